"""config.json of every family in both spellings, everything that is refused, and EngineConfig."""

from __future__ import annotations

import json
import math
from dataclasses import FrozenInstanceError

import pytest

from mini_vllm.config import (
    PREFIX_CACHE_POLICIES,
    SCHEDULING_POLICIES,
    EngineConfig,
    ModelConfig,
    RopeConfig,
    read_json,
    token_id_list,
)
from mini_vllm.models.registry import LOADERS

BASE = {
    "vocab_size": 160,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
REQUIRED_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


def from_hf(architecture: str = "LlamaForCausalLM", /, **changes: object) -> ModelConfig:
    """The base config with changes; a value of `...` removes the key."""
    config = {"architectures": [architecture], **BASE, **changes}
    return ModelConfig.from_hf({key: value for key, value in config.items() if value is not ...})


def refusal(architecture: str = "LlamaForCausalLM", /, **changes: object) -> str:
    with pytest.raises(ValueError, match=r"^config\.json") as error:
        from_hf(architecture, **changes)
    return str(error.value)


# ---- families ---------------------------------------------------------------------------------------------


def test_shape():
    config = from_hf(head_dim=16, dtype="bfloat16", eos_token_id=[7, 9], tie_word_embeddings=True)
    assert config == ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=160,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope=RopeConfig(),
        tie_word_embeddings=True,
        qkv_bias=False,
        o_bias=False,
        qk_norm=False,
        sliding_windows=(None, None, None),
        dtype="bfloat16",
        eos_token_ids=(7, 9),
    )
    with pytest.raises(FrozenInstanceError):
        config.head_dim = 8


@pytest.mark.parametrize(
    ("architecture", "attention_bias", "biases"),
    [  # (q/k/v bias, o bias)
        ("LlamaForCausalLM", False, (False, False)),
        ("LlamaForCausalLM", True, (True, True)),
        ("MistralForCausalLM", True, (False, False)),  # these two ignore the key
        ("Qwen2ForCausalLM", False, (True, False)),
        ("Qwen2ForCausalLM", True, (True, False)),
        ("Qwen3ForCausalLM", False, (False, False)),
        ("Qwen3ForCausalLM", True, (True, True)),
    ],
)
def test_biases(architecture, attention_bias, biases):
    config = from_hf(architecture, attention_bias=attention_bias)
    assert (config.qkv_bias, config.o_bias) == biases


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_defaults_of_absent_keys(architecture):
    config = from_hf(architecture, num_key_value_heads=None, rms_norm_eps=..., sliding_window=None)
    assert config.num_key_value_heads == 4
    assert config.rms_norm_eps == 1e-6
    assert config.head_dim == (128 if architecture == "Qwen3ForCausalLM" else 8)
    assert config.qk_norm == (architecture == "Qwen3ForCausalLM")
    assert config.rope == RopeConfig(theta=10000.0)
    assert not config.tie_word_embeddings
    assert config.dtype == "float32"
    assert config.eos_token_ids == ()
    assert config.sliding_windows == (None,) * 3


def test_absent_num_key_value_heads():
    """Llama means all heads; the others' default is a number that fits their first release alone."""
    assert from_hf("LlamaForCausalLM", num_key_value_heads=...).num_key_value_heads == 4
    for architecture in ARCHITECTURES[1:]:
        assert "num_key_value_heads" in refusal(architecture, num_key_value_heads=...)


def test_every_architecture_has_a_loader():
    assert set(LOADERS) == set(ARCHITECTURES)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtype_in_both_spellings(key, dtype):
    assert from_hf(**{key: dtype}).dtype == dtype


@pytest.mark.parametrize("eos", [None, 5, [5], [5, 6]])
def test_eos_token_ids(eos):
    assert from_hf(eos_token_id=eos).eos_token_ids == tuple([] if eos is None else [eos] if eos == 5 else eos)


# ---- sliding windows --------------------------------------------------------------------------------------

SLIDE = {"use_sliding_window": True, "sliding_window": 8}
KINDS = ["full_attention", "sliding_attention", "full_attention"]


