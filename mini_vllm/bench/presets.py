"""Real model shapes for benchmarks without a download: config.json contents, to be run with dummy weights."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def _qwen3(hidden: int, intermediate: int, layers: int, heads: int, tied: bool) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": 151936,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "eos_token_id": 151645,
    }


def _llama3(
    hidden: int, intermediate: int, layers: int, head_dim: int, rope_factor: float, tied: bool
) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 128256,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": head_dim,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": rope_factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "eos_token_id": 128001,
    }


PRESETS = {
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, tied=True),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, tied=True),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, tied=True),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32, tied=False),
    "llama-3.2-1b": _llama3(2048, 8192, 16, 64, 32.0, tied=True),
    "llama-3.1-8b": _llama3(4096, 14336, 32, 128, 8.0, tied=False),
    "qwen2.5-7b": {
        "architectures": ["Qwen2ForCausalLM"],  # the family whose projections of q, k and v have a bias
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "eos_token_id": 151643,
    },
}


def write_preset(name: str, directory: Path) -> Path:
    """Make a model directory of a preset, for `load_format="dummy"`. Raises `ValueError` for an unknown name."""
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} is not one of {', '.join(PRESETS)}")
    (directory / "config.json").write_text(json.dumps(PRESETS[name]))
    return directory


@contextmanager
def preset_arguments(name: str | None) -> Iterator[dict[str, Any]]:
    """The engine arguments that run a preset, whose directory lives as long as the context; {} for None."""
    if name is None:
        yield {}
        return
    with tempfile.TemporaryDirectory(prefix="mini-vllm-") as parent:
        directory = Path(parent) / name
        directory.mkdir()
        yield {"model": str(write_preset(name, directory)), "load_format": "dummy"}
