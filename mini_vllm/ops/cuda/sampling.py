"""Sampling on the GPU: which of sampling.cu's kernels run, on what grid, and the little memory they keep.

What runs depends on host facts only (shapes, any_random, any_filter, which rule groups are None), and every number of
the batch is read from device arrays, so a captured sampling step serves any batch that is written into its columns.
"""

from __future__ import annotations

import functools

import cupy
import numpy as np

from mini_vllm.ops.base import Array, SamplingBatch, TokenLogprobs
from mini_vllm.ops.cuda.device import DeviceInfo
from mini_vllm.ops.cuda.kernel import Kernel

MAX_TOP = 256  # NUM_MAXIMA of sampling.cu: the most top tokens that logprobs returns
CLUSTER = 8  # blocks that share a row in Hopper's thread block clusters: the largest size every such GPU has

_THREADS = 512  # of a block
_SAMPLE_THREADS = 256

_SAMPLE_BLOCKS_PER_SM = 4
_MAX_CLUSTER_ROWS = 128  # with more, one block for each row fills the GPU and is faster
_STATIC_SHARED_BYTES = 27 << 10  # of the kernels that search a row, rounded up
_RESERVED_ROWS = 1024


@functools.cache
def _kernel(name: str, *arguments: int) -> Kernel:
    return Kernel("sampling.cu", f"{name}<{', '.join(map(str, arguments))}>", pdl=True)


def instances() -> list[Kernel]:
    """Every kernel that this module launches."""
    return [
        _kernel("apply_rules", _THREADS),
        _kernel("sample", _SAMPLE_THREADS),
        *(_kernel(name, blocks, _THREADS) for name in ("filter_and_sample", "logprobs") for blocks in (1, CLUSTER)),
    ]


