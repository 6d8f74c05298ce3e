"""Clock and power of the GPU while a benchmark runs: at its power limit, a GPU is slower than its data sheet."""

from __future__ import annotations

import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

INTERVAL_MS = 200
COLUMNS = ("sm_clock_mhz", "max_sm_clock_mhz", "power_w", "power_limit_w")
_QUERY = "clocks.sm,clocks.max.sm,power.draw,power.limit"


@contextmanager
def gpu_monitor(device: str) -> Iterator[dict[str, Any]]:
    """Ask nvidia-smi about the current GPU, five times a second, until the block ends.

    The result is empty until then: medians of `COLUMNS`, and "readings", their number. It stays empty on the CPU,
    without nvidia-smi, and where the block ends before the first reading.
    """
    found: dict[str, Any] = {}
    if device != "cuda" or shutil.which("nvidia-smi") is None:
        yield found
        return
    command = ("nvidia-smi", f"--id={_pci_bus_id()}", f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits")
    with tempfile.TemporaryFile("w+") as printed:
        process = subprocess.Popen(
            (*command, f"--loop-ms={INTERVAL_MS}"), stdout=printed, stderr=subprocess.DEVNULL, text=True
        )
        try:
            yield found
        finally:
            process.terminate()
            process.wait()
        printed.seek(0)
        readings = [numbers for line in printed if (numbers := _numbers(line))]
    if readings:
        medians = map(statistics.median, zip(*readings, strict=True))
        found |= {**dict(zip(COLUMNS, medians, strict=True)), "readings": len(readings)}


def gpu_line(found: dict[str, Any]) -> str:
    """A line for people; `found` is not empty."""
    return (
        f"GPU meanwhile: {found['sm_clock_mhz']:.0f} of {found['max_sm_clock_mhz']:.0f} MHz, {found['power_w']:.0f} of "
        f"{found['power_limit_w']:.0f} W (medians of {found['readings']} readings)"
    )


def _pci_bus_id() -> str:
    from mini_vllm.ops.cuda.device import pci_bus_id

    return pci_bus_id()


def _numbers(line: str) -> tuple[float, ...]:
    """A reading; empty for a line that is none: "[N/A]", an error message, half a line."""
    try:
        numbers = tuple(map(float, line.split(",")))
    except ValueError:
        return ()
    return numbers if len(numbers) == len(COLUMNS) else ()
