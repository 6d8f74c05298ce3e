"""The narrow waist between model and hardware: the `Ops` protocol and the values that cross it.

`NumpyOps` is the specification of every method, `CudaOps` the fast implementation. Arrays are NumPy
arrays on the CPU and CuPy arrays on the GPU. Shape letters: T tokens of this step, B sequences, S rows to
sample, H hidden size, I intermediate size, V vocabulary, Hq / Hkv query / KV heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, TypeVar

import numpy as np

from mini_vllm.ops.weight import Weight

Array = Any  # numpy.ndarray or cupy.ndarray
Residual = Any  # an Array, or what a backend's linear_before_norm makes of it
Dataclass = TypeVar("Dataclass")

BANNED = np.float32(-1e30)
"""Logit added to tokens that bad_words or min_tokens forbid. Finite, so that a row in which every allowed
token is forbidden still has a well-defined answer instead of NaN."""


@dataclass(frozen=True)
class AttentionMetadata:
    """Which tokens of a step belong to which sequence, and where their keys and values live.

    The T tokens of a step are the new tokens of B sequences, one sequence after the other; a decoding
    sequence brings one, a prefill chunk brings many. The last of them has position seq_len - 1.
    """

    slot_mapping: Array  # [T] int32: cache row (block * block_size + offset) of each new token; -1 is padding
    cu_seqlens_q: Array  # [B + 1] int32: sequence i brings tokens cu_seqlens_q[i] to cu_seqlens_q[i + 1]
    seq_lens: Array  # [B] int32: keys that sequence i sees, this step's included
    block_tables: Array  # [B, max_blocks] int32: physical block of each logical block; unused entries mean nothing
    max_seqlen_q: int  # host ints, so that kernel and grid can be chosen without a synchronisation
    max_seqlen_k: int
    # max_seqlen_q == 1 promises more: no sequence sees a key that another one brings in the same step. (Sequences
    # may share a block that this step fills; then say 2.)


@dataclass(frozen=True)
class SamplingBatch:
    """The sampling rules of S rows as columns. Ragged columns are CSR: row i owns ids[offsets[i]:offsets[i + 1]].

    A ragged group is None when no row of the batch uses it.
    """

    temperature: Array  # [S] float32; 0 is greedy
    top_k: Array  # [S] int32; 0 is off
    top_p: Array  # [S] float32; 1 is off
    min_p: Array  # [S] float32; 0 is off
    seeds: Array  # [S] uint64: Philox key of the request
    positions: Array  # [S] int32: index in its sequence of the token being drawn; the Philox counter

    # Penalties: the distinct tokens of prompt and output, and how often each occurs in the output.
    penalty_offsets: Array | None = None  # [S + 1] int32
    penalty_ids: Array | None = None  # [N] int32
    penalty_counts: Array | None = None  # [N] int32; 0: only in the prompt
    repetition_penalty: Array | None = None  # [S] float32
    presence_penalty: Array | None = None  # [S] float32
    frequency_penalty: Array | None = None  # [S] float32

    # logit_bias, and BANNED for the tokens that bad_words and min_tokens forbid at this step.
    bias_offsets: Array | None = None  # [S + 1] int32
    bias_ids: Array | None = None  # [N] int32, distinct within a row
    bias_values: Array | None = None  # [N] float32

    # allowed_token_ids; a row with an empty range allows all tokens.
    allowed_offsets: Array | None = None  # [S + 1] int32
    allowed_ids: Array | None = None  # [N] int32

    # Host facts that choose the kernel without a synchronisation.
    any_random: bool = True  # some row has temperature > 0
    any_filter: bool = True  # some random row uses top_k, top_p or min_p

    @property
    def is_simple(self) -> bool:
        """No row uses a ragged group: the fixed-size columns say it all."""
        return self.penalty_ids is None and self.bias_ids is None and self.allowed_ids is None


@dataclass(frozen=True)
class TokenLogprobs:
    """Log probabilities of one chosen token a row, and of the most likely tokens of that row."""

    logprobs: Array  # [S] float32
    ranks: Array  # [S] int32: 1 is the most likely token
    top_ids: Array  # [S, K] int32, most likely first, ties to the lower id
    top_logprobs: Array  # [S, K] float32


def map_arrays(value: Dataclass, convert: Callable[[Array], Array]) -> Dataclass:
    """A copy of a dataclass with `convert` applied to its NumPy arrays; other fields are kept."""
    arrays = {f.name: getattr(value, f.name) for f in fields(value)}
    return replace(value, **{k: convert(v) for k, v in arrays.items() if isinstance(v, np.ndarray)})


class Download(Protocol):
    """Copies from the device that the host can wait for later."""

    def start(self, data: Array, count: int) -> Callable[[], np.ndarray]:
        """Enqueue a copy of data[:count]. The result waits for it and returns it; it is good until the next but one."""
        ...


class Ops(Protocol):
    """What a backend computes. Inputs are never modified except where a method says so.

    `dtype` is the activations' and the KV cache's; all sums are accumulated in float32.
    """

    device: str
    dtype: np.dtype

    def to_device(self, host: np.ndarray) -> Array: ...

    def to_host(self, array: Array) -> np.ndarray: ...

    def make_download(self, size: int, dtype: np.dtype) -> Download:
        """For results of at most `size` elements that the host fetches step by step without stopping the device."""
        ...

    def synchronize(self) -> None:
        """Wait for all that was enqueued."""
        ...

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype) -> Array: ...

    def host_zeros(self, shape: tuple[int, ...], dtype: np.dtype) -> Array:
        """Zeros in host memory that `copy_blocks` can read and write."""
        ...

    def load_weight(self, parts: Sequence[np.ndarray]) -> Array:
        """The parts stacked along their first axis, in `dtype`: a weight on its way from files to where it is used.

        The parts may be views of memory-mapped files, of any of the three dtypes; they are read once.
        """
        ...

    def embedding(self, ids: Array, table: Array, previous: Array | None = None) -> Array:
        """Rows `ids` [T] of `table` [V, H]: [T, H].

        An id -1 - r stands for `previous`[r], a token that was drawn on the device and that the host does not know.
        """
        ...

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        """x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang & Sennrich, 2019): any shape [..., H]."""
        ...

    def add_rms_norm(self, x: Array, residual: Array, weight: Array, eps: float) -> tuple[Array, Array]:
        """(rms_norm(x + residual), x + residual); the sum is rounded to `dtype` before the norm, as HF does.

        A backend may write both results over its inputs: the caller must not read `x` or `residual` again.
        """
        ...

    def linear(self, x: Array, weight: Weight) -> Array:
        """x [T, in] times the weight, plus its bias: [T, out]. Dispatches on the weight's type."""
        ...

    def silu_and_mul(self, gate_up: Array) -> Array:
        """silu(gate) * up for gate_up [T, 2 I], the gate half first: [T, I] (SwiGLU; Shazeer, 2020)."""
        ...

    # Steps of few tokens spend most of their time between kernels, so what often follows one another is one op, too: by
    # definition the composition of the single ones. A backend may round less in between.

    def add_norm_linear(
        self, x: Array, residual: Residual | None, norm_weight: Array, eps: float, weight: Weight
    ) -> tuple[Array, Array]:
        """(linear(h, weight), new residual) with (h, new residual) = add_rms_norm(x, residual, norm_weight, eps).

        Without a residual, x is the new one and h its norm. Both may come from `linear_before_norm`. As with
        `add_rms_norm`, the caller must not read `x` or `residual` again.
        """
        ...

    def add_norm_swiglu(
        self, x: Array, residual: Residual | None, norm_weight: Array, eps: float, gate_up: Weight
    ) -> tuple[Array, Array]:
        """(silu_and_mul(y), new residual) with (y, new residual) = add_norm_linear(x, residual, ..., gate_up)."""
        ...

    def linear_before_norm(
        self, x: Array, weight: Weight, residual: Array, norm_weight: Array | None
    ) -> tuple[Array, Residual]:
        """(all_reduce(linear(x, weight)), residual): the x and residual of the next norm, which has this norm_weight.

        Only `add_norm_linear` and `add_norm_swiglu` with the same weight may read them: a backend may already have
        made a part of what they do. With None as norm_weight they are what they are said to be.
        """
        ...

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
        """`rope_store_kv` at meta.slot_mapping, then `attention` of its result: [T, Hq * D]."""
        ...

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
        """Split qkv, norm q and k per head (if weights are given: both or neither), rotate them and write k and v
        into the cache.

        qkv: [T, (Hq + 2 Hkv) * D]; positions: [T] int32; rope_table: [max_position, D] float32, cosines then
        sines; q_norm, k_norm: [D] or None; k_cache, v_cache: [num_blocks, block_size, Hkv, D], written in
        place at slot_mapping [T]; -1 writes nothing. Returns the rotated q [T, Hq, D].
        """
        ...

    def copy_blocks(self, k_source: Array, v_source: Array, k_target: Array, v_target: Array, pairs: Array) -> None:
        """Copy cache blocks [block_size, Hkv, D]: target block t = source block s for (s, t) in pairs [N, 2] int32.

        Source and target may be the same cache; then no t may be another pair's s.
        """
        ...

    def attention(
        self,
        q: Array,
        k_cache: Array,
        v_cache: Array,
        meta: AttentionMetadata,
        scale: float,
        window: int | None = None,
    ) -> Array:
        """Causal attention of q [T, Hq, D] over the paged cache, for any mix of prefill chunks and decodes.

        Query head h reads KV head h // (Hq / Hkv). The query at position i sees the keys at positions
        j <= i, and with a sliding window only those with i - j < window. Returns [T, Hq * D]: zeros for a sequence
        that has no keys.
        """
        ...

    def logits(self, hidden: Array, weight: Weight) -> Array:
        """`linear` with a float32 result, for the language-model head: hidden [S, H] to [S, V]."""
        ...

    def sample(self, logits: Array, batch: SamplingBatch) -> Array:
        """Draw one token id a row under the batch's rules: logits [S, V] float32 to [S] int32.

        A backend may overwrite `logits`; compute log probabilities first.
        """
        ...

    def logprobs(self, logits: Array, token_ids: Array, num_top: int) -> TokenLogprobs:
        """log_softmax of each row at token_ids [S] and at the row's num_top most likely tokens."""
        ...

    def all_reduce(self, x: Array) -> Array:
        """Sum over the tensor-parallel ranks; the identity on one."""
        ...


