"""What a request asks of the sampler: `SamplingParams`, with vLLM's names, defaults and limits."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

MAX_LOGPROBS = 20
MAX_SEQUENCES_PER_REQUEST = 16384
MIN_TEMPERATURE = 1e-2  # below this a softmax in float32 is greedy decoding with overflow; vLLM clamps here too


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters of one request. Invalid values raise `ValueError` naming field, value and range.

    The rules apply to a row of logits in this order (the definition is `NumpyOps.sample`):
    allowed_token_ids, bad_words, min_tokens, logit_bias, repetition / frequency / presence penalty,
    temperature, min_p, top_k, top_p.

    n: sequences per prompt; sequence i behaves like a separate request with `seed + i`.
    temperature: 0 is greedy; positive values below 0.01 are raised to 0.01.
    top_k: keep the k most likely tokens; 0 or -1 is off.
    top_p: keep the most likely tokens whose probability mass reaches top_p (nucleus sampling).
    min_p: keep tokens at least min_p times as likely as the most likely one.
    repetition_penalty: divides positive and multiplies negative logits of tokens seen in prompt or output.
    presence_penalty, frequency_penalty: subtracted once, or per occurrence, for tokens seen in the output.
    logit_bias: {token id: value in [-100, 100]} added to the logits.
    seed: makes the request reproducible alone, in any batch and after preemption; None draws one.
    max_tokens: output tokens at most; None means up to the context length.
    min_tokens: EOS, stop tokens and stop strings cannot end the sequence before this many output tokens.
    stop: strings that end the sequence; left out of the text unless include_stop_str_in_output.
    stop_token_ids: further token ids that end the sequence like EOS does.
    ignore_eos: go on after EOS (stop_token_ids still hold).
    logprobs: return the log probabilities of this many top tokens and of the sampled one, taken from the
        model's own distribution, before any rule above (vLLM's raw_logprobs).
    prompt_logprobs: the same for each prompt token but the first.
    bad_words: strings whose last token is never sampled after their first ones.
    allowed_token_ids: only these may be sampled.
    skip_special_tokens: leave special tokens out of the text.
    detokenize: False returns token ids only and leaves `text` empty (stop strings are then refused).
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    bad_words: Sequence[str] = ()
    allowed_token_ids: Sequence[int] | None = None
    skip_special_tokens: bool = True
    detokenize: bool = True

    max_logprobs: ClassVar[int] = MAX_LOGPROBS

    def __post_init__(self) -> None:
        self._check_number("temperature", 0.0, 2.0)
        self._check_number("top_p", 0.0, 1.0, open_low=True)
        self._check_number("min_p", 0.0, 1.0)
        self._check_number("repetition_penalty", 0.0, math.inf, open_low=True)
        self._check_number("presence_penalty", -2.0, 2.0)
        self._check_number("frequency_penalty", -2.0, 2.0)
        self._check_int("n", 1, MAX_SEQUENCES_PER_REQUEST)
        self._check_int("top_k", -1)
        self._check_int("max_tokens", 1, optional=True)
        self._check_int("min_tokens", 0)
        self._check_int("logprobs", 0, self.max_logprobs, optional=True)
        self._check_int("prompt_logprobs", 0, self.max_logprobs, optional=True)
        self._check_int("seed", -1, 2**63 - 1, optional=True)
        for name in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens", "detokenize"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        self._freeze_lists()

        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} is larger than max_tokens={self.max_tokens}")
        if self.is_greedy and self.n > 1:
            raise ValueError(
                f"n={self.n} with temperature=0 would return {self.n} equal texts; use n=1 or temperature > 0"
            )
        if self.stop and not self.detokenize:
            raise ValueError("stop strings need the text: use detokenize=True or stop_token_ids")
        if 0 < self.temperature < MIN_TEMPERATURE:
            self._set("temperature", MIN_TEMPERATURE)
        if self.top_k == -1:
            self._set("top_k", 0)
        if self.seed == -1:
            self._set("seed", None)

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def has_penalties(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SamplingParams:
        """Build from a mapping; unknown names raise `ValueError` with the list of known ones."""
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"unknown sampling parameter {', '.join(unknown)}; known are {', '.join(known)}")
        return cls(**values)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_number(self, name: str, low: float, high: float, open_low: bool = False) -> None:
        value = getattr(self, name)
        bounds = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if math.isinf(high) else ']'}"
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not abs(value) <= sys.float_info.max:  # NaN too, and 10**400
            raise ValueError(f"{name} must be a finite number in {bounds}, got {value!r}")
        if value < low or value > high or (open_low and value == low):
            raise ValueError(f"{name} must be in {bounds}, got {value!r}")

    def _check_int(self, name: str, low: int, high: int | None = None, optional: bool = False) -> None:
        value = getattr(self, name)
        if value is None and optional:
            return
        allowed = f"an integer >= {low}" if high is None else f"an integer in [{low}, {high}]"
        if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
            raise ValueError(f"{name} must be {allowed}{' or None' if optional else ''}, got {value!r}")

    def _freeze_lists(self) -> None:
        """Check the list-like fields and store copies, so that a shared object cannot change under a request."""
        self._set("stop", _strings("stop", self.stop))
        self._set("bad_words", _strings("bad_words", self.bad_words))
        self._set("stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids))
        if self.allowed_token_ids is not None:
            allowed = _token_ids("allowed_token_ids", self.allowed_token_ids)
            if not allowed:
                raise ValueError("allowed_token_ids is empty: no token could be sampled; use None to allow all")
            self._set("allowed_token_ids", allowed)
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, Mapping):
                raise ValueError(f"logit_bias must map token ids to numbers, got {self.logit_bias!r}")
            _token_ids("logit_bias", list(self.logit_bias))
            for token_id, bias in self.logit_bias.items():
                if isinstance(bias, bool) or not isinstance(bias, (int, float)) or not -100 <= bias <= 100:
                    raise ValueError(f"logit_bias[{token_id}] must be a number in [-100, 100], got {bias!r}")
            self._set("logit_bias", dict(self.logit_bias))


@dataclass(frozen=True)
class BeamSearchParams:
    """What `LLM.beam_search` looks for, with vLLM's names. Invalid values raise `ValueError`.

    beam_width: continuations followed at a time, and returned.
    max_tokens: new tokens at most.
    ignore_eos: go on to max_tokens always.
    length_penalty: scores are log probabilities divided by the number of new tokens to this power; above 0 favours
        long continuations.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name in ("beam_width", "max_tokens"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        if not isinstance(self.ignore_eos, bool):
            raise ValueError(f"ignore_eos must be True or False, got {self.ignore_eos!r}")
        penalty = self.length_penalty
        if isinstance(penalty, bool) or not isinstance(penalty, (int, float)) or not math.isfinite(penalty):
            raise ValueError(f"length_penalty must be a finite number, got {penalty!r}")


def _strings(name: str, value: str | Sequence[str] | None) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        value = (value,)
    if not isinstance(value, (list, tuple)) or not all(isinstance(s, str) for s in value):
        raise ValueError(f"{name} must be a string or a list of strings, got {value!r}")
    if "" in value:
        raise ValueError(f"{name} holds an empty string, which every text contains; remove it")
    return tuple(value)


def _token_ids(name: str, value: Sequence[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{name} must be a list of token ids, got {value!r}")
    for token_id in value:
        if isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0:
            raise ValueError(f"{name} must hold token ids >= 0, got {token_id!r}")
    return tuple(value)
