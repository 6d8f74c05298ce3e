"""How much of the GPU is left for the KV cache, found by running the largest step there can be."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from mini_vllm.config import EngineConfig
from mini_vllm.engine.batch_state import BatchState
from mini_vllm.engine.model_input import build_model_input
from mini_vllm.engine.padding import max_prompt_tokens
from mini_vllm.engine.sampler import build_sampling_batch
from mini_vllm.models.decoder import CausalLM
from mini_vllm.models.kv_cache import KVCache
from mini_vllm.ops.base import map_arrays
from mini_vllm.ops.cuda.device import GPUAllocator, free_cached_memory, memory_info
from mini_vllm.sampling_params import SamplingParams
from mini_vllm.scheduling.block_manager import BlockManager
from mini_vllm.scheduling.scheduler import Scheduler
from mini_vllm.scheduling.sequence import Sequence

logger = logging.getLogger(__name__)

SLACK = 256 << 20  # bytes: CUDA graphs' own memory, the driver's, fragmentation


def measure_kv_cache_memory(model: CausalLM, config: EngineConfig) -> int:
    """Bytes left for the KV cache under gpu_memory_utilization, with the weights loaded.

    Raises `ValueError` with the figures when nothing is left.
    """
    prompt_tokens = max_prompt_tokens(config)
    sizes = {config.max_num_batched_tokens, config.max_num_seqs, prompt_tokens}
    steps = {size: _memory_of_step(model, config, size) for size in sizes}
    activations = steps[config.max_num_batched_tokens].peak
    if not config.enforce_eager:  # what the graphs keep for themselves
        activations += steps[config.max_num_seqs].peak + steps[prompt_tokens].reserved_by_model
    free_cached_memory()
    free, total = memory_info()
    allowed = int(total * config.gpu_memory_utilization)
    memory = allowed - (total - free) - activations - SLACK
    figures = (
        f"{total / 2**30:.1f} GiB of GPU memory, of which {allowed / 2**30:.1f} may be used; "
        f"{(total - free) / 2**30:.1f} in use (weights, CUDA, other processes), "
        f"{(activations + SLACK) / 2**30:.1f} for a step's activations"
    )
    if memory <= 0:
        raise ValueError(
            f"no memory is left for the KV cache: {figures}; raise gpu_memory_utilization, free the GPU, or lower "
            "max_num_batched_tokens or max_num_seqs"
        )
    logger.info("%.1f GiB for the KV cache (%s).", memory / 2**30, figures)
    return memory


@dataclass(frozen=True)
class StepMemory:
    """Bytes that a step needs besides weights and KV cache."""

    peak: int  # activations and logits in use at a time
    reserved_by_model: int  # taken from the device for activations; more than were in use, since sizes differ


def _memory_of_step(model: CausalLM, config: EngineConfig, num_tokens: int) -> StepMemory:
    """Of a step of `num_tokens` tokens over as many sequences as there can be."""
    ops = model.ops
    num_seqs = min(config.max_num_seqs, num_tokens)
    length = num_tokens // num_seqs
    num_blocks = num_seqs * -(-length // config.block_size)
    scheduler = Scheduler(
        BlockManager(num_blocks, config.block_size), max_num_seqs=num_seqs, max_num_batched_tokens=num_tokens
    )
    for i in range(num_seqs):
        scheduler.add(Sequence(i, [0] * length, SamplingParams(top_k=2), max_num_tokens=length + 1))
    plan = scheduler.schedule()
    allocator = GPUAllocator()
    with allocator.use():
        kv = KVCache(model.config, num_blocks, config.block_size, ops)
        allocated, reserved = allocator.get_allocated(), allocator.get_reserved()
        state = BatchState(num_seqs, -(-length // config.block_size), config.block_size)
        state.apply(plan)
        host = build_model_input(plan, state)
        inp, attn = map_arrays(host, ops.to_device), map_arrays(host.attn, ops.to_device)
        hidden = model.forward(inp.input_ids, inp.positions, attn, kv)  # of all tokens: it takes the most
        reserved_by_model = allocator.get_reserved() - reserved
        rows = host.logits_indices if host.last is None else host.last.rows
        hidden = ops.embedding(ops.to_device(rows), hidden)
        batch = build_sampling_batch(plan.scheduled, state)
        ops.to_host(ops.sample(model.logits(hidden), map_arrays(batch, ops.to_device)))
        return StepMemory(allocator.get_peak() - allocated, reserved_by_model)
