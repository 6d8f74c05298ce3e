"""Figures, the lines that scripts parse, the JSON file, and the comparison of two."""

import json
import platform
import re

import numpy as np
import pytest

from mini_vllm import __version__
from mini_vllm.bench import report as report_module
from mini_vllm.bench.report import (
    Metric,
    Report,
    compare,
    environment,
    latency_blocks,
    load_report,
    percentile,
    request_metrics,
    serving_keys,
    serving_lines,
)
from mini_vllm.bench.runner import RequestTiming, Run

RUN = Run(
    elapsed=2.0,
    requests=[
        RequestTiming(3, ttft=0.010, e2e=0.050, itls=(0.015, 0.025)),
        RequestTiming(2, ttft=0.020, e2e=0.050, itls=(0.030,)),
        RequestTiming(1, ttft=0.060, e2e=0.060),
    ],
    peak_concurrency=3,
    peak_output_throughput=4.0,
)


def a_report(**metrics):
    return Report("throughput", {"num_prompt_tokens": 90}, {"device": "cpu"}, metrics or request_metrics([RUN]))


def test_percentiles_are_interpolated_as_numpy_does():
    assert percentile([1, 2, 3, 4], 50) == 2.5
    assert percentile([10, 20], 90) == pytest.approx(19)
    assert percentile([7], 99) == 7


def test_metric():
    metric = Metric([4.0, 1.0, 2.0, 3.0, 5.0], "ms")
    assert metric.median == 3
    assert metric.spread == pytest.approx(4 / 3)
    assert metric.median_error == pytest.approx(1.57 * 2 / 5**0.5)
    assert Metric([2.0], "ms").median_error == Metric([2.0], "ms").spread == 0
    values = metric.to_dict()
    assert (values["mean"], values["min"], values["max"]) == (3, 1, 5)
    assert values["percentiles"]["90"] == pytest.approx(4.6)
    assert values["samples"] == [4, 1, 2, 3, 5]


def test_request_metrics_are_of_all_requests_in_milliseconds():
    metrics = request_metrics([RUN, RUN])
    assert metrics["ttft_ms"].samples == pytest.approx([10, 20, 60] * 2)
    assert metrics["tpot_ms"].samples == pytest.approx([20, 30] * 2)  # the third has one token
    assert metrics["itl_ms"].samples == pytest.approx([15, 25, 30] * 2)
    assert metrics["e2el_ms"].samples == pytest.approx([50, 50, 60] * 2)
    unwatched = Run(1.0, [RequestTiming(3, 0.1, 0.2)], 1)
    assert set(request_metrics([unwatched])) == {"ttft_ms", "tpot_ms", "e2el_ms"}


def test_latency_blocks_are_those_of_vllm_bench_serve():
    lines = list(latency_blocks(request_metrics([RUN])))
    assert lines[0] == "---------------Time to First Token----------------"
    assert lines[6] == "-----Time per Output Token (excl. 1st token)------"
    assert lines[12] == "---------------Inter-token Latency----------------"
    assert lines[18] == "----------------End-to-end Latency----------------"
    assert lines[-1] == "=" * 50
    assert "Mean TTFT (ms):                          30.00     " in lines
    assert "Median TTFT (ms):                        20.00     " in lines
    assert "P99 TTFT (ms):                           59.20     " in lines
    assert "P90 ITL (ms):                            29.00     " in lines
    assert "Mean TPOT (ms):                          25.00     " in lines


def test_serving_lines_and_keys_are_those_of_vllm_bench_serve():
    metrics = {name: Metric([value], "", True) for name, value in serving_throughputs().items()}
    report = a_report(**metrics, **request_metrics([RUN]))
    text = "\n".join(serving_lines(report, RUN, request_rate=1.5, max_concurrency=8))
    found = dict(re.findall(r"^(\w[^:\n]*):\s+([\d.]+)\s*$", text, re.MULTILINE))
    expected = {
        "Successful requests": "3",
        "Failed requests": "0",
        "Maximum request concurrency": "8",
        "Request rate configured (RPS)": "1.50",
        "Benchmark duration (s)": "2.00",
        "Total input tokens": "90",
        "Total generated tokens": "6",
        "Request throughput (req/s)": "1.50",
        "Output token throughput (tok/s)": "3.00",
        "Peak output token throughput (tok/s)": "4.00",
        "Peak concurrent requests": "3.00",
        "Total token throughput (tok/s)": "48.00",
        "Mean TTFT (ms)": "30.00",
        "P99 E2EL (ms)": "59.80",
    }
    assert {name: found[name] for name in expected} == expected
    assert text.splitlines()[0] == "============ Serving Benchmark Result ============"
    without = "\n".join(serving_lines(report, RUN, request_rate=float("inf"), max_concurrency=None))
    assert "RPS" not in without
    assert "Maximum request concurrency" not in without

    keys = serving_keys(report, RUN)
    assert (keys["completed"], keys["total_input_tokens"], keys["total_output_tokens"]) == (3, 90, 6)
    assert keys["mean_ttft_ms"] == pytest.approx(30)
    assert keys["p99_itl_ms"] == pytest.approx(np.percentile([15, 25, 30], 99))