@pytest.mark.parametrize(
    ("architecture", "keys", "windows"),
    [
        ("LlamaForCausalLM", SLIDE, (None, None, None)),  # no such thing in Llama
        ("MistralForCausalLM", {"sliding_window": 8}, (8, 8, 8)),
        ("MistralForCausalLM", {"sliding_window": 8, "layer_types": KINDS}, (8, 8, 8)),
        ("MistralForCausalLM", {"sliding_window": None}, (None, None, None)),
        ("MistralForCausalLM", {}, (4096, 4096, 4096)),
        ("Qwen2ForCausalLM", {"sliding_window": 8}, (None, None, None)),  # not switched on
        ("Qwen2ForCausalLM", {**SLIDE, "use_sliding_window": False, "layer_types": KINDS}, (None, None, None)),
        ("Qwen2ForCausalLM", {**SLIDE, "max_window_layers": 1}, (None, 8, 8)),  # the first layers see everything
        ("Qwen2ForCausalLM", {**SLIDE, "max_window_layers": 0}, (8, 8, 8)),
        ("Qwen2ForCausalLM", {**SLIDE, "max_window_layers": 3}, (None, None, None)),
        ("Qwen2ForCausalLM", SLIDE, (None, None, None)),  # max_window_layers is 28
        ("Qwen2ForCausalLM", {"use_sliding_window": True, "max_window_layers": 2}, (None, None, 4096)),
        ("Qwen3ForCausalLM", {**SLIDE, "max_window_layers": 2}, (None, None, 8)),
        ("Qwen3ForCausalLM", {**SLIDE, "max_window_layers": 0, "layer_types": KINDS}, (None, 8, None)),
    ],
)
def test_sliding_windows(architecture, keys, windows):
    assert from_hf(architecture, **keys).sliding_windows == windows


# ---- RoPE -------------------------------------------------------------------------------------------------

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("kind", "scaling", "expected"),
    [
        ("default", {}, RopeConfig(theta=500.0)),
        ("linear", {"factor": 2}, RopeConfig("linear", 500.0, factor=2.0)),
        ("llama3", LLAMA3, RopeConfig("llama3", 500.0, 8.0, 32, low_freq_factor=1.0, high_freq_factor=4.0)),
        ("yarn", YARN, RopeConfig("yarn", 500.0, 4.0, 32, attention_factor=0.1 * math.log(4) + 1)),
    ],
)
def test_rope_in_both_spellings(architecture, kind, scaling, expected):
    v5 = from_hf(architecture, rope_parameters={"rope_type": kind, "rope_theta": 500.0, **scaling})
    assert v5.rope == expected
    for type_key in ("rope_type", "type"):
        v4 = from_hf(architecture, rope_theta=500.0, rope_scaling={type_key: kind, **scaling})
        assert v4.rope == expected
    if kind == "default":
        assert from_hf(architecture, rope_theta=500, rope_scaling=None).rope == expected


def yarn(**changes: object) -> RopeConfig:
    return from_hf(rope_scaling={"rope_type": "yarn", **YARN, **changes}).rope


def test_precedence_of_the_spellings():
    linear = {"rope_type": "linear", "factor": 3.0}
    both = from_hf(rope_scaling=linear, rope_parameters={"rope_type": "default", "rope_theta": 7.0}, rope_theta=9.0)
    assert both.rope == RopeConfig("linear", 9.0, 3.0)
    assert from_hf(rope_scaling={**linear, "type": "yarn"}).rope.type == "linear"
    assert from_hf(rope_parameters={"rope_theta": 7.0}, rope_theta=9.0).rope == RopeConfig(theta=7.0)


def test_original_max_position_embeddings():
    scaling = {"rope_type": "yarn", "factor": 4.0}
    assert from_hf(rope_scaling=scaling).rope.original_max_position_embeddings == 128
    assert from_hf(rope_scaling={**scaling, **YARN}).rope.original_max_position_embeddings == 32
    top = from_hf(rope_scaling={**scaling, **YARN}, original_max_position_embeddings=64)
    assert top.rope.original_max_position_embeddings == 64


def test_yarn_options():
    assert yarn(factor=None).factor == 128 / 32
    assert yarn(factor=0.5).attention_factor == 1.0
    assert yarn(attention_factor=1.5).attention_factor == 1.5
    assert yarn(mscale=2.0, mscale_all_dim=0.5).attention_factor == (0.2 * math.log(4) + 1) / (0.05 * math.log(4) + 1)
    assert yarn(mscale=2.0).attention_factor == 0.1 * math.log(4) + 1  # alone it means nothing
    assert yarn(mscale=2.0, mscale_all_dim=0).attention_factor == 0.1 * math.log(4) + 1
    changed = yarn(beta_fast=16, beta_slow=2, truncate=False)
    assert (changed.beta_fast, changed.beta_slow, changed.truncate) == (16.0, 2.0, False)
    assert (yarn().beta_fast, yarn().beta_slow, yarn().truncate) == (32.0, 1.0, True)


