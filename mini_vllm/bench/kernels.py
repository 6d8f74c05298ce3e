"""The library behind `mini-vllm kernels`: resources, compilation, and timing of single ops on the GPU.

Timing: a graph of launches over enough copies of the inputs to overflow the L2 cache, so that every launch reads
cold memory; random data; the median of many replays by CUDA events. The roofs are measured in the same run:
bandwidth by reading a gigabyte, arithmetic by an 8192-cubed matrix product.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from mini_vllm.ops.base import AttentionMetadata, SamplingBatch
from mini_vllm.ops.cuda.compiler import Resources
from mini_vllm.ops.cuda.cuda_ops import CudaOps, instances
from mini_vllm.ops.cuda.device import DeviceInfo, GPUAllocator, GPUTimer
from mini_vllm.ops.cuda.graph import CapturedGraph
from mini_vllm.ops.cuda.kernel import Kernel, compile_all, device_arch
from mini_vllm.ops.weight import DenseWeight, RepeatedBlock

REPLAYS = 20
BLOCK_SIZE = 16


def _dtype(name: str) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def resources(arch: str | None, dtype: str, head_dim: int) -> Iterator[tuple[Kernel, Resources]]:
    """Each kernel instance with what it occupies, compiled for `arch`, else for this GPU, else for sm_90a."""
    if arch is None:
        try:
            arch = device_arch()
        except RuntimeError:  # no driver or no GPU: CuPy's CUDARuntimeError
            arch = "sm_90a"
    kernels = instances([_dtype(dtype)], [head_dim])
    compile_all(kernels, arch)
    for kernel in kernels:
        yield kernel, kernel.compile(arch).resources


def compile_for(arch: str, dtype: str, head_dim: int) -> tuple[int, float]:
    """Compile a model's kernels into the cache: (how many there are, seconds of compiling)."""
    kernels = instances([_dtype(dtype)], [head_dim])
    return len(kernels), compile_all(kernels, arch)


@dataclass(frozen=True)
class Case:
    """One op on one shape. `setup` makes fresh inputs and returns the call to time."""

    name: str
    setup: Callable[[], Callable[[], Any]]
    num_bytes: int  # that must move, each input and output once
    num_flops: int = 0  # on tensor cores

    @property
    def is_compute_bound(self) -> bool:
        return self.num_flops > 200 * self.num_bytes


def run(dtype: str, only: str | None = None) -> dict[str, Any]:
    """Time all cases whose name contains `only`: environment, roofs, and for each case its samples and rates."""
    ops = CudaOps(_dtype(dtype))
    info = DeviceInfo.of()
    bandwidth, flops = measure_roofs(ops)
    report: dict[str, Any] = {
        "gpu": info.name,
        "dtype": dtype,
        "roof_gb_per_s": bandwidth / 1e9,
        "roof_tflop_per_s": flops / 1e12,
        "cases": [],
    }
    for case in cases(ops):
        if only and only not in case.name:
            continue
        samples = time_case(case, info.l2_cache)
        seconds = statistics.median(samples)
        achieved = case.num_flops / seconds / flops if case.is_compute_bound else case.num_bytes / seconds / bandwidth
        report["cases"].append(
            {
                "name": case.name,
                "us": seconds * 1e6,
                "spread": (max(samples) - min(samples)) / seconds,
                "gb_per_s": case.num_bytes / seconds / 1e9,
                "tflop_per_s": case.num_flops / seconds / 1e12,
                "share_of_roof": achieved,
                "samples_us": [sample * 1e6 for sample in samples],
            }
        )
    return report


