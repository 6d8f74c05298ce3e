"""Every op in NumPy: the specification the CUDA kernels are tested against, and the backend without a GPU.

float32 is computed as it stands; float16 and bfloat16 inputs are widened to float32, and results are rounded
once at the end of each op, as the kernels do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from mini_vllm.ops.base import Array, AttentionMetadata, Compositions, SamplingBatch, TokenLogprobs
from mini_vllm.ops.philox import exponential_noise
from mini_vllm.ops.weight import Weight

QUERY_TILE = 256  # queries attended at once in a prefill: bounds the score matrix to heads x 256 x keys


def _f32(x: np.ndarray) -> np.ndarray:
    return x if x.dtype == np.float32 else x.astype(np.float32)  # the test is cheaper than astype's own


def _halves(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first and second half of the last axis."""
    middle = x.shape[-1] // 2
    return x[..., :middle], x[..., middle:]


def _csr_rows(offsets: np.ndarray) -> np.ndarray:
    """The row of each entry of a CSR list: offsets [S + 1] to [offsets[S]]."""
    return np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))


class NumpyDownload:
    """`Download` where everything has run by the time it is asked for."""

    def start(self, data: Array, count: int) -> Callable[[], np.ndarray]:
        copy = data[:count].copy()
        return lambda: copy


