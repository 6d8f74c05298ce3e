"""The floors of the house: which module may import what. Parsed from the sources, so lazy imports count too."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

import mini_vllm

ROOT = Path(__file__).resolve().parent.parent

# `from mini_vllm import LLM` is an import of mini_vllm.llm.
PUBLIC_NAMES = {**mini_vllm._HOMES, "CUDA_AVAILABLE": "mini_vllm", "__version__": "mini_vllm"}

LIBRARIES = {"numpy", "ml_dtypes", "safetensors", "tokenizers", "jinja2", "click", "tqdm", "huggingface_hub"}
CUDA_LIBRARIES = {"cupy", "cupyx", "cupy_backends", "cuda"}
TRAINING_LIBRARIES = {"torch", "transformers"}

FLOOR_0 = {"mini_vllm.config", "mini_vllm.sampling_params", "mini_vllm.tracing"}
TEXT = {"mini_vllm.tokenizer", "mini_vllm.detokenizer", "mini_vllm.chat_template"}
BASE = {"mini_vllm"}  # its version and where its data lies; it imports nothing itself


@dataclass(frozen=True)
class Floor:
    """May import from `internal` and its own package, from `libraries` and from the standard library."""

    internal: frozenset[str]
    libraries: frozenset[str]


def floor(*internal: set[str] | str, libraries: set[str] = LIBRARIES) -> Floor:
    names = set().union(*({i} if isinstance(i, str) else i for i in internal))
    return Floor(frozenset(names), frozenset(libraries))


# By prefix of the module's name; the longest one counts. `mini_vllm.x` stands for its submodules too.
FLOORS = {
    # 0: standard library
    "mini_vllm.config": floor(libraries=set()),
    "mini_vllm.sampling_params": floor(libraries=set()),
    "mini_vllm.tracing": floor(libraries=set()),
    "mini_vllm.demo": floor(libraries=set()),  # a data location
    "mini_vllm.demo.train": floor("mini_vllm.demo", libraries=LIBRARIES | TRAINING_LIBRARIES),
    # 1: scheduling, ops and text never import each other
    "mini_vllm.scheduling": floor(FLOOR_0, libraries=set()),
    "mini_vllm.ops": floor(FLOOR_0),
    "mini_vllm.ops.cuda": floor(FLOOR_0, BASE, "mini_vllm.ops", libraries=LIBRARIES | CUDA_LIBRARIES),
    "mini_vllm.chat_template": floor(FLOOR_0),
    "mini_vllm.tokenizer": floor(FLOOR_0, "mini_vllm.chat_template"),
    "mini_vllm.detokenizer": floor(FLOOR_0, "mini_vllm.tokenizer"),
    # 2: never a concrete backend
    "mini_vllm.models": floor(FLOOR_0, "mini_vllm.ops.base", "mini_vllm.ops.weight"),
    # 3: the only reader of both wings
    "mini_vllm.engine": floor(
        FLOOR_0, TEXT, "mini_vllm.scheduling", "mini_vllm.ops", "mini_vllm.models", "mini_vllm.demo"
    ),
    # 4
    "mini_vllm.llm": floor(FLOOR_0, "mini_vllm.engine", "mini_vllm.tokenizer"),
    "mini_vllm.doctor": floor(BASE, "mini_vllm.ops"),
    "mini_vllm.bench": floor(
        FLOOR_0, BASE, "mini_vllm.llm", "mini_vllm.engine", "mini_vllm.scheduling", "mini_vllm.ops"
    ),
    "mini_vllm.bench.plot": floor(FLOOR_0, libraries={"matplotlib"}),
    # 5
    "mini_vllm.cli": floor(FLOOR_0, BASE, "mini_vllm.llm", "mini_vllm.doctor", "mini_vllm.bench"),
    # beside the floors
    "mini_vllm.cuda_src": floor(libraries=set()),
}
# The package itself names things and imports each when it is first used; CUDA_AVAILABLE asks for CuPy.
LAZY_ROOT = {*PUBLIC_NAMES.values(), "mini_vllm.ops.cuda", "cupy"}


def covers(prefix: str, module: str) -> bool:
    return module == prefix or module.startswith(prefix + ".")


def module_sources() -> dict[str, Path]:
    """Every module of the package: dotted name to file. `cli` and `cuda_src` are installed inside mini_vllm."""
    modules = {}
    for directory, package in (("mini_vllm", ""), ("cli", "mini_vllm."), ("cuda_src", "mini_vllm.")):
        for path in sorted((ROOT / directory).rglob("*.py")):
            name = package + ".".join(path.relative_to(ROOT).with_suffix("").parts)
            modules[name.removesuffix(".__init__")] = path
    return modules


MODULES = module_sources()


def imports(module: str, source: str, is_package: bool) -> set[str]:
    """The modules that a source imports, anywhere in it, with `from a import b` resolved to a.b where that is one."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:  # relative: the package `level` steps up
                parts = module.split(".")[: None if is_package else -1]
                parts = parts[: len(parts) - node.level + 1]
                base = ".".join([*parts, *filter(None, [node.module])])
            for alias in node.names:
                if base == "mini_vllm" and alias.name in PUBLIC_NAMES:
                    found.add(PUBLIC_NAMES[alias.name])
                else:
                    inner = f"{base}.{alias.name}"
                    found.add(inner if inner in MODULES else base)
    return found


