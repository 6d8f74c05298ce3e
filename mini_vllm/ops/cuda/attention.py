"""Attention over the paged cache: which kernel serves which sequence, and how many blocks it gets.

Sequences with one new token belong to paged_attention.cu, those with more to flash_attention.cu or, on Hopper, to
flash_attention_sm90.cu; a batch with both is two launches, and each kernel finds its own sequences on the device. Steps
in which every sequence has one new token also have decode_attention.cu, for few, and on Hopper paged_attention_sm90.cu,
for many.
float32, and head sizes that tensor cores cannot take, are served by the plain kernel in flash_attention.cu. No grid
depends on the lengths of sequences: nothing waits for the device, and a captured launch stays right when lengths
and block tables change.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import cupy
import numpy as np

from mini_vllm.ops.base import Array, AttentionMetadata
from mini_vllm.ops.cuda import fused_gemv
from mini_vllm.ops.cuda.device import DeviceInfo
from mini_vllm.ops.cuda.elementwise import HEAD_DIMS, check_rope
from mini_vllm.ops.cuda.kernel import DTYPES, Kernel, TensorMap, type_name

MAX_HEAD_DIM = 256
MAX_ROPE_HEAD_DIM = 128
"""Up to which decoding kernels make q, k and v themselves: a warp holds four elements of a head in each lane."""

HOPPER = (9, 0)
NO_WINDOW = 1 << 30  # beyond any position

THREADS = 128  # a block, in flash_attention.cu
ROW_PADDING = 8  # elements behind each row in shared memory


@functools.cache
def _kernel(file: str, name: str, prefers_shared_memory: bool = False) -> Kernel:
    return Kernel(file, name, pdl=True, prefers_shared_memory=prefers_shared_memory)


# ---- what each kernel is told by its template arguments, or knows by its constants --------------------------------


@dataclass(frozen=True)
class PrefillTile:
    """The tile of flash_attention: 64 m_tiles rows (one query token and head each) by block_n keys.

    Chosen such that registers suffice and that a block fits into 99 KiB of shared memory (compute capability 8.6).
    """

    m_tiles: int  # 16-row matrix tiles of each of the 4 warps
    block_n: int

    @staticmethod
    def of(head_dim: int) -> PrefillTile:
        if head_dim <= 64:
            return PrefillTile(m_tiles=2, block_n=112)
        if head_dim <= 128:
            return PrefillTile(m_tiles=2, block_n=64)
        return PrefillTile(m_tiles=1, block_n=48)

    @property
    def block_m(self) -> int:
        return 64 * self.m_tiles

    def shared_memory(self, head_dim: int, itemsize: int) -> int:
        rows = self.block_m + 2 * self.block_n
        return rows * (head_dim + ROW_PADDING) * itemsize + 2 * self.block_n * 4

    def kernel(self, dtype: np.dtype, head_dim: int) -> Kernel:
        name = f"flash_attention<{type_name(dtype)}, {head_dim}, {self.m_tiles}, {self.block_n}>"
        return _kernel("flash_attention.cu", name)


@dataclass(frozen=True)
class HopperTile:
    """The tile of flash_attention_sm90: 128 rows by 128 or 64 keys, in tiles of 64 elements of the head."""

    column_tiles: int
    block_n: int

    BLOCK_M = 128
    THREADS = 384
    STAGES = 5
    BOOKKEEPING = 2768  # bytes besides the tiles

    @staticmethod
    def of(head_dim: int) -> HopperTile:
        if head_dim <= 128:
            return HopperTile(column_tiles=-(-head_dim // 64), block_n=128)
        return HopperTile(column_tiles=4, block_n=64)

    @property
    def shared_memory(self) -> int:
        return self.column_tiles * (self.BLOCK_M + self.STAGES * self.block_n) * 128 + self.BOOKKEEPING

    @staticmethod
    def kernel(dtype: np.dtype, head_dim: int) -> Kernel:
        return _kernel("flash_attention_sm90.cu", f"flash_attention_sm90<{type_name(dtype)}, {head_dim}>")


@dataclass(frozen=True)
class DecodeTile:
    """The tile of paged_attention: 16 warps keys by 8 n_tiles query heads of one KV head."""

    warps: int
    n_tiles: int

    MAX_BLOCKS_PER_SM = 3
    FEW_BLOCKS_PER_SM = 2  # for small batches
    STAGES = 2

    @staticmethod
    def of(head_dim: int, group_size: int) -> DecodeTile:
        if head_dim > 128:
            # Four warps would need more shared memory than compute capability 8.6 has, and 16 heads more registers:
            # with larger groups, keys are read once for each 8 heads.
            return DecodeTile(warps=2, n_tiles=1)
        return DecodeTile(warps=4, n_tiles=1 if group_size <= 8 else 2)

    @property
    def threads(self) -> int:
        return 32 * self.warps

    def shared_memory(self, head_dim: int, itemsize: int) -> int:
        return self.STAGES * 2 * 16 * self.warps * (head_dim + ROW_PADDING) * itemsize

    def blocks(self, head_dim: int, itemsize: int, info: DeviceInfo) -> int:
        """As many as the GPU can run at once."""
        # A multiprocessor has 1 KiB more than one block may take, and each block costs 1 KiB besides its own.
        per_sm = (info.max_shared_memory + 1024) // (self.shared_memory(head_dim, itemsize) + 1024 + 32)
        return info.num_sms * max(1, min(per_sm, self.MAX_BLOCKS_PER_SM if self.n_tiles == 1 else 2))

    def kernel(self, dtype: np.dtype, head_dim: int, rope: bool) -> Kernel:
        parameters = f"{type_name(dtype)}, {head_dim}, {self.warps}, {self.n_tiles}, {str(rope).lower()}"
        return _kernel("paged_attention.cu", f"paged_attention<{parameters}>")


@dataclass(frozen=True)
class BoxTile:
    """The shape of paged_attention_sm90: blocks for `heads` KV heads, each with a ring of `slots` boxes."""

    heads: int
    slots: int
    per_sm: int  # blocks of a multiprocessor

    MIN_SEQUENCE_HEADS = 1024  # sequences times KV heads; with fewer, paged_attention is as fast or faster
    MAX_GROUP_SIZE = 8
    MAX_HEADS = 8
    MAX_WARPS = 10  # of a multiprocessor
    MAX_SLOTS = 20
    TILE_KEYS = 16
    SM_SHARED_MEMORY = 228 << 10  # of a multiprocessor
    BLOCK_COST = 2 << 10  # of it, besides dynamic shared memory: what the compiler lays out, and the system's part

    @classmethod
    def of(cls, num_kv_heads: int, head_dim: int) -> BoxTile:
        """With as many heads as there may be, since they lie together in memory.

        And with as few slots as keep another block out: were there room, some multiprocessors would get one more while
        the kernel in front ends, and others none.
        """
        heads = max(n for n in range(1, cls.MAX_HEADS + 1) if num_kv_heads % n == 0)
        per_sm = cls.MAX_WARPS // (heads + 1)
        without_ring = cls(heads, 0, per_sm).shared_memory(head_dim, group_size=1)
        room = cls.SM_SHARED_MEMORY // (per_sm + 1) - cls.BLOCK_COST - without_ring
        return cls(heads, room // cls._slot_bytes(heads, head_dim) + 1, per_sm)

    @classmethod
    def _slot_bytes(cls, heads: int, head_dim: int) -> int:
        return 2 * cls.TILE_KEYS * heads * head_dim

    def shared_memory(self, head_dim: int, group_size: int) -> int:
        own = group_size * (head_dim + ROW_PADDING) + 2 * head_dim  # q and the new key and value of a head
        return self.slots * self._slot_bytes(self.heads, head_dim) + 2 * self.heads * own

    @staticmethod
    def serves(head_dim: int) -> bool:
        return head_dim in (64, 128)

    @staticmethod
    def kernel(dtype: np.dtype, head_dim: int) -> Kernel:
        return _kernel("paged_attention_sm90.cu", f"paged_attention_sm90<{type_name(dtype)}, {head_dim}>")


@dataclass(frozen=True)
class ClusterTile:
    """The shape of decode_attention: a cluster of blocks for each sequence and KV head."""

    blocks: int
    warps: int  # of a block
    stages: int  # tiles of 16 keys in shared memory, for each warp

    MAX_GROUP_SIZE = 8

    @staticmethod
    def of(num_sequences: int, num_kv_heads: int) -> ClusterTile | None:
        """The best shape for a batch; None where paged_attention is faster."""
        tiles = FEW_SEQUENCES if num_sequences <= fused_gemv.MAX_ROWS else MORE_SEQUENCES
        return next((tile for most, tile in tiles.items() if num_sequences * num_kv_heads <= most), None)

    def shared_memory(self, head_dim: int, group_size: int, itemsize: int) -> int:
        tiles = self.warps * self.stages * 2 * 16 * (head_dim + ROW_PADDING) * itemsize
        results = self.blocks * (64 + group_size * (head_dim + 4) * 4) if self.blocks > 1 else 0
        return tiles + results

    def kernel(self, dtype: np.dtype, head_dim: int) -> Kernel:
        name = f"decode_attention<{type_name(dtype)}, {head_dim}, {self.blocks}, {self.warps}, {self.stages}>"
        beside_fused_gemv = self in FEW_SEQUENCES.values()
        return _kernel("decode_attention.cu", name, beside_fused_gemv)


FEW_SEQUENCES = {16: ClusterTile(8, 8, 1), 32: ClusterTile(8, 4, 1), 64: ClusterTile(4, 8, 1)}
MORE_SEQUENCES = {64: ClusterTile(4, 4, 2)}
"""By the number of sequences times KV heads up to which they serve: beside fused_gemv.cu, and beside other products."""


@functools.lru_cache(maxsize=1024)
def _cache_map(address: int, shape: tuple[int, ...], box_heads: int) -> TensorMap:
    """A cache [blocks, block_size, Hkv, D] as [Hkv D / 64, slots, 64], in boxes of 16 slots and some heads."""
    blocks, block_size, num_kv_heads, head_dim = shape
    sizes = 64, blocks * block_size, num_kv_heads * head_dim // 64
    box = BoxTile.TILE_KEYS, box_heads * head_dim // 64
    # Were 256 bytes fetched at a time, what the box wants next would come twice: 5 % slower.
    return TensorMap(address, sizes, (2 * num_kv_heads * head_dim, 128), box, l2_bytes=128)


def _plain_kernel(dtype: np.dtype, head_dim: int) -> Kernel:
    return _kernel("flash_attention.cu", f"plain_attention<{type_name(dtype)}, {-(-head_dim // 32)}>")


def _workspace_bytes(num_sms: int) -> int:
    """Room for the partial results of all blocks, whichever kernel needs more."""
    heads = 16
    decode = 2 * DecodeTile.MAX_BLOCKS_PER_SM * heads * (8 + (MAX_HEAD_DIM + 4) * 4)
    boxes = 2 * BoxTile.MAX_WARPS * (MAX_ROPE_HEAD_DIM // 16 + 1) * 32 * 16
    prefill = HopperTile.BLOCK_M * (MAX_HEAD_DIM + 8) * 4
    return num_sms * max(decode, boxes, prefill)


def _uses_tensor_cores(dtype: np.dtype, head_dim: int) -> bool:
    return dtype.itemsize == 2 and head_dim % 16 == 0


def instances(
    dtypes: Iterable[np.dtype] = DTYPES,
    head_dims: Iterable[int] = HEAD_DIMS,
    compute_capability: tuple[int, int] | None = None,
) -> list[Kernel]:
    """Every kernel that this module launches for these data types and head sizes, whatever the group size.

    With a compute capability only those that such a GPU uses.
    """
    kernels = []
    head_dims = list(head_dims)
    for dtype in map(np.dtype, dtypes):
        for head_dim in head_dims:
            if not _uses_tensor_cores(dtype, head_dim):
                kernels.append(_plain_kernel(dtype, head_dim))
                continue
            if compute_capability != HOPPER:
                kernels.append(PrefillTile.of(head_dim).kernel(dtype, head_dim))
            if compute_capability in (HOPPER, None):
                kernels.append(HopperTile.kernel(dtype, head_dim))
                if BoxTile.serves(head_dim):
                    kernels.append(BoxTile.kernel(dtype, head_dim))
            for group_size in (8, 16):
                tile = DecodeTile.of(head_dim, group_size)
                kernels += [tile.kernel(dtype, head_dim, rope) for rope in (False, head_dim <= MAX_ROPE_HEAD_DIM)]
            if head_dim <= MAX_ROPE_HEAD_DIM and (compute_capability is None or compute_capability >= HOPPER):
                tiles = (*FEW_SEQUENCES.values(), *MORE_SEQUENCES.values())
                kernels += [tile.kernel(dtype, head_dim) for tile in tiles]
    return list(dict.fromkeys(kernels))


# ---- launching ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _DecodeStep:
    """What the decode kernels are told: of a step's shapes, and of what lies where."""

    out: Array
    x: Array  # q [T, Hq, D]; with rope the output of the QKV projection, [T, (Hq + 2 Hkv) D]
    k_cache: Array
    v_cache: Array
    meta: AttentionMetadata
    group_size: int
    scale: float
    window: int | None
    rope: tuple[Array | None, ...] = (None,) * 4  # rope_table, q_norm, k_norm, slot_mapping, if q is still to be made
    eps: float = 0.0

    @property
    def num_sequences(self) -> int:
        return len(self.meta.seq_lens)

    @property
    def num_kv_heads(self) -> int:
        return self.k_cache.shape[2]

    @property
    def head_dim(self) -> int:
        return self.k_cache.shape[3]

    @property
    def dtype(self) -> np.dtype:
        return self.x.dtype

    @property
    def sizes(self) -> tuple[np.int32, ...]:
        """max_blocks, block_size, num_kv_heads, group_size."""
        max_blocks, block_size = self.meta.block_tables.shape[1], self.k_cache.shape[1]
        return tuple(map(np.int32, (max_blocks, block_size, self.num_kv_heads, self.group_size)))

    @property
    def rules(self) -> tuple[np.float32, np.float32, np.int32]:
        """eps, scale, window."""
        return np.float32(self.eps), np.float32(self.scale), _window(self.window)


