"""The library behind `mini-vllm kernels`: resources, compilation, and timing of single ops on the GPU.

Timing: a graph of launches over enough copies of the inputs to overflow the L2 cache, so that every launch reads
cold memory; random data; the median of many replays by CUDA events. The roofs are measured in the same run:
bandwidth by reading a gigabyte, arithmetic by an 8192-cubed matrix product.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from mini_vllm.bench.report import Metric, Report
from mini_vllm.engine.model_runner import numpy_dtype
from mini_vllm.ops.base import AttentionMetadata, SamplingBatch
from mini_vllm.ops.cuda import CudaUnavailable, install_hint
from mini_vllm.ops.weight import DenseWeight, RepeatedBlock

try:
    from mini_vllm.ops.cuda.compiler import Resources
    from mini_vllm.ops.cuda.cuda_ops import CudaOps, instances
    from mini_vllm.ops.cuda.device import GPUAllocator, GPUTimer
    from mini_vllm.ops.cuda.graph import CapturedGraph
    from mini_vllm.ops.cuda.kernel import Kernel, compile_all, device_arch
except ImportError as error:
    raise CudaUnavailable(f"CuPy cannot be imported ({error}); {install_hint()}") from error

REPLAYS = 20
BLOCK_SIZE = 16


def resources(arch: str | None, dtype: str, head_dim: int) -> Iterator[tuple[Kernel, Resources]]:
    """Each kernel instance with what it occupies, compiled for `arch`, else for this GPU, else for sm_90a."""
    if arch is None:
        try:
            arch = device_arch()
        except RuntimeError:  # no driver or no GPU: CuPy's CUDARuntimeError
            arch = "sm_90a"
    kernels = instances([numpy_dtype(dtype)], [head_dim])
    compile_all(kernels, arch)
    for kernel in kernels:
        yield kernel, kernel.compile(arch).resources


def compile_for(arch: str, dtype: str, head_dim: int) -> tuple[int, float]:
    """Compile a model's kernels into the cache: (how many there are, seconds of compiling)."""
    kernels = instances([numpy_dtype(dtype)], [head_dim])
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


def measure_kernels(dtype: str, only: str = "") -> Report:
    """Time all cases whose name contains `only`, in microseconds.

    Raises `ValueError` if there is none, before anything is measured.
    """
    ops = CudaOps(numpy_dtype(dtype))
    found = list(cases(ops))
    wanted = [case for case in found if only in case.name]
    if not wanted:
        examples = {case.name.split()[0]: case.name for case in found}  # one of each op
        raise ValueError(
            f"--only {only} selects none of the {len(found)} cases; some of them are: {'; '.join(examples.values())}"
        )
    bandwidth, flops = measure_roofs(ops)
    roofs = {"bandwidth_gb_per_s": bandwidth / 1e9, "matmul_tflop_per_s": flops / 1e12}
    report = Report("kernels", {"dtype": dtype}, {"device": ops.device}, {}, details={"roofs": roofs, "cases": {}})
    for case in wanted:
        metric = Metric([1e6 * seconds for seconds in time_case(case, ops.info.l2_cache)], "us")
        gb_per_s, tflop_per_s = case.num_bytes / metric.median / 1e3, case.num_flops / metric.median / 1e6
        by_bytes, by_flops = gb_per_s / roofs["bandwidth_gb_per_s"], tflop_per_s / roofs["matmul_tflop_per_s"]
        report.metrics[case.name] = metric
        report.details["cases"][case.name] = {
            "gb_per_s": gb_per_s,
            "tflop_per_s": tflop_per_s,
            "share_of_roof": by_flops if case.is_compute_bound else by_bytes,
        }
    return report


def kernel_lines(report: Report) -> Iterator[str]:
    """A line for each case."""
    yield f"{'case':<56}{'us':>10}{'spread':>8}{'GB/s':>8}{'TFLOP/s':>9}{'of roof':>9}"
    for name, metric in report.metrics.items():
        case = report.details["cases"][name]
        yield (
            f"{name:<56}{metric.median:>10.2f}{metric.spread:>7.1%} {case['gb_per_s']:>7.0f}"
            f"{case['tflop_per_s']:>9.1f}{case['share_of_roof']:>9.0%}"
        )


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


