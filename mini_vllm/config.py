"""`EngineConfig`, the user's knobs, and `ModelConfig`, what a checkpoint's config.json says. Both are frozen.

Every difference between the supported model families is a field of `ModelConfig`; an unknown architecture,
RoPE type, activation or quantisation is refused here, so nothing downstream has to guess.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "float32", "float16", "bfloat16")
LOAD_FORMATS = ("auto", "dummy")
GENERATION_CONFIGS = ("auto", "none")
PREFIX_CACHE_POLICIES = ("lru", "lfu", "size")
SCHEDULING_POLICIES = ("fcfs", "priority", "sjf")


@dataclass(frozen=True)
class EngineConfig:
    """How to run a model. Invalid values raise `ValueError`.

    model: directory of an HF checkpoint, or a hub id such as "Qwen/Qwen3-0.6B"; None is the bundled demo.
    device: "cpu", or "cuda" for an NVIDIA GPU; "auto" is "cuda" where that works, else "cpu".
    dtype: of weights, activations and KV cache; "auto" is float32 on the CPU and the checkpoint's on a GPU.
    max_model_len: prompt and output tokens at most; None takes the model's limit, or what the KV cache holds.
    block_size: tokens per KV-cache block.
    num_kv_blocks, kv_cache_memory: size of the KV cache in blocks or in bytes, at most one of the two.
    max_num_seqs: sequences running at once.
    max_num_batched_tokens: tokens of one step; None is 2048, or max_num_seqs if that is more.
    gpu_memory_utilization: share of the GPU's memory that weights, activations and KV cache may take.
    enable_prefix_caching: share the K/V of equal prompt prefixes between requests, and keep it for later ones.
    prefix_cache_policy: what the prefix cache forgets first: "lru", "lfu" or "size".
    swap_space: bytes of host memory for K/V that the prefix cache must give up on the device; 0 is none.
    policy: who runs first: "fcfs", "priority" (lower first) or "sjf" (shortest prompt first); none of them starves.
    max_num_queued_requests: requests that may wait; further ones end at once with finish_reason "abort".
    max_queue_time: seconds after which a request that has not started ends with finish_reason "abort".
    overlap: let the GPU run a step while the host plans the next one. It changes no token.
    enforce_eager: never use CUDA graphs.
    seed: of the requests that bring none of their own, and of dummy weights.
    load_format: "dummy" makes seeded random weights from config.json alone, for benchmarks.
    generation_config: "auto" takes default sampling parameters from the checkpoint's generation_config.json
        as vLLM does, "none" takes those of `SamplingParams`.
    skip_tokenizer_init: load no tokenizer; prompts are then token ids and `text` stays empty.
    revision: branch, tag or commit of a hub id.
    """

    model: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    max_model_len: int | None = None
    block_size: int = 16
    num_kv_blocks: int | None = None
    kv_cache_memory: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None
    gpu_memory_utilization: float = 0.9
    enable_prefix_caching: bool = True
    prefix_cache_policy: str = "lru"
    swap_space: int = 0
    policy: str = "fcfs"
    max_num_queued_requests: int | None = None
    max_queue_time: float | None = None
    overlap: bool = True
    enforce_eager: bool = False
    seed: int = 0
    load_format: str = "auto"
    generation_config: str = "auto"
    skip_tokenizer_init: bool = False
    revision: str | None = None

    def __post_init__(self) -> None:
        for name, allowed in (
            ("device", DEVICES),
            ("dtype", DTYPES),
            ("load_format", LOAD_FORMATS),
            ("generation_config", GENERATION_CONFIGS),
            ("prefix_cache_policy", PREFIX_CACHE_POLICIES),
            ("policy", SCHEDULING_POLICIES),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name in (
            "max_model_len",
            "num_kv_blocks",
            "kv_cache_memory",
            "max_num_batched_tokens",
            "max_num_queued_requests",
        ):
            if getattr(self, name) is not None:
                self._check_positive_int(name)
        self._check_positive_int("block_size")
        self._check_positive_int("max_num_seqs")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be an integer in [0, 2**63), got {self.seed!r}")
        for name in ("enable_prefix_caching", "overlap", "enforce_eager", "skip_tokenizer_init"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        share = self.gpu_memory_utilization
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
            raise ValueError(f"gpu_memory_utilization must be in (0, 1], got {self.gpu_memory_utilization!r}")
        if isinstance(self.swap_space, bool) or not isinstance(self.swap_space, int) or self.swap_space < 0:
            raise ValueError(f"swap_space must be a number of bytes >= 0, got {self.swap_space!r}")
        if self.swap_space and not self.enable_prefix_caching:
            raise ValueError("swap_space holds what the prefix cache gives up; it needs enable_prefix_caching=True")
        wait = self.max_queue_time
        if wait is not None and (isinstance(wait, bool) or not isinstance(wait, (int, float)) or not wait > 0):
            raise ValueError(f"max_queue_time must be seconds > 0, got {wait!r}")
        if self.num_kv_blocks is not None and self.kv_cache_memory is not None:
            raise ValueError("num_kv_blocks and kv_cache_memory both size the KV cache; give one of them")
        if self.max_num_batched_tokens is None:
            object.__setattr__(self, "max_num_batched_tokens", max(2048, self.max_num_seqs))
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} must be at least "
                f"max_num_seqs={self.max_num_seqs}, since each running sequence takes a token in every step"
            )

    def _check_positive_int(self, name: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {value!r}")

    @classmethod
    def from_kwargs(cls, **kwargs: Any) -> EngineConfig:
        """Like the constructor, but a name that does not exist raises a `ValueError` that lists those that do."""
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(kwargs) - set(known))
        if unknown:
            raise ValueError(f"unknown engine argument {', '.join(unknown)}; known are {', '.join(known)}")
        return cls(**kwargs)


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding (Su et al., 2021) and its scalings, in the keys of HF's `rope_scaling`.

    type "linear": positions divided by factor. "llama3": long wavelengths divided, short ones kept, a ramp
    between. "yarn" (Peng et al., 2023): a ramp over the rotation count, and attention_factor on cos and sin.
    """

    type: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder, in HF's field names; build it with `from_hf`.

    qkv_bias, o_bias: biases of the attention projections. qk_norm: per-head RMSNorm of q and k (Qwen3).
    sliding_windows: for each layer the attention window in tokens, or None for full attention.
    dtype: the checkpoint's own. eos_token_ids: config.json's; generation_config.json may add some.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool
    sliding_windows: tuple[int | None, ...]
    dtype: str
    eos_token_ids: tuple[int, ...]

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Read a config.json, in the spelling of transformers 4 or 5; `ValueError` says what is not supported."""
        reader = _ConfigReader(config)
        family = reader.family()
        if config.get("quantization_config") is not None:
            raise ValueError("config.json: quantization_config is not supported; use the unquantised checkpoint")
        act = config.get("hidden_act", "silu")
        if act != "silu":
            raise ValueError(f"config.json: hidden_act {act!r} is not supported; supported is silu")
        if reader.flag("mlp_bias"):
            raise ValueError("config.json: mlp_bias is not supported; supported are MLPs without bias")

        hidden_size = reader.size("hidden_size")
        num_heads = reader.size("num_attention_heads")
        # Where the key is missing, transformers takes num_attention_heads for Llama but numbers of its own for
        # the others; released checkpoints name it. null means num_attention_heads everywhere.
        no_gqa = family == "llama" or "num_key_value_heads" in config
        num_kv_heads = reader.size("num_key_value_heads", default=num_heads if no_gqa else None)
        num_layers = reader.size("num_hidden_layers")
        if num_heads % num_kv_heads:
            raise ValueError(
                f"config.json: num_attention_heads={num_heads} is not a multiple of num_key_value_heads={num_kv_heads}"
            )
        if config.get("head_dim") is None and hidden_size % num_heads:
            raise ValueError(
                f"config.json has no head_dim and hidden_size={hidden_size} is not a multiple of "
                f"num_attention_heads={num_heads}"
            )
        # A Qwen3 config without head_dim means 128 in transformers; every released one names it.
        head_dim = reader.size("head_dim", default=128 if family == "qwen3" else hidden_size // num_heads)
        if head_dim % 2:
            raise ValueError(f"config.json: head_dim={head_dim} is odd; rotary embedding needs pairs")
        attention_bias = reader.flag("attention_bias") and family in ("llama", "qwen3")
        max_position = reader.size("max_position_embeddings")
        return cls(
            architecture=config["architectures"][0],
            vocab_size=reader.size("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=reader.size("intermediate_size"),
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            num_key_value_heads=num_kv_heads,
            head_dim=head_dim,
            max_position_embeddings=max_position,
            rms_norm_eps=reader.number("rms_norm_eps", default=1e-6),
            rope=reader.rope(max_position),
            tie_word_embeddings=reader.flag("tie_word_embeddings"),
            qkv_bias=family == "qwen2" or attention_bias,
            o_bias=attention_bias,
            qk_norm=family == "qwen3",
            sliding_windows=reader.sliding_windows(family, num_layers),
            dtype=reader.dtype(),
            eos_token_ids=reader.token_ids("eos_token_id"),
        )


FAMILIES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


class _ConfigReader:
    """Typed access to config.json: each accessor raises `ValueError` naming the key, the value and what is allowed."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config

    def family(self) -> str:
        architectures = self.config.get("architectures")
        if architectures not in [[name] for name in FAMILIES]:
            raise ValueError(
                f"config.json: architectures {architectures!r} is not supported; supported are {', '.join(FAMILIES)}"
            )
        return FAMILIES[architectures[0]]

    def size(self, key: str, default: int | None = None, minimum: int = 1) -> int:
        value = self.config.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise ValueError(f"config.json: {key} must be an integer >= {minimum}, got {value!r}")
        return value

    def flag(self, key: str, default: bool = False, source: Mapping[str, Any] | None = None) -> bool:
        value = (self.config if source is None else source).get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise ValueError(f"config.json: {key} must be true or false, got {value!r}")
        return value

    def number(self, key: str, default: float | None = None, source: Mapping[str, Any] | None = None) -> float:
        value = (self.config if source is None else source).get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= sys.float_info.max:
            raise ValueError(f"config.json: {key} must be a number > 0, got {value!r}")
        return float(value)

    def dtype(self) -> str:
        name = self.config.get("dtype") or self.config.get("torch_dtype") or "float32"  # transformers 5 / 4
        if name not in DTYPES[1:]:
            raise ValueError(f"config.json: dtype {name!r} is not supported; supported are {', '.join(DTYPES[1:])}")
        return name

    def token_ids(self, key: str) -> tuple[int, ...]:
        return token_id_list(self.config.get(key), f"config.json: {key}")

    def sliding_windows(self, family: str, num_layers: int) -> tuple[int | None, ...]:
        config = self.config
        if family == "llama":
            return (None,) * num_layers
        if family == "mistral":  # one window for all layers; a missing key means 4096, null means none
            on = config.get("sliding_window", 4096) is not None
            return (self.size("sliding_window", default=4096) if on else None,) * num_layers
        if not self.flag("use_sliding_window"):
            return (None,) * num_layers
        window = self.size("sliding_window", default=4096)
        layer_types = config.get("layer_types")
        if layer_types is None:
            first = self.size("max_window_layers", default=28, minimum=0)
            return tuple(window if i >= first else None for i in range(num_layers))
        kinds = {"full_attention": None, "sliding_attention": window}
        known = isinstance(layer_types, list) and all(kind in list(kinds) for kind in layer_types)
        if not known or len(layer_types) != num_layers:
            raise ValueError(
                f"config.json: layer_types must name {' or '.join(kinds)} for each of the {num_layers} layers, "
                f"got {layer_types!r}"
            )
        return tuple(kinds[kind] for kind in layer_types)

    def rope(self, max_position_embeddings: int) -> RopeConfig:
        """`rope_theta` + `rope_scaling` (transformers 4) or `rope_parameters` (transformers 5)."""
        scaling = self.config.get("rope_scaling") or self.config.get("rope_parameters") or {}
        if not isinstance(scaling, Mapping):
            raise ValueError(f"config.json: rope_scaling must be an object, got {scaling!r}")
        if any(isinstance(value, Mapping) for value in scaling.values()):
            raise ValueError(f"config.json: rope parameters per layer type are not supported, got {scaling!r}")
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind not in ROPE_TYPES:
            raise ValueError(f"config.json: rope type {kind!r} is not supported; supported are {', '.join(ROPE_TYPES)}")
        rotary_factor = scaling.get("partial_rotary_factor", self.config.get("partial_rotary_factor", 1.0))
        if rotary_factor not in (None, 1.0):
            raise ValueError(f"config.json: partial_rotary_factor {rotary_factor!r} is not supported; supported is 1")
        theta = self.number("rope_theta", self.number("rope_theta", 10000.0), scaling)
        if kind == "default":
            return RopeConfig(theta=theta)
        if kind == "linear":
            return RopeConfig(kind, theta, self.number("factor", source=scaling))
        original = self.config.get("original_max_position_embeddings") or scaling.get(
            "original_max_position_embeddings", max_position_embeddings
        )
        if isinstance(original, bool) or not isinstance(original, int) or original < 1:
            raise ValueError(f"config.json: original_max_position_embeddings must be an integer >= 1, got {original!r}")
        if kind == "llama3":
            low = self.number("low_freq_factor", source=scaling)
            high = self.number("high_freq_factor", source=scaling)
            if low >= high:
                raise ValueError(f"config.json: low_freq_factor={low} must be below high_freq_factor={high}")
            factor = self.number("factor", source=scaling)
            return RopeConfig(kind, theta, factor, original, low_freq_factor=low, high_freq_factor=high)
        if theta <= 1:
            raise ValueError(f"config.json: rope_theta={theta:g} must be above 1, since yarn divides by its logarithm")
        factor = self.number("factor", max_position_embeddings / original, scaling)
        return RopeConfig(
            kind,
            theta,
            factor,
            original,
            attention_factor=self._yarn_attention_factor(scaling, factor),
            beta_fast=self.number("beta_fast", 32.0, scaling),
            beta_slow=self.number("beta_slow", 1.0, scaling),
            truncate=self.flag("truncate", True, scaling),
        )

    def _yarn_attention_factor(self, scaling: Mapping[str, Any], factor: float) -> float:
        if scaling.get("attention_factor") is not None:
            return self.number("attention_factor", source=scaling)

        def mscale(coefficient: float) -> float:
            return 0.1 * coefficient * math.log(factor) + 1.0 if factor > 1 else 1.0

        if scaling.get("mscale") and scaling.get("mscale_all_dim"):
            return mscale(self.number("mscale", source=scaling)) / mscale(self.number("mscale_all_dim", source=scaling))
        return mscale(1.0)


def token_id_list(value: Any, name: str) -> tuple[int, ...]:
    """A token id, a list of them or None, as HF's configs write EOS ids: always a tuple."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    for token_id in values:
        if isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0:
            raise ValueError(f"{name} must be a token id >= 0 or a list of them, got {value!r}")
    return tuple(values)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; `ValueError` names the file when it is missing or malformed."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; a model directory holds config.json and *.safetensors") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value
