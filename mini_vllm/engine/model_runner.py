"""Loads a model, sizes its KV cache and runs the scheduler's steps."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import TypeVar

import ml_dtypes
import numpy as np

from mini_vllm.config import EngineConfig, ModelConfig
from mini_vllm.engine.batch_state import BatchState
from mini_vllm.engine.model_input import ModelInput, build_model_input, num_scored_tokens
from mini_vllm.engine.padding import max_prompt_tokens
from mini_vllm.engine.sampler import build_sampling_batch
from mini_vllm.models.decoder import LastTokens
from mini_vllm.models.kv_cache import KVCache
from mini_vllm.models.registry import LOADERS
from mini_vllm.models.weights import Checkpoint, DummyWeights
from mini_vllm.ops.base import Array, AttentionMetadata, Ops, SamplingBatch, TokenLogprobs, map_arrays
from mini_vllm.scheduling.scheduler import SchedulerOutput
from mini_vllm.scheduling.sequence import Sequence
from mini_vllm.tracing import NULL_TRACER, NullTracer, Stopwatch

logger = logging.getLogger(__name__)

CPU_KV_CACHE_MEMORY = 4 << 30  # bytes; pages of it that no sequence reaches are never touched
Columns = TypeVar("Columns", AttentionMetadata, LastTokens, SamplingBatch)

SCORED_ROWS = 256  # prompt tokens scored at once: bounds the logits of prompt_logprobs to 256 x vocabulary


@dataclass(frozen=True)
class StepResult:
    """What a step computed, in host memory.

    token_ids: one for each sampling sequence, in the plan's order.
    logprobs: of those tokens, row by row; None when no sequence asked.
    prompt_logprobs: (sequence, position of the first token, log probabilities of the tokens from there on).
    """

    token_ids: list[int]
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: list[tuple[Sequence, int, TokenLogprobs]] = field(default_factory=list)


class ModelRunner:
    """The model, its KV cache and the backend they live on.

    max_model_len: the longest sequence that the model, the user and the KV cache allow. A sequence of that
    length fits into the cache alone, which is what the scheduler's guarantees rest on.
    host_kv: blocks in host memory, or None; where the scheduler's transfers go to and come from.
    runs_ahead: `launch` returns before the step has run, so that the host can do something else.
    startup_seconds: what each part of the start took: device, weights, kernels, kv_cache, graphs.
    """

    def __init__(self, config: EngineConfig, model_config: ModelConfig, model_dir: Path) -> None:
        watch = Stopwatch()
        self.startup_seconds = watch.seconds
        self.ops = ops = make_ops(config, model_config)
        watch.lap("device")
        wanted = wanted_model_len(config, model_config)
        source = DummyWeights(config.seed) if config.load_format == "dummy" else Checkpoint(model_dir)
        self.model = LOADERS[model_config.architecture](model_config, source, ops, wanted)
        self.tracer: NullTracer = NULL_TRACER
        self.runs_ahead = ops.device == "cuda"
        self._graphs = self._prompt_graphs = None
        if ops.device == "cuda":
            ops.finish_loading()
        watch.lap("weights")
        if ops.device == "cuda":
            ops.prepare(model_config.head_dim)
            watch.lap("kernels")
        memory = config.kv_cache_memory or CPU_KV_CACHE_MEMORY
        if ops.device == "cuda" and config.kv_cache_memory is None and config.num_kv_blocks is None:
            from mini_vllm.engine.gpu_memory import measure_kv_cache_memory

            memory = measure_kv_cache_memory(self.model, config)
        num_blocks, self.max_model_len = plan_kv_cache(config, model_config, ops.dtype, wanted, memory)
        self.kv = KVCache(model_config, num_blocks, config.block_size, ops)
        self.host_kv = None
        if config.swap_space:
            block_bytes = KVCache.bytes_per_block(model_config, config.block_size, ops.dtype)
            if config.swap_space < block_bytes:
                raise ValueError(
                    f"swap_space={config.swap_space} bytes hold no KV block: one of {config.block_size} tokens takes "
                    f"{block_bytes} bytes"
                )
            num_host_blocks = config.swap_space // block_bytes
            self.host_kv = KVCache(model_config, num_host_blocks, config.block_size, ops, on_host=True)
        max_blocks = -(-self.max_model_len // config.block_size)
        self._state = BatchState(config.max_num_seqs, max_blocks, config.block_size)
        # The tokens that the newest step drew, for the next one to read where it runs before the host knows them.
        self._drawn = ops.zeros((config.max_num_seqs,), np.int32)
        watch.lap("kv_cache")
        self._download = ops.make_download(config.max_num_seqs, np.int32)
        if ops.device == "cuda" and not config.enforce_eager:
            from mini_vllm.engine import graph_runner

            tables = graph_runner.BlockTables(config.max_num_seqs, max_blocks)
            one_each = ops.to_device(np.arange(len(tables.data) + 1, dtype=np.int32))
            context = graph_runner.GraphContext(
                self.model, self.kv, ops, self._drawn, tables, one_each, self.max_model_len
            )
            self._graphs = graph_runner.DecodeGraphRunner(context, config.max_num_seqs)
            self._prompt_graphs = graph_runner.PromptGraphRunner(context, max_prompt_tokens(config))
            watch.lap("graphs")

    def launch(self, output: SchedulerOutput) -> Callable[[], StepResult]:
        """Start a planned step: write the K/V of its tokens and draw a token for each sequence that samples.

        Returns what waits for the result. Steps are launched in the order in which they were planned; a step may be
        launched before the one before it was waited for, unless its sampling rules depend on that one's tokens.
        """
        ops, span = self.ops, self.tracer.span
        with span("prepare"):
            self._state.apply(output)
            host = build_model_input(output, self._state)
            sampling = [s for s in output.scheduled if s.samples]
            batch = build_sampling_batch(sampling, self._state) if sampling else None
        with span("launch"):
            self._move_blocks(output)
            asked = [n for s in sampling if (n := s.seq.sampling_params.logprobs) is not None]
            is_drawn = False
            if self._graphs is not None and host.attn.max_seqlen_q == 1 and len(sampling) == len(host.input_ids):
                logits, hidden, is_drawn = self._graphs.run(host, batch), None, batch.is_simple
            else:
                hidden = self._forward(host)
                logits = self.model.logits(hidden[: len(sampling)]) if sampling else None
            scores = None
            if sampling:
                raw = logits.copy() if asked and not is_drawn else logits  # sampling may overwrite them
                drawn = self._drawn[: len(sampling)]
                if not is_drawn:
                    drawn[:] = ops.sample(logits, self._to_device(batch))
                if asked:
                    scores = ops.logprobs(raw, drawn, max(asked))
            scored_prompts = () if hidden is None else self._score_prompts(output, hidden, len(sampling))
            return self._wait_for_tokens(len(sampling), scores, scored_prompts)

    def _forward(self, host: ModelInput) -> Array:
        """Run the model on a step given as host arrays: the hidden states [S + P, H] at its logits_indices."""
        ops = self.ops
        graphs = self._prompt_graphs
        if graphs is not None and len(host.input_ids) <= graphs.max_num_tokens:
            hidden = graphs.forward(host)
        else:
            ids, positions = ops.to_device(host.input_ids), ops.to_device(host.positions)
            drawn = self._drawn if self.runs_ahead else None
            last = None if host.last is None else self._to_device(host.last)
            hidden = self.model.forward(ids, positions, self._to_device(host.attn), self.kv, drawn, last)
        if host.last is not None and len(host.logits_indices) == len(host.last.rows):
            return hidden  # every sequence samples
        return ops.embedding(ops.to_device(host.logits_indices), hidden)  # a gather of rows is an embedding

    def _wait_for_tokens(
        self,
        count: int,
        scores: TokenLogprobs | None = None,
        scored_prompts: SequenceOf[tuple[Sequence, int, TokenLogprobs]] = (),
    ) -> Callable[[], StepResult]:
        """The second half of `launch`: the result of a step whose last kernel has been enqueued."""
        fetch = self._download.start(self._drawn, count)

        def wait() -> StepResult:
            with self.tracer.span("wait"):
                return StepResult(
                    fetch().tolist(),
                    None if scores is None else map_to_host(self.ops, scores),
                    [(seq, position, map_to_host(self.ops, s)) for seq, position, s in scored_prompts],
                )

        return wait

    def _move_blocks(self, output: SchedulerOutput) -> None:
        """The plan's transfers in order, runs of one direction together, then its copies."""
        for to_host, transfers in itertools.groupby(output.transfers, key=attrgetter("to_host")):
            source_kv, target_kv = (self.kv, self.host_kv) if to_host else (self.host_kv, self.kv)
            sources = {t.target: t.source for t in transfers}  # a host block filled twice keeps what came last
            pairs = np.array([(source, target) for target, source in sources.items()], np.int32)
            target_kv.copy_blocks_from(source_kv, self.ops.to_device(pairs), self.ops)
        if output.copies:
            self.kv.copy_blocks_from(self.kv, self.ops.to_device(np.array(output.copies, np.int32)), self.ops)

    def seconds_to_load_block(self) -> float:
        """Measure what bringing a block from host memory takes, by moving the first ones out and in again."""
        count = min(self.kv.num_blocks, self.host_kv.num_blocks, 64)
        pairs = self.ops.to_device(np.repeat(np.arange(count, dtype=np.int32), 2).reshape(-1, 2))
        self.host_kv.copy_blocks_from(self.kv, pairs, self.ops)
        self.kv.copy_blocks_from(self.host_kv, pairs, self.ops)  # the first time pays for loading kernels
        self.ops.synchronize()
        start = time.perf_counter()
        self.kv.copy_blocks_from(self.host_kv, pairs, self.ops)
        self.ops.synchronize()
        return (time.perf_counter() - start) / count

    def _to_device(self, columns: Columns) -> Columns:
        """A dataclass of host arrays with its arrays on the device."""
        return columns if self.ops.device == "cpu" else map_arrays(columns, self.ops.to_device)

    def _score_prompts(
        self, output: SchedulerOutput, hidden: Array, row: int
    ) -> list[tuple[Sequence, int, TokenLogprobs]]:
        """Log probabilities of prompt tokens: hidden [row:] are the states that predict them, in the plan's order."""
        results = []
        for s in output.scheduled:
            first, last = s.start + 1, s.start + 1 + num_scored_tokens(s)
            for position in range(first, last, SCORED_ROWS):
                targets = np.array(s.seq.token_ids[position : min(position + SCORED_ROWS, last)], np.int32)
                logits = self.model.logits(hidden[row : row + len(targets)])
                row += len(targets)
                num_top = s.seq.sampling_params.prompt_logprobs
                results.append((s.seq, position, self.ops.logprobs(logits, self.ops.to_device(targets), num_top)))
        return results