def measure_roofs(ops: CudaOps) -> tuple[float, float]:
    """(bytes per second of reading, matrix FLOP per second). Takes 2 GiB of GPU memory.

    By a product of one row with a weight of a gigabyte, and by one of 8192 cubed.
    """
    read = _linear(ops, 1, 4096, (1 << 30) // (4096 * ops.dtype.itemsize))
    multiply = _linear(ops, 8192, 8192, 8192)
    reading, multiplying = (statistics.median(time_case(case, l2_bytes=0)) for case in (read, multiply))
    return read.num_bytes / reading, multiply.num_flops / multiplying


@functools.cache
def _normal_block() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(1 << 22, np.float32)


def _random(ops: CudaOps, *shape: int) -> Any:
    """Normally distributed values. The GPU repeats a block of them: some cases take gigabytes."""
    return ops.load_weight([RepeatedBlock(_normal_block(), 0, shape)])


def cases(ops: CudaOps) -> Iterator[Case]:
    """The shapes of Qwen3-0.6B (hidden 1024, 16/8 heads) and Qwen3-8B (hidden 4096, 32/8 heads), head size 128."""
    for tokens, hidden in ((1, 4096), (256, 4096), (8192, 4096)):
        yield _rms_norm(ops, tokens, hidden)
    for tokens, width in ((1, 12288), (256, 12288), (8192, 12288)):
        yield _silu_and_mul(ops, tokens, width)
    for hidden, outputs in ((1024, 4096), (4096, 6144)):  # qkv_proj
        for tokens in (1, 4, 64, 256):
            yield _add_norm_linear(ops, tokens, hidden, outputs)
    for hidden, width in ((1024, 3072), (4096, 12288)):  # gate_up_proj
        for tokens in (1, 4, 64, 256):
            yield _add_norm_swiglu(ops, tokens, hidden, width)
    for columns, rows in ((2048, 1024), (3072, 1024), (4096, 4096), (12288, 4096)):  # o_proj and down_proj
        for tokens in (1, 64, 256):
            yield _linear(ops, tokens, columns, rows)
        for tokens in (8, 64, 256):
            yield _linear_before_norm(ops, tokens, columns, rows)
    for tokens, columns, rows in (
        (1, 1024, 6144),
        (1, 4096, 24576),
        (1, 1024, 151936),
        (8, 4096, 24576),
        (64, 4096, 24576),
        (256, 4096, 24576),
        (4096, 4096, 24576),
    ):
        yield _linear(ops, tokens, columns, rows)
    for heads in (16, 32):
        for batch, context in ((1, 256), (1, 1024), (8, 1024), (256, 512), (256, 1024)):
            yield _rope_attention(ops, batch, context, heads, 8)
    for batch, context, heads in (
        (1, 1024, 32),
        (1, 8192, 32),
        (1, 32768, 32),
        (64, 2048, 32),
        (256, 1024, 32),
        (256, 1024, 16),
    ):
        yield _attention(ops, batch, context, context, heads, 8, decode=True)
    for batch, length, heads in ((4, 4096, 32), (16, 1024, 32), (1, 16384, 32), (4, 4096, 16)):
        yield _attention(ops, batch, length, length, heads, 8, decode=False)
    for rows in (1, 256):
        for kind in ("greedy", "temperature", "top_k + top_p"):
            yield _sample(ops, rows, 151936, kind)


def _rms_norm(ops: CudaOps, tokens: int, hidden: int) -> Case:
    def setup() -> Callable[[], Any]:
        x, residual, weight = _random(ops, tokens, hidden), _random(ops, tokens, hidden), _random(ops, hidden)
        return lambda: ops.add_rms_norm(x, residual, weight, 1e-6)

    return Case(f"add_rms_norm {tokens} x {hidden}", setup, 4 * tokens * hidden * ops.dtype.itemsize)


def _silu_and_mul(ops: CudaOps, tokens: int, width: int) -> Case:
    def setup() -> Callable[[], Any]:
        gate_up = _random(ops, tokens, 2 * width)
        return lambda: ops.silu_and_mul(gate_up)

    return Case(f"silu_and_mul {tokens} x {width}", setup, 3 * tokens * width * ops.dtype.itemsize)


def _add_norm(ops: CudaOps, tokens: int, hidden: int) -> tuple[Any, Any, Any, float]:
    """x, residual, norm weight and eps. A call may write the normed sum over x and the sum over the residual.

    The weight makes rows of length 1, so that the residual hardly grows from call to call, and products are of size 1.
    """
    norm_weight = ops.to_device(np.full(hidden, hidden**-0.5, ops.dtype))
    return _random(ops, tokens, hidden), _random(ops, tokens, hidden), norm_weight, 1e-6


def _add_norm_linear(ops: CudaOps, tokens: int, hidden: int, outputs: int) -> Case:
    def setup() -> Callable[[], Any]:
        inputs, weight = _add_norm(ops, tokens, hidden), DenseWeight(_random(ops, outputs, hidden))
        return lambda: ops.add_norm_linear(*inputs, weight)

    num_bytes = (3 * tokens * hidden + hidden + outputs * hidden + tokens * outputs) * ops.dtype.itemsize
    name = f"add_norm_linear {tokens} x {hidden} to {outputs}"
    return Case(name, setup, num_bytes, 2 * tokens * hidden * outputs)


def _add_norm_swiglu(ops: CudaOps, tokens: int, hidden: int, width: int) -> Case:
    def setup() -> Callable[[], Any]:
        inputs, gate_up = _add_norm(ops, tokens, hidden), DenseWeight(_random(ops, 2 * width, hidden))
        return lambda: ops.add_norm_swiglu(*inputs, gate_up)

    num_bytes = (3 * tokens * hidden + hidden + 2 * width * hidden + tokens * width) * ops.dtype.itemsize
    name = f"add_norm_swiglu {tokens} x {hidden} to 2 x {width}"
    return Case(name, setup, num_bytes, 4 * tokens * hidden * width)


def _linear_before_norm(ops: CudaOps, tokens: int, columns: int, rows: int) -> Case:
    def setup() -> Callable[[], Any]:
        x, weight = _random(ops, tokens, columns), DenseWeight(_random(ops, rows, columns))
        residual, norm_weight = _random(ops, tokens, rows), _random(ops, rows)
        return lambda: ops.linear_before_norm(x, weight, residual, norm_weight)[0]

    num_bytes = (tokens * columns + rows * columns + 3 * tokens * rows + rows) * ops.dtype.itemsize
    name = f"linear_before_norm {tokens} x {columns} to {rows}"
    return Case(name, setup, num_bytes, 2 * tokens * columns * rows)


def _linear(ops: CudaOps, tokens: int, columns: int, rows: int) -> Case:
    def setup() -> Callable[[], Any]:
        x, weight = _random(ops, tokens, columns), DenseWeight(_random(ops, rows, columns))
        return lambda: ops.linear(x, weight)

    num_bytes = (tokens * columns + rows * columns + tokens * rows) * ops.dtype.itemsize
    return Case(f"linear {tokens} x {columns} to {rows}", setup, num_bytes, 2 * tokens * columns * rows)


def _paged(ops: CudaOps, batch: int, query_len: int, context: int, kv_heads: int) -> tuple[Any, Any, AttentionMetadata]:
    """K and V of sequences of `context` tokens in random blocks, and a step that brings the last query_len of each."""
    blocks = context // BLOCK_SIZE
    k, v = (_random(ops, batch * blocks, BLOCK_SIZE, kv_heads, 128) for _ in range(2))
    tables = np.random.default_rng(0).permutation(batch * blocks).astype(np.int32).reshape(batch, blocks)
    positions = np.arange(context - query_len, context, dtype=np.int32)
    slots = tables[:, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
    meta = AttentionMetadata(
        slot_mapping=ops.to_device(slots.reshape(-1)),
        cu_seqlens_q=ops.to_device(np.arange(batch + 1, dtype=np.int32) * query_len),
        seq_lens=ops.to_device(np.full(batch, context, np.int32)),
        block_tables=ops.to_device(tables),
        max_seqlen_q=query_len,
        max_seqlen_k=context,
    )
    return k, v, meta


def _rope_attention(ops: CudaOps, batch: int, context: int, heads: int, kv_heads: int) -> Case:
    """A decode step's; it writes the same keys and values again each time."""
    angles = np.arange(context)[:, None] * 1e6 ** (-np.arange(64) / 64)
    table = np.concatenate([np.cos(angles), np.sin(angles)], axis=1, dtype=np.float32)

    def setup() -> Callable[[], Any]:
        qkv = _random(ops, batch, (heads + 2 * kv_heads) * 128)
        positions, rope_table = ops.to_device(np.full(batch, context - 1, np.int32)), ops.to_device(table)
        q_norm, k_norm = _random(ops, 128), _random(ops, 128)
        k, v, meta = _paged(ops, batch, 1, context, kv_heads)
        return lambda: ops.rope_attention(qkv, positions, rope_table, q_norm, k_norm, 1e-6, k, v, meta, 128**-0.5)

    # Of K and V, context - 1 tokens are read and one is written.
    num_bytes = batch * (2 * context * kv_heads + 2 * heads + 2 * kv_heads) * 128 * ops.dtype.itemsize
    name = f"rope_attention decode {batch} x {context}, {heads}/{kv_heads} heads"
    return Case(name, setup, num_bytes, 4 * batch * heads * 128 * context)


def _attention(ops: CudaOps, batch: int, query_len: int, context: int, heads: int, kv_heads: int, decode: bool) -> Case:
    query_len = 1 if decode else query_len

    def setup() -> Callable[[], Any]:
        q = _random(ops, batch * query_len, heads, 128)
        k, v, meta = _paged(ops, batch, query_len, context, kv_heads)
        return lambda: ops.attention(q, k, v, meta, 128**-0.5)

    num_bytes = (2 * batch * context * kv_heads + 2 * batch * query_len * heads) * 128 * ops.dtype.itemsize
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
