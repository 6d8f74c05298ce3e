"""What a benchmark asks of the engine: prompts as token ids, and how many tokens each is answered with.

All drawn with Python's `random` from a seed, so that a workload is the same on every machine.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Protocol

from mini_vllm.bench.files import read_json
from mini_vllm.sampling_params import SamplingParams

MAX_TOKEN_ID = 10_000  # as vLLM's and nano-vllm's benchmarks: ids that every usual vocabulary has
NANO_PROMPTS, NANO_MIN_LEN, NANO_MAX_LEN = 256, 100, 1024

# What vLLM takes from ShareGPT: no turn of a word or two, no prompt or conversation that dominates the rest.
SHAREGPT_MIN_LEN, SHAREGPT_MAX_PROMPT_LEN, SHAREGPT_MAX_LEN = 4, 1024, 2048


class Encoder(Protocol):
    def encode(self, text: str) -> list[int]: ...


@dataclass(frozen=True)
class Workload:
    """Requests, in the order in which they arrive.

    prompts: token ids.
    output_lens: tokens that each is answered with.
    description: how it came about, for the report.
    """

    prompts: list[list[int]]
    output_lens: list[int]
    description: dict[str, Any]

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def num_prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def num_output_tokens(self) -> int:
        return sum(self.output_lens)

    @property
    def max_len(self) -> int:
        """Tokens of the longest request, prompt and output."""
        return max(len(prompt) + n for prompt, n in zip(self.prompts, self.output_lens, strict=True))

    def sampling_params(self, temperature: float, detokenize: bool = True) -> list[SamplingParams]:
        """One for each request; the end-of-text token does not end it."""
        return [
            SamplingParams(temperature=temperature, max_tokens=n, ignore_eos=True, detokenize=detokenize)
            for n in self.output_lens
        ]

    def check_fits(self, max_model_len: int) -> None:
        """Raise `ValueError` if a request is longer than the engine allows: it would be cut, and the figures wrong."""
        if self.max_len > max_model_len:
            raise ValueError(
                f"the longest request of this workload has {self.max_len} tokens, prompt and output, but "
                f"max_model_len={max_model_len}; lower --input-len or --output-len, or raise --max-model-len"
            )

    def summary(self) -> dict[str, Any]:
        """`description` and the totals, for the report."""
        totals = {"num_prompt_tokens": self.num_prompt_tokens, "num_output_tokens": self.num_output_tokens}
        return {**self.description, "num_prompts": len(self), **totals}


def random_workload(
    num_prompts: int,
    input_len: int,
    output_len: int,
    vocab_size: int,
    *,
    seed: int = 0,
    range_ratio: float = 0.0,
    prefix_len: int = 0,
) -> Workload:
    """Random token ids.

    range_ratio: lengths are uniform in [(1 - range_ratio) * len, (1 + range_ratio) * len].
    prefix_len: the same random tokens before every prompt, on top of its input_len.
    """
    if not 0 <= range_ratio < 1:
        raise ValueError(f"--random-range-ratio must be in [0, 1), got {range_ratio}")
    rng = random.Random(seed)

    def length(mean: int) -> int:
        low, high = math.floor(mean * (1 - range_ratio)), math.ceil(mean * (1 + range_ratio))
        return rng.randint(max(1, low), high)

    prefix = _token_ids(rng, prefix_len, vocab_size)
    lengths = [(length(input_len), length(output_len)) for _ in range(num_prompts)]
    return Workload(
        prompts=[prefix + _token_ids(rng, n, vocab_size) for n, _ in lengths],
        output_lens=[n for _, n in lengths],
        description={
            "dataset": "random",
            "input_len": input_len,
            "output_len": output_len,
            "range_ratio": range_ratio,
            "prefix_len": prefix_len,
            "seed": seed,
        },
    )


def prefix_repetition_workload(
    num_prompts: int,
    vocab_size: int,
    *,
    prefix_len: int = 256,
    suffix_len: int = 256,
    num_prefixes: int = 10,
    output_len: int = 128,
    seed: int = 0,
) -> Workload:
    """Random prompts of which groups share a prefix, in random order: what a prefix cache is for.

    num_prompts is rounded down to a multiple of num_prefixes, as in vLLM.
    """
    if num_prompts < num_prefixes:
        raise ValueError(
            f"--num-prompts {num_prompts} must be at least --prefix-repetition-num-prefixes {num_prefixes}"
        )
    rng = random.Random(seed)
    prompts = []
    for _ in range(num_prefixes):
        prefix = _token_ids(rng, prefix_len, vocab_size)
        prompts += [prefix + _token_ids(rng, suffix_len, vocab_size) for _ in range(num_prompts // num_prefixes)]
    rng.shuffle(prompts)
    return Workload(
        prompts,
        [output_len] * len(prompts),
        {
            "dataset": "prefix-repetition",
            "prefix_len": prefix_len,
            "suffix_len": suffix_len,
            "num_prefixes": num_prefixes,
            "output_len": output_len,
            "seed": seed,
        },
    )


def _token_ids(rng: random.Random, count: int, vocab_size: int) -> list[int]:
    return [rng.randrange(min(vocab_size, MAX_TOKEN_ID)) for _ in range(count)]


def nano_workload(
    vocab_size: int,
    *,
    num_prompts: int = NANO_PROMPTS,
    max_input_len: int = NANO_MAX_LEN,
    max_output_len: int = NANO_MAX_LEN,
) -> Workload:
    """The workload of nano-vllm's bench.py, draw by draw; `description["exact"]` is False where it was made smaller."""
    rng = random.Random(0)
    max_id = min(MAX_TOKEN_ID, vocab_size - 1)

    def length(longest: int) -> int:
        return rng.randint(min(NANO_MIN_LEN, longest), longest)

    prompts = [[rng.randint(0, max_id) for _ in range(length(max_input_len))] for _ in range(num_prompts)]
    output_lens = [length(max_output_len) for _ in range(num_prompts)]
    shape = (num_prompts, max_input_len, max_output_len, max_id)
    exact = shape == (NANO_PROMPTS, NANO_MAX_LEN, NANO_MAX_LEN, MAX_TOKEN_ID)
    names = ("num_prompts", "max_input_len", "max_output_len", "max_token_id")
    return Workload(prompts, output_lens, {"dataset": "nano", "exact": exact, **dict(zip(names, shape, strict=True))})


