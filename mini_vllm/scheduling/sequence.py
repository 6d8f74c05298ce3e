"""One sequence of tokens on its way through the engine. Plain integers: no text, no arrays."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum

from mini_vllm.sampling_params import SamplingParams


class SequenceStatus(Enum):
    WAITING = "waiting"  # in the queue, owns no blocks
    RUNNING = "running"  # owns blocks for all its tokens
    PREEMPTED = "preempted"  # back in the queue; its tokens are kept, its K/V is computed again
    FINISHED = "finished"


class FinishReason(str, Enum):
    STOP = "stop"  # EOS, a stop token or a stop string
    LENGTH = "length"  # max_tokens or the context length
    ABORT = "abort"  # the caller took the request back, or the engine failed


class Sequence:
    """The tokens of one sample, what is computed of them, and where their K/V lives.

    seq_id: unique and increasing in order of arrival.
    token_ids: prompt, then output.
    bad_words_token_ids: SamplingParams.bad_words as token ids.
    seed: key of the sequence's random numbers.
    stop_token_ids: ids that end the sequence once min_tokens are out (EOS included unless ignored).
    max_num_tokens: prompt and output together, the smaller of max_tokens' and the context's limit.
    num_computed_tokens: leading tokens whose K/V is in the cache.
    block_table: physical block of each logical block of `block_size` tokens.
    stop_reason: the stop token id that ended it, if it was not the model's EOS; set by the engine to the
        stop string where one did.
    """

    __slots__ = (
        "bad_words_token_ids",
        "block_table",
        "eos_token_ids",
        "finish_reason",
        "max_num_tokens",
        "num_computed_tokens",
        "num_preemptions",
        "num_prompt_tokens",
        "sampling_params",
        "seed",
        "seq_id",
        "status",
        "stop_reason",
        "stop_token_ids",
        "token_ids",
    )

    def __init__(
        self,
        seq_id: int,
        prompt_token_ids: Iterable[int],
        sampling_params: SamplingParams,
        *,
        max_num_tokens: int,
        eos_token_ids: Iterable[int] = (),
        bad_words_token_ids: Iterable[tuple[int, ...]] = (),
        seed: int = 0,
    ) -> None:
        self.seq_id = seq_id
        self.token_ids = list(prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.sampling_params = sampling_params
        self.max_num_tokens = max_num_tokens
        self.eos_token_ids = frozenset(() if sampling_params.ignore_eos else eos_token_ids)
        self.stop_token_ids = self.eos_token_ids.union(sampling_params.stop_token_ids)
        self.bad_words_token_ids = tuple(bad_words_token_ids)
        self.seed = seed
        self.block_table: list[int] = []
        self.num_computed_tokens = 0
        self.num_preemptions = 0
        self.status = SequenceStatus.WAITING
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        assert 0 < self.num_prompt_tokens < max_num_tokens, "the engine refuses such prompts at the door"

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_uncomputed_tokens(self) -> int:
        """1 while decoding; more when a prompt, or a preempted sequence, is (re)computed."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def is_finished(self) -> bool:
        return self.status is SequenceStatus.FINISHED

    def append_token(self, token_id: int) -> FinishReason | None:
        """Add a sampled token and say whether it ends the sequence."""
        self.token_ids.append(token_id)
        if token_id in self.stop_token_ids and self.num_output_tokens > self.sampling_params.min_tokens:
            if token_id not in self.eos_token_ids:
                self.stop_reason = token_id
            return FinishReason.STOP
        if self.num_tokens >= self.max_num_tokens:
            return FinishReason.LENGTH
        return None

    def __repr__(self) -> str:
        return (
            f"Sequence(id={self.seq_id}, {self.status.value}, prompt={self.num_prompt_tokens}, "
            f"output={self.num_output_tokens}, computed={self.num_computed_tokens}, blocks={len(self.block_table)})"
        )