def _window(window: int | None) -> np.int32:
    return np.int32(NO_WINDOW if window is None else min(window, NO_WINDOW))


class Attention:
    """`Ops.attention` on one GPU.

    It owns the workspace of sequences that several blocks share, so launches of one object must follow one another
    on the device: one stream, or graphs that are replayed on one stream.

    Args:
        info: the GPU.
        wgmma: use Hopper's own kernels for prefill and large batches; by default where it is one.
    """

    def __init__(self, info: DeviceInfo, wgmma: bool | None = None) -> None:
        self._info = info
        self._wgmma = info.compute_capability == HOPPER if wgmma is None else wgmma
        # Some MiB, whatever batch and context come. Made here because it must neither move nor grow under a graph.
        self._partials = cupy.empty(_workspace_bytes(info.num_sms), np.uint8)
        # Counters, zero between launches: each launch clears what it has counted.
        self._arrivals = cupy.zeros(BoxTile.MAX_WARPS * info.num_sms, np.int32)
        self._work = cupy.zeros(2, np.int32)

    def __call__(
        self,
        q: Array,
        k_cache: Array,
        v_cache: Array,
        meta: AttentionMetadata,
        scale: float,
        window: int | None = None,
    ) -> Array:
        """See `Ops.attention`. A token of a sequence with no keys gets zeros; one of no sequence is left unwritten.

        Raises:
            ValueError: shapes that do not fit, a head size above 256, a scale or window that is not positive.
        """
        num_kv_heads, head_dim, num_sequences = self._check(q, k_cache, v_cache, meta, scale, window)
        num_tokens, num_heads, _ = q.shape
        group_size, dtype = num_heads // num_kv_heads, q.dtype
        out = cupy.empty((num_tokens, num_heads * head_dim), dtype)
        if num_tokens == 0:
            return out
        arrays = (out, q, k_cache, v_cache, meta.cu_seqlens_q, meta.seq_lens, meta.block_tables)
        max_blocks, block_size = meta.block_tables.shape[1], k_cache.shape[1]
        sizes = tuple(map(np.int32, (num_sequences, max_blocks, block_size, num_kv_heads, group_size)))
        rules = np.float32(scale), _window(window)

        if not _uses_tensor_cores(dtype, head_dim):
            args = (*arrays, *sizes, np.int32(head_dim), *rules)
            _plain_kernel(dtype, head_dim)((num_tokens, num_heads), (THREADS,), args)
            return out

        if meta.max_seqlen_q > 1 and self._wgmma:
            args = (*arrays, self._partials, self._arrivals, self._work, *sizes, *rules)
            shared = HopperTile.of(head_dim).shared_memory
            HopperTile.kernel(dtype, head_dim)((self._info.num_sms,), (HopperTile.THREADS,), args, shared)
        elif meta.max_seqlen_q > 1:
            tile = PrefillTile.of(head_dim)
            # Each sequence may end in a tile that is not full.
            num_tiles = num_tokens * group_size // tile.block_m + num_sequences
            args, shared = (*arrays, *sizes, *rules), tile.shared_memory(head_dim, dtype.itemsize)
            tile.kernel(dtype, head_dim)((num_tiles * num_kv_heads,), (THREADS,), args, shared)

        if meta.max_seqlen_q <= 1 or num_sequences > 1 or num_tokens == 1:
            self._launch_paged(_DecodeStep(out, q, k_cache, v_cache, meta, group_size, scale, window))
        return out

    def with_rope(
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
    ) -> Array | None:
        """`Ops.rope_attention` in one launch, for decode steps; None for all others."""
        num_tokens, width = qkv.shape
        num_kv_heads, head_dim = k_cache.shape[2:]
        num_q_heads = width // head_dim - 2 * num_kv_heads
        group_size, num_sequences = num_q_heads // num_kv_heads, len(meta.seq_lens)
        # That no sequence sees another one's new key is what lets a block make it for itself, and load others early.
        if not (
            meta.max_seqlen_q == 1
            and 0 < num_tokens == num_sequences
            and _uses_tensor_cores(qkv.dtype, head_dim)
            and head_dim <= MAX_ROPE_HEAD_DIM
        ):
            return None
        check_rope(qkv, positions, rope_table, q_norm, k_norm, k_cache, v_cache, meta.slot_mapping)
        self._check(qkv.reshape(num_tokens, -1, head_dim)[:, :num_q_heads], k_cache, v_cache, meta, scale, window)
        out = cupy.empty((num_tokens, num_q_heads * head_dim), qkv.dtype)
        rope = rope_table, q_norm, k_norm, meta.slot_mapping
        step = _DecodeStep(out, qkv, k_cache, v_cache, meta, group_size, scale, window, rope, eps)
        if tile := self._cluster_tile(step):
            self._launch_clusters(step, tile)
        elif self._fetches_boxes(step):
            self._launch_boxes(step, BoxTile.of(num_kv_heads, head_dim))
        else:
            self._launch_paged(step)
        return out

    def _cluster_tile(self, step: _DecodeStep) -> ClusterTile | None:
        """The shape of decode_attention.cu where that is the way to go."""
        tile = ClusterTile.of(step.num_sequences, step.num_kv_heads)
        if (
            tile is not None
            and self._info.compute_capability >= HOPPER
            and step.group_size <= ClusterTile.MAX_GROUP_SIZE
            and tile.shared_memory(step.head_dim, step.group_size, step.dtype.itemsize) + 4096
            <= self._info.max_shared_memory
        ):
            return tile
        return None

    @staticmethod
    def _launch_clusters(step: _DecodeStep, tile: ClusterTile) -> None:
        """decode_attention.cu."""
        meta = step.meta
        tile.kernel(step.dtype, step.head_dim)(
            (tile.blocks, step.num_kv_heads, step.num_sequences),
            (32 * tile.warps,),
            (
                *(step.out, step.x, step.k_cache, step.v_cache),
                *(*step.rope, meta.seq_lens, meta.block_tables),
                *(*step.sizes, *step.rules),
            ),
            tile.shared_memory(step.head_dim, step.group_size, step.dtype.itemsize),
        )

    def _fetches_boxes(self, step: _DecodeStep) -> bool:
        """Whether paged_attention_sm90.cu is the way to go."""
        return (
            self._wgmma
            and BoxTile.serves(step.head_dim)
            and step.k_cache.shape[1] % BoxTile.TILE_KEYS == 0
            and step.group_size <= BoxTile.MAX_GROUP_SIZE
            and step.num_sequences * step.num_kv_heads >= BoxTile.MIN_SEQUENCE_HEADS
        )

    def _launch_boxes(self, step: _DecodeStep, box: BoxTile) -> None:
        """paged_attention_sm90.cu."""
        meta, groups = step.meta, step.num_kv_heads // box.heads
        maps = (_cache_map(cache.data.ptr, cache.shape, box.heads) for cache in (step.k_cache, step.v_cache))
        BoxTile.kernel(step.dtype, step.head_dim)(
            (max(1, box.per_sm * self._info.num_sms // groups), groups),
            (32 * (box.heads + 1),),
            (
                *(step.out, step.x, *maps, step.k_cache, step.v_cache),
                *(meta.seq_lens, meta.block_tables, *step.rope),
                *(self._partials, self._arrivals, np.int32(step.num_sequences)),
                *(*step.sizes, np.int32(box.slots), *step.rules),
            ),
            box.shared_memory(step.head_dim, step.group_size),
        )

    def _launch_paged(self, step: _DecodeStep) -> None:
        """paged_attention.cu."""
        meta, tile = step.meta, DecodeTile.of(step.head_dim, step.group_size)
        blocks = tile.blocks(step.head_dim, step.dtype.itemsize, self._info)
        few_blocks = min(blocks, DecodeTile.FEW_BLOCKS_PER_SM * self._info.num_sms)
        tile.kernel(step.dtype, step.head_dim, rope=step.rope[0] is not None)(
            (blocks,),
            (tile.threads,),
            (
                *(step.out, step.x, step.k_cache, step.v_cache),
                *(meta.cu_seqlens_q, meta.seq_lens, meta.block_tables, *step.rope),
                *(self._partials, self._arrivals, np.int32(few_blocks), np.int32(step.num_sequences)),
                *(*step.sizes, *step.rules),
            ),
            tile.shared_memory(step.head_dim, step.dtype.itemsize),
        )

    @staticmethod
    def _check(
        q: Array, k_cache: Array, v_cache: Array, meta: AttentionMetadata, scale: float, window: int | None
    ) -> tuple[int, int, int]:
        """(KV heads, head size, sequences), or a ValueError."""
        num_kv_heads, head_dim = k_cache.shape[2:]
        num_sequences = len(meta.seq_lens)
        if not (
            q.shape[2:] == (head_dim,)
            and q.shape[1] % num_kv_heads == 0
            and k_cache.shape == v_cache.shape
            and q.dtype == k_cache.dtype == v_cache.dtype
            and meta.cu_seqlens_q.shape == (num_sequences + 1,)
            and len(meta.block_tables) == num_sequences
        ):
            raise ValueError(
                f"attention: q {q.dtype}{q.shape}, k_cache {k_cache.dtype}{k_cache.shape}, v_cache {v_cache.dtype}"
                f"{v_cache.shape}, cu_seqlens_q {meta.cu_seqlens_q.shape}, seq_lens {meta.seq_lens.shape} and "
                f"block_tables {meta.block_tables.shape} do not fit; needed are q [T, Hq, D], caches [num_blocks, "
                "block_size, Hkv, D] of q's dtype with Hq a multiple of Hkv, cu_seqlens_q [B + 1], seq_lens [B], "
                "block_tables [B, max_blocks]"
            )
        if head_dim > MAX_HEAD_DIM:
            raise ValueError(f"attention: head_dim is {head_dim}; the CUDA kernels take at most {MAX_HEAD_DIM}")
        if not scale > 0:
            raise ValueError(f"attention: scale is {scale}; it must be positive, usually head_dim ** -0.5")
        if window is not None and window < 1:
            raise ValueError(f"attention: window is {window}; a query sees at least itself, so at least 1")
        return num_kv_heads, head_dim, num_sequences
