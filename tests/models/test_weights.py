"""Checkpoints: what loads, in which dtype and order, and what every malformed file is told."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save, save_file

from mini_vllm.config import ModelConfig
from mini_vllm.models.decoder import CausalLM
from mini_vllm.models.weights import INDEX_FILE, Checkpoint, DummyWeights, load_decoder
from mini_vllm.ops.numpy_ops import NumpyOps
from mini_vllm.ops.weight import RepeatedBlock

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


# ---- files ------------------------------------------------------------------------------------------------


def entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def file_of(header: dict | bytes, data: bytes = b"", header_size: int | None = None) -> bytes:
    """A safetensors file byte by byte: size of the header, header, data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if header_size is None else header_size).to_bytes(8, "little") + text + data


A = entry([2], 0, 8)
TWICE = b'{"a": %b, "a": %b}' % (json.dumps(A).encode(), json.dumps(entry([4], 0, 8, "F16")).encode())
MALFORMED = {
    "zero length": b"",
    "shorter than its size field": b"1234567",
    "header of 100 MB and more": file_of(b"{}", header_size=100_000_001),
    "header of 2^63 bytes": file_of(b"{}", header_size=2**63),
    "shorter than its header": file_of({"a": A}, header_size=5000),
    "header is not JSON": file_of(b"hello world"),
    "header is not an object": file_of(b"[]"),
    "header is not UTF-8": file_of(b'{"\xff": 1}'),
    "header is nested deeply": file_of(b'{"a":' * 5000 + b"1" + b"}" * 5000),
    "no data": file_of({"a": A}),
    "data cut short": file_of({"a": A}, bytes(7)),
    "data after the last tensor": file_of({"a": A}, bytes(9)),
    "overlapping": file_of({"a": A, "b": entry([2], 4, 12)}, bytes(12)),
    "gap": file_of({"a": A, "b": entry([2], 12, 20)}, bytes(20)),
    "reversed": file_of({"a": entry([2], 8, 0)}, bytes(8)),
    "negative": file_of({"a": entry([2], -8, 0)}, bytes(8)),
    "offsets beyond 64 bits": file_of({"a": entry([2], 2**64 - 8, 2**64)}, bytes(8)),
    "size beyond 64 bits": file_of({"a": entry([2**62, 4], 0, 8)}, bytes(8)),
    "shape and bytes disagree": file_of({"a": entry([3], 0, 8)}, bytes(8)),
    "dtype and bytes disagree": file_of({"a": entry([2], 0, 8, "F16")}, bytes(8)),
    "shape is not of integers": file_of({"a": {**A, "shape": ["2"]}}, bytes(8)),
    "no offsets": file_of({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
    "dtype that does not exist": file_of({"a": entry([2], 0, 8, "Q7")}, bytes(8)),
    "a tensor twice": file_of(TWICE, bytes(8)),
}


@pytest.mark.parametrize("content", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_file(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is not a valid safetensors file") as error:
        Checkpoint(tmp_path)
    assert str(error.value).startswith(str(path))


@pytest.mark.parametrize(("dtype", "size"), [("I64", 8), ("F8_E4M3", 1), ("F64", 8), ("BOOL", 1), ("U8", 1)])
def test_dtype_that_is_not_a_weight(tmp_path, dtype, size):
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_of({"good": A, "odd": entry([3], 8, 8 + 3 * size, dtype)}, bytes(8 + 3 * size)))
    with pytest.raises(ValueError, match=f"{path}: tensor odd has dtype {dtype}; supported are F32, F16, BF16"):
        Checkpoint(tmp_path)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damage_to_a_file_escapes_as_another_exception(tmp_path, data):
    """Cut, lengthened or with bytes changed: it opens, with tensors inside the file, or it is a ValueError."""
    content = bytearray(save({"a": np.arange(6, dtype=np.float32), "b": np.ones((2, 3), np.float16)}))
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))] + bytes(data.draw(st.sampled_from([0, 0, 1, 4])))
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    tensors, refusal = {}, str(path)
    try:
        tensors = Checkpoint(tmp_path)._tensors
    except ValueError as error:
        refusal = str(error)
    assert str(path) in refusal
    assert sum(view.copy().nbytes for _, view in tensors.values()) <= len(content)