# ---- refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "architectures",
    [..., None, [], "LlamaForCausalLM", ["GPT2LMHeadModel"], ["LlamaForCausalLM", "Qwen2ForCausalLM"], [{}], 3],
)
def test_unknown_architecture(architectures):
    message = refusal(architectures=architectures)
    assert all(name in message for name in ARCHITECTURES)
    assert repr(None if architectures is ... else architectures) in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, ["quantization_config", "unquantised"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "'gelu'", "silu"]),
        ({"mlp_bias": True}, ["mlp_bias"]),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, ["num_attention_heads=4", "num_key_value_heads=3"]),
        ({"hidden_size": 34}, ["head_dim", "hidden_size=34", "num_attention_heads=4"]),
        ({"head_dim": 15}, ["head_dim=15", "odd"]),
        ({"hidden_size": 36}, ["head_dim=9", "odd"]),
        ({"dtype": "float8_e4m3fn"}, ["dtype", "float8_e4m3fn", "float32, float16, bfloat16"]),
        ({"torch_dtype": 16}, ["dtype", "16"]),
        ({"eos_token_id": -1}, ["eos_token_id", "-1"]),
        ({"eos_token_id": [2, True]}, ["eos_token_id", "True"]),
        ({"eos_token_id": "</s>"}, ["eos_token_id", "</s>"]),
        ({"rope_scaling": [1]}, ["rope_scaling", "[1]"]),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, ["'dynamic'", "default, linear, llama3, yarn"]),
        ({"rope_parameters": {"rope_type": "longrope"}}, ["'longrope'", "default, linear, llama3, yarn"]),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, ["per layer type"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5"]),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, ["partial_rotary_factor", "0.25"]),
        ({"rope_theta": 0}, ["rope_theta", "0"]),
        ({"rope_theta": "1e6"}, ["rope_theta", "'1e6'"]),
        ({"rope_scaling": {"type": "linear"}}, ["factor", "None"]),
        ({"rope_scaling": {"type": "linear", "factor": -2}}, ["factor", "-2"]),
        ({"rope_scaling": {"rope_type": "llama3", **LLAMA3, "factor": None}}, ["factor"]),
        ({"rope_scaling": {"rope_type": "llama3", **LLAMA3, "low_freq_factor": None}}, ["low_freq_factor"]),
        ({"rope_scaling": {"rope_type": "llama3", **LLAMA3, "high_freq_factor": 1}}, ["low_freq_factor=1.0", "below"]),
        ({"rope_scaling": {"rope_type": "yarn", **YARN, "beta_fast": "fast"}}, ["beta_fast", "'fast'"]),
        ({"rope_scaling": {"rope_type": "yarn", **YARN, "truncate": 1}}, ["truncate", "1"]),
        ({"rope_scaling": {"rope_type": "yarn", **YARN, "mscale": "x", "mscale_all_dim": 1}}, ["mscale", "'x'"]),
        ({"rope_scaling": {"rope_type": "yarn", **YARN}, "rope_theta": 1}, ["rope_theta=1", "yarn"]),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 1.5}},
            ["original_max_position_embeddings", "1.5"],
        ),
    ],
)
def test_refused(changes, words):
    message = refusal(**changes)
    assert all(word in message for word in words), message


def test_nulls_that_mean_absent():
    assert from_hf(quantization_config=None, rope_scaling=None, mlp_bias=None, head_dim=None) == from_hf()


@pytest.mark.parametrize(
    "key",
    [*REQUIRED_SIZES, "num_key_value_heads", "head_dim"],
)
@pytest.mark.parametrize("value", [0, -1, True, 4.0, "4", [4], {}])
def test_sizes_of_the_wrong_type(key, value):
    message = refusal(**{key: value})
    assert f"{key} must be an integer >= 1, got {value!r}" in message


@pytest.mark.parametrize("key", REQUIRED_SIZES)
def test_missing_sizes(key):
    assert f"{key} must be an integer >= 1, got None" in refusal(**{key: ...})


@pytest.mark.parametrize("value", [0, -1e-6, math.nan, math.inf, True, "1e-6", 10**400])
def test_rms_norm_eps_of_the_wrong_type(value):
    assert "rms_norm_eps must be a number > 0" in refusal(rms_norm_eps=value)


