"""The decoder of Llama, Mistral, Qwen2 and Qwen3. What tells them apart is data in `ModelConfig`.

    hidden = embedding(input_ids)
    per layer:  hidden += o_proj(attention(rope(qkv_proj(norm(hidden)))))
                hidden += down_proj(silu_and_mul(gate_up_proj(norm(hidden))))
    logits = lm_head(norm(hidden))

Each class is its weights and a forward pass; state comes in as arguments.
"""

from __future__ import annotations

from dataclasses import dataclass

from mini_vllm.config import ModelConfig
from mini_vllm.models.kv_cache import KVCache
from mini_vllm.ops.base import Array, AttentionMetadata, Ops
from mini_vllm.ops.weight import Weight


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
        hidden: Array,
        positions: Array,
        rope: Array,
        keys: Array,
        values: Array,
        meta: AttentionMetadata,
    ) -> Array:
        qkv = ops.linear(hidden, self.qkv_proj)
        q = ops.rope_store_kv(
            qkv,
            positions,
            rope,
            self.q_norm,
            self.k_norm,
            config.rms_norm_eps,
            keys,
            values,
            meta.slot_mapping,
        )
        out = ops.attention(q, keys, values, meta, config.head_dim**-0.5, self.window)
        return ops.all_reduce(ops.linear(out, self.o_proj))


@dataclass(frozen=True)
class MLP:
    gate_up_proj: Weight  # rows: gate, then up
    down_proj: Weight

    def forward(self, ops: Ops, hidden: Array) -> Array:
        return ops.all_reduce(ops.linear(ops.silu_and_mul(ops.linear(hidden, self.gate_up_proj)), self.down_proj))


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
        self, input_ids: Array, positions: Array, meta: AttentionMetadata, kv: KVCache, indices: Array
    ) -> Array:
        """Run the step's tokens, writing their K/V, and return the normed hidden states of some of them.

        input_ids, positions: [T] int32; indices: [S] int32, the rows whose logits are wanted. Returns [S, H].
        """
        ops, eps = self.ops, self.config.rms_norm_eps
        residual = ops.embedding(input_ids, self.embed_tokens)
        hidden = ops.rms_norm(residual, self.layers[0].input_norm, eps)
        for i, layer in enumerate(self.layers):
            if i > 0:
                hidden, residual = ops.add_rms_norm(hidden, residual, layer.input_norm, eps)
            hidden = layer.attention.forward(
                ops, self.config, hidden, positions, self.rope, kv.keys[i], kv.values[i], meta
            )
            hidden, residual = ops.add_rms_norm(hidden, residual, layer.post_attention_norm, eps)
            hidden = layer.mlp.forward(ops, hidden)
        # Only the rows that need logits go through the last norm (and the head): a row gather is an embedding.
        hidden, residual = ops.embedding(indices, hidden), ops.embedding(indices, residual)
        return ops.add_rms_norm(hidden, residual, self.norm, eps)[0]

    def logits(self, hidden: Array) -> Array:
        """hidden [S, H], as `forward` returns it, to logits [S, V] float32."""
        return self.ops.logits(hidden, self.lm_head)