def time_case(case: Case, l2_bytes: int, replays: int = REPLAYS) -> list[float]:
    """Seconds per call, one sample a replay, with cold inputs."""
    copies = max(2, min(64, 4 * l2_bytes // case.num_bytes + 1))
    allocator = GPUAllocator()
    with allocator.use():
        calls = [case.setup() for _ in range(copies)]

    def all_copies() -> None:
        for call in calls:
            call()

    graph = CapturedGraph(all_copies, allocator)
    graph.replay()
    samples = []
    for _ in range(replays):
        with GPUTimer() as timer:
            graph.replay()
        samples.append(timer.elapsed_ms() / 1e3 / copies)
    return samples


def measure_bandwidth(ops: CudaOps) -> float:
    """Bytes per second of reading: a product of one row with a weight of a gigabyte. Takes 2 GiB of GPU memory."""
    gigabyte, columns = 1 << 30, 4096
    block = np.random.default_rng(0).standard_normal(1 << 20, np.float32)

    def read() -> Callable[[], Any]:
        shape = (gigabyte // (columns * ops.dtype.itemsize), columns)
        x, weight = _random(ops, 1, columns), DenseWeight(ops.load_weight([RepeatedBlock(block, 0, shape)]))
        ops.finish_loading()
        return lambda: ops.linear(x, weight)

    return gigabyte / statistics.median(time_case(Case("read", read, gigabyte), 0))


def measure_roofs(ops: CudaOps) -> tuple[float, float]:
    """(`measure_bandwidth`, matrix FLOP per second at 8192 cubed)."""
    side = 8192

    def product() -> Callable[[], Any]:
        x, weight = _random(ops, side, side), DenseWeight(_random(ops, side, side))
        return lambda: ops.linear(x, weight)

    multiplying = statistics.median(time_case(Case("matmul", product, 3 * side * side * 2, 2 * side**3), 0))
    return measure_bandwidth(ops), 2 * side**3 / multiplying


def _random(ops: CudaOps, *shape: int) -> Any:
    host = np.random.default_rng(0).standard_normal(min(int(np.prod(shape)), 1 << 22), np.float32)
    return ops.to_device(np.resize(host, shape).astype(ops.dtype))


def cases(ops: CudaOps) -> Iterator[Case]:
    """The shapes of Qwen3-0.6B (hidden 1024, 16/8 heads) and Qwen3-8B (hidden 4096, 32/8 heads), head size 128."""
    itemsize = ops.dtype.itemsize
    for tokens, hidden in ((1, 4096), (256, 4096), (8192, 4096)):
        yield _rms_norm(ops, tokens, hidden, itemsize)
    for tokens, width in ((1, 12288), (256, 12288), (8192, 12288)):
        yield _silu_and_mul(ops, tokens, width, itemsize)
    for tokens, columns, rows in (
        (1, 1024, 6144),
        (1, 4096, 24576),
        (1, 12288, 4096),
        (1, 1024, 151936),
        (8, 4096, 24576),
        (64, 4096, 24576),
        (256, 4096, 24576),
        (4096, 4096, 24576),
    ):
        yield _linear(ops, tokens, columns, rows, itemsize)
    for batch, context, heads in (
        (1, 1024, 32),
        (1, 8192, 32),
        (1, 32768, 32),
        (64, 2048, 32),
        (256, 1024, 32),
        (256, 1024, 16),
    ):
        yield _attention(ops, batch, context, context, heads, 8, itemsize, decode=True)
    for batch, length, heads in ((4, 4096, 32), (16, 1024, 32), (1, 16384, 32), (4, 4096, 16)):
        yield _attention(ops, batch, length, length, heads, 8, itemsize, decode=False)
    for rows in (1, 256):
        for kind in ("greedy", "temperature", "top_k + top_p"):
            yield _sample(ops, rows, 151936, kind)


def _rms_norm(ops: CudaOps, tokens: int, hidden: int, itemsize: int) -> Case:
    def setup() -> Callable[[], Any]:
        x, residual, weight = _random(ops, tokens, hidden), _random(ops, tokens, hidden), _random(ops, hidden)
        return lambda: ops.add_rms_norm(x, residual, weight, 1e-6)

    return Case(f"add_rms_norm {tokens} x {hidden}", setup, 4 * tokens * hidden * itemsize)


def _silu_and_mul(ops: CudaOps, tokens: int, width: int, itemsize: int) -> Case:
    def setup() -> Callable[[], Any]:
        gate_up = _random(ops, tokens, 2 * width)
        return lambda: ops.silu_and_mul(gate_up)

    return Case(f"silu_and_mul {tokens} x {width}", setup, 3 * tokens * width * itemsize)


def _linear(ops: CudaOps, tokens: int, columns: int, rows: int, itemsize: int) -> Case:
    def setup() -> Callable[[], Any]:
        x, weight = _random(ops, tokens, columns), DenseWeight(_random(ops, rows, columns))
        return lambda: ops.linear(x, weight)

    num_bytes = (tokens * columns + rows * columns + tokens * rows) * itemsize
    return Case(f"linear {tokens} x {columns} to {rows}", setup, num_bytes, 2 * tokens * columns * rows)


def _attention(
    ops: CudaOps, batch: int, query_len: int, context: int, heads: int, kv_heads: int, itemsize: int, decode: bool
) -> Case:
    query_len = 1 if decode else query_len
    blocks = context // BLOCK_SIZE

    def setup() -> Callable[[], Any]:
        q = _random(ops, batch * query_len, heads, 128)
        k, v = (_random(ops, batch * blocks, BLOCK_SIZE, kv_heads, 128) for _ in range(2))
        tables = np.random.default_rng(0).permutation(batch * blocks).astype(np.int32).reshape(batch, blocks)
        meta = AttentionMetadata(
            slot_mapping=ops.to_device(np.zeros(batch * query_len, np.int32)),
            cu_seqlens_q=ops.to_device(np.arange(batch + 1, dtype=np.int32) * query_len),
            seq_lens=ops.to_device(np.full(batch, context, np.int32)),
            block_tables=ops.to_device(tables),
            max_seqlen_q=query_len,
            max_seqlen_k=context,
        )
        return lambda: ops.attention(q, k, v, meta, 128**-0.5)

    num_bytes = (2 * batch * context * kv_heads + 2 * batch * query_len * heads) * 128 * itemsize
    pairs = context if decode else query_len * (query_len + 1) // 2  # causal
    kind = "decode" if decode else "prefill"
    name = f"attention {kind} {batch} x {context}, {heads}/{kv_heads} heads"
    return Case(name, setup, num_bytes, 4 * batch * heads * 128 * pairs)


def _sample(ops: CudaOps, rows: int, vocab_size: int, kind: str) -> Case:
    greedy, filtered = kind == "greedy", kind == "top_k + top_p"

    def setup() -> Callable[[], Any]:
        logits = np.resize(np.random.default_rng(0).standard_normal(1 << 20, np.float32) * 3, (rows, vocab_size))
        on_device = ops.to_device(logits)
        batch = SamplingBatch(
            temperature=ops.to_device(np.full(rows, 0 if greedy else 0.8, np.float32)),
            top_k=ops.to_device(np.full(rows, 50 if filtered else 0, np.int32)),
            top_p=ops.to_device(np.full(rows, 0.95 if filtered else 1, np.float32)),
            min_p=ops.to_device(np.zeros(rows, np.float32)),
            seeds=ops.to_device(np.arange(rows, dtype=np.uint64)),
            positions=ops.to_device(np.arange(rows, dtype=np.int32)),
            any_random=not greedy,
            any_filter=filtered,
        )
        return lambda: ops.sample(on_device, batch)

    return Case(f"sample {kind}, {rows} x {vocab_size}", setup, rows * vocab_size * 4)
