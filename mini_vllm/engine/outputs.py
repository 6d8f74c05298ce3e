"""What a request returns, in vLLM's shapes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Logprob:
    """Natural log of a token's probability, its rank (1 is the most likely) and its text."""

    logprob: float
    rank: int
    decoded_token: str | None


@dataclass
class CompletionOutput:
    """One sample of a request.

    text: the new text, without stop string; settled text while the request runs.
    logprobs: for each output token {token id: Logprob}, the sampled token first; None unless asked for.
    cumulative_logprob: the sum over the sampled tokens; None unless logprobs were asked for.
    finish_reason: "stop", "length" or "abort"; None while running.
    stop_reason: the stop string or stop token id that ended it, or why the engine aborted it; None for EOS.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass
class RequestMetrics:
    """Moments of a request, in seconds of `time.monotonic`; None until they happen."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None

    @property
    def queue_time(self) -> float | None:
        """Seconds in the queue before the first step."""
        return None if self.first_scheduled_time is None else self.first_scheduled_time - self.arrival_time

    @property
    def time_to_first_token(self) -> float | None:
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time


@dataclass
class BeamSearchSequence:
    """One continuation that beam search found.

    tokens: prompt and output, EOS included where it ended so; text: of the output, without special tokens.
    cum_logprob: the sum of the output tokens' log probabilities; score: that, corrected for length.
    finish_reason: "stop" for EOS, "length".
    """

    tokens: list[int]
    cum_logprob: float
    score: float
    finish_reason: str
    text: str = ""


@dataclass
class BeamSearchOutput:
    """The continuations of one prompt, best score first, at most beam_width."""

    sequences: list[BeamSearchSequence]


@dataclass(frozen=True)
class EngineStats:
    """The engine's state between two steps, and counters since it was made.

    num_running, num_waiting: sequences.
    num_cached_kv_blocks: blocks that the prefix cache remembers, in use or not; num_host_kv_blocks: more, in host
        memory.
    num_free_kv_blocks: neither in use nor remembered.
    prefix_cache_queries, prefix_cache_hits: tokens of admitted sequences, and those of them found computed.
    peak_kv_blocks: the most blocks in use or remembered at a time.
    """

    num_running: int
    num_waiting: int
    num_kv_blocks: int
    num_free_kv_blocks: int
    num_cached_kv_blocks: int
    num_host_kv_blocks: int
    prefix_cache_queries: int
    prefix_cache_hits: int
    num_preemptions: int
    peak_kv_blocks: int


@dataclass
class RequestOutput:
    """State of a request after a step, or its result.

    prompt_logprobs: for each prompt token {token id: Logprob}, None for the first; None unless asked for.
    num_cached_tokens: prompt tokens whose K/V came from the prefix cache.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0

    @property
    def text(self) -> str:
        """The first sample's text."""
        return self.outputs[0].text
