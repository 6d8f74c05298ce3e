"""`LLMEngine`: requests in, tokens and text out, a step at a time. The only place that sees both wings."""

from __future__ import annotations

import itertools
import logging
import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mini_vllm.config import EngineConfig, ModelConfig, read_json, token_id_list
from mini_vllm.demo import DEMO_DIR
from mini_vllm.detokenizer import IncrementalDetokenizer
from mini_vllm.engine.beam_search import BeamSearch
from mini_vllm.engine.model_runner import ModelRunner, StepResult
from mini_vllm.engine.outputs import (
    BeamSearchOutput,
    CompletionOutput,
    EngineStats,
    Logprob,
    RequestMetrics,
    RequestOutput,
)
from mini_vllm.engine.prompts import Prompt, parse_prompt, parse_prompts
from mini_vllm.models.hub import resolve_model
from mini_vllm.ops.base import TokenLogprobs
from mini_vllm.sampling_params import BeamSearchParams, SamplingParams
from mini_vllm.scheduling.block_manager import BlockManager
from mini_vllm.scheduling.policy import POLICIES
from mini_vllm.scheduling.radix_tree import EVICTION_POLICIES, RadixTree
from mini_vllm.scheduling.scheduler import Scheduler, SchedulerOutput
from mini_vllm.scheduling.sequence import FinishReason
from mini_vllm.scheduling.sequence import Sequence as TokenSequence
from mini_vllm.tokenizer import Tokenizer
from mini_vllm.tracing import NULL_TRACER, NullTracer

logger = logging.getLogger(__name__)

MEASURED_TOKENS = 256
"""A step of at least so many tokens tells what computing one takes."""

# generation_config.json's names for the parameters that become defaults, as in vLLM.
_GENERATION_DEFAULTS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


class _Sample:
    """One sequence of a request, with its text and log probabilities."""

    def __init__(self, seq: TokenSequence, detokenizer: IncrementalDetokenizer | None) -> None:
        self.seq = seq
        self.detokenizer = detokenizer
        self.logprobs: list[dict[int, Logprob]] | None = None
        if seq.sampling_params.logprobs is not None:
            self.logprobs = []

    def output(self, index: int) -> CompletionOutput:
        seq = self.seq
        total = None
        if self.logprobs is not None:
            total = sum(entry[token].logprob for entry, token in zip(self.logprobs, seq.output_token_ids, strict=True))
        return CompletionOutput(
            index=index,
            text=self.detokenizer.text if self.detokenizer else "",
            token_ids=seq.output_token_ids,
            cumulative_logprob=total,
            logprobs=None if self.logprobs is None else list(self.logprobs),
            finish_reason=seq.finish_reason.value if seq.finish_reason else None,
            stop_reason=seq.stop_reason,
        )


class _Request:
    """A prompt and its n samples."""

    def __init__(
        self, request_id: str, prompt: str | None, prompt_token_ids: list[int], samples: list[_Sample]
    ) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.prompt_token_ids = prompt_token_ids
        self.samples = samples
        self.metrics = RequestMetrics(arrival_time=time.monotonic())
        self.prompt_logprobs: list[dict[int, Logprob] | None] | None = None
        if samples[0].seq.sampling_params.prompt_logprobs is not None:
            self.prompt_logprobs = [None]  # nothing predicts the first token

    @property
    def is_finished(self) -> bool:
        return all(sample.seq.is_finished for sample in self.samples)

    @property
    def needs_history(self) -> bool:
        """Whether the rules for a token depend on the token before it."""
        seq = self.samples[0].seq
        return seq.sampling_params.has_penalties or bool(seq.bad_words_token_ids)

    @property
    def num_output_tokens(self) -> int:
        return sum(sample.seq.num_output_tokens for sample in self.samples)

    def output(self) -> RequestOutput:
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=[sample.output(i) for i, sample in enumerate(self.samples)],
            finished=self.is_finished,
            metrics=replace(self.metrics),
            prompt_logprobs=None if self.prompt_logprobs is None else list(self.prompt_logprobs),
            num_cached_tokens=self.samples[0].seq.num_cached_tokens,
        )