def violations(module: str, source: str, is_package: bool = False) -> list[str]:
    """What `module` imports against the table, as sentences."""
    found = sorted(imports(module, source, is_package) - {"__future__"})
    if module == "mini_vllm":
        return [f"mini_vllm imports {name}" for name in found if not may_root_import(name)]
    prefixes = [prefix for prefix in FLOORS if covers(prefix, module)]
    if not prefixes:
        return [f"{module} has no floor: give it one in FLOORS"]
    prefix = max(prefixes, key=len)
    rules = FLOORS[prefix]
    bad = []
    for name in found:
        top = name.partition(".")[0]
        if top == "mini_vllm":
            exact = name in BASE & rules.internal
            allowed = exact or any(covers(i, name) for i in {prefix, *rules.internal} - BASE)
            # The wall inside ops: only the engine and the package itself reach for the CUDA backend.
            if covers("mini_vllm.ops.cuda", name) and prefix == "mini_vllm.ops":
                allowed = False
        else:
            allowed = top in sys.stdlib_module_names or top in rules.libraries
        if not allowed:
            bad.append(f"{module} imports {name}")
    return bad


def may_root_import(name: str) -> bool:
    return name in LAZY_ROOT or name.partition(".")[0] in sys.stdlib_module_names


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_only_from_lower_floors(module):
    path = MODULES[module]
    assert violations(module, path.read_text(encoding="utf-8"), path.name == "__init__.py") == []


def test_public_names_are_the_package_s():
    assert {*mini_vllm.__all__, "__version__"} == set(PUBLIC_NAMES)
    for name, home in mini_vllm._HOMES.items():
        assert getattr(mini_vllm, name).__module__ == home
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = mini_vllm.no_such_name


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("mini_vllm.scheduling.scheduler", "import numpy as np"),
        ("mini_vllm.scheduling.scheduler", "def f():\n    from numpy import array"),
        ("mini_vllm.scheduling.scheduler", "from mini_vllm.ops.base import Ops"),
        ("mini_vllm.scheduling.scheduler", "from ..ops.base import Ops"),
        ("mini_vllm.scheduling.scheduler", "from .. import tokenizer"),
        ("mini_vllm.scheduling.scheduler", "from mini_vllm import LLM"),
        ("mini_vllm.sampling_params", "import numpy"),
        ("mini_vllm.sampling_params", "from mini_vllm.scheduling.sequence import Sequence"),
        ("mini_vllm.config", "from . import llm"),
        ("mini_vllm.ops.numpy_ops", "import cupy"),
        ("mini_vllm.ops.numpy_ops", "from mini_vllm.ops.cuda import kernel"),
        ("mini_vllm.ops.numpy_ops", "from mini_vllm.models.rope import rope_table"),
        ("mini_vllm.ops.cuda.kernel", "import torch"),
        ("mini_vllm.ops.cuda.kernel", "from mini_vllm.engine.model_runner import ModelRunner"),
        ("mini_vllm.ops.cuda.kernel", "from mini_vllm import LLM"),
        ("mini_vllm.tokenizer", "from mini_vllm.scheduling.sequence import Sequence"),
        ("mini_vllm.models.decoder", "from mini_vllm.ops.numpy_ops import NumpyOps"),
        ("mini_vllm.models.decoder", "from mini_vllm.ops import numpy_ops"),
        ("mini_vllm.models.decoder", "def f():\n    if True:\n        import mini_vllm.ops.cuda"),
        ("mini_vllm.models.decoder", "from mini_vllm.scheduling.sequence import Sequence"),
        ("mini_vllm.engine.llm_engine", "from mini_vllm.llm import LLM"),
        ("mini_vllm.engine.llm_engine", "import cupy.cuda"),
        ("mini_vllm.llm", "from mini_vllm.models.decoder import CausalLM"),
        ("mini_vllm.llm", "from mini_vllm.ops.base import Ops"),
        ("mini_vllm.cli.generate", "from mini_vllm.scheduling.scheduler import Scheduler"),
        ("mini_vllm.cli.generate", "from mini_vllm import LLMEngine"),
        ("mini_vllm.cli.generate", "import requests"),
        ("mini_vllm", "import numpy"),
        ("mini_vllm", "from mini_vllm.models.decoder import CausalLM"),
        ("mini_vllm.helpers", "import os"),
    ],
)
def test_checker_catches(module, source):
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("mini_vllm.scheduling.scheduler", "from .sequence import Sequence\nfrom collections import deque"),
        ("mini_vllm.ops.cuda.kernel", "import cupy\nfrom . import compiler\nfrom mini_vllm.ops.base import Ops"),
        ("mini_vllm.models.decoder", "from mini_vllm.ops.base import Ops\nfrom mini_vllm.config import ModelConfig"),
        ("mini_vllm.engine.llm_engine", "from mini_vllm.ops.cuda import require_cuda"),
        ("mini_vllm.cli.generate", "from mini_vllm import LLM, SamplingParams, __version__\nimport click"),
    ],
)
def test_checker_accepts(module, source):
    assert violations(module, source) == []


def run_fresh(code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return run.stdout.strip()


def test_import_is_light():
    heavy = "{'numpy', 'cupy', 'tokenizers', 'jinja2', 'safetensors', 'huggingface_hub', 'tqdm', 'click'}"
    assert run_fresh(f"import sys, mini_vllm; print({heavy} & set(sys.modules))") == "set()"


def test_import_takes_less_than_a_third_of_a_second():
    seconds = []
    for _ in range(5):  # the whole process; the best of a few, since the machine may be busy
        start = time.perf_counter()
        run_fresh("import mini_vllm")
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.3