def map_to_host(ops: Ops, logprobs: TokenLogprobs) -> TokenLogprobs:
    return TokenLogprobs(*(ops.to_host(getattr(logprobs, f)) for f in TokenLogprobs.__dataclass_fields__))


def make_ops(config: EngineConfig, model_config: ModelConfig) -> Ops:
    """The backend for `device`, with the engine's dtype.

    "auto" is CUDA where it can be used, else the CPU, and says why where there is an NVIDIA driver.
    Raises `CudaUnavailable` with what mends it when "cuda" is asked for and cannot be used.
    """
    from mini_vllm.ops.cuda import CudaUnavailable, driver_cuda_version, require_cuda

    if config.device == "cuda" or (config.device == "auto" and driver_cuda_version() is not None):
        try:
            require_cuda()
            from mini_vllm.ops.cuda.cuda_ops import CudaOps

            return CudaOps(numpy_dtype(model_config.dtype if config.dtype == "auto" else config.dtype))
        except CudaUnavailable as error:
            if config.device == "cuda":
                raise
            logger.info("Running on the CPU with NumPy: %s.", error)
    from mini_vllm.ops.numpy_ops import NumpyOps

    return NumpyOps(numpy_dtype("float32" if config.dtype == "auto" else config.dtype))


def numpy_dtype(name: str) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def wanted_model_len(config: EngineConfig, model_config: ModelConfig) -> int:
    """The context that user and model allow, before the KV cache has its say."""
    limit = model_config.max_position_embeddings
    if config.max_model_len is not None and config.max_model_len > limit:
        raise ValueError(
            f"max_model_len={config.max_model_len} exceeds the model's {limit} positions (max_position_embeddings)"
        )
    return config.max_model_len or limit