def test_file_without_tensors(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(file_of({"__metadata__": {"format": "pt"}}))
    with pytest.raises(ValueError, match="tensor a"):
        Checkpoint(tmp_path).tensor("a", (2,))


def test_unaligned_data(tmp_path):
    """The format does not align its header; NumPy reads such a view all the same."""
    for padding in range(4):
        header = json.dumps({"a": entry([3], 0, 12)}).encode() + b" " * padding
        (tmp_path / "model.safetensors").write_bytes(file_of(header, np.float32([1, 2, 3]).tobytes()))
        assert Checkpoint(tmp_path).tensor("a", (3,)).tolist() == [1, 2, 3]


def test_tensors_are_views_of_the_mapped_file(tmp_path):
    save_file({"a": np.ones((4, 2), np.float32), "b": np.ones(3, np.float16)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    for name, shape in (("a", (4, 2)), ("b", (3,))):
        view = checkpoint.tensor(name, shape)
        assert not view.flags.owndata
        assert not view.flags.writeable
        root = view
        while isinstance(root.base, np.ndarray):
            root = root.base
        assert isinstance(root, np.memmap)


def test_no_file(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ValueError, match=r"holds no \*\.safetensors file \(\.bin") as error:
        Checkpoint(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_directory_and_dangling_link_instead_of_a_file(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        Checkpoint(tmp_path)
    (tmp_path / "model.safetensors").rmdir()
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"model\.safetensors does not exist"):
        Checkpoint(tmp_path)


# ---- shards -----------------------------------------------------------------------------------------------


def write_index(directory: Path, weight_map: object) -> None:
    (directory / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_shards(tmp_path):
    save_file({"a": np.float32([1]), "b": np.float32([2])}, tmp_path / "model-1.safetensors")
    save_file({"c": np.float32([3])}, tmp_path / "model-2.safetensors")
    save_file({"a": np.float32([9])}, tmp_path / "adapter.safetensors")  # the index does not name it
    write_index(tmp_path, {"a": "model-1.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors"})
    checkpoint = Checkpoint(tmp_path)
    assert [checkpoint.tensor(name, (1,))[0] for name in "abc"] == [1, 2, 3]


def test_shards_without_an_index(tmp_path):
    save_file({"a": np.float32([1])}, tmp_path / "part1.safetensors")
    save_file({"b": np.float32([2])}, tmp_path / "part2.safetensors")
    checkpoint = Checkpoint(tmp_path)
    assert [checkpoint.tensor(name, (1,))[0] for name in "ab"] == [1, 2]


def test_a_tensor_in_two_shards(tmp_path):
    for name in ("s1.safetensors", "s2.safetensors"):
        save_file({"a": np.float32([1])}, tmp_path / name)
    write_index(tmp_path, {"a": "s1.safetensors", "b": "s2.safetensors"})
    with pytest.raises(ValueError, match=r"s2\.safetensors: tensor a is also in s1\.safetensors"):
        Checkpoint(tmp_path)


OUTSIDE = ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..", "", "x.bin", 5, None, ["x"]]


@pytest.mark.parametrize("name", OUTSIDE, ids=repr)
def test_index_that_points_outside_the_directory(tmp_path, name):
    inside = tmp_path / "model"
    (inside / "sub").mkdir(parents=True)
    for path in (tmp_path, inside / "sub"):  # the files are there: only the name is wrong
        save_file({"a": np.float32([1])}, path / "x.safetensors")
    write_index(inside, {"a": name})
    with pytest.raises(ValueError, match="which is not a safetensors file of the directory") as error:
        Checkpoint(inside)
    assert f"{inside / INDEX_FILE}: a is in {name!r}" in str(error.value)


def test_missing_shard(tmp_path):
    save_file({"a": np.float32([1])}, tmp_path / "s1.safetensors")
    write_index(tmp_path, {"a": "s1.safetensors", "b": "s2.safetensors"})
    with pytest.raises(ValueError, match=r"s2\.safetensors does not exist"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": {}}', b"\xff"])
def test_malformed_index(tmp_path, content):
    save_file({"a": np.float32([1])}, tmp_path / "model.safetensors")
    (tmp_path / INDEX_FILE).write_bytes(content)
    with pytest.raises(ValueError, match=r"JSON|weight_map") as error:
        Checkpoint(tmp_path)
    assert str(tmp_path / INDEX_FILE) in str(error.value)


def test_linked_shards_as_in_the_hub_cache(tmp_path):
    """A snapshot's files are links to ../../blobs/<hash>: names decide, not where a link leads."""
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name, tensor in (("s1.safetensors", "a"), ("s2.safetensors", "b")):
        save_file({tensor: np.float32([7])}, blobs / f"hash-{tensor}")
        (snapshot / name).symlink_to(Path("../../blobs") / f"hash-{tensor}")
    write_index(snapshot, {"a": "s1.safetensors", "b": "s2.safetensors"})
    checkpoint = Checkpoint(snapshot)
    assert [checkpoint.tensor(name, (1,))[0] for name in "ab"] == [7, 7]


# ---- the decoder ------------------------------------------------------------------------------------------

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 6, 10, 4, 2, 4, 13


def model_config(architecture: str = "Qwen3ForCausalLM", **changes: object) -> ModelConfig:
    return ModelConfig.from_hf(
        {
            "architectures": [architecture],
            "vocab_size": VOCAB,
            "hidden_size": HIDDEN,
            "intermediate_size": INNER,
            "num_hidden_layers": 2,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "head_dim": HEAD_DIM,
            "max_position_embeddings": 32,
            "sliding_window": None,
            **changes,
        }
    )


def tensors_of(config: ModelConfig, dtype: type = np.float32) -> dict[str, np.ndarray]:
    """Everything HF stores for such a model, random."""
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    shapes = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    for i in range(config.num_hidden_layers):
        layer = {
            "input_layernorm.weight": (HIDDEN,),
            "post_attention_layernorm.weight": (HIDDEN,),
            "self_attn.q_proj.weight": (q, HIDDEN),
            "self_attn.k_proj.weight": (kv, HIDDEN),
            "self_attn.v_proj.weight": (kv, HIDDEN),
            "self_attn.o_proj.weight": (HIDDEN, q),
            "mlp.gate_proj.weight": (INNER, HIDDEN),
            "mlp.up_proj.weight": (INNER, HIDDEN),
            "mlp.down_proj.weight": (HIDDEN, INNER),
        }
        if config.qk_norm:
            layer |= {"self_attn.q_norm.weight": (HEAD_DIM,), "self_attn.k_norm.weight": (HEAD_DIM,)}
        if config.qkv_bias:
            layer |= {f"self_attn.{name}_proj.bias": (size,) for name, size in (("q", q), ("k", kv), ("v", kv))}
        if config.o_bias:
            layer["self_attn.o_proj.bias"] = (HIDDEN,)
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def load(
    directory: Path, tensors: dict[str, np.ndarray], config: ModelConfig, dtype: np.dtype | type = np.float32
) -> CausalLM:
    save_file(tensors, directory / "model.safetensors")
    return load_decoder(config, Checkpoint(directory), NumpyOps(dtype), max_model_len=20)


def check_model(model: CausalLM, tensors: dict[str, np.ndarray], dtype: np.dtype | type) -> None:
    """Every tensor is where it belongs, converted once; rows of merged projections in HF's order of names."""

    def expect(got: np.ndarray, *names: str) -> None:
        assert got.dtype == dtype
        np.testing.assert_array_equal(got, np.concatenate([tensors[name] for name in names]).astype(dtype))

    expect(model.embed_tokens, "model.embed_tokens.weight")
    expect(model.norm, "model.norm.weight")
    config = model.config
    if config.tie_word_embeddings:
        assert model.lm_head.weight is model.embed_tokens
    else:
        expect(model.lm_head.weight, "lm_head.weight")
    assert model.lm_head.bias is None
    assert len(model.layers) == config.num_hidden_layers
    for i, layer in enumerate(model.layers):
        attn, mlp = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
        expect(layer.input_norm, f"model.layers.{i}.input_layernorm.weight")
        expect(layer.post_attention_norm, f"model.layers.{i}.post_attention_layernorm.weight")
        qkv = [f"{attn}{name}_proj." for name in "qkv"]
        expect(layer.attention.qkv_proj.weight, *(f"{name}weight" for name in qkv))
        expect(layer.attention.o_proj.weight, f"{attn}o_proj.weight")
        expect(layer.mlp.gate_up_proj.weight, f"{mlp}gate_proj.weight", f"{mlp}up_proj.weight")
        expect(layer.mlp.down_proj.weight, f"{mlp}down_proj.weight")
        assert layer.mlp.gate_up_proj.bias is layer.mlp.down_proj.bias is None
        if config.qkv_bias:
            expect(layer.attention.qkv_proj.bias, *(f"{name}bias" for name in qkv))
        else:
            assert layer.attention.qkv_proj.bias is None
        if config.o_bias:
            expect(layer.attention.o_proj.bias, f"{attn}o_proj.bias")
        else:
            assert layer.attention.o_proj.bias is None
        if config.qk_norm:
            expect(layer.attention.q_norm, f"{attn}q_norm.weight")
            expect(layer.attention.k_norm, f"{attn}k_norm.weight")
        else:
            assert layer.attention.q_norm is layer.attention.k_norm is None


@pytest.mark.parametrize("stored", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_dtypes(tmp_path, stored, dtype):
    config = model_config()
    tensors = tensors_of(config, stored)
    check_model(load(tmp_path, tensors, config, dtype), tensors, dtype)


@pytest.mark.parametrize(
    "config",
    [
        model_config("LlamaForCausalLM"),
        model_config("LlamaForCausalLM", attention_bias=True, tie_word_embeddings=True),
        model_config("MistralForCausalLM", sliding_window=8),
        model_config("Qwen2ForCausalLM"),
        model_config("Qwen3ForCausalLM", tie_word_embeddings=True),
    ],
    ids=["llama", "llama-bias-tied", "mistral", "qwen2", "qwen3-tied"],
)
def test_families(tmp_path, config):
    tensors = tensors_of(config)
    model = load(tmp_path, tensors, config)
    check_model(model, tensors, np.float32)
    assert [layer.attention.window for layer in model.layers] == list(config.sliding_windows)
    assert model.rope.shape == (20, HEAD_DIM)  # max_model_len


def test_tied_model_may_repeat_its_embedding(tmp_path):
    config = model_config(tie_word_embeddings=True)
    tensors = tensors_of(config)
    again = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}
    check_model(load(tmp_path, again, config), tensors, np.float32)


@pytest.mark.parametrize(
    "head",
    [np.zeros((VOCAB, HIDDEN), np.float32), np.zeros((VOCAB + 1, HIDDEN), np.float32), None],
    ids=["values", "shape", "dtype"],
)
def test_tied_model_with_another_head(tmp_path, head):
    config = model_config(tie_word_embeddings=True)
    tensors = tensors_of(config)
    if head is None:
        head = tensors["model.embed_tokens.weight"].astype(np.float16)
    with pytest.raises(ValueError, match=r"model\.safetensors: ") as error:
        load(tmp_path, {**tensors, "lm_head.weight": head}, config)
    assert "model.embed_tokens.weight" in str(error.value)


NAMES = sorted(tensors_of(model_config("Qwen2ForCausalLM")))


@pytest.mark.parametrize("name", NAMES)
def test_missing_tensor(tmp_path, name):
    config = model_config("Qwen2ForCausalLM")
    tensors = tensors_of(config)
    shape = list(tensors.pop(name).shape)
    with pytest.raises(ValueError, match="is missing from the checkpoint") as error:
        load(tmp_path, tensors, config)
    assert f"{tmp_path}: tensor {name} {shape}" in str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_misshapen_tensor(tmp_path, name):
    config = model_config("Qwen2ForCausalLM")
    tensors = tensors_of(config)
    right = tensors[name]
    wrong_shapes = [(right.shape[0] + 1, *right.shape[1:]), (right.shape[0] - 1, *right.shape[1:]), (1, *right.shape)]
    if right.ndim == 2:
        wrong_shapes.append(right.shape[::-1])
    for shape in wrong_shapes:
        with pytest.raises(ValueError, match=r"config\.json asks for") as error:
            load(tmp_path, {**tensors, name: np.ones(shape, np.float32)}, config)
        assert f"{tmp_path / 'model.safetensors'}: tensor {name} has shape {list(shape)}" in str(error.value)
        assert str(list(right.shape)) in str(error.value)


@pytest.mark.parametrize(
    "extra",
    ["model.layers.2.mlp.up_proj.weight", "model.layers.0.self_attn.q_norm.weight", "score.weight", "lm_head.bias"],
)
def test_extra_tensor(tmp_path, extra):
    config = model_config("Qwen2ForCausalLM")
    with pytest.raises(ValueError, match=r"config\.json describes a model without") as error:
        load(tmp_path, {**tensors_of(config), extra: np.ones(3, np.float32)}, config)
    assert str(tmp_path / "model.safetensors") in str(error.value)
    assert extra in str(error.value)


def test_many_extra_tensors_are_counted(tmp_path):
    config = model_config()
    extra = {f"extra.{i}": np.ones(1, np.float32) for i in range(9)}
    with pytest.raises(ValueError, match=r"extra\.0, extra\.1, extra\.2, extra\.3, extra\.4 and 4 more"):
        load(tmp_path, {**tensors_of(config), **extra}, config)


def test_tables_of_old_checkpoints_are_ignored(tmp_path):
    config = model_config()
    tensors = tensors_of(config)
    table = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}
    check_model(load(tmp_path, {**tensors, **table}, config), tensors, np.float32)


def test_embedding_of_another_vocabulary(tmp_path):
    config = model_config(vocab_size=VOCAB + 3)
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight has shape \[13, 6\]"):
        load(tmp_path, tensors_of(config), config)


# ---- dummy weights ----------------------------------------------------------------------------------------


def test_dummy_weights_are_a_function_of_seed_and_name():
    a, b, c = DummyWeights(1), DummyWeights(1), DummyWeights(2)
    shape = (7, 5)
    np.testing.assert_array_equal(a.tensor("x.weight", shape), b.tensor("x.weight", shape))
    a.tensor("other.weight", (3,))  # what was asked before does not matter
    np.testing.assert_array_equal(a.tensor("x.weight", shape), b.tensor("x.weight", shape))
    assert not np.array_equal(a.tensor("x.weight", shape), c.tensor("x.weight", shape))
    assert not np.array_equal(a.tensor("x.weight", shape), a.tensor("y.weight", shape))


def test_dummy_weights_look_like_weights():
    dummy = DummyWeights(0)
    np.testing.assert_array_equal(dummy.tensor("model.norm.weight", (5,)), np.ones(5))
    np.testing.assert_array_equal(dummy.tensor("self_attn.q_norm.weight", (5,)), np.ones(5))
    # Longer than the block that is repeated.
    big = np.asarray(dummy.tensor("model.embed_tokens.weight", (1100, 1024)))
    assert big.shape == (1100, 1024)
    assert abs(float(big.std()) - 0.02) < 1e-4
    assert abs(float(big.mean())) < 1e-4
    assert len(np.unique(big[:, :8], axis=0)) == len(big)


@pytest.mark.parametrize(
    ("shape", "start"), [((3,), 0), ((4, 5), 15), ((7,), 10), ((17,), 0), ((9, 13), 16), ((400,), 3)]
)
def test_a_repeated_block_is_what_its_copies_make(shape, start):
    """What a GPU does with `copies`, in NumPy: each reads only what is there, and together they fill the tensor."""
    part = RepeatedBlock(np.arange(17, dtype=np.float32), start, shape)
    expected = np.asarray(part)
    assert expected.shape == shape
    assert expected.reshape(-1).tolist() == [(start + i) % 17 for i in range(expected.size)]
    out = np.full(expected.size, np.nan, np.float32)
    copies = list(part.copies())
    for to, from_block, offset, count in copies:
        source = (part.block if from_block else out)[offset : offset + count].copy()
        assert len(source) == count
        assert not np.isnan(source).any()
        out[to : to + count] = source
    np.testing.assert_array_equal(out, expected.reshape(-1))
    assert sum(count for *_, count in copies) == expected.size
    assert len(copies) < 10


def test_a_backend_takes_repeated_blocks_among_arrays():
    part = RepeatedBlock(np.arange(5, dtype=np.float32), 2, (2, 3))
    for dtype in DTYPES.values():
        weight = NumpyOps(dtype).load_weight([part, np.ones((1, 3), np.float32)])
        assert weight.dtype == dtype
        assert weight.astype(np.float32).tolist() == [[2, 3, 4], [0, 1, 2], [1, 1, 1]]


def test_dummy_model_needs_no_files():
    config = model_config()
    model = load_decoder(config, DummyWeights(3), NumpyOps(), max_model_len=20)
    again = load_decoder(config, DummyWeights(3), NumpyOps(), max_model_len=20)
    np.testing.assert_array_equal(model.layers[1].attention.qkv_proj.weight, again.layers[1].attention.qkv_proj.weight)
    assert model.lm_head.weight.shape == (VOCAB, HIDDEN)
