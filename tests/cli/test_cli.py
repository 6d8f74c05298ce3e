"""The command line: through click's runner, and as a real process where exit codes, pipes and signals matter."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from mini_vllm import __version__
from mini_vllm.cli import cli

CHECKOUT = Path(__file__).resolve().parents[2]
GREEDY = ["--temperature", "0", "--max-tokens", "12", "--ignore-eos", "--device", "cpu"]


def invoke(*args, text=None):
    return CliRunner().invoke(cli, list(args), input=text)


def process(*args, **kwargs):
    """`mini-vllm ARGS` as its own process, run from this checkout."""
    env = {**os.environ, "PYTHONPATH": str(CHECKOUT), "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "mini_vllm.cli", *args]
    return subprocess.Popen(
        command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.PIPE, **kwargs
    )


def run(*args, text=None):
    with process(*args) as running:
        out, err = running.communicate(text, timeout=60)
    return running.returncode, out, err


@pytest.fixture(scope="module")
def story(demo_llm):
    from mini_vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    return demo_llm.generate("Once upon a time", params, use_tqdm=False)[0]


def test_version_and_help():
    assert __version__ in invoke("--version").output
    for command in ("generate", "chat"):
        assert command in invoke("--help").output
        output = invoke(command, "--help").output
        assert "Sampling:" in output
        assert "Engine:" in output


def test_help_is_fast_and_imports_no_numpy():
    times = []
    for _ in range(3):
        start = time.monotonic()
        code, out, _ = run("--help")
        times.append(time.monotonic() - start)
        assert code == 0
        assert "generate" in out
    assert min(times) < 0.3
    code = "import sys, mini_vllm.cli.generate; print(sorted({'numpy', 'cupy', 'tokenizers'} & set(sys.modules)))"
    env = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    assert subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stdout == "[]\n"


def test_generate_streams_a_prompt_to_stdout_and_says_which_model(story):
    code, out, err = run("generate", "Once upon a time", *GREEDY)
    assert (code, out) == (0, story.text + "\n")
    assert len([line for line in err.splitlines() if "demo model" in line]) == 1


def test_no_stream_and_stdin_give_the_same_text(story):
    assert invoke("generate", "Once upon a time", "--no-stream", *GREEDY).stdout == story.text + "\n"
    assert invoke("generate", *GREEDY, text="Once upon a time\n").stdout == story.text + "\n"


def test_json_output(story):
    result = invoke("generate", "Once upon a time", "--json", "--logprobs", "1", *GREEDY)
    (record,) = [json.loads(line) for line in result.stdout.splitlines()]
    assert record["prompt"] == "Once upon a time"
    assert record["outputs"][0]["text"] == story.text
    assert record["outputs"][0]["token_ids"] == story.outputs[0].token_ids
    assert len(record["outputs"][0]["logprobs"]) == 12


def test_many_prompts_are_numbered(story):
    result = invoke("generate", "Once upon a time", "The king", *GREEDY)
    assert result.stdout.startswith(f"--- 0\n{story.text}\n--- 1\n")
    assert "Processed prompts" in result.stderr


def test_n_samples_with_a_seed():
    arguments = ("generate", "The king", "--n", "2", "--seed", "7", "--max-tokens", "5", "--device", "cpu")
    first, second = invoke(*arguments), invoke(*arguments)
    assert first.stdout == second.stdout
    assert "--- 0.1\n" in first.stdout


def test_files_in_and_out(tmp_path, story):
    lines = [
        json.dumps({"prompt": "Once upon a time", "other": "ignored"}),
        json.dumps({"prompt_token_ids": story.prompt_token_ids}),
        json.dumps({"messages": [{"role": "user", "content": "Tell me a story"}]}),
        json.dumps("Once upon a time"),
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "in.txt").write_text("Once upon a time\n\nThe king\n")
    out = tmp_path / "out.jsonl"
    assert invoke("generate", "--input", str(tmp_path / "in.jsonl"), "--output", str(out), *GREEDY).exit_code == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["index"] for r in records] == [0, 1, 2, 3]
    assert [records[i]["outputs"][0]["text"] for i in (0, 1, 3)] == [story.text] * 3
    assert "--- 1\n" in invoke("generate", "--input", str(tmp_path / "in.txt"), *GREEDY).stdout


def test_chat_flag_uses_the_template(demo_llm):
    result = invoke("generate", "Hello", "--chat", "--system", "Be brief.", "--json", *GREEDY)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    expected = demo_llm.get_tokenizer().apply_chat_template(messages)
    assert json.loads(result.stdout)["prompt_token_ids"] == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "a", "--no-such-option"], "No such option"),
        (["generate", "a", "--temperature", "hot"], "not a valid float"),
        (["generate", "a", "--temperature", "3"], "temperature must be in [0, 2]"),
        (["generate", "a", "--n", "0"], "n must be an integer in"),
        (["generate", "a", "--device", "tpu"], "'tpu' is not one of"),
        (["generate", "a", "--block-size", "0"], "block_size must be an integer >= 1"),
        (["generate", "a", "--system", "x"], "--system needs --chat"),
        (["generate", "a", "--input", __file__], "not both"),
        (["generate", "--input", "/no/such/file.txt"], "does not exist"),
        (["generate"], "no prompt"),
        (["no-such-command"], "No such command"),
    ],
)
def test_bad_usage_exits_with_2(arguments, message):
    code, out, err = run(*arguments)
    assert code == 2
    assert message in err
    assert out == ""
    assert "Traceback" not in err


def test_bad_lines_of_a_jsonl_file_are_named(tmp_path):
    file = tmp_path / "in.jsonl"
    for content, message in (
        ("{", "is not JSON"),
        ('{"text": 1}', "must be a string or an object"),
        ("[1]", "must be"),
    ):
        file.write_text('"fine"\n' + content)
        result = invoke("generate", "--input", str(file))
        assert result.exit_code == 2
        assert f"{file}:2" in result.stderr
        assert message in result.stderr


def test_a_failed_run_exits_with_1_in_one_line(tmp_path):
    code, out, err = run("generate", "a", "--model", str(tmp_path))
    assert (code, out) == (1, "")
    assert err.startswith("Error: ")
    assert len(err.splitlines()) == 1
    code, _, err = run("generate", "a", "--model", str(tmp_path), "--debug")
    assert code == 1
    assert "Traceback" in err


def test_a_closed_pipe_is_silent():
    with process("generate", "Once", "--max-tokens", "300", "--ignore-eos", "--device", "cpu") as running:
        running.stdin.close()
        assert running.stdout.read(5)
        running.stdout.close()
        assert running.wait(timeout=60) == 0
        assert "Traceback" not in running.stderr.read()


def test_ctrl_c_ends_cleanly():
    with process("generate", "Once", "--max-tokens", "900", "--ignore-eos", "--device", "cpu") as running:
        running.stdin.close()
        assert running.stdout.read(5)
        running.send_signal(signal.SIGINT)
        assert running.wait(timeout=60) == 130
        err = running.stderr.read()
    assert "Interrupted." in err
    assert "Traceback" not in err


def test_chat_remembers_resets_and_leaves(monkeypatch):
    from mini_vllm import LLMEngine

    seen = []
    encode = LLMEngine.encode_chat

    def spy(self, messages, **kwargs):
        seen.append([dict(message) for message in messages])
        return encode(self, messages, **kwargs)

    monkeypatch.setattr(LLMEngine, "encode_chat", spy)
    lines = "Hello\n\nAnd then?\n/reset\nOnce more\n/exit\nnever read\n"
    result = invoke("chat", "--system", "Be kind.", *GREEDY, text=lines)
    assert result.exit_code == 0
    roles = [[message["role"] for message in messages] for messages in seen]
    assert roles == [["system", "user"], ["system", "user", "assistant", "user"], ["system", "user"]]
    assert seen[1][2]["content"] == result.stdout.splitlines()[0]
    assert invoke("chat", *GREEDY, text="").exit_code == 0  # end of input leaves too


def test_chat_survives_a_conversation_that_outgrows_the_context():
    result = invoke("chat", "--max-model-len", "32", *GREEDY, text="word " * 60 + "\nHi\n/exit\n")
    assert result.exit_code == 0
    assert "max_model_len=32" in result.stderr
    assert result.stdout.strip()


def test_doctor_reports_and_advises():
    result = invoke("doctor", "--json")
    facts = json.loads(result.stdout)
    assert facts["software"]["mini-vllm"] == __version__
    if facts["cuda_available"]:
        assert facts["verdict"] == "CUDA setup verified."
        assert "equal to NumPy" in facts["kernels"]["hello kernel"]
    else:
        assert facts["verdict"].startswith("No CUDA")
        assert "NumPy backend works" in facts["verdict"]
    text = invoke("doctor")
    assert text.exit_code == 0
    assert facts["verdict"] in text.stdout


def test_kernels_are_listed_and_compiled_without_a_gpu():
    pytest.importorskip("cupy")
    result = invoke("kernels", "list", "--arch", "sm_90a", "--head-dim", "64")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["file", "registers", "shared", "stack", "spills", "kernel"]
    files = {line.split()[0] for line in lines[1:]}
    assert {"rmsnorm.cu", "rope.cu", "flash_attention.cu", "paged_attention.cu", "gemv.cu", "sampling.cu"} <= files
    assert all(int(line.split()[1]) > 0 for line in lines[1:])
    again = invoke("kernels", "compile", "--arch", "sm_90a", "--head-dim", "64")
    assert again.stdout == f"sm_90a: {len(lines) - 1} kernels, 0.0 s of compiling\n"
    assert invoke("kernels", "compile", "--arch", "sm_75").exit_code == 2