def serving_throughputs():
    return {"request_throughput": 1.5, "output_throughput": 3.0, "total_throughput": 48.0}


# ---- files ------------------------------------------------------------------------------------------------


def test_a_report_file_has_everything(tmp_path):
    report = a_report()
    report.vllm = {"elapsed_time": 2.0}
    report.notes.append("smaller")
    path = tmp_path / "report.json"
    report.write(path)
    found = load_report(path)
    assert found["elapsed_time"] == 2.0
    assert found["benchmark"] == "throughput"
    assert found["workload"] == {"num_prompt_tokens": 90}
    assert found["notes"] == ["smaller"]
    assert found["metrics"]["ttft_ms"]["samples"] == pytest.approx([10, 20, 60])
    assert found["metrics"]["ttft_ms"]["median"] == pytest.approx(20)
    assert found["environment"]["python"] == platform.python_version()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", found["date"])


def test_environment():
    found = environment("cpu")
    assert found["mini_vllm"] == __version__
    assert found["numpy"] == np.__version__
    assert found["cpu_cores"] >= 1
    assert found["cpu"]
    assert not {"gpu", "cupy", "nvrtc"} & set(found)  # nothing about a GPU that did not take part
    assert all(value not in (None, {}, []) for value in found.values())


def test_the_commit_is_that_of_this_package_or_none(monkeypatch):
    answers = {"ls-files": "report.py", "rev-parse": "abc123", "status": ""}
    monkeypatch.setattr(report_module, "_command", lambda *words: answers[words[3]] if words[0] == "git" else None)
    assert environment("cpu")["git_commit"] == "abc123"
    answers["status"] = " M file"
    assert environment("cpu")["git_commit"] == "abc123+changes"
    answers["ls-files"] = None  # not in a checkout, or in that of another project
    assert "git_commit" not in environment("cpu")


def test_nvidia_smi_s_columns_are_named(monkeypatch):
    monkeypatch.setattr(report_module, "_command", lambda *_: "NVIDIA H200, 580.1, 1980, 3201, 1980, 3201, 700.00, 31")
    (gpu,) = report_module._nvidia_smi()
    assert (gpu["name"], gpu["driver_version"], gpu["clocks.sm"]) == ("NVIDIA H200", "580.1", "1980")
    assert gpu["temperature.gpu"] == "31"


@pytest.mark.parametrize("arguments", [("no-such-program-anywhere",), ("false",)])
def test_a_program_that_fails_is_no_answer(arguments):
    assert report_module._command(*arguments) is None


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"metrics": {}}', '{"benchmark": "x", "metrics": []}', '{"benchmark": "x", "metrics": {"a": 1}}'],
)
def test_a_file_that_is_no_report_is_named(tmp_path, content):
    path = tmp_path / "report.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=str(path)):
        load_report(path)


# ---- comparison -------------------------------------------------------------------------------------------


def compared(first, second, **changes):
    a, b = (json.loads(json.dumps(a_report(**metrics).to_dict())) for metrics in (first, second))
    return list(compare(a, {**b, **changes}))


def test_compare_prints_ratios_and_judges_by_direction_and_error():
    first = {
        "latency_s": Metric([1.0], "s"),
        "output_throughput": Metric([100.0], "tok/s", True),
        "decode_ms": Metric([1.0, 1.1, 1.2, 0.9, 0.8], "ms"),
        "only_here": Metric([1.0], "s"),
    }
    second = {
        "latency_s": Metric([0.5], "s"),
        "output_throughput": Metric([50.0], "tok/s", True),
        "decode_ms": Metric([1.05, 1.15, 1.2, 0.9, 0.8], "ms"),
    }
    heads, *lines = compared(first, second)
    assert heads.split() == ["a", "b", "b", "/", "a"]
    assert [line.split(None, 4) for line in lines] == [
        ["latency_s", "1", "0.5", "0.500", "s, better"],
        ["output_throughput", "100", "50", "0.500", "tok/s, worse"],
        ["decode_ms", "1", "1.05", "1.050", "ms, the same within errors"],
    ]


def test_compare_says_what_else_differs():
    metrics = {"latency_s": Metric([1.0], "s")}
    lines = compared(metrics, metrics, benchmark="latency", workload={}, environment={"cpu": "abacus"})
    assert lines[:2] == ["Note: the benchmarks differ.", "Note: the workloads differ."]
    assert lines[2].endswith("against abacus.")


def test_compare_of_nothing_shared():
    with pytest.raises(ValueError, match="share no figure"):
        compared({"a": Metric([1.0], "s")}, {"b": Metric([1.0], "s")})