@pytest.mark.parametrize("key", ["tie_word_embeddings", "attention_bias", "mlp_bias"])
@pytest.mark.parametrize("value", ["false", 0, 1, []])
def test_flags_of_the_wrong_type(key, value):
    assert f"{key} must be true or false, got {value!r}" in refusal(**{key: value})


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"use_sliding_window": "true"}, "use_sliding_window"),
        ({**SLIDE, "sliding_window": 0}, "sliding_window"),
        ({**SLIDE, "sliding_window": 2.5}, "sliding_window"),
        ({**SLIDE, "max_window_layers": -1}, "max_window_layers"),
        ({**SLIDE, "max_window_layers": "1"}, "max_window_layers"),
        ({**SLIDE, "layer_types": 3}, "layer_types"),
        ({**SLIDE, "layer_types": KINDS[:2]}, "layer_types"),
        ({**SLIDE, "layer_types": ["chunked_attention"] * 3}, "layer_types"),
        ({**SLIDE, "layer_types": [["full_attention"]] * 3}, "layer_types"),
    ],
)
def test_windows_of_the_wrong_type(changes, key):
    assert key in refusal("Qwen2ForCausalLM", **changes)


def test_mistral_window_of_the_wrong_type():
    assert "sliding_window" in refusal("MistralForCausalLM", sliding_window=0)


def test_code_of_a_checkpoint_is_never_imported(tmp_path):
    """auto_map names Python files of the checkpoint: they are as good as not there."""
    marker = tmp_path / "ran"
    for name in ("configuration_evil.py", "modeling_evil.py"):
        (tmp_path / name).write_text(f"open({str(marker)!r}, 'w')\n")
    auto_map = {"AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
    config = {"architectures": ["LlamaForCausalLM"], **BASE, "auto_map": auto_map, "trust_remote_code": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert ModelConfig.from_hf(read_json(tmp_path / "config.json")) == from_hf()
    from mini_vllm import LLM, SamplingParams

    llm = LLM(model=str(tmp_path), load_format="dummy", device="cpu", num_kv_blocks=8)
    output = llm.generate({"prompt_token_ids": [1, 2, 3]}, SamplingParams(max_tokens=2), use_tqdm=False)
    assert len(output[0].outputs[0].token_ids) == 2
    assert not marker.exists()


# ---- files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"3", b"null", b"\xff\xfe", b'{"a": ' * 100_000, b'{"a": ' + b"9" * 10_000 + b"}"],
    ids=["empty", "cut", "list", "number", "null", "not utf-8", "deep", "long number"],
)
def test_read_json_names_a_malformed_file(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="JSON") as error:
        read_json(path)
    assert str(path) in str(error.value)


def test_read_json_names_a_missing_file(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(ValueError, match="does not exist") as error:
        read_json(path)
    assert str(path) in str(error.value)


def test_read_json_names_a_directory(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        read_json(tmp_path)


def test_token_id_list():
    assert token_id_list(None, "x") == ()
    assert token_id_list(0, "x") == (0,)
    assert token_id_list([3, 1], "x") == (3, 1)
    for wrong in (-1, True, 1.0, "1", [1, None], [[1]], {}):
        with pytest.raises(ValueError, match=r"^x must be"):
            token_id_list(wrong, "x")


# ---- EngineConfig -----------------------------------------------------------------------------------------


def test_engine_config_defaults():
    config = EngineConfig()
    assert (config.model, config.device, config.dtype, config.block_size) == (None, "auto", "auto", 16)
    assert (config.max_num_seqs, config.max_num_batched_tokens) == (256, 2048)
    assert (config.enable_prefix_caching, config.prefix_cache_policy, config.swap_space) == (True, "lru", 0)
    assert (config.policy, config.max_num_queued_requests, config.max_queue_time) == ("fcfs", None, None)
    assert config.overlap
    assert EngineConfig(max_num_seqs=5000).max_num_batched_tokens == 5000
    assert EngineConfig(max_num_seqs=8, max_num_batched_tokens=8).max_num_batched_tokens == 8
    with pytest.raises(FrozenInstanceError):
        config.seed = 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"device": "tpu"}, ["device", "'tpu'", "auto, cpu, cuda"]),
        ({"device": None}, ["device", "None"]),
        ({"dtype": "int8"}, ["dtype", "'int8'", "auto, float32, float16, bfloat16"]),
        ({"load_format": "pt"}, ["load_format", "'pt'", "auto, dummy"]),
        ({"generation_config": "vllm"}, ["generation_config", "'vllm'", "auto, none"]),
        ({"gpu_memory_utilization": 0}, ["gpu_memory_utilization", "(0, 1]"]),
        ({"gpu_memory_utilization": 1.01}, ["gpu_memory_utilization"]),
        ({"gpu_memory_utilization": math.nan}, ["gpu_memory_utilization"]),
        ({"gpu_memory_utilization": "0.9"}, ["gpu_memory_utilization"]),
        ({"gpu_memory_utilization": True}, ["gpu_memory_utilization"]),
        ({"num_kv_blocks": 8, "kv_cache_memory": 1 << 20}, ["num_kv_blocks", "kv_cache_memory", "one of them"]),
        ({"max_num_seqs": 9, "max_num_batched_tokens": 8}, ["max_num_batched_tokens=8", "max_num_seqs=9"]),
        ({"seed": -1}, ["seed", "-1"]),
        ({"seed": 2**63}, ["seed"]),
        ({"seed": 1.0}, ["seed"]),
        ({"seed": True}, ["seed"]),
        ({"enforce_eager": "false"}, ["enforce_eager", "'false'"]),
        ({"enable_prefix_caching": 0}, ["enable_prefix_caching"]),
        ({"skip_tokenizer_init": None}, ["skip_tokenizer_init"]),
        ({"overlap": 1}, ["overlap", "True or False", "1"]),
        ({"policy": "fifo"}, ["policy must be one of", "fcfs, priority, sjf", "'fifo'"]),
        ({"policy": None}, ["policy must be one of", "None"]),
        ({"prefix_cache_policy": "mru"}, ["prefix_cache_policy", "lru, lfu, size", "'mru'"]),
        ({"swap_space": -1}, ["swap_space", "bytes >= 0", "-1"]),
        ({"swap_space": 4.0}, ["swap_space", "4.0"]),
        ({"swap_space": None}, ["swap_space", "None"]),
        ({"swap_space": True}, ["swap_space", "True"]),
        ({"swap_space": 1 << 20, "enable_prefix_caching": False}, ["swap_space", "needs enable_prefix_caching=True"]),
        ({"max_queue_time": 0}, ["max_queue_time", "seconds > 0", "0"]),
        ({"max_queue_time": -1.5}, ["max_queue_time", "-1.5"]),
        ({"max_queue_time": math.nan}, ["max_queue_time", "nan"]),
        ({"max_queue_time": "1"}, ["max_queue_time", "'1'"]),
        ({"max_queue_time": True}, ["max_queue_time", "True"]),
    ],
)
def test_engine_config_refuses(changes, words):
    with pytest.raises(ValueError, match=words[0]) as error:
        EngineConfig(**changes)
    assert all(word in str(error.value) for word in words), error.value


