"""Clock and power during a run, from a nvidia-smi that is a shell script."""

from __future__ import annotations

import os
import time

import pytest

from mini_vllm.bench import gpu_monitor as module
from mini_vllm.bench.gpu_monitor import gpu_line, gpu_monitor


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """A function that makes a nvidia-smi of shell commands; it notes its arguments in the file `arguments`."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(module, "_pci_bus_id", lambda: "0000:1B:00.0")

    def make(commands: str) -> None:
        program = tmp_path / "nvidia-smi"
        lines = ["#!/bin/sh", f'echo "$@" > {tmp_path}/arguments', commands, f"echo > {tmp_path}/printed"]
        program.write_text("\n".join([*lines, "exec sleep 60", ""]))
        program.chmod(0o755)

    make.directory = tmp_path
    return make


def wait_for(path):
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_medians_of_all_readings(nvidia_smi):
    nvidia_smi('echo "1980, 1980, 120.5, 700.00"\necho "1500, 1980, 690.5, 700.00"\necho "1530, 1980, 700, 700.00"')
    start = time.monotonic()
    with gpu_monitor("cuda") as found:
        assert not found
        wait_for(nvidia_smi.directory / "printed")
    assert time.monotonic() - start < 30, "the program does not end by itself"
    assert found == {
        "sm_clock_mhz": 1530,
        "max_sm_clock_mhz": 1980,
        "power_w": 690.5,
        "power_limit_w": 700,
        "readings": 3,
    }
    assert gpu_line(found) == "GPU meanwhile: 1530 of 1980 MHz, 690 of 700 W (medians of 3 readings)"
    arguments = (nvidia_smi.directory / "arguments").read_text()
    assert "--id=0000:1B:00.0" in arguments
    assert "--loop-ms=200" in arguments


def test_lines_that_are_no_readings_do_not_count(nvidia_smi):
    nvidia_smi('echo "1500, 1980, [N/A], 700.00"\necho "1400, 1980, 600, 700"\necho Failed\nprintf "1980, 19"')
    with gpu_monitor("cuda") as found:
        wait_for(nvidia_smi.directory / "printed")
    assert (found["sm_clock_mhz"], found["readings"]) == (1400, 1)


def test_an_error_in_the_block_ends_the_program_and_stays_the_error(nvidia_smi):
    nvidia_smi("echo $$ > " + str(nvidia_smi.directory / "pid"))

    def fail() -> None:
        with gpu_monitor("cuda"):
            wait_for(nvidia_smi.directory / "printed")
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fail()
    pid = int((nvidia_smi.directory / "pid").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_nothing_is_found_without_a_gpu_or_the_program(device, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with gpu_monitor(device) as found:
        pass
    assert found == {}
