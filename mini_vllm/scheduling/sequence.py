"""One sequence of tokens on its way through the engine. Plain integers: no text, no arrays."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from typing import TYPE_CHECKING

from mini_vllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from mini_vllm.scheduling.radix_tree import Node

PENDING = -1
"""Stands in `token_ids` for a token that a step in flight is drawing."""


class SequenceStatus(Enum):
    WAITING = "waiting"  # in the queue, owns no blocks
    RUNNING = "running"  # owns blocks for all its tokens, and a seat
    PREEMPTED = "preempted"  # back in the queue; its tokens are kept, its K/V is found in the cache or computed again
    FINISHED = "finished"


class FinishReason(str, Enum):
    STOP = "stop"  # EOS, a stop token or a stop string
    LENGTH = "length"  # max_tokens or the context length
    ABORT = "abort"  # the caller took the request back, or the engine failed


class Sequence:
    """The tokens of one sample, what is computed of them, and where their K/V lives.

    seq_id: unique and increasing in order of arrival.
    token_ids: prompt, then output; the last num_pending_tokens are `PENDING`: planned, not yet known.
    bad_words_token_ids: SamplingParams.bad_words as token ids.
    seed: key of the sequence's random numbers.
    stop_token_ids: ids that end the sequence once min_tokens are out (EOS included unless ignored).
    max_num_tokens: prompt and output together, the smaller of max_tokens' and the context's limit.
    priority: for policy "priority"; lower runs earlier.
    cache_salt: prefixes are shared only between sequences of the same salt.
    fork_of: a sequence with the same tokens but the last (or the same tokens), whose K/V this one may take over
        when it is admitted.
    num_computed_tokens: leading tokens whose K/V is in the cache, or will be after the steps planned so far.
    num_cached_tokens: tokens that were found computed at the first admission.
    block_table: physical block of each logical block of `block_size` tokens.
    seat: index below max_num_seqs, unique among running sequences, for state kept by sequence elsewhere.
    cache_node: where the sequence's path in the prefix cache ends.
    sort_key: the scheduling policy's order.
    stop_reason: the stop token id that ended it, if it was not the model's EOS; set by the engine to the
        stop string where one did, or to why it was aborted.
    """

    __slots__ = (
        "bad_words_token_ids",
        "block_table",
        "cache_node",
        "cache_salt",
        "eos_token_ids",
        "finish_reason",
        "fork_of",
        "max_num_tokens",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_pending_tokens",
        "num_preemptions",
        "num_prompt_tokens",
        "priority",
        "sampling_params",
        "seat",
        "seed",
        "seq_id",
        "sort_key",
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
        priority: int = 0,
        cache_salt: str | None = None,
        fork_of: Sequence | None = None,
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
        self.priority = priority
        self.cache_salt = cache_salt
        self.fork_of = fork_of
        self.block_table: list[int] = []
        self.seat: int | None = None
        self.cache_node: Node | None = None
        self.num_computed_tokens = 0
        self.num_pending_tokens = 0
        self.num_cached_tokens = 0
        self.num_preemptions = 0
        self.sort_key: tuple[float, int] = (0, seq_id)
        self.status = SequenceStatus.WAITING
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        assert 0 < self.num_prompt_tokens < max_num_tokens, "the engine refuses such prompts at the door"

    @property
    def num_tokens(self) -> int:
        """Pending ones included."""
        return len(self.token_ids)

    @property
    def num_known_tokens(self) -> int:
        return len(self.token_ids) - self.num_pending_tokens

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_pending_tokens - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens : self.num_known_tokens]

    @property
    def last_token_id(self) -> int:
        """The newest token that is known."""
        return self.token_ids[self.num_known_tokens - 1]

    @property
    def num_uncomputed_tokens(self) -> int:
        """1 while decoding; more when a prompt, or a preempted sequence, is (re)computed."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def is_finished(self) -> bool:
        return self.status is SequenceStatus.FINISHED

    def set_token(self, position: int, token_id: int) -> FinishReason | None:
        """Fill in a pending token and say whether it ends the sequence; what was planned after it is then dropped."""
        assert self.token_ids[position] == PENDING, f"the token at {position} of {self!r} is known already"
        self.token_ids[position] = token_id
        self.num_pending_tokens -= 1
        num_output_tokens = position + 1 - self.num_prompt_tokens
        if token_id in self.stop_token_ids and num_output_tokens > self.sampling_params.min_tokens:
            if token_id not in self.eos_token_ids:
                self.stop_reason = token_id
            return FinishReason.STOP
        if position + 1 >= self.max_num_tokens:
            return FinishReason.LENGTH
        return None

    def drop_pending_tokens(self) -> None:
        """Forget tokens that are planned but not known."""
        if self.num_pending_tokens:
            del self.token_ids[-self.num_pending_tokens :]
            self.num_pending_tokens = 0

    def __repr__(self) -> str:
        return (
            f"Sequence(id={self.seq_id}, {self.status.value}, prompt={self.num_prompt_tokens}, "
            f"output={self.num_output_tokens}, computed={self.num_computed_tokens}, blocks={len(self.block_table)})"
        )