def test_engine_config_knows_the_policies_that_there_are():
    """Its names are its own, since it may import nothing."""
    from mini_vllm.scheduling.policy import POLICIES
    from mini_vllm.scheduling.radix_tree import EVICTION_POLICIES

    assert (set(SCHEDULING_POLICIES), set(PREFIX_CACHE_POLICIES)) == (set(POLICIES), set(EVICTION_POLICIES))


def test_engine_config_takes_any_time_to_queue_that_is_one():
    for seconds in (1, 0.25, math.inf):
        assert EngineConfig(max_queue_time=seconds).max_queue_time == seconds


@pytest.mark.parametrize(
    "name", ["max_model_len", "num_kv_blocks", "kv_cache_memory", "max_num_batched_tokens", "max_num_queued_requests"]
)
def test_engine_config_optional_sizes(name):
    assert EngineConfig(**{name: None})
    for wrong in (0, -1, 2048.0, "2048", True):
        with pytest.raises(ValueError, match=f"{name} must be an integer >= 1, got {wrong!r}"):
            EngineConfig(**{name: wrong})


@pytest.mark.parametrize("name", ["block_size", "max_num_seqs"])
def test_engine_config_sizes(name):
    for wrong in (0, -1, 16.0, "16", True, None):
        with pytest.raises(ValueError, match=f"{name} must be an integer >= 1, got {wrong!r}"):
            EngineConfig(**{name: wrong})


def test_engine_config_names_unknown_arguments():
    with pytest.raises(
        ValueError, match=r"unknown engine argument quantization, tensor_parallel; known are .*block_size"
    ):
        EngineConfig.from_kwargs(block_size=16, tensor_parallel=2, quantization="awq")
    assert EngineConfig.from_kwargs(block_size=8) == EngineConfig(block_size=8)


def test_the_policies_that_a_user_may_name_are_those_that_there_are():
    from mini_vllm.config import PREFIX_CACHE_POLICIES, SCHEDULING_POLICIES
    from mini_vllm.scheduling.policy import POLICIES
    from mini_vllm.scheduling.radix_tree import EVICTION_POLICIES

    assert set(SCHEDULING_POLICIES) == set(POLICIES)
    assert set(PREFIX_CACHE_POLICIES) == set(EVICTION_POLICIES)