class CudaSampler:
    """`Ops.sample` and `Ops.logprobs` on one device; the definition is `NumpyOps`. For one stream at a time.

    The memory that the kernels keep between launches is allocated here. Should a batch need more, it grows, which
    cannot happen while a graph is captured: run the largest batch once before.
    """

    def __init__(self, info: DeviceInfo) -> None:
        self._info = info
        self._max_cluster_rows = _MAX_CLUSTER_ROWS if info.compute_capability >= (9, 0) else 0
        self._workspaces: dict[str, Array] = {}
        self._outgrown: list[Array] = []  # graphs captured earlier still use them
        self._workspace("best", _RESERVED_ROWS, np.uint64)
        self._workspace("arrived", _RESERVED_ROWS, np.uint32)

    def sample(self, logits: Array, batch: SamplingBatch) -> Array:
        """Draw one token id a row: logits [S, V] float32, overwritten, to [S] int32. See `NumpyOps.sample`.

        Raises:
            ValueError: logits or columns of a wrong shape or dtype.
            RuntimeError: a workspace would have to grow during a capture.
        """
        rows, vocab_size = _check(logits, batch.temperature, "temperature")
        token_ids = cupy.empty(rows, np.int32)
        self._apply_rules(logits, batch)
        if batch.any_random and batch.any_filter:
            blocks, shared_memory = self._row_grid(rows, vocab_size)
            _kernel("filter_and_sample", blocks, _THREADS)(
                (rows * blocks,),
                (_THREADS,),
                (logits, batch.temperature, batch.top_k, batch.top_p, batch.min_p, batch.seeds, batch.positions,
                 token_ids, np.int32(vocab_size)),
                shared_memory,
            )  # fmt: skip
        else:
            splits = self._num_splits(rows, vocab_size)
            _kernel("sample", _SAMPLE_THREADS)(
                (rows * splits,),
                (_SAMPLE_THREADS,),
                (logits, batch.temperature if batch.any_random else None, batch.seeds, batch.positions,
                 self._workspace("best", rows, np.uint64), self._workspace("arrived", rows, np.uint32),
                 token_ids, np.int32(vocab_size), np.int32(splits)),
            )  # fmt: skip
        return token_ids

    def logprobs(self, logits: Array, token_ids: Array, num_top: int) -> TokenLogprobs:
        """log_softmax of logits [S, V] float32 at token_ids [S] int32, with ranks and the num_top best tokens.

        Raises:
            ValueError: num_top outside 0 to MAX_TOP, or arrays of a wrong shape or dtype.
        """
        rows, vocab_size = _check(logits, token_ids, "token_ids")
        if not 0 <= num_top <= MAX_TOP:
            raise ValueError(f"num_top must be between 0 and {MAX_TOP}, got {num_top}")
        num_top = min(num_top, vocab_size)
        result = TokenLogprobs(
            logprobs=cupy.empty(rows, np.float32),
            ranks=cupy.empty(rows, np.int32),
            top_ids=cupy.empty((rows, num_top), np.int32),
            top_logprobs=cupy.empty((rows, num_top), np.float32),
        )
        blocks, shared_memory = self._row_grid(rows, vocab_size)
        _kernel("logprobs", blocks, _THREADS)(
            (rows * blocks,),
            (_THREADS,),
            (logits, token_ids, result.logprobs, result.ranks, result.top_ids, result.top_logprobs,
             np.int32(vocab_size), np.int32(num_top)),
            shared_memory,
        )  # fmt: skip
        return result

    def _apply_rules(self, logits: Array, batch: SamplingBatch) -> None:
        allowed, bias, penalty = batch.allowed_ids, batch.bias_ids, batch.penalty_ids
        if allowed is None and bias is None and penalty is None:
            return
        rows, vocab_size = logits.shape
        _kernel("apply_rules", _THREADS)(
            (rows,),
            (_THREADS,),
            (logits,
             batch.allowed_offsets, allowed,
             None if allowed is None else self._workspace("allowed", len(allowed), np.float32),
             batch.bias_offsets, bias, batch.bias_values,
             batch.penalty_offsets, penalty, batch.penalty_counts,
             batch.repetition_penalty, batch.presence_penalty, batch.frequency_penalty,
             np.int32(vocab_size)),
        )  # fmt: skip

    def _num_splits(self, rows: int, vocab_size: int) -> int:
        """Blocks a row for `sample`: enough to fill the GPU, each with a group of four tokens a thread at least."""
        at_most = -(-vocab_size // (4 * _SAMPLE_THREADS))
        return max(1, min(at_most, self._info.num_sms * _SAMPLE_BLOCKS_PER_SM // max(rows, 1)))

    def _row_grid(self, rows: int, vocab_size: int) -> tuple[int, int]:
        """For the kernels that search a row: its blocks and their dynamic shared memory.

        On Hopper a cluster of blocks keeps a row in its shared memory, if that is large enough.
        """
        runs = -(-vocab_size // 128)  # of 32 groups of 4 tokens; the blocks of a row take them in turn
        part = 512 * -(-runs // CLUSTER)
        fits = part + _STATIC_SHARED_BYTES <= self._info.max_shared_memory
        if fits and rows <= self._max_cluster_rows:
            return CLUSTER, part
        return 1, 0

    def _workspace(self, name: str, size: int, dtype: np.dtype | type) -> Array:
        """A zeroed array of at least `size` elements, the same one in every call that it is large enough for."""
        array = self._workspaces.get(name)
        if array is None or len(array) < size:
            if cupy.cuda.get_current_stream().is_capturing():
                raise RuntimeError(f"sampling needs {size} {name} entries: run this batch once before capturing it")
            if array is not None:
                self._outgrown.append(array)
            array = self._workspaces[name] = cupy.zeros(max(size, 1), dtype)
        return array


def _check(logits: Array, column: Array, name: str) -> tuple[int, int]:
    if logits.ndim != 2 or logits.shape[1] == 0 or column.shape != logits.shape[:1]:
        raise ValueError(
            f"logits must be [rows, vocab_size] and {name} [rows], got {list(logits.shape)} and {list(column.shape)}"
        )
    return logits.shape
