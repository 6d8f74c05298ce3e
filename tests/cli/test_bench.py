"""`mini-vllm bench`: through click's runner on the demo model, and as a process where exit codes matter."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from mini_vllm.bench import suite
from mini_vllm.cli import cli
from mini_vllm.demo import DEMO_DIR

CHECKOUT = Path(__file__).resolve().parents[2]
CPU = ["--device", "cpu"]
SMALL = ["--input-len", "8", "--output-len", "4"]


def invoke(*args):
    return CliRunner().invoke(cli, ["bench", *map(str, args)])


def invoke_well(*args):
    result = invoke(*args)
    assert result.exit_code == 0, result.output
    return result


def run(*args):
    """`mini-vllm bench ARGS` as a process: exit code, stdout, stderr."""
    env = {**os.environ, "PYTHONPATH": str(CHECKOUT), "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "mini_vllm.cli", "bench", *map(str, args)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


COMMANDS = ("latency", "throughput", "nano", "startup", "sweep", "suite", "compare")


def test_help():
    text = invoke_well("--help").output
    for command in COMMANDS:
        assert re.search(rf"^  {command} +\S.*[^.]\.$", text, re.MULTILINE)  # a whole sentence, not cut off
        assert invoke_well(command, "--help").output
    assert "bench" in CliRunner().invoke(cli, ["--help"]).output


@pytest.mark.parametrize("module", ["bench", "kernels"])
def test_the_commands_module_imports_no_engine(module):
    code = (
        f"import sys, mini_vllm.cli.{module}; "
        "print(sorted({'numpy', 'cupy', 'tokenizers', 'matplotlib', 'mini_vllm.engine'} & set(sys.modules)))"
    )
    env = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    assert subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stdout == "[]\n"


def test_latency_writes_report_and_trace(tmp_path):
    report, trace = tmp_path / "report.json", tmp_path / "trace.json"
    arguments = [*CPU, *SMALL, "--batch-size", 2, "--num-iters", 3, "--num-iters-warmup", 1]
    result = invoke_well("latency", *arguments, "--output-json", report, "--profile", trace, "--seed", 3)
    assert re.search(r"^Avg latency: [\d.e-]+ seconds$", result.stdout, re.MULTILINE)
    found = json.loads(report.read_text())
    assert len(found["latencies"]) == 3
    assert found["avg_latency"] == pytest.approx(sum(found["latencies"]) / 3)
    assert (found["workload"]["input_len"], found["workload"]["seed"]) == (8, 3)
    assert found["engine"]["config"]["enable_prefix_caching"] is False
    events = json.loads(trace.read_text())["traceEvents"]
    assert {"step", "schedule", "launch"} <= {event["name"] for event in events}

    # Compared with itself nothing has changed.
    lines = invoke_well("compare", report, report).stdout.splitlines()
    assert len(lines) == 1 + len(found["metrics"])
    assert all(line.endswith("the same within errors") for line in lines[1:])


def test_latency_of_a_batch_larger_than_max_num_seqs_is_one_batch(monkeypatch):
    from mini_vllm.bench import latency

    seen = {}

    def measure(arguments, **kwargs):
        seen.update(arguments)
        raise RuntimeError("enough")

    monkeypatch.setattr(latency, "measure_latency", measure)
    assert invoke("latency", "--batch-size", 300).exit_code == 1
    assert seen["max_num_seqs"] == 300


def test_throughput_prints_what_scripts_parse(tmp_path):
    path = tmp_path / "report.json"
    result = invoke_well("throughput", *CPU, *SMALL, "--num-prompts", 5, "--output-json", path)
    assert "requests/s" in result.stdout
    assert "Total num prompt tokens:  40\nTotal num output tokens:  20\n" in result.stdout
    assert "Serving Benchmark Result" not in result.stdout
    assert json.loads(path.read_text())["num_requests"] == 5


@pytest.mark.parametrize("load", [["--request-rate", "500"], ["--request-rate", "inf"], ["--max-concurrency", "2"]])
def test_throughput_with_a_load_times_every_token(load):
    result = invoke_well("throughput", *CPU, *SMALL, "--num-prompts", 5, *load)
    assert "============ Serving Benchmark Result ============" in result.stdout
    assert re.search(r"^Mean ITL \(ms\): +[\d.]+ *$", result.stdout, re.MULTILINE)
    assert ("RPS" in result.stdout) == (load[1] == "500")


@pytest.mark.parametrize("name", ["prefix-repetition", "prefix_repetition"])
def test_prefix_repetition_shows_what_the_cache_found(name):
    lengths = ["--prefix-repetition-prefix-len", 32, "--prefix-repetition-suffix-len", 8, "--output-len", 2]
    arguments = [*lengths, "--prefix-repetition-num-prefixes", 2, "--num-prompts", 6, "--max-concurrency", 1]
    result = invoke_well("throughput", *CPU, "--dataset-name", name, *arguments, "--enable-prefix-caching")
    assert "Total num prompt tokens:  240" in result.stdout
    assert "Prefix cache: 128 of 240 prompt tokens found (53%)" in result.stdout


def test_sharegpt(tmp_path):
    path = tmp_path / "sharegpt.json"
    turns = [{"from": "human", "value": "Tell me a story of a king."}, {"from": "gpt", "value": "There was a king."}]
    path.write_text(json.dumps([{"conversations": turns}]))
    arguments = ["--dataset-name", "sharegpt", "--dataset-path", path, "--num-prompts", 3]
    assert "Total num output tokens:" in invoke_well("throughput", *CPU, *arguments).stdout
    (tmp_path / "config.json").write_text((DEMO_DIR / "config.json").read_text())
    code, _, err = run("throughput", *CPU, "--model", tmp_path, "--load-format", "dummy", *arguments)
    assert code == 1
    assert "this model has no tokenizer.json" in err.splitlines()[-1]

    path.write_text('[{"conversations": "none"}]')
    code, out, err = run("throughput", *CPU, *arguments)
    assert (code, out) == (1, "")
    assert err.startswith(f"Error: {path}: entry 0 is not a conversation")
    assert len(err.splitlines()) == 1


def test_nano(tmp_path):
    smaller = ["--num-prompts", 3, "--max-input-len", 12, "--max-output-len", 4]
    result = invoke_well("nano", *CPU, *smaller)
    assert re.match(r"Total: \d+tok, Time: [\d.]+s, Throughput: [\d.]+tok/s\n", result.stdout)
    assert "Not nano-vllm's workload" in result.stdout


def test_nano_runs_with_nano_vllm_s_settings(monkeypatch):
    from mini_vllm.bench import throughput

    seen = []
    monkeypatch.setattr(
        throughput, "measure_nano", lambda arguments, **kwargs: seen.append((arguments, kwargs)) or 1 / 0
    )
    invoke("nano", "--preset", "qwen3-0.6b", "--max-num-batched-tokens", 8192)
    (arguments, kwargs) = seen[0]
    assert (arguments["max_model_len"], arguments["max_num_batched_tokens"]) == (4096, 8192)
    assert (kwargs["num_prompts"], kwargs["max_input_len"], kwargs["max_output_len"]) == (256, 1024, 1024)


def test_startup():
    result = invoke_well("startup", *CPU, "--num-iters-cold", 0, "--num-iters-warmup", 0, "--num-iters-warm", 1)
    assert "WARM STARTUP:\nAvg startup time: " in result.stdout
    assert "COLD" not in result.stdout


def test_sweep(tmp_path):
    path = tmp_path / "report.json"
    result = invoke_well("sweep", *CPU, *SMALL, "--num-prompts", 4, "--request-rate", "300,inf", "--output-json", path)
    assert [line.split()[:2] for line in result.stdout.splitlines()[1:3]] == [["rate", "300"], ["rate", "inf"]]
    assert [point["load"] for point in json.loads(path.read_text())["points"]] == ["rate 300", "rate inf"]


def test_quick_suite(tmp_path):
    path = tmp_path / "results.json"
    selected = [word for text in ("batch", "nano", "prefill", "warm") for word in ("--only", text)]
    result = invoke_well("suite", "--quick", *CPU, *selected, "--out", path)
    assert [line for line in result.stdout.splitlines() if line.startswith("demo decode, batch 8")]
    metrics = json.loads(path.read_text())["metrics"]
    assert {name: (metric["unit"], metric["higher_is_better"]) for name, metric in metrics.items()} == {
        "demo decode, batch 1": ("ms/step", False),
        "demo decode, batch 8": ("ms/step", False),
        "demo small nano workload": ("tok/s", True),
        "demo prefill 2 x 256": ("tok/s", True),
        "demo startup, warm": ("s", False),
    }
    assert invoke_well("suite", "--list").stdout.splitlines() == suite.row_names()


def test_a_suite_with_a_failed_row_writes_its_file_and_fails(tmp_path, monkeypatch):
    def fail(engine):
        raise ValueError("too hot")

    monkeypatch.setattr(suite, "QUICK_ROWS", [suite.Row("hot", None, fail)])
    path = tmp_path / "results.json"
    result = invoke("suite", "--quick", *CPU, "--only", "hot", "--out", path)
    assert result.exit_code == 1
    assert "FAILED: ValueError: too hot" in result.stdout
    assert "1 rows failed" in result.stderr
    assert json.loads(path.read_text())["failures"] == {"hot": "ValueError: too hot"}


@pytest.mark.parametrize("command", ["latency", "sweep"])
def test_plots(command, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "plot.png"
    small = ["--num-iters", 1, "--num-iters-warmup", 0] if command == "latency" else ["--max-concurrency", "1,2"]
    invoke_well(command, *CPU, *SMALL, *small, "--plot", path)
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("command", ["latency", "throughput", "nano", "sweep"])
def test_without_matplotlib_a_plot_fails_before_anything_runs(command, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "matplotlib" else find(name, *more)
    )
    result = invoke(command, *CPU, "--plot", tmp_path / "plot.png")
    assert result.exit_code == 1
    assert 'pip install "mini-vllm[plot]"' in str(result.exception)
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["latency", "--batch-size", "0"], "0 is not in the range x>=1"),
        (["latency", "--no-such-option"], "No such option"),
        (["latency", "--temperature", "3"], "3.0 is not in the range"),
        (["latency", "--block-size", "0"], "block_size must be an integer >= 1"),
        (["latency", "--preset", "gpt-5"], "'gpt-5' is not one of 'qwen3-0.6b'"),
        (["latency", "--preset", "qwen3-8b", "--model", "x"], "give it or --model, not both"),
        (["latency", "--output-json", "/no/such/directory/file.json"], "directory /no/such/directory does not exist"),
        (["latency", "--profile", "/no/such/directory/file.json"], "directory /no/such/directory does not exist"),
        (["throughput", "--dataset-name", "sharegpt"], "need each other"),
        (["throughput", "--dataset-path", __file__], "need each other"),
        (["throughput", "--dataset-name", "sharegpt", "--dataset-path", "/no/file"], "does not exist"),
        (["throughput", "--dataset-name", "poems"], "'poems' is not one of 'random'"),
        (["throughput", "--request-rate", "0"], "must be above 0"),
        (["throughput", "--request-rate", "nan"], "must be above 0"),
        (["sweep", "--max-concurrency", "1,x"], "numbers separated by commas, got '1,x'"),
        (["sweep", "--request-rate", "1,0"], "must be above 0"),
        (["sweep", "--request-rate", "1", "--max-concurrency", "1"], "not both"),
        (["startup", "--num-iters-cold", "0", "--num-iters-warm", "0"], "nothing to measure"),
        (["compare", "/no/such/a.json", "/no/such/b.json"], "does not exist"),
        (["no-such-benchmark"], "No such command"),
    ],
)
def test_bad_usage_exits_with_2(arguments, message):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in re.sub(r"\s+", " ", result.stderr)
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["throughput", *CPU, "--input-len", "5000"], "but max_model_len=2048; lower --input-len"),
        (["suite", *CPU], "needs a GPU; --quick"),
        (["suite", "--quick", *CPU, "--only", "llama"], "--only llama selects none"),
        (["compare", str(CHECKOUT / "pyproject.toml"), str(CHECKOUT / "pyproject.toml")], "cannot be read as JSON"),
    ],
)
def test_a_failed_run_exits_with_1_in_one_line(arguments, message):
    code, out, err = run(*arguments)
    assert (code, out) == (1, "")
    errors = [line for line in err.splitlines() if not line.startswith("mini-vllm: ")]
    assert len(errors) == 1
    assert errors[0].startswith("Error: ")
    assert message in errors[0]
