"""mini-vllm: an LLM inference engine that installs and starts in seconds and reads like a book.

    from mini_vllm import LLM, SamplingParams

    print(LLM().generate("Once upon a time", SamplingParams(max_tokens=64))[0].text)

Names are loaded on first use, so that `import mini_vllm` takes no time and needs no GPU.
"""

from __future__ import annotations

import importlib
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mini_vllm.config import EngineConfig, ModelConfig
    from mini_vllm.engine.llm_engine import LLMEngine
    from mini_vllm.llm import LLM
    from mini_vllm.sampling_params import BeamSearchParams, SamplingParams
    from mini_vllm.tokenizer import Tokenizer

    CUDA_AVAILABLE: bool

__version__ = "0.1.0"
__all__ = [
    "CUDA_AVAILABLE",
    "LLM",
    "BeamSearchParams",
    "EngineConfig",
    "LLMEngine",
    "ModelConfig",
    "SamplingParams",
    "Tokenizer",
]

_HOMES = {
    "BeamSearchParams": "mini_vllm.sampling_params",
    "EngineConfig": "mini_vllm.config",
    "LLM": "mini_vllm.llm",
    "LLMEngine": "mini_vllm.engine.llm_engine",
    "ModelConfig": "mini_vllm.config",
    "SamplingParams": "mini_vllm.sampling_params",
    "Tokenizer": "mini_vllm.tokenizer",
}

# In a checkout `cli` and `cuda_src` stand beside this package, in an installation inside it; as
# mini_vllm.cli and mini_vllm.cuda_src they are found in both.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "cli" / "__init__.py").is_file() and (_checkout / "pyproject.toml").is_file():
    __path__.append(str(_checkout))

# What the engine decides for the user (a fallback, a default, a limit) is said in one line on stderr, unless
# the application has set up logging itself; MINI_VLLM_LOG_LEVEL=WARNING silences it.
_handler = logging.StreamHandler()
_handler.setFormatter(logging.Formatter("mini-vllm: %(message)s"))
_handler.addFilter(lambda record: not logging.root.handlers)
logging.getLogger(__name__).addHandler(_handler)
logging.getLogger(__name__).setLevel(os.environ.get("MINI_VLLM_LOG_LEVEL", "INFO").upper())


def __getattr__(name: str) -> Any:
    if name == "CUDA_AVAILABLE":
        value = _cuda_available()
    elif name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module 'mini_vllm' has no attribute {name!r}")
    globals()[name] = value
    return value


def _cuda_available() -> bool:
    """Whether CuPy is installed and sees a GPU."""
    try:
        import cupy
    except ImportError:
        return False
    return bool(cupy.is_available())
