"""Fixtures and options for all tests: what to skip where, the record of a run on a GPU, and a sample for a sanitizer.

compute-sanitizer --tool memcheck --report-api-errors no \\
    python -m pytest -m gpu -p no:xdist --sanitizer 2 -k "not failing_kernel" tests/ops/cuda

Without workers, which do not start under it, and without the test whose kernel fails on purpose; launches that the
driver refuses on purpose are no errors either. racecheck does not get to the end of two more, which only measure time:
-k "not (failing_kernel or tuning or timer)".
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import subprocess
import warnings
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from mini_vllm.engine.batch_state import BatchState
from mini_vllm.engine.model_input import build_model_input
from mini_vllm.models.kv_cache import KVCache
from mini_vllm.ops.base import map_arrays
from mini_vllm.sampling_params import SamplingParams
from mini_vllm.scheduling.block_manager import BlockManager
from mini_vllm.scheduling.scheduler import Scheduler
from mini_vllm.scheduling.sequence import Sequence

if TYPE_CHECKING:
    import cupy

    from mini_vllm import LLM

ROOT = Path(__file__).resolve().parent.parent


# ---- skipping ---------------------------------------------------------------------------------------------


@functools.cache
def why_no_gpu() -> str | None:
    """Why `gpu` tests cannot run here; None where they can."""
    try:
        with warnings.catch_warnings():  # CuPy warns where it finds no CUDA toolkit, which is then the reason
            warnings.simplefilter("ignore")
            import cupy
    except ImportError as error:
        return f"CuPy cannot be imported: {error}"
    return None if cupy.is_available() else "CuPy finds no NVIDIA GPU"


@functools.cache
def why_no_oracle() -> str | None:
    """Why `oracle` tests cannot run here; None where they can."""
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    return f"{' and '.join(missing)} not installed" if missing else None


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    # Asked only when such a test is about to run: other runs do not pay for importing CuPy.
    for mark, why_not in (("gpu", why_no_gpu), ("oracle", why_no_oracle)):
        if item.get_closest_marker(mark) and (reason := why_not()):
            pytest.skip(f"{mark} test: {reason}")


# ---- options ----------------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--gpu-record",
        metavar="PATH",
        type=Path,
        help="write a JSON record of this run there: digest of the tested sources, GPU, versions, outcome",
    )
    parser.addoption(
        "--sanitizer",
        metavar="N",
        type=int,
        help="for compute-sanitizer, which is slow: run N cases of each test function, and give each array on the GPU "
        "memory of its own, so that a step beyond its end is seen",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    num_cases = config.getoption("--sanitizer")
    if num_cases is None:
        return
    functions: dict[tuple, list[pytest.Item]] = {}
    for item in items:
        functions.setdefault((item.path, getattr(item, "originalname", item.name)), []).append(item)
    kept = set()
    for cases in functions.values():
        count = min(num_cases, len(cases))
        kept.update(cases[len(cases) * i // count] for i in range(count))
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def allocate_alone(num_bytes: int) -> cupy.cuda.MemoryPointer:
    """Memory that is no part of a larger piece."""
    import cupy

    return cupy.cuda.MemoryPointer(cupy.cuda.Memory(num_bytes), 0)


def pytest_sessionstart(session: pytest.Session) -> None:
    if session.config.getoption("--sanitizer") is not None and why_no_gpu() is None:
        import cupy

        cupy.cuda.set_allocator(allocate_alone)


# ---- the record of a run on a GPU -------------------------------------------------------------------------


def source_digest() -> str:
    """sha256 over the sources of the CUDA backend: for each path in order, path NUL content NUL.

    In a clean checkout these are the paths of `git ls-files cuda_src mini_vllm/ops`; the machine with the GPU
    may hold an export without git.
    """
    files = [path for name in ("cuda_src", "mini_vllm/ops") for path in (ROOT / name).rglob("*") if path.is_file()]
    digest = hashlib.sha256()
    for path in sorted(file.relative_to(ROOT).as_posix() for file in files if file.suffix != ".pyc"):
        digest.update(path.encode() + b"\0" + (ROOT / path).read_bytes() + b"\0")
    return digest.hexdigest()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    path = config.getoption("--gpu-record")
    if path is None:
        return
    if reason := why_no_gpu():
        terminalreporter.write_line(f"--gpu-record: nothing written, {reason}", red=True)
        return
    import cupy
    from cupy_backends.cuda.libs import nvrtc

    def reports(*outcomes: str) -> list[pytest.TestReport]:
        return [report for outcome in outcomes for report in terminalreporter.stats.get(outcome, ())]

    failures = reports("failed", "error")
    properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
    nvidia_smi = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    record = {
        "source_digest": source_digest(),
        "gpu": properties["name"].decode(),
        "driver": subprocess.run(nvidia_smi, capture_output=True, text=True, check=True).stdout.split("\n")[0],
        "cupy": cupy.__version__,
        "nvrtc": ".".join(map(str, nvrtc.getVersion())),
        "passed": len(reports("passed")),
        "failed": len(failures),
        "skipped": len(reports("skipped")),
        "failures": sorted({report.nodeid for report in failures}),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    terminalreporter.write_line(f"--gpu-record: {path}")


@pytest.fixture
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture
def digest() -> str:
    """`source_digest` of the sources that are tested now."""
    return source_digest()


# ---- fixtures ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def times(request: pytest.FixtureRequest) -> Callable[[int], int]:
    """A function (count) -> how often to do something that shows by chance: `count` times, twice for a sanitizer."""
    return lambda count: count if request.config.getoption("--sanitizer") is None else min(count, 2)


@pytest.fixture
def prompt_logits() -> Callable[[LLM, list[int]], np.ndarray]:
    """A function (llm, token_ids) -> [T, V] float32: the logits after every token of a prompt.

    They come from the LLM's model and backend in one step over a KV cache of its own, so the engine's state
    stays as it is.
    """

    def prompt_logits(llm: LLM, token_ids: list[int]) -> np.ndarray:
        runner, length = llm.llm_engine.runner, len(token_ids)
        ops, block_size = runner.ops, runner.kv.block_size
        blocks = BlockManager(-(-length // block_size), block_size)
        scheduler = Scheduler(blocks, max_num_seqs=1, max_num_batched_tokens=length)
        scheduler.add(Sequence(0, token_ids, SamplingParams(), max_num_tokens=length + 1))
        plan, state = scheduler.schedule(), BatchState(1, blocks.num_blocks, block_size)
        state.apply(plan)
        host = build_model_input(plan, state)
        kv = KVCache(runner.model.config, blocks.num_blocks, block_size, ops)
        hidden = runner.model.forward(
            ops.to_device(host.input_ids),
            ops.to_device(host.positions),
            map_arrays(host.attn, ops.to_device),
            kv,
        )
        return ops.to_host(runner.model.logits(hidden))

    return prompt_logits


@pytest.fixture(scope="session")
def demo_llm() -> LLM:
    """The bundled demo model on the CPU."""
    from mini_vllm import LLM

    return LLM(device="cpu")
