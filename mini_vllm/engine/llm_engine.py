"""`LLMEngine`: requests in, tokens and text out, a step at a time. The only place that sees both wings."""

from __future__ import annotations

import itertools
import logging
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mini_vllm.config import EngineConfig, ModelConfig, read_json, token_id_list
from mini_vllm.demo import DEMO_DIR
from mini_vllm.detokenizer import IncrementalDetokenizer
from mini_vllm.engine.model_runner import ModelRunner
from mini_vllm.engine.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from mini_vllm.engine.prompts import Prompt, parse_prompt, parse_prompts
from mini_vllm.models.hub import resolve_model
from mini_vllm.ops.base import TokenLogprobs
from mini_vllm.sampling_params import SamplingParams
from mini_vllm.scheduling.block_manager import BlockManager
from mini_vllm.scheduling.scheduler import Scheduler
from mini_vllm.scheduling.sequence import FinishReason
from mini_vllm.scheduling.sequence import Sequence as TokenSequence
from mini_vllm.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

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
        )


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
        self.scheduler = Scheduler(
            BlockManager(self.runner.kv.num_blocks, config.block_size),
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
        )
        self._requests: dict[str, _Request] = {}
        self._request_of: dict[int, tuple[_Request, _Sample]] = {}  # by seq_id
        self._seq_ids = itertools.count()
        self._generate_ids = itertools.count()
        self._seeds = random.Random(config.seed)

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

    def add_request(self, request_id: str, prompt: Any, params: SamplingParams | None = None) -> None:
        """Queue a request. `prompt`: str, list of token ids, {"prompt": ...} or {"prompt_token_ids": ...}.

        Raises `ValueError` for an id in use, a prompt that cannot be run, or parameters out of range.
        """
        self._submit(self._make_request(request_id, parse_prompt(prompt), params))

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
        return bool(self._requests)

    def num_unfinished_requests(self) -> int:
        return len(self._requests)

    def _make_request(self, request_id: str, prompt: Prompt, params: SamplingParams | None) -> _Request:
        if not isinstance(request_id, str):
            raise ValueError(f"request_id must be a string, got {request_id!r}")
        if request_id in self._requests:
            raise ValueError(f"request_id {request_id!r} is in use by an unfinished request")
        if params is None:
            params = self._default_sampling_params
        elif not isinstance(params, SamplingParams):
            raise ValueError(f"sampling parameters must be a SamplingParams, got {type(params).__name__}")
        token_ids = self._encode(prompt)
        self._check_token_ids("prompt", token_ids)
        if not token_ids:
            raise ValueError("the prompt is empty; give at least one token")
        if len(token_ids) >= self.max_model_len:
            raise ValueError(
                f"the prompt has {len(token_ids)} tokens, but max_model_len={self.max_model_len} leaves room for at "
                f"most {self.max_model_len - 1} and one output token; shorten it or raise max_model_len"
            )
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
            )
            samples.append(_Sample(seq, self._make_detokenizer(token_ids, params)))
        return _Request(request_id, prompt.text, token_ids, samples)

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
        for token_id in token_ids:
            if not 0 <= token_id < vocab_size:
                raise ValueError(f"{name}: token id {token_id} is not in the vocabulary, 0 to {vocab_size - 1}")

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

    # ---- steps --------------------------------------------------------------------------------------------

    def step(self) -> list[RequestOutput]:
        """Run one step and return the requests that got a token; finished ones are then forgotten."""
        return [request.output() for request in self._step()]

    def _step(self) -> list[_Request]:
        plan = self.scheduler.schedule()
        if not plan.scheduled:
            return []
        now = time.monotonic()
        for s in plan.scheduled:
            metrics = self._request_of[s.seq.seq_id][0].metrics
            if metrics.first_scheduled_time is None:
                metrics.first_scheduled_time = now
        try:
            result = self.runner.execute(plan)
        except BaseException:
            for request_id in list(self._requests):
                self.abort_request(request_id)
            raise

        for seq, position, scores in result.prompt_logprobs:
            self._add_prompt_logprobs(self._request_of[seq.seq_id][0], position, scores)
        rows = {s.seq.seq_id: row for row, s in enumerate(s for s in plan.scheduled if s.samples)}
        advanced: dict[str, _Request] = {}
        for seq in self.scheduler.update(plan, result.token_ids):
            request, sample = self._request_of[seq.seq_id]
            if sample.logprobs is not None:
                row, token_id = rows[seq.seq_id], seq.token_ids[-1]
                sample.logprobs.append(
                    self._logprob_entry(result.logprobs, row, token_id, seq.sampling_params.logprobs)
                )
            self._add_text(sample)
            advanced[request.request_id] = request
        now = time.monotonic()
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
            detokenizer.append(seq.token_ids[-1])
        if detokenizer.stop_reason is not None and not ended_by_token:
            self.scheduler.finish(seq, FinishReason.STOP)
            seq.finish_reason = FinishReason.STOP  # it may have reached its length with the same token
            seq.stop_reason = detokenizer.stop_reason
        if seq.is_finished:
            detokenizer.finish()

    def _finish(self, sample: _Sample, reason: FinishReason) -> None:
        self.scheduler.finish(sample.seq, reason)
        if sample.detokenizer is not None:
            sample.detokenizer.finish()

    def _retire(self, request: _Request) -> None:
        """Forget a finished request."""
        request.metrics.finished_time = time.monotonic()
        del self._requests[request.request_id]
        for sample in request.samples:
            del self._request_of[sample.seq.seq_id]

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
        if self._requests:
            raise RuntimeError("generate() needs the engine for itself; finish the added requests with step() first")
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
        if self._requests:
            raise RuntimeError("stream() needs the engine for itself; finish the added requests with step() first")
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
