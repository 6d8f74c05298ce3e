"""The paged decoder against a plain forward pass without pages, chunks or batches."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mini_vllm.config import ModelConfig
from mini_vllm.models.decoder import CausalLM, LastTokens
from mini_vllm.models.kv_cache import KVCache
from mini_vllm.models.rope import rope_table
from mini_vllm.models.weights import load_decoder
from mini_vllm.ops.base import AttentionMetadata
from mini_vllm.ops.numpy_ops import NumpyOps

VOCAB, MAX_LEN = 23, 40


class RandomWeights:
    """Weights of a size at which every op matters, norms included. The same name is the same tensor."""

    def __init__(self) -> None:
        self.tensors: dict[str, np.ndarray] = {}

    def tensor(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name not in self.tensors:
            rng = np.random.default_rng(list(name.encode()))
            scale = 0.5 if len(shape) == 1 else shape[-1] ** -0.5
            self.tensors[name] = (rng.standard_normal(shape) * scale + name.endswith("norm.weight")).astype(np.float32)
        return self.tensors[name]


def forward_plain(config: ModelConfig, tensors: dict[str, np.ndarray], token_ids: list[int]) -> np.ndarray:
    """Logits [T, V] in float64, written down from the papers; RoPE tables are tested on their own."""
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    length = len(token_ids)
    table = rope_table(config.rope, dim, length).astype(np.float64)[:, None]
    cos, sin = np.concatenate([table[..., : dim // 2]] * 2, -1), np.concatenate([table[..., dim // 2 :]] * 2, -1)

    def get(name: str) -> np.ndarray:
        return tensors[name].astype(np.float64)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.rms_norm_eps) * get(name)

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        bias = tensors.get(f"{name}.bias")
        return x @ get(f"{name}.weight").T + (0 if bias is None else bias.astype(np.float64))

    def rope(x: np.ndarray) -> np.ndarray:
        half_turned = np.concatenate([-x[..., dim // 2 :], x[..., : dim // 2]], -1)
        return x * cos + half_turned * sin

    x = get("model.embed_tokens.weight")[token_ids]
    for i in range(config.num_hidden_layers):
        attn, mlp = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
        h = norm(x, f"model.layers.{i}.input_layernorm.weight")
        q, k, v = (linear(h, f"{attn}{name}_proj").reshape(length, -1, dim) for name in "qkv")
        if config.qk_norm:
            q, k = norm(q, f"{attn}q_norm.weight"), norm(k, f"{attn}k_norm.weight")
        q, k = rope(q), np.repeat(rope(k), heads // kv_heads, axis=1)
        scores = np.einsum("qhd,khd->hqk", q, k) / math.sqrt(dim)
        window = config.sliding_windows[i] or length
        ago = np.arange(length)[:, None] - np.arange(length)
        scores[:, (ago < 0) | (ago >= window)] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out = np.einsum("hqk,khd->qhd", weights, np.repeat(v, heads // kv_heads, axis=1))
        x = x + linear(out.reshape(length, -1), f"{attn}o_proj")
        h = norm(x, f"model.layers.{i}.post_attention_layernorm.weight")
        gate = linear(h, f"{mlp}gate_proj")
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(h, f"{mlp}up_proj"), f"{mlp}down_proj")
    head = "model.embed_tokens" if config.tie_word_embeddings else "lm_head"
    return linear(norm(x, "model.norm.weight"), head)


def model_config(architecture: str, **changes: object) -> ModelConfig:
    return ModelConfig.from_hf(
        {
            "architectures": [architecture],
            "vocab_size": VOCAB,
            "hidden_size": 24,
            "intermediate_size": 36,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": MAX_LEN,
            "rms_norm_eps": 1e-2,
            "sliding_window": None,
            **changes,
        }
    )


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
FAMILIES: dict[str, tuple[str, dict]] = {
    "llama": ("LlamaForCausalLM", {}),
    "llama-mqa-bias-tied": (
        "LlamaForCausalLM",
        {"num_key_value_heads": 1, "attention_bias": True, "tie_word_embeddings": True},
    ),
    "mistral-window": ("MistralForCausalLM", {"sliding_window": 5, "head_dim": 10}),
    "qwen2-yarn": ("Qwen2ForCausalLM", {"rope_scaling": YARN}),
    "qwen2-mixed-windows": (
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1, "head_dim": 6},
    ),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 8, "tie_word_embeddings": True}),
    "qwen3-mha": ("Qwen3ForCausalLM", {"head_dim": 16, "num_key_value_heads": 4, "attention_bias": True}),
}


class Runner:
    """A model, a cache that is NaN where nothing was written, and sequences in permuted blocks."""

    def __init__(self, model: CausalLM, block_size: int, prompts: list[list[int]]) -> None:
        self.model, self.prompts = model, prompts
        per_sequence = -(-MAX_LEN // block_size)
        num_blocks = 1 + len(prompts) * per_sequence
        self.kv = KVCache(model.config, num_blocks, block_size, model.ops)
        for cache in self.kv.keys + self.kv.values:
            cache[:] = np.nan
        shuffled = 1 + np.random.default_rng(7).permutation(num_blocks - 1)
        self.block_tables = shuffled.reshape(len(prompts), per_sequence).astype(np.int32)
        self.computed = [0] * len(prompts)

    def step(self, chunks: dict[int, int]) -> dict[int, np.ndarray]:
        """Run the next tokens of some sequences, {sequence: how many}; the logits of each, [tokens, V]."""
        block_size = self.kv.block_size
        rows = [(i, self.computed[i] + t) for i, count in chunks.items() for t in range(count)]
        for i, count in chunks.items():
            self.computed[i] += count
        seq_lens = [self.computed[i] for i in chunks]
        slots = [self.block_tables[i, p // block_size] * block_size + p % block_size for i, p in rows]
        meta = AttentionMetadata(
            slot_mapping=np.array(slots, np.int32),
            cu_seqlens_q=np.cumsum([0, *chunks.values()]).astype(np.int32),
            seq_lens=np.array(seq_lens, np.int32),
            block_tables=self.block_tables[list(chunks)],
            max_seqlen_q=max(chunks.values()),
            max_seqlen_k=max(seq_lens),
        )
        ids = np.array([self.prompts[i][p] for i, p in rows], np.int32)
        positions = np.array([p for _, p in rows], np.int32)
        hidden = self.model.forward(ids, positions, meta, self.kv)
        # The last tokens alone: the same, and it is their step's keys and values that later steps read.
        last = LastTokens(meta.cu_seqlens_q[1:] - 1, np.arange(len(chunks) + 1, dtype=np.int32))
        of_last = self.model.forward(ids, positions, meta, self.kv, last=last)
        assert of_last.shape == (len(chunks), self.model.config.hidden_size)
        np.testing.assert_allclose(of_last, hidden[last.rows], rtol=0, atol=1e-4)
        logits = self.model.logits(hidden)
        return dict(zip(chunks, np.split(logits, np.cumsum(list(chunks.values()))[:-1]), strict=True))


PROMPTS = [np.random.default_rng(s).integers(0, VOCAB, n).tolist() for s, n in enumerate([33, 1, 18])]
# Chunks of the three prompts, step by step: whole; token by token; mixed in every way.
SCHEDULES = {
    "whole": [{0: 33, 1: 1, 2: 18}],
    "alone": [{2: 18}, {0: 33}, {1: 1}],
    "token by token": [{0: 1, 2: 1} for _ in range(18)] + [{0: 1} for _ in range(15)] + [{1: 1}],
    "mixed": [{0: 5}, {2: 16, 0: 1}, {0: 12, 1: 1, 2: 1}, {2: 1, 0: 14}, {0: 1}],
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
@pytest.mark.parametrize("block_size", [1, 5, 16])
@pytest.mark.parametrize("family", FAMILIES)
def test_paged_equals_plain(family, block_size, schedule):
    architecture, changes = FAMILIES[family]
    config = model_config(architecture, **changes)
    weights = RandomWeights()
    model = load_decoder(config, weights, NumpyOps(), MAX_LEN)
    runner = Runner(model, block_size, PROMPTS)
    pieces: list[list[np.ndarray]] = [[] for _ in PROMPTS]
    for chunks in schedule:
        for i, logits in runner.step(chunks).items():
            pieces[i].append(logits)
    for prompt, got in zip(PROMPTS, pieces, strict=True):
        got = np.concatenate(got)
        assert got.dtype == np.float32
        expected = forward_plain(config, weights.tensors, prompt)
        # 38 ops, each a sum of up to 64 terms with a random walk of roundings; the worst of 1200 logits lies
        # 4 standard deviations out.
        atol = 4 * 2.0**-24 * math.sqrt(38 * 64) * np.abs(expected).max()
        np.testing.assert_allclose(got, expected, rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"rms_norm_eps": 1e-6}),
        ("mistral-window", {"sliding_window": 6}),
        ("qwen2-yarn", {"rope_scaling": None}),
        ("qwen2-mixed-windows", {"max_window_layers": 2}),
    ],
)
def test_what_configs_differ_in_shows_in_the_logits(family, changes):
    """Otherwise the comparison above could not tell them apart."""
    architecture, base = FAMILIES[family]
    weights = RandomWeights()
    load_decoder(model_config(architecture, **base), weights, NumpyOps(), MAX_LEN)
    logits = [
        forward_plain(model_config(architecture, **keys), weights.tensors, PROMPTS[0])
        for keys in (base, {**base, **changes})
    ]
    assert np.abs(logits[0] - logits[1]).max() > 1e-2