def read_sharegpt(path: Path) -> list[tuple[str, str]]:
    """(prompt, answer) of each conversation that has both, from a JSON file in ShareGPT's form.

    Raises `ValueError` with the place for a file of another form, and for one without any conversation.
    """
    entries = read_json(path)
    form = '[{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}, ...]'
    if not isinstance(entries, list):
        raise ValueError(f"{path} must hold {form}, got {type(entries).__name__} at the top")
    pairs = []
    for i, entry in enumerate(entries):
        turns = entry.get("conversations") if isinstance(entry, dict) else None
        is_turns = isinstance(turns, list) and all(
            isinstance(turn, dict) and isinstance(turn.get("value"), str) for turn in turns
        )
        if not is_turns:
            raise ValueError(f"{path}: entry {i} is not a conversation; the file must hold {form}")
        if len(turns) >= 2:
            pairs.append((turns[0]["value"], turns[1]["value"]))
    if not pairs:
        raise ValueError(f"{path} holds no conversation of two turns")
    return pairs


def sharegpt_workload(
    pairs: list[tuple[str, str]],
    encoder: Encoder | None,
    num_prompts: int,
    max_len: int,
    *,
    output_len: int | None = None,
    seed: int = 0,
) -> Workload:
    """Conversations in random order, those that vLLM takes and that fit into max_len tokens; answers as long as theirs.

    output_len: answers of this length instead. A file with too few is gone through again.
    """
    if encoder is None:
        raise ValueError("--dataset-name sharegpt is text, and this model has no tokenizer.json")
    pairs = random.Random(seed).sample(pairs, len(pairs))
    max_len = min(max_len, SHAREGPT_MAX_LEN)

    def usable() -> Iterator[tuple[list[int], int]]:
        for prompt, answer in pairs:
            token_ids = encoder.encode(prompt)
            n = output_len or len(encoder.encode(answer))
            long_enough = len(token_ids) >= SHAREGPT_MIN_LEN and (output_len or n >= SHAREGPT_MIN_LEN)
            if long_enough and len(token_ids) <= SHAREGPT_MAX_PROMPT_LEN and len(token_ids) + n <= max_len:
                yield token_ids, n

    found = list(islice(usable(), num_prompts))
    if not found:
        raise ValueError(
            f"none of the {len(pairs)} conversations has a prompt of {SHAREGPT_MIN_LEN} to {SHAREGPT_MAX_PROMPT_LEN} "
            f"tokens and at most {max_len} tokens together with its answer; take another file or model"
        )
    requests = list(islice(cycle(found), num_prompts))
    return Workload(
        [token_ids for token_ids, _ in requests],
        [n for _, n in requests],
        {"dataset": "sharegpt", "num_conversations": len(found), "output_len": output_len, "seed": seed},
    )


def poisson_arrivals(num_requests: int, rate: float, seed: int = 0) -> list[float]:
    """Seconds from the start at which requests arrive: a Poisson process of `rate` a second; inf is all at once."""
    if math.isinf(rate):
        return [0.0] * num_requests
    rng = random.Random(seed)
    arrivals, now = [], 0.0
    for _ in range(num_requests):
        arrivals.append(now)
        now += rng.expovariate(rate)
    return arrivals
