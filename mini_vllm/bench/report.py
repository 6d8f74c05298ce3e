"""What a benchmark leaves behind: figures with all their samples, the machine they come from, and lines to read.

The lines are vLLM's where vLLM prints such a figure, so that scripts which read its output read this one too; so are
the keys at the top of the JSON file.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from mini_vllm import __version__
from mini_vllm.bench.files import read_json, write_json
from mini_vllm.bench.gpu_monitor import gpu_line
from mini_vllm.bench.runner import Run

PERCENTILES = (10, 25, 50, 75, 90, 99)


def percentile(samples: Sequence[float], q: float) -> float:
    """The q-th percentile, interpolated between samples as NumPy and vLLM do."""
    return float(np.percentile(samples, q))


@dataclass(frozen=True)
class Metric:
    """A figure: the median of its samples, of which there is at least one."""

    samples: list[float]
    unit: str
    higher_is_better: bool = False

    @property
    def median(self) -> float:
        return percentile(self.samples, 50)

    @property
    def spread(self) -> float:
        """From the least to the greatest sample, as a share of the median."""
        return (max(self.samples) - min(self.samples)) / self.median if self.median else 0.0

    @property
    def median_error(self) -> float:
        """Half a notch of a box plot, 1.57 IQR / sqrt(n): medians that differ by more than both really do differ.

        (McGill, Tukey and Larsen, Variations of box plots, 1978.) 0 for a single sample, which knows nothing of errors.
        """
        return 1.57 * (percentile(self.samples, 75) - percentile(self.samples, 25)) / len(self.samples) ** 0.5

    def to_dict(self) -> dict[str, Any]:
        return {
            "median": self.median,
            "mean": float(np.mean(self.samples)),
            "min": min(self.samples),
            "max": max(self.samples),
            "percentiles": {str(q): percentile(self.samples, q) for q in PERCENTILES},
            "spread": self.spread,
            "median_error": self.median_error,
            "unit": self.unit,
            "higher_is_better": self.higher_is_better,
            "samples": self.samples,
        }


@dataclass
class Report:
    """One benchmark's result.

    workload: what was asked. engine: `runner.engine_state`, or what stands for it.
    metrics: by name. vllm: keys and values that vLLM's JSON file for this benchmark has.
    notes: what a reader must know to compare the figures.
    """

    benchmark: str
    workload: dict[str, Any]
    engine: dict[str, Any]
    metrics: dict[str, Metric]
    vllm: dict[str, Any] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.vllm,
            "benchmark": self.benchmark,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "environment": environment(self.engine.get("device", "cpu")),
            "workload": self.workload,
            "engine": self.engine,
            "notes": self.notes,
            **self.details,
            "metrics": {name: metric.to_dict() for name, metric in self.metrics.items()},
        }

    def write(self, path: Path) -> None:
        write_json(self.to_dict(), path)


# ---- the machine ------------------------------------------------------------------------------------------


def environment(device: str) -> dict[str, Any]:
    """Hardware and versions; on "cuda" those of GPU, driver, CuPy and NVRTC too. What is not found is left out."""
    found: dict[str, Any] = {
        "mini_vllm": __version__,
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "environment_variables": {
            name: os.environ[name] for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS") if name in os.environ
        },
    }
    if device == "cuda":
        from mini_vllm.ops.cuda.compiler import nvrtc_version
        from mini_vllm.ops.cuda.device import DeviceInfo

        info = DeviceInfo.of()
        found["gpu"] = info.name
        found["gpu_memory_bytes"] = info.total_memory
        found["driver_cuda"] = f"{info.driver_version // 1000}.{info.driver_version % 1000 // 10}"
        found["nvrtc"] = ".".join(map(str, nvrtc_version()))
        for package in ("cupy-cuda12x", "cupy-cuda13x", "cupy"):
            with contextlib.suppress(metadata.PackageNotFoundError):
                found["cupy"] = metadata.version(package)
    found["nvidia_smi"] = _nvidia_smi()
    return {name: value for name, value in found.items() if value not in (None, {}, [])}


def _command(*arguments: str) -> str | None:
    """What a program prints, None if it is not there or fails."""
    if shutil.which(arguments[0]) is None:
        return None
    try:
        return subprocess.run(arguments, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _git_commit() -> str | None:
    """The commit of the checkout that this package is in, with "+changes" if files differ from it."""
    here = Path(__file__)
    git = ("git", "-C", str(here.parent))
    if _command(*git, "ls-files", "--error-unmatch", here.name) is None:  # an installation is in nobody's checkout
        return None
    commit = _command(*git, "rev-parse", "HEAD")
    return f"{commit}+changes" if _command(*git, "status", "--porcelain", "--untracked-files=no") else commit


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _nvidia_smi() -> list[dict[str, str]] | None:
    """Clocks (MHz) and more of each GPU, as nvidia-smi sees them now."""
    columns = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu"
    printed = _command("nvidia-smi", f"--query-gpu={columns}", "--format=csv,noheader,nounits")
    if printed is None:
        return None
    names = columns.split(",")
    return [dict(zip(names, line.split(", "), strict=False)) for line in printed.splitlines()]


# ---- figures of runs --------------------------------------------------------------------------------------


def request_metrics(runs: Sequence[Run]) -> dict[str, Metric]:
    """TTFT, TPOT, ITL (where tokens were watched) and end-to-end latency of all requests, in milliseconds."""
    requests = [request for run in runs for request in run.requests]
    samples = {
        "ttft": [request.ttft for request in requests],
        "tpot": [request.tpot for request in requests if request.tpot is not None],
        "itl": [gap for request in requests for gap in request.itls],
        "e2el": [request.e2e for request in requests],
    }
    return {f"{name}_ms": Metric([1e3 * s for s in values], "ms") for name, values in samples.items() if values}


BLOCKS = {
    "ttft_ms": ("TTFT", "Time to First Token"),
    "tpot_ms": ("TPOT", "Time per Output Token (excl. 1st token)"),
    "itl_ms": ("ITL", "Inter-token Latency"),
    "e2el_ms": ("E2EL", "End-to-end Latency"),
}


def latency_blocks(metrics: dict[str, Metric]) -> Iterator[str]:
    """Mean, median and percentiles, in the blocks and the columns of `vllm bench serve`."""
    for name, (short, title) in BLOCKS.items():
        if name in metrics:
            samples = metrics[name].samples
            yield f"{title:-^50}"
            yield _row(f"Mean {short} (ms):", f"{np.mean(samples):.2f}")
            yield _row(f"Median {short} (ms):", f"{percentile(samples, 50):.2f}")
            for q in (50, 90, 99):
                yield _row(f"P{q} {short} (ms):", f"{percentile(samples, q):.2f}")
    yield "=" * 50


def _row(name: str, value: object) -> str:
    return f"{name:<40} {value:<10}"


def serving_lines(report: Report, run: Run, request_rate: float, max_concurrency: int | None) -> Iterator[str]:
    """What `vllm bench serve` prints for such a run."""
    prompt_tokens = report.workload["num_prompt_tokens"]
    yield f"{' Serving Benchmark Result ':=^50}"
    yield _row("Successful requests:", len(run.requests))
    yield _row("Failed requests:", 0)
    if max_concurrency is not None:
        yield _row("Maximum request concurrency:", max_concurrency)
    if request_rate != float("inf"):
        yield _row("Request rate configured (RPS):", f"{request_rate:.2f}")
    yield _row("Benchmark duration (s):", f"{run.elapsed:.2f}")
    yield _row("Total input tokens:", prompt_tokens)
    yield _row("Total generated tokens:", run.num_output_tokens)
    yield _row("Request throughput (req/s):", f"{len(run.requests) / run.elapsed:.2f}")
    yield _row("Output token throughput (tok/s):", f"{run.num_output_tokens / run.elapsed:.2f}")
    yield _row("Peak output token throughput (tok/s):", f"{run.peak_output_throughput:.2f}")
    yield _row("Peak concurrent requests:", f"{run.peak_concurrency:.2f}")
    yield _row("Total token throughput (tok/s):", f"{(prompt_tokens + run.num_output_tokens) / run.elapsed:.2f}")
    yield from latency_blocks(report.metrics)


def serving_keys(report: Report, run: Run) -> dict[str, Any]:
    """What vLLM's file of such a run has."""
    prompt_tokens, metrics = report.workload["num_prompt_tokens"], report.metrics
    found: dict[str, Any] = {
        "duration": run.elapsed,
        "completed": len(run.requests),
        "total_input_tokens": prompt_tokens,
        "total_output_tokens": run.num_output_tokens,
        "request_throughput": metrics["request_throughput"].median,
        "output_throughput": metrics["output_throughput"].median,
        "total_token_throughput": metrics["total_throughput"].median,
    }
    for name in BLOCKS:
        if name in metrics:
            samples = metrics[name].samples
            found |= {f"mean_{name}": float(np.mean(samples)), f"median_{name}": percentile(samples, 50)}
            found |= {f"p{q}_{name}": percentile(samples, q) for q in (50, 90, 99)}
    return found