@dataclass(frozen=True)
class _Step:
    """A step on its way through the device."""

    plan: SchedulerOutput
    wait: Callable[[], StepResult]
    launched: float  # time.monotonic


class LLMEngine:
    """Continuous batching over one model.

    Arguments are those of `EngineConfig`; `ValueError` names unknown and invalid ones. Requests join and
    leave between steps:

        engine.add_request("id", "Once upon a time", SamplingParams(max_tokens=64))
        while engine.has_unfinished_requests():
            for output in engine.step():
                ...

    A refused request raises `ValueError` and leaves the engine as it was. If a step fails, all running
    requests end with finish_reason "abort" before the exception goes on, and the engine can be used again.

    On a GPU a step runs while the next one is planned (`EngineConfig.overlap`): `step` then launches a step, and
    returns what the one before it has brought.

    A process that exists for its engine should call `gc.freeze()` once the engine is made. `step` returns so many
    objects that Python now and then searches all there are for cycles, among them every imported module: 30 to 50 ms,
    in which no step is launched.
    """

    def __init__(self, model: str | Path | None = None, **kwargs: Any) -> None:
        self._init(EngineConfig.from_kwargs(model=None if model is None else str(model), **kwargs))

    @classmethod
    def from_config(cls, config: EngineConfig) -> LLMEngine:
        engine = cls.__new__(cls)
        engine._init(config)
        return engine

    def _init(self, config: EngineConfig) -> None:
        self.config = config
        if config.model is None:
            logger.info("No model named: using the bundled demo model, a toy storyteller.")
            model_dir = DEMO_DIR
        else:
            model_dir = resolve_model(config.model, config.revision)
        self.model_config = ModelConfig.from_hf(read_json(model_dir / "config.json"))
        self.generation_config: dict[str, Any] = {}
        if (model_dir / "generation_config.json").exists():
            self.generation_config = read_json(model_dir / "generation_config.json")
        self.tokenizer: Tokenizer | None = None
        # Dummy weights need no more than a config.json; with a tokenizer beside it they speak gibberish.
        tokenizer_missing = config.load_format == "dummy" and not (model_dir / "tokenizer.json").exists()
        if not config.skip_tokenizer_init and not tokenizer_missing:
            self.tokenizer = Tokenizer.from_dir(model_dir)
        self.eos_token_ids = self._find_eos_token_ids()
        self._default_sampling_params = self._read_default_sampling_params()

        self.runner = ModelRunner(config, self.model_config, model_dir)
        self.max_model_len = self.runner.max_model_len
        self.scheduler = self._make_scheduler()
        self._in_flight: _Step | None = None
        self._booked = 0.0  # when the last step was done; time.monotonic
        self._refused: list[_Request] = []  # ended without having run; the next step returns them
        self._queue: deque[_Request] = deque()  # not started, in order of arrival; only kept under max_queue_time
        self._num_histories = 0  # unfinished requests of which the rules depend on the newest token
        self._tracer: NullTracer = NULL_TRACER
        self._requests: dict[str, _Request] = {}
        self._request_of: dict[int, tuple[_Request, _Sample]] = {}  # by seq_id
        self._seq_ids = itertools.count()
        self._generate_ids = itertools.count()
        self._seeds = random.Random(config.seed)

    def _make_scheduler(self) -> Scheduler:
        config, kv, host_kv = self.config, self.runner.kv, self.runner.host_kv
        blocks, cache = BlockManager(kv.num_blocks, config.block_size), None
        if config.enable_prefix_caching:
            host = None if host_kv is None else BlockManager(host_kv.num_blocks, config.block_size)
            cache = RadixTree(blocks, host, EVICTION_POLICIES[config.prefix_cache_policy]())
        scheduler = Scheduler(
            blocks,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            cache=cache,
            policy=POLICIES[config.policy],
        )
        if host_kv is not None:
            scheduler.seconds_to_load_block = self.runner.seconds_to_load_block()
        return scheduler

    @property
    def tracer(self) -> NullTracer:
        """Records where the time of steps goes; assign a `Tracer` to switch it on."""
        return self._tracer

    @tracer.setter
    def tracer(self, tracer: NullTracer) -> None:
        self._tracer = self.runner.tracer = tracer

    def _find_eos_token_ids(self) -> frozenset[int]:
        ids = set(self.model_config.eos_token_ids)
        ids.update(token_id_list(self.generation_config.get("eos_token_id"), "generation_config.json: eos_token_id"))
        if self.tokenizer is not None and self.tokenizer.eos_token_id is not None:
            ids.add(self.tokenizer.eos_token_id)
        return frozenset(ids)

    def _read_default_sampling_params(self) -> SamplingParams:
        if self.config.generation_config == "none":
            return SamplingParams()
        found = {
            ours: value
            for theirs, ours in _GENERATION_DEFAULTS.items()
            if (value := self.generation_config.get(theirs)) is not None
        }
        if found:
            shown = ", ".join(f"{name}={value}" for name, value in found.items())
            logger.info("Default sampling parameters from generation_config.json: %s.", shown)
        try:
            return SamplingParams(**found)
        except ValueError as error:
            raise ValueError(f'generation_config.json: {error}; generation_config="none" ignores the file') from None

    def get_default_sampling_params(self) -> SamplingParams:
        """What a request without SamplingParams gets: the checkpoint's generation_config.json, as in vLLM."""
        return self._default_sampling_params

    # ---- requests -----------------------------------------------------------------------------------------

    def add_request(
        self, request_id: str, prompt: Any, params: SamplingParams | None = None, *, priority: int = 0
    ) -> None:
        """Queue a request. `prompt`: str, list of token ids, {"prompt": ...} or {"prompt_token_ids": ...}.

        A mapping may also hold "cache_salt", a string: cached prefixes are shared only under the same one.
        priority: lower goes first, under policy="priority". With a full queue (`max_num_queued_requests`) the request
        ends at once with finish_reason "abort", which the next `step` reports.

        Raises `ValueError` for an id in use, a prompt that cannot be run, or parameters out of range.
        """
        if isinstance(priority, bool) or not isinstance(priority, int):
            raise ValueError(f"priority must be an integer, got {priority!r}")
        request = self._make_request(request_id, parse_prompt(prompt), params, priority)
        limit = self.config.max_num_queued_requests
        is_full = limit is not None and self._num_queued_requests() >= limit
        self._submit(request)
        if is_full:
            self._refuse(request, f"{limit} requests are waiting already (max_num_queued_requests)")

    def abort_request(self, request_id: str) -> RequestOutput | None:
        """End a request in any state; its blocks are free at once. Returns its last output, None if unknown."""
        request = self._requests.get(request_id)
        if request is None:
            return None
        for sample in request.samples:
            if not sample.seq.is_finished:
                self._finish(sample, FinishReason.ABORT)
        self._retire(request)
        return request.output()

    def has_unfinished_requests(self) -> bool:
        return bool(self._requests or self._refused)

    def num_unfinished_requests(self) -> int:
        return len(self._requests)

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes; running requests go on."""
        self.scheduler.reset_prefix_cache()

    def stats(self) -> EngineStats:
        """What the engine holds now, and its counters."""
        scheduler, blocks = self.scheduler, self.scheduler.block_manager
        cache = None if scheduler.cache is None else scheduler.cache.stats()
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=scheduler.num_waiting,
            num_kv_blocks=blocks.num_blocks,
            num_free_kv_blocks=blocks.num_free_blocks,
            num_cached_kv_blocks=cache.num_cached_blocks if cache else 0,
            num_host_kv_blocks=cache.num_host_blocks if cache else 0,
            prefix_cache_queries=cache.queried_tokens if cache else 0,
            prefix_cache_hits=cache.hit_tokens if cache else 0,
            num_preemptions=scheduler.num_preemptions,
            peak_kv_blocks=blocks.peak_used_blocks,
        )

    def _make_request(
        self, request_id: str, prompt: Prompt, params: SamplingParams | None, priority: int = 0
    ) -> _Request:
        if not isinstance(request_id, str):
            raise ValueError(f"request_id must be a string, got {request_id!r}")
        if request_id in self._requests:
            raise ValueError(f"request_id {request_id!r} is in use by an unfinished request")
        if params is None:
            params = self._default_sampling_params
        elif not isinstance(params, SamplingParams):
            raise ValueError(f"sampling parameters must be a SamplingParams, got {type(params).__name__}")
        token_ids = self._encode_checked(prompt)
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            self._check_token_ids(name, list(getattr(params, name) or ()))
        if self.tokenizer is None and (params.stop or params.bad_words):
            raise ValueError("stop and bad_words are strings and need a tokenizer; this engine has none")
        max_num_tokens = min(len(token_ids) + (params.max_tokens or self.max_model_len), self.max_model_len)
        seed = self._seeds.getrandbits(63) if params.seed is None else params.seed
        bad_words = self._encode_bad_words(params.bad_words)
        samples = []
        for i in range(params.n):
            seq = TokenSequence(
                next(self._seq_ids),
                token_ids,
                params if i == 0 else replace(params, prompt_logprobs=None),  # one sample scores the prompt
                max_num_tokens=max_num_tokens,
                eos_token_ids=self.eos_token_ids,
                bad_words_token_ids=bad_words,
                seed=(seed + i) % 2**64,
                priority=priority,
                cache_salt=prompt.cache_salt,
                fork_of=samples[0].seq if i else None,
            )
            samples.append(_Sample(seq, self._make_detokenizer(token_ids, params)))
        return _Request(request_id, prompt.text, token_ids, samples)

    def _encode_checked(self, prompt: Prompt) -> list[int]:
        """A prompt's token ids, or a ValueError that says why it cannot be run."""
        token_ids = self._encode(prompt)
        self._check_token_ids("prompt", token_ids)
        if not token_ids:
            raise ValueError("the prompt is empty; give at least one token")
        if len(token_ids) >= self.max_model_len:
            raise ValueError(
                f"the prompt has {len(token_ids)} tokens, but max_model_len={self.max_model_len} leaves room for at "
                f"most {self.max_model_len - 1} and one output token; shorten it or raise max_model_len"
            )
        return token_ids

    def _encode(self, prompt: Prompt) -> list[int]:
        if prompt.token_ids is not None:
            return prompt.token_ids
        if self.tokenizer is None:
            raise ValueError("a text prompt needs a tokenizer and this engine has none; give prompt_token_ids")
        return self.tokenizer.encode(prompt.text)

    def _encode_bad_words(self, words: Sequence[str]) -> set[tuple[int, ...]]:
        """Each word as it is spelled at the start of a text and after a space."""
        spellings = (spelling for word in words for spelling in (word.lstrip(), " " + word.lstrip()))
        return {tuple(self.tokenizer.encode(s, add_special_tokens=False)) for s in spellings if s.strip()}

    def _check_token_ids(self, name: str, token_ids: Sequence[int]) -> None:
        vocab_size = self.model_config.vocab_size
        if token_ids and not 0 <= min(token_ids) <= max(token_ids) < vocab_size:
            wrong = next(token_id for token_id in token_ids if not 0 <= token_id < vocab_size)
            raise ValueError(f"{name}: token id {wrong} is not in the vocabulary, 0 to {vocab_size - 1}")

    def _make_detokenizer(self, token_ids: list[int], params: SamplingParams) -> IncrementalDetokenizer | None:
        if self.tokenizer is None or not params.detokenize:
            return None
        return IncrementalDetokenizer(
            self.tokenizer,
            token_ids,
            skip_special_tokens=params.skip_special_tokens,
            stop=params.stop,
            include_stop_str_in_output=params.include_stop_str_in_output,
            min_tokens=params.min_tokens,
        )

    def _submit(self, request: _Request) -> None:
        self._requests[request.request_id] = request
        for sample in request.samples:
            self._request_of[sample.seq.seq_id] = (request, sample)
            self.scheduler.add(sample.seq)
        if self.config.max_queue_time is not None:
            self._queue.append(request)
        self._num_histories += request.needs_history

    def _num_queued_requests(self) -> int:
        return sum(request.metrics.first_scheduled_time is None for request in self._requests.values())

    def _refuse(self, request: _Request, reason: str) -> None:
        """End a request that has not started."""
        for sample in request.samples:
            self._finish(sample, FinishReason.ABORT, reason)
        self._retire(request)
        self._refused.append(request)

    def _end_overdue_requests(self) -> None:
        """Abort requests that have waited longer than max_queue_time for their first step."""
        limit = self.config.max_queue_time
        while self._queue:
            request = self._queue[0]
            if request.metrics.first_scheduled_time is None and not request.is_finished:
                if time.monotonic() - request.metrics.arrival_time <= limit:
                    return
                self._refuse(request, f"it waited more than {limit:g} s for its first step (max_queue_time)")
            self._queue.popleft()

    # ---- steps --------------------------------------------------------------------------------------------

    def step(self) -> list[RequestOutput]:
        """Run one step and return the requests that got a token; finished ones are then forgotten."""
        return [request.output() for request in self._step()]

    def _step(self) -> list[_Request]:
        if self._queue:
            self._end_overdue_requests()
        refused, self._refused = self._refused, []
        try:
            step, self._in_flight = self._in_flight or self._launch(), None
            if step is None:
                return refused
            if self.runner.runs_ahead and self.config.overlap and not self._num_histories:
                self._in_flight = self._launch()
            return refused + self._book(step, step.wait())
        except BaseException:
            self._in_flight, self._refused = None, refused
            for request_id in list(self._requests):
                self.abort_request(request_id)
            self.scheduler.reset_prefix_cache()  # what was planned may never have been computed
            raise

    def _launch(self) -> _Step | None:
        """Plan the next step and start it; None if there is nothing to do."""
        with self._tracer.span("schedule"):
            plan = self.scheduler.schedule()
        if not plan.scheduled:
            return None
        now = time.monotonic()
        for seq in plan.admitted:
            metrics = self._request_of[seq.seq_id][0].metrics
            if metrics.first_scheduled_time is None:
                metrics.first_scheduled_time = now
        return _Step(plan, self.runner.launch(plan), now)

    def _book(self, step: _Step, result: StepResult) -> list[_Request]:
        """Take over what a step has brought; returns the requests that got a token."""
        now = time.monotonic()
        plan = step.plan
        if plan.num_tokens >= MEASURED_TOKENS:
            started = max(step.launched, self._booked)  # it was launched while the step before it ran
            self.scheduler.seconds_to_compute_token = (now - started) / plan.num_tokens
        self._booked = now
        with self._tracer.span("detokenize"):
            for seq, position, scores in result.prompt_logprobs:
                if seq.seq_id in self._request_of:
                    self._add_prompt_logprobs(self._request_of[seq.seq_id][0], position, scores)
            rows = None
            if result.logprobs is not None:
                rows = {s.seq.seq_id: row for row, s in enumerate(s for s in plan.scheduled if s.samples)}
            advanced: dict[str, _Request] = {}
            for seq in self.scheduler.update(plan, result.token_ids):
                request, sample = self._request_of[seq.seq_id]
                if sample.logprobs is not None:
                    row, num_top = rows[seq.seq_id], seq.sampling_params.logprobs
                    sample.logprobs.append(self._logprob_entry(result.logprobs, row, seq.last_token_id, num_top))
                self._add_text(sample)
                advanced[request.request_id] = request
            for request in advanced.values():
                if request.metrics.first_token_time is None:
                    request.metrics.first_token_time = now
                if request.is_finished:
                    self._retire(request)
        return list(advanced.values())

    def _add_text(self, sample: _Sample) -> None:
        """Feed the newest token to the detokenizer; a stop string ends the sequence."""
        seq, detokenizer = sample.seq, sample.detokenizer
        if detokenizer is None:
            return
        ended_by_token = seq.finish_reason is FinishReason.STOP
        if not ended_by_token or seq.sampling_params.include_stop_str_in_output:
            detokenizer.append(seq.last_token_id)
        if detokenizer.stop_reason is not None and not ended_by_token:
            self.scheduler.finish(seq, FinishReason.STOP)
            seq.finish_reason = FinishReason.STOP  # it may have reached its length with the same token
            seq.stop_reason = detokenizer.stop_reason
        if seq.is_finished:
            detokenizer.finish()

    def _finish(self, sample: _Sample, reason: FinishReason, why: str | None = None) -> None:
        self.scheduler.finish(sample.seq, reason)
        sample.seq.stop_reason = why
        if sample.detokenizer is not None:
            sample.detokenizer.finish()

    def _retire(self, request: _Request) -> None:
        """Forget a finished request."""
        request.metrics.finished_time = time.monotonic()
        del self._requests[request.request_id]
        for sample in request.samples:
            del self._request_of[sample.seq.seq_id]
        self._num_histories -= request.needs_history

    def _add_prompt_logprobs(self, request: _Request, position: int, scores: TokenLogprobs) -> None:
        num_top = request.samples[0].seq.sampling_params.prompt_logprobs
        for row in range(len(scores.logprobs)):
            if len(request.prompt_logprobs) == position + row:  # a preempted prompt is scored a second time
                token_id = request.prompt_token_ids[position + row]
                request.prompt_logprobs.append(self._logprob_entry(scores, row, token_id, num_top))

    def _logprob_entry(self, scores: TokenLogprobs, row: int, token_id: int, num_top: int) -> dict[int, Logprob]:
        """{token id: Logprob}: the token itself first, then the num_top most likely ones."""

        def entry(token: int, logprob: float, rank: int) -> Logprob:
            return Logprob(float(logprob), int(rank), self.tokenizer.decode_token(token) if self.tokenizer else None)

        entries = {token_id: entry(token_id, scores.logprobs[row], scores.ranks[row])}
        for rank, (token, logprob) in enumerate(
            zip(scores.top_ids[row, :num_top].tolist(), scores.top_logprobs[row], strict=False), start=1
        ):
            entries.setdefault(token, entry(token, logprob, rank))
        return entries

    # ---- whole requests -----------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = False,
    ) -> RequestOutput | list[RequestOutput]:
        """Run prompts to their end: one `RequestOutput` for one prompt, a list in order for a list.

        All prompts are checked before any runs. An interrupt aborts them and leaves the engine usable.
        """
        parsed, single = parse_prompts(prompts)
        outputs = self._generate(parsed, sampling_params, use_tqdm)
        return outputs[0] if single else outputs

    def _generate(
        self,
        prompts: list[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        self._check_idle("generate()")
        requests = self._make_requests(prompts, sampling_params)
        for request in requests:
            self._submit(request)
        start = time.monotonic()
        with tqdm(total=len(requests), desc="Processed prompts", unit="req", disable=not use_tqdm) as progress:
            try:
                while self._requests:
                    done = sum(request.is_finished for request in self._step())
                    if use_tqdm and done:
                        num_tokens = sum(request.num_output_tokens for request in requests)
                        rate = num_tokens / (time.monotonic() - start)
                        progress.set_postfix_str(f"output: {rate:.1f} tok/s", refresh=False)
                        progress.update(done)
            finally:
                for request_id in list(self._requests):
                    self.abort_request(request_id)
        return [request.output() for request in requests]

    def beam_search(self, prompts: Any, params: BeamSearchParams) -> list[BeamSearchOutput]:
        """The params.beam_width most likely continuations of each prompt (or of the one prompt), best first.

        Raises `ValueError` for a prompt that cannot be run or does not leave room for max_tokens, and for more beams
        than the engine has seats.
        """
        self._check_idle("beam_search()")
        if params.beam_width > self.config.max_num_seqs:
            raise ValueError(f"beam_width={params.beam_width} exceeds max_num_seqs={self.config.max_num_seqs}")
        parsed, _ = parse_prompts(prompts)
        token_ids = [self._encode_checked(prompt) for prompt in parsed]
        for ids in token_ids:
            if len(ids) + params.max_tokens > self.max_model_len:
                raise ValueError(
                    f"a prompt of {len(ids)} tokens and max_tokens={params.max_tokens} exceed "
                    f"max_model_len={self.max_model_len}; shorten one of them"
                )

        def run(plan: SchedulerOutput) -> StepResult:
            return self.runner.launch(plan)()

        if (step := self._in_flight) is not None:  # of requests that have ended meanwhile
            self._in_flight = None
            self._book(step, step.wait())
        search = BeamSearch(self.scheduler, run, self._seq_ids.__next__, params, self.eos_token_ids)
        try:
            outputs = search.search(token_ids)
        except BaseException:
            self.scheduler.reset_prefix_cache()
            raise
        if self.tokenizer is not None:
            for ids, output in zip(token_ids, outputs, strict=True):
                for sequence in output.sequences:
                    sequence.text = self.tokenizer.decode(sequence.tokens[len(ids) :])
        return outputs

    def _check_idle(self, caller: str) -> None:
        if self.has_unfinished_requests():
            raise RuntimeError(f"{caller} needs the engine for itself; finish the added requests with step() first")

    def _make_requests(
        self, prompts: list[Prompt], sampling_params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[_Request]:
        many = isinstance(sampling_params, (list, tuple))
        if many and len(sampling_params) != len(prompts):
            raise ValueError(f"{len(sampling_params)} sampling_params for {len(prompts)} prompts; give one or as many")
        params = sampling_params if many else [sampling_params] * len(prompts)
        requests = []
        for i, (prompt, p) in enumerate(zip(prompts, params, strict=True)):
            try:
                requests.append(self._make_request(f"generate-{next(self._generate_ids)}", prompt, p))
            except ValueError as error:
                if len(prompts) == 1:
                    raise
                raise ValueError(f"prompt {i}: {error}") from None
        return requests

    def stream(self, prompt: Any, sampling_params: SamplingParams | None = None) -> Iterator[str]:
        """Yield the text of one prompt piece by piece; closing the iterator aborts the request."""
        params = sampling_params or self._default_sampling_params
        if params.n != 1:
            raise ValueError(f"stream() follows one sample, got n={params.n}")
        self._check_idle("stream()")
        request = self._make_request(f"stream-{next(self._generate_ids)}", parse_prompt(prompt), params)
        return self._stream(request)

    def _stream(self, request: _Request) -> Iterator[str]:
        self._submit(request)
        sent = 0
        try:
            while not request.is_finished:
                self._step()
                text = request.samples[0].output(0).text
                if len(text) > sent:
                    yield text[sent:]
                    sent = len(text)
        finally:
            self.abort_request(request.request_id)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> dict[str, list[int]]:
        """A conversation as a prompt, through the checkpoint's chat template."""
        if self.tokenizer is None:
            raise ValueError("chat needs a tokenizer with a chat template and this engine has none")
        return {"prompt_token_ids": self.tokenizer.apply_chat_template(messages, **kwargs)}

    def check(self) -> None:
        """Recount the engine's state; raises AssertionError on any broken invariant."""
        self.scheduler.check()
        queued = {seq.seq_id for seq in (*self.scheduler.running, *self.scheduler.waiting)}
        samples = [sample for request in self._requests.values() for sample in request.samples]
        assert {s.seq.seq_id for s in samples} == set(self._request_of)
        assert {s.seq.seq_id for s in samples if not s.seq.is_finished} == queued
