"""The decoder of Llama, Mistral, Qwen2 and Qwen3. What tells them apart is data in `ModelConfig`.

    hidden = embedding(input_ids)
    per layer:  hidden += o_proj(attention(rope(qkv_proj(norm(hidden)))))
                hidden += down_proj(silu_and_mul(gate_up_proj(norm(hidden))))
    logits = lm_head(norm(hidden))

The sum is kept in two parts, the last projection's output and the `residual` before it, which the next norm adds up;
the projection is told that norm's weight, so that a backend can do so at once.
Of a prompt only the last token is drawn from, and nothing reads the last layer's output but the head: there the other
tokens leave their keys and values and go no further.
Each class is its weights and a forward pass; state comes in as arguments.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mini_vllm.config import ModelConfig
from mini_vllm.models.kv_cache import KVCache
from mini_vllm.ops.base import Array, AttentionMetadata, Ops, Residual
from mini_vllm.ops.weight import Weight


@dataclass(frozen=True)
class LastTokens:
    """The last token of each sequence, where a step brings more and only their hidden states are wanted."""

    rows: Array  # [B] int32, among the step's tokens
    cu_seqlens_q: Array  # [B + 1] int32: 0, 1, 2, ...

    def select(self, ops: Ops, x: Array) -> Array:
        """Their rows of x [T, ...]: [B, ...]."""
        rows = ops.embedding(self.rows, x.reshape(len(x), -1))  # a gather of rows is an embedding
        return rows.reshape(len(self.rows), *x.shape[1:])

    def attention(self, meta: AttentionMetadata) -> AttentionMetadata:
        """What attention reads if the step brings no others, and their keys and values are in the cache already."""
        return replace(meta, cu_seqlens_q=self.cu_seqlens_q, max_seqlen_q=1)


@dataclass(frozen=True)
class Attention:
    qkv_proj: Weight  # rows: query heads, key heads, value heads
    o_proj: Weight
    q_norm: Array | None  # [head_dim]; Qwen3 normalises each head of q and k before RoPE
    k_norm: Array | None
    window: int | None

    def forward(
        self,
        ops: Ops,
        config: ModelConfig,
        norm: Array,
        next_norm: Array,
        hidden: Array,
        residual: Residual | None,
        positions: Array,
        rope: Array,
        keys: Array,
        values: Array,
        meta: AttentionMetadata,
        last: LastTokens | None,
    ) -> tuple[Array, Residual]:
        eps, scale = config.rms_norm_eps, config.head_dim**-0.5
        qkv, residual = ops.add_norm_linear(hidden, residual, norm, eps, self.qkv_proj)
        rotation = positions, rope, self.q_norm, self.k_norm, eps
        if last is None:
            out = ops.rope_attention(qkv, *rotation, keys, values, meta, scale, self.window)
        else:
            q = ops.rope_store_kv(qkv, *rotation, keys, values, meta.slot_mapping)
            q, residual = last.select(ops, q), last.select(ops, residual)
            out = ops.attention(q, keys, values, last.attention(meta), scale, self.window)
        return ops.linear_before_norm(out, self.o_proj, residual, next_norm)


@dataclass(frozen=True)
class MLP:
    gate_up_proj: Weight  # rows: gate, then up
    down_proj: Weight

    def forward(
        self,
        ops: Ops,
        config: ModelConfig,
        norm: Array,
        next_norm: Array | None,
        hidden: Array,
        residual: Residual,
    ) -> tuple[Array, Residual]:
        gated, residual = ops.add_norm_swiglu(hidden, residual, norm, config.rms_norm_eps, self.gate_up_proj)
        return ops.linear_before_norm(gated, self.down_proj, residual, next_norm)


@dataclass(frozen=True)
class DecoderLayer:
    input_norm: Array  # [hidden_size]
    attention: Attention
    post_attention_norm: Array  # [hidden_size]
    mlp: MLP


@dataclass(frozen=True)
class CausalLM:
    config: ModelConfig
    ops: Ops
    embed_tokens: Array  # [vocab_size, hidden_size]
    layers: tuple[DecoderLayer, ...]
    norm: Array  # [hidden_size]
    lm_head: Weight  # the embedding itself where the checkpoint ties them
    rope: Array  # [max_model_len, head_dim] float32

    def forward(
        self,
        input_ids: Array,
        positions: Array,
        meta: AttentionMetadata,
        kv: KVCache,
        previous: Array | None = None,
        last: LastTokens | None = None,
    ) -> Array:
        """Run the step's tokens, writing their K/V, and return their hidden states behind the last norm: [T, H].

        input_ids, positions: [T] int32; previous: int32, tokens that input_ids may name, see `Ops.embedding`; last: the
        only ones whose hidden states are wanted, then [B, H].
        """
        ops = self.ops
        hidden, residual = ops.embedding(input_ids, self.embed_tokens, previous), None
        next_norms = [*(layer.input_norm for layer in self.layers[1:]), None]  # no product follows the last one
        for i, (layer, next_norm) in enumerate(zip(self.layers, next_norms, strict=True)):
            norm, middle_norm = layer.input_norm, layer.post_attention_norm
            state = positions, self.rope, kv.keys[i], kv.values[i], meta, last if next_norm is None else None
            hidden, residual = layer.attention.forward(ops, self.config, norm, middle_norm, hidden, residual, *state)
            hidden, residual = layer.mlp.forward(ops, self.config, middle_norm, next_norm, hidden, residual)
        return ops.add_rms_norm(hidden, residual, self.norm, self.config.rms_norm_eps)[0]

    @property
    def projections(self) -> list[Weight]:
        """What `Ops` multiplies hidden states with, layer by layer, without the head."""
        return [
            weight
            for layer in self.layers
            for weight in (
                layer.attention.qkv_proj, layer.attention.o_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj
            )
        ]  # fmt: skip

    def logits(self, hidden: Array) -> Array:
        """Rows of what `forward` returns, hidden [S, H], to logits [S, V] float32."""
        return self.ops.logits(hidden, self.lm_head)
