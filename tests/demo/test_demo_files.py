"""The bundled checkpoint is complete, small and of one piece."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open
from tokenizers import Tokenizer

from mini_vllm.demo import DEMO_DIR


def read(name: str) -> dict:
    return json.loads((DEMO_DIR / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(DEMO_DIR / "tokenizer.json"))


def test_it_is_small_enough_to_ship():
    assert sum(path.stat().st_size for path in DEMO_DIR.glob("*") if path.is_file()) <= 12_000_000


def test_tensors_are_those_of_the_config():
    config = read("config.json")
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["tie_word_embeddings"]
    assert config["max_position_embeddings"] >= 1024
    hidden, inner, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    layer = {
        "input_layernorm": [hidden],
        "self_attn.q_proj": [q, hidden],
        "self_attn.k_proj": [kv, hidden],
        "self_attn.v_proj": [kv, hidden],
        "self_attn.o_proj": [hidden, q],
        "self_attn.q_norm": [head_dim],
        "self_attn.k_norm": [head_dim],
        "post_attention_layernorm": [hidden],
        "mlp.gate_proj": [inner, hidden],
        "mlp.up_proj": [inner, hidden],
        "mlp.down_proj": [hidden, inner],
    }
    expected = {"model.embed_tokens.weight": [config["vocab_size"], hidden], "model.norm.weight": [hidden]}
    for i in range(config["num_hidden_layers"]):
        expected |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}

    with safe_open(DEMO_DIR / "model.safetensors", framework="np") as weights:
        slices = {name: weights.get_slice(name) for name in weights.keys()}  # noqa: SIM118 (not a dict)
        assert {name: tensor.get_shape() for name, tensor in slices.items()} == expected
        assert {tensor.get_dtype() for tensor in slices.values()} == {"BF16"}


def test_special_tokens_agree_everywhere(tokenizer):
    config, generation, names = read("config.json"), read("generation_config.json"), read("tokenizer_config.json")
    eos, im_start, im_end = map(tokenizer.token_to_id, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    assert names["eos_token"] == "<|endoftext|>"
    assert set(names["additional_special_tokens"]) == {"<|im_start|>", "<|im_end|>"}
    assert tokenizer.decode([eos, im_start, im_end], skip_special_tokens=True) == ""
    assert config["eos_token_id"] == eos
    assert config["bos_token_id"] is None
    assert config["pad_token_id"] == generation["pad_token_id"] == eos
    assert generation["eos_token_id"] == [eos, im_end]
    assert names["model_max_length"] == config["max_position_embeddings"]
    assert tokenizer.get_vocab_size() == config["vocab_size"]


@pytest.mark.parametrize(
    "text",
    [
        "Once upon a time, in a far-off land,\n\nthere lived a king.",
        " leading, trailing and  double spaces \t\r\n\n",
        'It\'s "quoted" -- 1234567890 (and) {code: [1, 2]};',
        "naïve Æsop, Zürich, Привет, 物語, שלום",
        "🐉 👩‍👩‍👧 🏳️‍🌈 👍🏽",
        "\x00\x01\x7f\ufffd\u2028",
        "",
    ],
)
def test_any_text_survives_the_tokenizer(tokenizer, text):
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.token_to_id("<|endoftext|>") for i in ids), "plain text makes no special token"


def test_fairy_tale_english_is_cheap(tokenizer):
    """One token per byte would mean that the merges are lost."""
    text = "Once upon a time there lived a king who had three daughters."
    assert len(tokenizer.encode(text).ids) <= 15
    assert tokenizer.encode("Once upon a time").tokens == tokenizer.encode("Once upon a time there").tokens[:4]


def test_directory_is_beside_its_code():
    import mini_vllm.demo

    assert Path(mini_vllm.demo.__file__).parent == DEMO_DIR