class Compositions:
    """The ops that are compositions of others: their definition, and what a backend does where fusing does not pay."""

    def add_norm_linear(
        self, x: Array, residual: Array | None, norm_weight: Array, eps: float, weight: Weight
    ) -> tuple[Array, Array]:
        hidden, residual = self._add_norm(x, residual, norm_weight, eps)
        return self.linear(hidden, weight), residual

    def add_norm_swiglu(
        self, x: Array, residual: Array | None, norm_weight: Array, eps: float, gate_up: Weight
    ) -> tuple[Array, Array]:
        y, residual = self.add_norm_linear(x, residual, norm_weight, eps, gate_up)
        return self.silu_and_mul(y), residual

    def linear_before_norm(
        self, x: Array, weight: Weight, residual: Array, norm_weight: Array | None
    ) -> tuple[Array, Residual]:
        return self.all_reduce(self.linear(x, weight)), residual

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
        slots = meta.slot_mapping
        q = self.rope_store_kv(qkv, positions, rope_table, q_norm, k_norm, eps, k_cache, v_cache, slots)
        return self.attention(q, k_cache, v_cache, meta, scale, window)

    def _add_norm(self, x: Array, residual: Array | None, norm_weight: Array, eps: float) -> tuple[Array, Array]:
        """(norm, new residual) of `Ops.add_norm_linear`."""
        if residual is None:
            return self.rms_norm(x, norm_weight, eps), x
        return self.add_rms_norm(x, residual, norm_weight, eps)
