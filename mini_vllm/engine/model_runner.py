"""Loads a model, sizes its KV cache and runs the scheduler's steps."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import ml_dtypes
import numpy as np

from mini_vllm.config import EngineConfig, ModelConfig
from mini_vllm.engine.model_input import ModelInput, build_model_input, num_scored_tokens
from mini_vllm.engine.sampler import build_sampling_batch
from mini_vllm.models.kv_cache import KVCache
from mini_vllm.models.registry import LOADERS
from mini_vllm.models.weights import Checkpoint, DummyWeights
from mini_vllm.ops.base import Array, AttentionMetadata, Ops, SamplingBatch, TokenLogprobs, map_arrays
from mini_vllm.scheduling.scheduler import SchedulerOutput
from mini_vllm.scheduling.sequence import Sequence

logger = logging.getLogger(__name__)

CPU_KV_CACHE_MEMORY = 4 << 30  # bytes; pages of it that no sequence reaches are never touched
Columns = TypeVar("Columns", ModelInput, AttentionMetadata, SamplingBatch)

SCORED_ROWS = 256  # prompt tokens scored at once: bounds the logits of prompt_logprobs to 256 x vocabulary


@dataclass(frozen=True)
class StepResult:
    """What a step computed, in host memory.

    token_ids: one for each sampling sequence, in the plan's order.
    logprobs: of those tokens, row by row; None when no sequence asked.
    prompt_logprobs: (sequence, position of the first token, log probabilities of the tokens from there on).
    """

    token_ids: list[int]
    logprobs: TokenLogprobs | None
    prompt_logprobs: list[tuple[Sequence, int, TokenLogprobs]]


class ModelRunner:
    """The model, its KV cache and the backend they live on.

    max_model_len: the longest sequence that the model, the user and the KV cache allow. A sequence of that
    length fits into the cache alone, which is what the scheduler's guarantees rest on.
    """

    def __init__(self, config: EngineConfig, model_config: ModelConfig, model_dir: Path) -> None:
        self.ops = ops = make_ops(config, model_config)
        wanted = wanted_model_len(config, model_config)
        source = DummyWeights(config.seed) if config.load_format == "dummy" else Checkpoint(model_dir)
        self.model = LOADERS[model_config.architecture](model_config, source, ops, wanted)
        self._graphs = None
        if ops.device == "cuda":
            ops.finish_loading()
            ops.prepare(model_config.head_dim)
        memory = config.kv_cache_memory or CPU_KV_CACHE_MEMORY
        if ops.device == "cuda" and config.kv_cache_memory is None and config.num_kv_blocks is None:
            from mini_vllm.engine.gpu_memory import measure_kv_cache_memory

            memory = measure_kv_cache_memory(self.model, config)
        num_blocks, self.max_model_len = plan_kv_cache(config, model_config, ops.dtype, wanted, memory)
        self.kv = KVCache(model_config, num_blocks, config.block_size, ops)
        if ops.device == "cuda" and not config.enforce_eager:
            from mini_vllm.engine.graph_runner import DecodeGraphRunner

            self._graphs = DecodeGraphRunner(
                self.model, self.kv, ops, max_num_seqs=config.max_num_seqs, max_model_len=self.max_model_len
            )

    def execute(self, output: SchedulerOutput) -> StepResult:
        """Run one step: write the K/V of its tokens and draw a token for each sequence that samples."""
        ops = self.ops
        host = build_model_input(output, self.kv.block_size)
        sampling = [s.seq for s in output.scheduled if s.samples]
        batch = build_sampling_batch(sampling) if sampling else None
        asked = [n for seq in sampling if (n := seq.sampling_params.logprobs) is not None]

        if self._graphs is not None and len(sampling) == output.num_tokens:  # all of them decode
            logits, hidden = self._graphs.forward(host, batch), None
            if not asked and batch.is_simple:
                return StepResult(self._graphs.sample(len(sampling)), None, [])
        else:
            inp, attn = self._to_device(host), self._to_device(host.attn)
            hidden = self.model.forward(inp.input_ids, inp.positions, attn, self.kv, inp.logits_indices)
            logits = self.model.logits(hidden[: len(sampling)]) if sampling else None

        token_ids: list[int] = []
        logprobs = None
        if sampling:
            raw = logits.copy() if asked else None  # sampling may overwrite them
            sampled = ops.sample(logits, self._to_device(batch))
            if asked:
                logprobs = map_to_host(ops, ops.logprobs(raw, sampled, max(asked)))
            token_ids = ops.to_host(sampled).tolist()
        return StepResult(token_ids, logprobs, self._score_prompts(output, hidden, len(sampling)))

    def _to_device(self, columns: Columns) -> Columns:
        """A dataclass of host arrays with its arrays on the device."""
        return columns if self.ops.device == "cpu" else map_arrays(columns, self.ops.to_device)

    def _score_prompts(
        self, output: SchedulerOutput, hidden: Array | None, row: int
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
                scores = self.ops.logprobs(logits, self.ops.to_device(targets), num_top)
                results.append((s.seq, position, map_to_host(self.ops, scores)))
        return results


def map_to_host(ops: Ops, logprobs: TokenLogprobs) -> TokenLogprobs:
    return TokenLogprobs(*(ops.to_host(getattr(logprobs, f)) for f in TokenLogprobs.__dataclass_fields__))


def make_ops(config: EngineConfig, model_config: ModelConfig) -> Ops:
    """The backend for `device`, with the engine's dtype.

    "auto" is the CPU, and says so where there is a GPU, until the engine's GPU tests have a recorded run.
    Raises `CudaUnavailable` with what mends it when "cuda" is asked for and cannot be used.
    """
    from mini_vllm.ops.cuda import driver_cuda_version, require_cuda

    if config.device == "cuda":
        require_cuda()
        from mini_vllm.ops.cuda.cuda_ops import CudaOps

        return CudaOps(numpy_dtype(model_config.dtype if config.dtype == "auto" else config.dtype))
    if config.device == "auto" and driver_cuda_version() is not None:
        logger.info('Running on the CPU with NumPy; the young CUDA backend is used when asked for: device="cuda".')
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