def engine_lines(report: Report) -> Iterator[str]:
    """Model, memory and cache."""
    engine = report.engine
    yield f"Engine: {engine['model']} on {engine['device']}, {engine['dtype']}"
    kv, memory = report.engine["kv"], report.engine["peak_memory"]
    share = kv["peak_kv_blocks"] / kv["num_kv_blocks"]
    yield (
        f"KV cache: at most {kv['peak_kv_blocks']} of {kv['num_kv_blocks']} blocks in use ({share:.0%}), "
        f"{kv['num_preemptions']} preemptions"
    )
    if kv["prefix_cache_queries"]:
        hits, queries = kv["prefix_cache_hits"], kv["prefix_cache_queries"]
        yield f"Prefix cache: {hits} of {queries} prompt tokens found ({hits / queries:.0%})"
    yield f"Peak memory: {memory['bytes'] / 2**30:.2f} GiB ({memory['of']})"
    if report.details.get("gpu"):
        yield gpu_line(report.details["gpu"])
    yield from report.notes


# ---- files and comparison ---------------------------------------------------------------------------------


def load_report(path: Path) -> dict[str, Any]:
    """A file that `Report.write` made. Raises `ValueError` for anything else."""
    report = read_json(path)
    metrics = report.get("metrics") if isinstance(report, dict) else None
    keys = {"median", "median_error", "unit", "higher_is_better"}
    is_ours = isinstance(metrics, dict) and all(isinstance(m, dict) and keys <= m.keys() for m in metrics.values())
    if not is_ours or "benchmark" not in report:
        raise ValueError(f"{path} is not a report that a benchmark wrote for --output-json")
    return report


