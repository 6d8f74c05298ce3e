"""`mini-vllm bench startup`: from an empty process to the first token, cold and warm.

Each start is a process of its own. Cold: its cache of compiled kernels is empty (the files that it reads may still be
in the system's memory). This module is also what that process runs, so it imports nothing at the top that is measured.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mini_vllm.bench.report import Report

PARTS = {
    "python": "Python itself, before our first line",
    "import": "import of the engine",
    "device": "backend: CuPy and a CUDA context",
    "weights": "weights on the device",
    "kernels": "kernels compiled or taken from the cache, and loaded",
    "kv_cache": "memory measured, KV cache allocated",
    "graphs": "CUDA graphs: decode steps captured, memory for prompt steps; products tuned",
    "other": "config, tokenizer and the rest of the engine",
    "first_token": "one token, greedy",
}


def start_once(arguments: dict[str, Any], cold: bool) -> tuple[str, dict[str, float]]:
    """Start an engine in a fresh process and make one token: (device, seconds of each part, of "ready" and "total").

    ready: import and engine, as a program that imports it would wait. total: from before the process to its first
    token. Raises `RuntimeError` with the process's own message if it fails.
    """
    # Downloaded models stay where they are, although their cache would move with the kernels'.
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    environment = {"HF_HOME": os.path.join(base, "huggingface"), **os.environ}
    package_parent = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package_parent, os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory(prefix="mini-vllm-cold-") as empty:
        if cold:
            # Ours, CuPy's and the driver's.
            environment |= dict.fromkeys(("XDG_CACHE_HOME", "CUPY_CACHE_DIR", "CUDA_CACHE_PATH"), empty)
        command = [sys.executable, "-m", __name__, json.dumps(arguments), repr(time.monotonic())]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        raise RuntimeError(f"the process that was to start an engine failed: {lines[-1] if lines else 'no message'}")
    device, seconds = json.loads(done.stdout.splitlines()[-1])
    return device, seconds


def child(arguments: dict[str, Any], spawned: float) -> tuple[str, dict[str, float]]:
    """What the fresh process does; `spawned` is the parent's time.monotonic, a clock that processes share."""
    begun = time.monotonic()
    from mini_vllm.engine.llm_engine import LLMEngine
    from mini_vllm.sampling_params import SamplingParams

    imported = time.monotonic()
    engine = LLMEngine(**arguments)
    ready = time.monotonic()
    engine.generate([1, 2, 3, 4], SamplingParams(temperature=0, max_tokens=1))
    done = time.monotonic()
    inside = engine.runner.startup_seconds
    return engine.runner.ops.device, {
        "python": begun - spawned,
        "import": imported - begun,
        **inside,
        "other": ready - imported - sum(inside.values()),
        "first_token": done - ready,
        "ready": ready - begun,
        "total": done - spawned,
    }


def measure_startup(
    arguments: dict[str, Any], *, num_iters_cold: int = 3, num_iters_warmup: int = 1, num_iters_warm: int = 3
) -> Report:
    """Start engines with an empty and with a filled kernel cache."""
    from tqdm import tqdm

    from mini_vllm.bench.report import Metric, Report

    starts = {"cold": [], "warm": []}
    for _ in tqdm(range(num_iters_cold), "Cold starts", disable=None):
        device, seconds = start_once(arguments, cold=True)
        starts["cold"].append(seconds)
    for _ in range(num_iters_warmup):
        start_once(arguments, cold=False)
    for _ in tqdm(range(num_iters_warm), "Warm starts", disable=None):
        device, seconds = start_once(arguments, cold=False)
        starts["warm"].append(seconds)

    metrics, vllm = {}, {}
    for phase, measured in starts.items():
        if measured:
            for name in measured[0]:
                metrics[f"{phase}_{name}_s"] = Metric([seconds[name] for seconds in measured], "s")
            times = metrics[f"{phase}_ready_s"].samples
            vllm |= {f"avg_{phase}_startup_time": sum(times) / len(times), f"{phase}_startup_times": times}
    counts = {"num_iters_cold": num_iters_cold, "num_iters_warm": num_iters_warm}
    return Report("startup", counts, {"config": arguments, "device": device}, metrics, vllm)


def startup_lines(report: Report) -> Iterator[str]:
    """A table of the parts, and the totals as `vllm bench startup` prints them."""
    phases = [phase for phase in ("cold", "warm") if f"{phase}_total_s" in report.metrics]
    yield f"{'seconds, median':<16}" + "".join(f"{phase:>8}" for phase in phases)
    explained = {**PARTS, "ready": "import to an engine that is ready", "total": "start of Python to the first token"}
    for name, text in explained.items():
        found = [report.metrics.get(f"{phase}_{name}_s") for phase in phases]
        if any(found):
            yield f"{name:<16}" + "".join(f"{metric.median:>8.2f}" for metric in found) + f"  {text}"
    for phase in phases:
        yield f"{phase.upper()} STARTUP:"
        yield f"Avg startup time: {report.vllm[f'avg_{phase}_startup_time']:.2f} seconds"


if __name__ == "__main__":
    print(json.dumps(child(json.loads(sys.argv[1]), float(sys.argv[2]))))