class NumpyOps(Compositions):
    """`Ops` on the CPU. See `Ops` for what each method means; here is how."""

    device = "cpu"

    def __init__(self, dtype: np.dtype | type = np.float32) -> None:
        self.dtype = np.dtype(dtype)
        self._gathered = [np.empty(0, self.dtype), np.empty(0, self.dtype)]  # keys, values; see _gather_kv

    def _round(self, x: np.ndarray) -> np.ndarray:
        return x if x.dtype == self.dtype else x.astype(self.dtype)

    # ---- memory -------------------------------------------------------------------------------------------

    def to_device(self, host: np.ndarray) -> Array:
        return host

    def to_host(self, array: Array) -> np.ndarray:
        return array

    def make_download(self, size: int, dtype: np.dtype) -> NumpyDownload:
        return NumpyDownload()

    def synchronize(self) -> None:
        pass

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype) -> Array:
        return np.zeros(shape, dtype)

    def host_zeros(self, shape: tuple[int, ...], dtype: np.dtype) -> Array:
        return self.zeros(shape, dtype)

    def load_weight(self, parts: Sequence[np.ndarray]) -> Array:
        # Column-major: `x @ weight.T` then reads whole rows of memory, twice as fast for a single token.
        weight = np.empty((sum(map(len, parts)), *parts[0].shape[1:]), self.dtype, order="F")
        return np.concatenate(parts, out=weight, casting="unsafe")

    # ---- transformer --------------------------------------------------------------------------------------

    def embedding(self, ids: Array, table: Array, previous: Array | None = None) -> Array:
        if previous is not None:
            ids = np.where(ids < 0, previous[np.maximum(-1 - ids, 0)], ids)
        return table[ids]

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        x = _f32(x)
        mean_square = np.vecdot(x, x)[..., None] / x.shape[-1]
        return self._round(x / np.sqrt(mean_square + eps) * _f32(weight))

    def add_rms_norm(self, x: Array, residual: Array, weight: Array, eps: float) -> tuple[Array, Array]:
        residual = self._round(_f32(x) + _f32(residual))
        return self.rms_norm(residual, weight, eps), residual

    def linear(self, x: Array, weight: Weight) -> Array:
        return self._round(self.logits(x, weight))

    def logits(self, hidden: Array, weight: Weight) -> Array:
        y = _f32(hidden) @ _f32(weight.weight).T
        if weight.bias is not None:
            y += _f32(weight.bias)
        return y

    def silu_and_mul(self, gate_up: Array) -> Array:
        gate, up = _halves(_f32(gate_up))
        with np.errstate(over="ignore"):  # exp(-gate) may be infinite: silu is then -0, as it should be
            return self._round(gate / (1 + np.exp(-gate)) * up)

    def rope(self, x: Array, positions: Array, rope_table: Array) -> Array:
        """Rotate-half RoPE (GPT-NeoX and HF checkpoints): element i turns with i + D/2. x: [T, heads, D]."""
        cos, sin = _halves(rope_table[positions][:, None])
        first, second = _halves(_f32(x))
        out = np.empty(x.shape, self.dtype)
        out_first, out_second = _halves(out)
        out_first[:] = first * cos - second * sin
        out_second[:] = second * cos + first * sin
        return out

    def store_kv(self, k: Array, v: Array, k_cache: Array, v_cache: Array, slot_mapping: Array) -> None:
        """Scatter k and v [T, Hkv, D] into the cache rows slot_mapping [T]; -1 is padding."""
        if slot_mapping.min(initial=0) < 0:
            real = slot_mapping >= 0
            k, v, slot_mapping = k[real], v[real], slot_mapping[real]
        for values, cache in ((k, k_cache), (v, v_cache)):
            cache.reshape(-1, *cache.shape[2:])[slot_mapping] = values

    def copy_blocks(self, k_source: Array, v_source: Array, k_target: Array, v_target: Array, pairs: Array) -> None:
        sources, targets = pairs.T
        k_target[targets] = k_source[sources]
        v_target[targets] = v_source[sources]

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
        num_kv_heads, head_dim = k_cache.shape[2:]
        heads = qkv.reshape(len(qkv), -1, head_dim)
        qk, v = heads[:, :-num_kv_heads], heads[:, -num_kv_heads:]
        if q_norm is not None:
            weights = np.empty(qk.shape[1:], q_norm.dtype)
            weights[:-num_kv_heads], weights[-num_kv_heads:] = q_norm, k_norm
            qk = self.rms_norm(qk, weights, eps)
        qk = self.rope(qk, positions, rope_table)
        self.store_kv(qk[:, -num_kv_heads:], v, k_cache, v_cache, slot_mapping)
        return qk[:, :-num_kv_heads]

    # ---- attention ----------------------------------------------------------------------------------------

    def attention(
        self,
        q: Array,
        k_cache: Array,
        v_cache: Array,
        meta: AttentionMetadata,
        scale: float,
        window: int | None = None,
    ) -> Array:
        # A pure decode step: all sequences at once, padded to the longest.
        if meta.max_seqlen_q == 1 and len(q) == len(meta.seq_lens):
            k, v = self._gather_kv(k_cache, v_cache, meta.block_tables, meta.seq_lens)
            out = self._attend(q[:, None], k, v, meta.seq_lens[:, None] - 1, scale, window)
            return self._round(out.reshape(len(q), -1))

        out = np.empty(q.shape, np.float32)
        query_lens = np.diff(meta.cu_seqlens_q)
        decoding = np.flatnonzero(query_lens == 1)
        if len(decoding):
            rows, seq_lens = meta.cu_seqlens_q[decoding], meta.seq_lens[decoding]
            k, v = self._gather_kv(k_cache, v_cache, meta.block_tables[decoding], seq_lens)
            out[rows] = self._attend(q[rows][:, None], k, v, seq_lens[:, None] - 1, scale, window)[:, 0]
        for i in np.flatnonzero(query_lens > 1):  # prompts one by one, in tiles of queries
            start, end, seq_len = meta.cu_seqlens_q[i], meta.cu_seqlens_q[i + 1], meta.seq_lens[i]
            k, v = self._gather_kv(k_cache, v_cache, meta.block_tables[i : i + 1], meta.seq_lens[i : i + 1])
            for tile in range(start, end, QUERY_TILE):
                tile_end = min(tile + QUERY_TILE, end)
                positions = np.arange(tile, tile_end)[None] + (seq_len - end)
                visible = positions[0, -1] + 1  # keys beyond the tile's last query are masked for all of it
                out[tile:tile_end] = self._attend(
                    q[None, tile:tile_end], k[:, :visible], v[:, :visible], positions, scale, window
                )[0]
        return self._round(out.reshape(len(q), -1))

    def _gather_kv(
        self, k_cache: Array, v_cache: Array, block_tables: Array, seq_lens: Array
    ) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values of some sequences as [sequences, longest, Hkv, D] float32, zero after a sequence's end.

        Zero, because the mask cannot undo what another sequence may have left there: 0 * NaN is NaN. They are
        gathered into buffers that are kept, since fresh memory of that size costs a page fault every 4 KiB.
        """
        block_size, longest = k_cache.shape[1], seq_lens.max()
        tables = block_tables[:, : -(-longest // block_size)]
        padding = np.arange(longest) >= seq_lens[:, None] if len(seq_lens) > 1 else None
        gathered = []
        for i, cache in enumerate((k_cache, v_cache)):
            size = tables.size * cache[0].size
            if self._gathered[i].size < size:
                self._gathered[i] = np.empty(2 * size, self.dtype)
            out = self._gathered[i][:size].reshape(*tables.shape, *cache.shape[1:])
            cache.take(tables, axis=0, out=out, mode="clip")  # "raise" would go through a buffer of its own
            out = _f32(out).reshape(len(tables), -1, *cache.shape[2:])[:, :longest]
            if padding is not None:
                out[padding] = 0
            gathered.append(out)
        return gathered[0], gathered[1]

    @staticmethod
    def _attend(
        q: np.ndarray, k: np.ndarray, v: np.ndarray, positions: np.ndarray, scale: float, window: int | None
    ) -> np.ndarray:
        """softmax(scale * q k^T + mask) v. q: [B, L, Hq, D]; k, v: [B, keys, Hkv, D]; positions: [B, L]."""
        batch, length, _, head_dim = q.shape
        num_kv_heads = k.shape[2]
        # The query heads that share a KV head become rows of one matrix, so no key is copied per query head.
        grouped = _f32(q).reshape(batch, length, num_kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)
        rows = grouped.reshape(batch, num_kv_heads, -1, head_dim) * scale
        scores = rows @ k.transpose(0, 2, 3, 1)

        if window is not None or positions.min() + 1 < k.shape[1]:  # else every query sees every key
            distance = positions[:, :, None] - np.arange(k.shape[1])  # [B, L, keys]
            hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
            by_query = scores.reshape(*grouped.shape[:4], -1)  # a view: [B, Hkv, heads of a group, L, keys]
            by_query += np.where(hidden, np.float32(-np.inf), np.float32(0))[:, None, None]

        # Where no key is seen all scores are -inf: finite bounds make that zeros. Other sums are 1 and more.
        scores -= scores.max(axis=-1, keepdims=True, initial=np.finfo(np.float32).min)
        np.exp(scores, out=scores)
        out = scores @ v.transpose(0, 2, 1, 3) / np.maximum(scores.sum(axis=-1, keepdims=True), 1)
        return out.reshape(grouped.shape).transpose(0, 3, 1, 2, 4).reshape(q.shape)

    # ---- sampling -----------------------------------------------------------------------------------------

    def sample(self, logits: Array, batch: SamplingBatch) -> Array:
        logits = self._apply_rules(logits.copy(), batch)
        greedy = logits.argmax(axis=-1).astype(np.int32)  # ties go to the lowest id
        if not batch.any_random:
            return greedy
        is_greedy = batch.temperature == 0
        logits /= np.where(is_greedy, np.float32(1), batch.temperature)[:, None]
        if batch.any_filter:
            logits = self._filter(logits, batch)
        # The exponential race: argmin of noise / probability is a draw from the distribution, without
        # normalising or summing it (the Gumbel-max trick with -log(noise) as the Gumbel variable).
        noise = exponential_noise(batch.seeds, batch.positions, logits.shape[-1])
        drawn = (logits - np.log(noise)).argmax(axis=-1).astype(np.int32)
        return np.where(is_greedy, greedy, drawn)

    @staticmethod
    def _apply_rules(logits: np.ndarray, batch: SamplingBatch) -> np.ndarray:
        """allowed_token_ids, then bias and bans, then penalties: the rules that greedy decoding obeys too."""
        if batch.allowed_ids is not None:
            forbidden = np.diff(batch.allowed_offsets)[:, None] > 0  # rows that have a list
            forbidden = np.broadcast_to(forbidden, logits.shape).copy()
            forbidden[_csr_rows(batch.allowed_offsets), batch.allowed_ids] = False
            logits[forbidden] = -np.inf
        if batch.bias_ids is not None:
            logits[_csr_rows(batch.bias_offsets), batch.bias_ids] += batch.bias_values
        if batch.penalty_ids is not None:
            rows, counts = _csr_rows(batch.penalty_offsets), batch.penalty_counts
            seen = logits[rows, batch.penalty_ids]
            repetition = batch.repetition_penalty[rows]
            seen = np.where(seen > 0, seen / repetition, seen * repetition)
            seen -= batch.frequency_penalty[rows] * counts + batch.presence_penalty[rows] * (counts > 0)
            logits[rows, batch.penalty_ids] = seen
        return logits

    @staticmethod
    def _filter(logits: np.ndarray, batch: SamplingBatch) -> np.ndarray:
        """min_p, then top_k, then top_p, each over what the one before left; equal logits share their fate.

        Each rule keeps the logits at or above a threshold, so a kernel may find it by any search:
        min_p: max + log(min_p); top_k: the k-th largest; top_p: the smallest logit such that the
        probability mass strictly above it is less than top_p.
        """
        descending = -np.sort(-logits, axis=-1)
        with np.errstate(divide="ignore"):  # log(0) = -inf: no min_p
            threshold = descending[:, :1] + np.log(batch.min_p)[:, None]
        vocab_size = logits.shape[-1]
        last = np.where(batch.top_k > 0, np.minimum(batch.top_k, vocab_size), vocab_size) - 1
        threshold = np.maximum(threshold, np.take_along_axis(descending, last[:, None], axis=-1))

        kept = np.where(descending >= threshold, np.exp(descending - descending[:, :1]), np.float32(0))
        mass_above = np.cumsum(kept, axis=-1) - kept
        limit = np.where(batch.top_p < 1, batch.top_p, np.inf)[:, None] * kept.sum(axis=-1, keepdims=True)
        last = (mass_above < limit).sum(axis=-1, keepdims=True) - 1
        threshold = np.maximum(threshold, np.take_along_axis(descending, last, axis=-1))
        return np.where(logits >= threshold, logits, np.float32(-np.inf))

    def logprobs(self, logits: Array, token_ids: Array, num_top: int) -> TokenLogprobs:
        shifted = logits - logits.max(axis=-1, keepdims=True)
        log_softmax = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
        chosen = np.take_along_axis(log_softmax, token_ids[:, None], axis=-1)
        top_ids = np.argsort(-log_softmax, axis=-1, kind="stable")[:, :num_top].astype(np.int32)
        return TokenLogprobs(
            logprobs=chosen[:, 0],
            ranks=1 + (log_softmax > chosen).sum(axis=-1, dtype=np.int32),
            top_ids=top_ids,
            top_logprobs=np.take_along_axis(log_softmax, top_ids, axis=-1),
        )

    def all_reduce(self, x: Array) -> Array:
        return x