def compare(a: dict[str, Any], b: dict[str, Any]) -> Iterator[str]:
    """A line for each figure that two reports share: both medians, b / a, and whether b is better.

    Medians that are no further apart than their errors together are called the same. Raises `ValueError` if the reports
    share nothing.
    """
    shared = [name for name in a["metrics"] if name in b["metrics"]]
    if not shared:
        raise ValueError(f"the reports share no figure: one is of {a['benchmark']!r}, the other of {b['benchmark']!r}")
    for what, key in (("benchmark", "benchmark"), ("workload", "workload")):
        if a[key] != b[key]:
            yield f"Note: the {what}s differ."
    for name in ("gpu", "cpu"):
        values = [report.get("environment", {}).get(name) for report in (a, b)]
        if values[0] != values[1]:
            yield f"Note: {values[0]} against {values[1]}."
    width = max(map(len, shared))
    yield f"{'':<{width}}  {'a':>12} {'b':>12} {'b / a':>8}"
    for name in shared:
        first, second = a["metrics"][name], b["metrics"][name]
        ratio = second["median"] / first["median"] if first["median"] else float("nan")
        if abs(second["median"] - first["median"]) <= first["median_error"] + second["median_error"]:
            verdict = "the same within errors"
        else:
            verdict = "better" if (ratio > 1) == first["higher_is_better"] else "worse"
        values = f"{first['median']:>12.4g} {second['median']:>12.4g} {ratio:>8.3f}"
        yield f"{name:<{width}}  {values}  {first['unit']}, {verdict}"