def plan_kv_cache(
    config: EngineConfig, model_config: ModelConfig, dtype: np.dtype, wanted: int, memory: int | None
) -> tuple[int, int]:
    """(number of blocks, longest sequence), such that a sequence of that length fits into the cache alone.

    wanted: the longest sequence asked for; memory: bytes for the cache unless num_kv_blocks is given.
    Raises `ValueError` with the figures when the cache cannot hold the max_model_len that the user gave.
    """
    block_size = config.block_size
    blocks_per_sequence = -(-wanted // block_size)
    block_bytes = KVCache.bytes_per_block(model_config, block_size, dtype)
    num_blocks = config.num_kv_blocks
    if num_blocks is None:
        num_blocks = min(memory // block_bytes, config.max_num_seqs * blocks_per_sequence)
        if num_blocks == 0:
            raise ValueError(
                f"kv_cache_memory={memory} bytes hold no KV block: one of {block_size} tokens takes {block_bytes} bytes"
            )
    if num_blocks < blocks_per_sequence:
        capacity = num_blocks * block_size
        if config.max_model_len is not None:
            raise ValueError(
                f"max_model_len={wanted} needs {blocks_per_sequence} KV blocks of {block_size} tokens "
                f"({blocks_per_sequence * block_bytes / 2**20:.0f} MiB), but the KV cache has {num_blocks} "
                f"({num_blocks * block_bytes / 2**20:.0f} MiB, {capacity} tokens); lower max_model_len or raise "
                "kv_cache_memory or num_kv_blocks"
            )
        logger.info("The KV cache holds %d tokens: max_model_len is %d instead of %d.", capacity, capacity, wanted)
        wanted = capacity
    return num_blocks, wanted
