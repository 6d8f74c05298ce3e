"""CudaOps: every op on the GPU, each by the module that chooses its kernel and grid. Nothing here waits.

Outputs come from CuPy's current memory pool. To capture a step into a graph, run it on a side stream between
begin_capture and end_capture with a `GPUAllocator` in use that lives as long as the graph: what the pool handed out
then stays reserved for the replays. Inputs that change from step to step are arrays made before the capture and
written in place. `to_device` and `to_host` stay outside.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import cupy
import numpy as np

from mini_vllm.ops.base import Array, AttentionMetadata, Compositions, Residual, SamplingBatch, TokenLogprobs
from mini_vllm.ops.cuda import attention, elementwise, gemm, require_cuda, sampling
from mini_vllm.ops.cuda.device import DeviceInfo, Download, PinnedStaging, WeightUpload, pinned_zeros
from mini_vllm.ops.cuda.gemm_sm90 import AddedResidual
from mini_vllm.ops.cuda.kernel import DTYPES, Kernel, compile_all, type_name
from mini_vllm.ops.weight import Weight


def instances(dtypes: Iterable[np.dtype] = DTYPES, head_dims: Iterable[int] = elementwise.HEAD_DIMS) -> list[Kernel]:
    """Every kernel that `CudaOps` launches for these data types and head sizes."""
    dtypes, head_dims = list(dtypes), list(head_dims)
    return [
        *elementwise.instances(dtypes, head_dims),
        *attention.instances(dtypes, head_dims),
        *gemm.instances(dtypes),
        *sampling.instances(),
    ]


class CudaOps(Compositions):
    """`Ops` on the current CUDA device. See `Ops` for what each method means. For one thread.

    Raises:
        CudaUnavailable: what is missing on this machine and what mends it.
        ValueError: a dtype other than float32, float16 and bfloat16.
    """

    device = "cuda"

    def __init__(self, dtype: np.dtype | type = np.float32) -> None:
        require_cuda()
        type_name(dtype)  # refuses what the kernels do not take
        self.dtype = np.dtype(dtype)
        self.info = DeviceInfo.of()
        self._staging = PinnedStaging()
        self._weight_upload: WeightUpload | None = None  # made for the first weight, dropped by finish_loading
        self._attention = attention.Attention(self.info)
        self._gemm = gemm.Gemm(self.info)
        self._sampler = sampling.CudaSampler(self.info)

    def prepare(self, head_dim: int) -> float:
        """Compile and load all kernels for this dtype and head size, so that no later step has to.

        Returns the seconds of compiling; 0.0 if all kernels were in the cache.
        """
        return compile_all(instances([self.dtype], [head_dim]))

    def tune(self, rows: Sequence[int], weights: Sequence[Weight], head: Weight) -> None:
        """Measure the best way to multiply so many rows with each of these weights; see `Gemm.tune`."""
        self._gemm.tune(rows, weights, head)

    # ---- memory -------------------------------------------------------------------------------------------

    def to_device(self, host: np.ndarray) -> Array:
        """A copy on the device, by way of pinned memory: asynchronous unless it is megabytes large."""
        return self._staging.upload(host)

    def to_host(self, array: Array) -> np.ndarray:
        """A copy on the host; waits for what the current stream has to do before."""
        return cupy.asnumpy(array)

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype) -> Array:
        return cupy.zeros(shape, dtype)

    def host_zeros(self, shape: tuple[int, ...], dtype: np.dtype) -> Array:
        return pinned_zeros(shape, dtype)

    def load_weight(self, parts: Sequence[np.ndarray]) -> Array:
        if self._weight_upload is None:
            self._weight_upload = WeightUpload()
        return self._weight_upload.upload(parts, self.dtype)

    def finish_loading(self) -> None:
        """Wait for the weights and give their pinned buffers back."""
        self.synchronize()
        self._weight_upload = None

    @staticmethod
    def make_download(size: int, dtype: np.dtype | type) -> Download:
        """For results that the host fetches step by step, without stopping the device."""
        return Download(size, dtype)

    def synchronize(self) -> None:
        """Wait for all that the current stream has to do."""
        cupy.cuda.get_current_stream().synchronize()

    # ---- transformer --------------------------------------------------------------------------------------

    def embedding(self, ids: Array, table: Array, previous: Array | None = None) -> Array:
        return elementwise.embedding(ids, table, previous)

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        return elementwise.rms_norm(x, weight, eps)

    def add_rms_norm(self, x: Array, residual: Array, weight: Array, eps: float) -> tuple[Array, Array]:
        return elementwise.add_rms_norm(x, residual, weight, eps)

    def linear(self, x: Array, weight: Weight) -> Array:
        return self._gemm.linear(x, weight)

    def logits(self, hidden: Array, weight: Weight) -> Array:
        return self._gemm.logits(hidden, weight)

    def silu_and_mul(self, gate_up: Array) -> Array:
        return elementwise.silu_and_mul(gate_up)

    def rope_store_kv(
        self,
        qkv: Array,
        positions: Array,
        rope_table: Array,
        q_norm: Array | None,
        k_norm: Array | None,
        eps: float,
        k_cache: Array,
        v_cache: Array,
        slot_mapping: Array,
    ) -> Array:
        return elementwise.rope_store_kv(
            qkv, positions, rope_table, q_norm, k_norm, eps, k_cache, v_cache, slot_mapping
        )

    def store_kv(self, k: Array, v: Array, k_cache: Array, v_cache: Array, slot_mapping: Array) -> None:
        elementwise.store_kv(k, v, k_cache, v_cache, slot_mapping)

    def copy_blocks(self, k_source: Array, v_source: Array, k_target: Array, v_target: Array, pairs: Array) -> None:
        elementwise.copy_blocks(k_source, v_source, k_target, v_target, pairs)

    def add_norm_linear(
        self, x: Array, residual: Residual | None, norm_weight: Array, eps: float, weight: Weight
    ) -> tuple[Array, Array]:
        return self._add_norm_product(x, residual, norm_weight, eps, weight, swiglu=False)

    def add_norm_swiglu(
        self, x: Array, residual: Residual | None, norm_weight: Array, eps: float, gate_up: Weight
    ) -> tuple[Array, Array]:
        return self._add_norm_product(x, residual, norm_weight, eps, gate_up, swiglu=True)

    def _add_norm_product(
        self, x: Array, residual: Residual | None, norm_weight: Array, eps: float, weight: Weight, swiglu: bool
    ) -> tuple[Array, Array]:
        """Both of the above, in as few launches as there are kernels for."""
        if isinstance(residual, AddedResidual):
            if (y := self._gemm.scaled(x, residual, eps, weight, swiglu)) is not None:
                return y, residual.total
            x, residual = residual.total, None
        if fused := self._gemm.norm_linear(x, gemm.Norm(norm_weight, eps, residual), weight, swiglu):
            return fused
        hidden, residual = self._add_norm(x, residual, norm_weight, eps)
        if not swiglu:
            return self._gemm.linear(hidden, weight, fused=True), residual
        gated = self._gemm.swiglu(hidden, weight)
        return self.silu_and_mul(self.linear(hidden, weight)) if gated is None else gated, residual

    def linear_before_norm(
        self, x: Array, weight: Weight, residual: Array, norm_weight: Array | None
    ) -> tuple[Array, Residual]:
        fused = None if norm_weight is None else self._gemm.linear_add(x, weight, residual, norm_weight)
        return fused or super().linear_before_norm(x, weight, residual, norm_weight)

    # ---- attention ----------------------------------------------------------------------------------------

    def rope_attention(
        self,
        qkv: Array,
        positions: Array,
        rope_table: Array,
        q_norm: Array | None,
        k_norm: Array | None,
        eps: float,
        k_cache: Array,
        v_cache: Array,
        meta: AttentionMetadata,
        scale: float,
        window: int | None = None,
    ) -> Array:
        rope = positions, rope_table, q_norm, k_norm, eps
        fused = self._attention.with_rope(qkv, *rope, k_cache, v_cache, meta, scale, window)
        if fused is None:
            return super().rope_attention(qkv, *rope, k_cache, v_cache, meta, scale, window)
        return fused

    def attention(
        self,
        q: Array,
        k_cache: Array,
        v_cache: Array,
        meta: AttentionMetadata,
        scale: float,
        window: int | None = None,
    ) -> Array:
        return self._attention(q, k_cache, v_cache, meta, scale, window)

    # ---- sampling -----------------------------------------------------------------------------------------

    def sample(self, logits: Array, batch: SamplingBatch) -> Array:
        return self._sampler.sample(logits, batch)

    def logprobs(self, logits: Array, token_ids: Array, num_top: int) -> TokenLogprobs:
        return self._sampler.logprobs(logits, token_ids, num_top)

    def all_reduce(self, x: Array) -> Array:
        return x
