"""The cases of `mini-vllm kernels bench`, on the NumPy backend; and what `mini-vllm kernels` says without CuPy."""

import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

from mini_vllm.bench.report import load_report
from mini_vllm.cli import cli
from mini_vllm.ops.numpy_ops import NumpyOps


class InPlaceOps(NumpyOps):
    """The ops that may write over their inputs do so."""

    def add_rms_norm(self, x, residual, weight, eps):
        x[...], residual[...] = super().add_rms_norm(x, residual, weight, eps)
        return x, residual


def test_cases_call_each_op_as_it_is_and_stay_finite():
    """Twice as many calls on the same inputs as the benchmark makes, in the type with the smallest range."""
    pytest.importorskip("cupy")
    from mini_vllm.bench import kernels

    found = list(kernels.cases(InPlaceOps(np.float16)))
    assert len({case.name for case in found}) == len(found)
    small = [case for case in found if case.num_bytes < 20e6 and case.num_flops < 1e9]
    ops = {case.name.split()[0] for case in found}
    assert {case.name.split()[0] for case in small} == ops
    assert ops >= {"add_norm_linear", "add_norm_swiglu", "linear_before_norm", "rope_attention"}
    for case in small:
        call = case.setup()
        for _ in range(2 * kernels.REPLAYS if case.name.startswith("add_") else 1):
            result = call()
        for array in result if isinstance(result, tuple) else (result,):
            assert np.isfinite(array).all(), case.name
        if case.name.startswith("add_norm_"):
            assert 0.1 < np.abs(result[0]).mean(dtype=float) < 10, case.name


def test_bytes_of_a_case_are_those_of_its_inputs_and_outputs():
    pytest.importorskip("cupy")
    from mini_vllm.bench.kernels import cases

    num_bytes = {case.name: case.num_bytes for case in cases(NumpyOps(np.float16))}
    assert num_bytes["linear 64 x 2048 to 1024"] == 2 * (64 * 2048 + 2048 * 1024 + 64 * 1024)
    assert num_bytes["add_norm_linear 64 x 1024 to 4096"] == 2 * (3 * 64 * 1024 + 1024 + 1024 * 4096 + 64 * 4096)
    assert num_bytes["add_norm_swiglu 4 x 4096 to 2 x 12288"] == 2 * (
        3 * 4 * 4096 + 4096 + 2 * 12288 * 4096 + 4 * 12288
    )
    assert num_bytes["linear_before_norm 64 x 2048 to 1024"] == 2 * (64 * 2048 + 2048 * 1024 + 3 * 64 * 1024 + 1024)
    qkv, out, kv = 32 * 128, 16 * 128, 2 * 8 * 128
    assert num_bytes["rope_attention decode 8 x 1024, 16/8 heads"] == 2 * 8 * (qkv + out + 1024 * kv)


class MeasuredOps(NumpyOps):
    info = SimpleNamespace(l2_cache=50 << 20)


@pytest.fixture
def timed(monkeypatch):
    """The names of the cases that were timed, on a GPU that is made up: 1 TB/s, 200 TFLOP/s, and half of it reached."""
    pytest.importorskip("cupy")
    from mini_vllm.bench import kernels

    timed = []

    def time_case(case, l2_bytes):
        timed.append(case.name)
        seconds = max(case.num_bytes / 1e12, case.num_flops / 200e12)
        return [2 * seconds, 1.8 * seconds, 2.1 * seconds] if l2_bytes else [seconds]  # the roofs run warm

    monkeypatch.setattr(kernels, "CudaOps", MeasuredOps)
    monkeypatch.setattr(kernels, "time_case", time_case)
    return timed


def test_all_cases_are_measured_against_the_roofs(timed):
    from mini_vllm.bench.kernels import cases, kernel_lines, measure_kernels

    report = measure_kernels("bfloat16")
    names = [case.name for case in cases(MeasuredOps(np.float16))]
    assert timed[2:] == list(report.metrics) == list(report.details["cases"]) == names
    assert report.details["roofs"] == pytest.approx({"bandwidth_gb_per_s": 1000, "matmul_tflop_per_s": 200})
    assert [case["share_of_roof"] for case in report.details["cases"].values()] == pytest.approx([0.5] * len(names))
    lines = list(kernel_lines(report))
    assert len(lines) == 1 + len(names)
    rms_norm, product = "add_rms_norm 256 x 4096", "linear 4096 x 4096 to 24576"
    assert report.metrics[rms_norm].samples == pytest.approx([x * 256 * 4096 * 8 / 1e6 for x in (2, 1.8, 2.1)])
    columns = {rms_norm: "16.78 15.0% 500 0.0 50%", product: "8246.34 15.0% 53 100.0 50%"}
    for name, expected in columns.items():
        (line,) = [line for line in lines if line.startswith(name + " ")]
        assert line.removeprefix(name).split() == expected.split()


@pytest.mark.parametrize("option", ["--output-json", "--json"])
def test_bench_writes_a_report_that_compare_reads(timed, tmp_path, option):
    path = tmp_path / "kernels.json"
    result = CliRunner().invoke(cli, ["kernels", "bench", "--only", "sample", option, str(path)])
    assert result.exit_code == 0, result.output
    assert "sample greedy, 1 x 151936" in timed[2:]
    head, *lines = result.stdout.splitlines()
    assert head.split() == ["case", "us", "spread", "GB/s", "TFLOP/s", "of", "roof"]
    assert [line.split("  ")[0] for line in lines] == timed[2:]
    report = load_report(path)
    assert (report["benchmark"], report["workload"]) == ("kernels", {"dtype": "bfloat16"})
    assert {"date", "environment", "roofs", "cases"} <= set(report)
    assert all(len(metric["samples"]) == 3 and metric["unit"] == "us" for metric in report["metrics"].values())
    result = CliRunner().invoke(cli, ["bench", "compare", str(path), str(path)])
    assert [line.split("  ")[0] for line in result.stdout.splitlines()[1:]] == timed[2:]
    assert result.stdout.count("us, the same within errors") == len(lines)


def test_bench_refuses_before_it_measures(timed):
    result = CliRunner().invoke(cli, ["kernels", "bench", "--only", "llama"])
    assert result.stdout == ""
    message = str(result.exception)
    assert message.startswith("--only llama selects none of the ")
    assert "; linear 4096 x 4096 to 24576; " in message
    result = CliRunner().invoke(cli, ["kernels", "bench", "--json", "/no/such/directory/file.json"])
    assert result.exit_code == 2
    assert "directory /no/such/directory does not exist" in result.stderr
    assert timed == []


def test_bench_without_a_gpu_says_so_in_one_line(root):
    pytest.importorskip("cupy")
    command = [sys.executable, "-m", "mini_vllm.cli", "kernels", "bench"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(("Error: there is no NVIDIA driver", "Error: the NVIDIA driver finds no GPU"))
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("arguments", [("list",), ("compile",), ("bench",), ("list", "--arch", "sm_80")])
def test_without_cupy_the_pip_command_is_all_there_is(root, arguments):
    """In a process of its own, where `import cupy` fails even if CuPy is installed."""
    script = "import sys; sys.modules['cupy'] = None; from mini_vllm.cli import main; main()"
    command = [sys.executable, "-c", script, "kernels", *arguments]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: CuPy cannot be imported (")
    assert 'install them with: pip install "mini-vllm[cuda1' in done.stderr
    assert len(done.stderr.splitlines()) == 1
