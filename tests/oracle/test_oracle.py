"""The engine against transformers, on the committed fixtures of make_fixtures.py."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mini_vllm import LLM, BeamSearchParams, SamplingParams

MAKE_FIXTURES = Path(__file__).with_name("make_fixtures.py")
FIXTURES = sorted(path.parent for path in Path(__file__).with_name("fixtures").glob("*/config.json"))
BEAM_FIXTURES = [directory for directory in FIXTURES if (directory / "beams.json").exists()]
V4_FIXTURES = [directory for directory in FIXTURES if (directory / "config_v4.json").exists()]
assert FIXTURES, "tests/oracle/fixtures is empty"
assert V4_FIXTURES, "no fixture has a config_v4.json"

RUNS = [
    pytest.param(device, dtype, marks=marks, id=f"{device}-{dtype}")
    for device, marks in (("cpu", ()), ("cuda", pytest.mark.gpu))
    for dtype in ("float32", "float16", "bfloat16")
]
every_fixture = pytest.mark.parametrize("directory", FIXTURES, ids=lambda directory: directory.name)
every_run = pytest.mark.parametrize(("device", "dtype"), RUNS)


@dataclass(frozen=True)
class Expected:
    """What transformers computed in float32: per prompt the ids, logits [T, V] and greedy continuation."""

    prompts: list[list[int]]
    logits: list[np.ndarray]
    greedy: list[list[int]]
    margins: np.ndarray  # [P, N] float32: top-1 minus top-2 logit at each greedy step

    @classmethod
    def load(cls, directory: Path) -> Expected:
        with np.load(directory / "expected.npz") as file:
            ends = np.cumsum(file["prompt_lens"])[:-1]
            prompts = [ids.tolist() for ids in np.split(file["prompt_ids"], ends)]
            return cls(prompts, np.split(file["logits"], ends), file["greedy"].tolist(), file["margins"])


def open_llm(directory: Path, device: str = "cpu", dtype: str = "float32", **settings: int) -> LLM:
    settings = {"num_kv_blocks": 64, **settings}
    return LLM(model=str(directory), device=device, dtype=dtype, skip_tokenizer_init=True, **settings)


def tolerance(directory: Path, dtype: str) -> float:
    """How far logits computed in `dtype` may lie from the exact ones, by rounding alone.

    On its way to a logit a value passes 12 ops a layer (norm, q/k/v, q/k norm, RoPE, attention, output
    projection, add; norm, gate/up, SiLU, down, add), then norm and head. Every op rounds its result once, to
    a relative u = eps / 2. In float32 its sum of up to n terms, accumulated in the same precision, rounds n
    times; in the 16-bit types it is accumulated in float32 and that is negligible. Roundings are independent,
    so they add up like a random walk, and of the 14,000 logits of a fixture the worst lies 4 standard
    deviations out. That gives 0.5e-4 to 1.2e-4 in float32.
    """
    config = json.loads((directory / "config.json").read_text())
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    terms = max(hidden, config["intermediate_size"], heads * config.get("head_dim", hidden // heads))
    ops = 12 * config["num_hidden_layers"] + 2
    roundings = ops * terms if dtype == "float32" else ops
    unit_roundoff = float(ml_dtypes.finfo(dtype).eps) / 2
    scale = max(float(np.abs(logits).max()) for logits in Expected.load(directory).logits)
    return 4 * unit_roundoff * roundings**0.5 * scale


def check_logits(got: np.ndarray, expected: np.ndarray, atol: float) -> None:
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=0, atol=atol)


def check_greedy(llm: LLM, prompts: list[int], expected: Expected, atol: float) -> None:
    """Continue some of the prompts, all in one call, and compare with transformers' tokens.

    A token may differ only where the two best logits are closer than rounding can bring them; what follows is
    then another text. The fixtures keep every margin at 5e-3 or more, so in float32 all tokens are the same.
    """
    params = SamplingParams(temperature=0, max_tokens=len(expected.greedy[0]), ignore_eos=True)
    inputs = [{"prompt_token_ids": expected.prompts[i]} for i in prompts]
    outputs = llm.generate(inputs, params, use_tqdm=False)
    assert len(outputs) == len(prompts)
    for i, output in zip(prompts, outputs, strict=True):
        got = np.array(output.outputs[0].token_ids)
        assert got.shape == (params.max_tokens,)
        different = np.flatnonzero(got != expected.greedy[i])
        if len(different):
            step = different[0]
            margin = expected.margins[i, step]
            assert margin <= 2 * atol, (
                f"prompt {i} of {len(expected.prompts[i])} tokens: greedy token {step} is {got[step]}, "
                f"transformers has {expected.greedy[i][step]} by a margin of {margin:.4f}"
            )


@every_run
@every_fixture
def test_logits_of_every_prompt_position(directory, device, dtype, prompt_logits):
    expected = Expected.load(directory)
    llm = open_llm(directory, device, dtype)
    for prompt, logits in zip(expected.prompts, expected.logits, strict=True):
        check_logits(prompt_logits(llm, prompt), logits, tolerance(directory, dtype))


@every_run
@every_fixture
def test_greedy_alone(directory, device, dtype):
    expected = Expected.load(directory)
    llm = open_llm(directory, device, dtype)
    for i in range(len(expected.prompts)):
        check_greedy(llm, [i], expected, tolerance(directory, dtype))


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="whole"),
        pytest.param({"max_num_seqs": 4, "max_num_batched_tokens": 13}, id="chunked"),
        pytest.param({"num_kv_blocks": 9}, id="preempted"),  # the prompts need 8, all tokens 13
    ],
)
@every_run
@every_fixture
def test_greedy_in_a_batch(directory, device, dtype, settings):
    expected = Expected.load(directory)
    llm = open_llm(directory, device, dtype, **settings)
    check_greedy(llm, list(range(len(expected.prompts))), expected, tolerance(directory, dtype))


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="alone"),
        pytest.param({"enable_prefix_caching": False, "block_size": 3}, id="forks only"),
        pytest.param({"num_kv_blocks": 12, "max_num_seqs": 5, "max_num_batched_tokens": 9}, id="under pressure"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("directory", BEAM_FIXTURES, ids=lambda directory: directory.name)
def test_beam_search(directory, device, settings):
    """The same continuations in the same order as transformers, one prompt at a time and all in one batch."""
    prompts = Expected.load(directory).prompts
    engine = open_llm(directory, device, **settings).llm_engine
    searches = json.loads((directory / "beams.json").read_text())
    batches = {}
    for search in searches:
        names = ("beam_width", "max_tokens", "length_penalty")
        batches.setdefault((search["eos_token_id"], *(search[name] for name in names)), []).append(search)
    atol = tolerance(directory, "float32")
    for (eos, beam_width, max_tokens, length_penalty), batch in batches.items():
        engine.eos_token_ids = frozenset(() if eos is None else [eos])
        params = BeamSearchParams(beam_width, max_tokens, length_penalty=length_penalty)
        outputs = engine.beam_search([prompts[search["prompt"]] for search in batch], params)
        engine.check()
        for search, output in zip(batch, outputs, strict=True):
            prompt = prompts[search["prompt"]]
            assert [s.tokens[len(prompt) :] for s in output.sequences] == search["outputs"]
            # A score is a sum of up to max_tokens log probabilities, perhaps undivided.
            scores = [s.score for s in output.sequences]
            np.testing.assert_allclose(scores, search["scores"], rtol=0, atol=max_tokens * atol)
            assert all((s.finish_reason == "stop") == (s.tokens[-1] == eos) for s in output.sequences)
    assert engine.scheduler.num_available_blocks == engine.scheduler.block_manager.num_blocks


@pytest.mark.parametrize("directory", V4_FIXTURES, ids=lambda directory: directory.name)
def test_config_in_the_spelling_of_transformers_4(directory, tmp_path, prompt_logits):
    copy = shutil.copytree(directory, tmp_path / directory.name)
    (copy / "config_v4.json").replace(copy / "config.json")
    expected = Expected.load(directory)
    llm = open_llm(copy)
    for prompt, logits in zip(expected.prompts, expected.logits, strict=True):
        check_logits(prompt_logits(llm, prompt), logits, tolerance(directory, "float32"))


@pytest.mark.parametrize("name", ["qwen2_tied", "qwen3", "llama_llama3"])
def test_tied_checkpoint_that_repeats_the_embedding_as_lm_head(name, tmp_path, prompt_logits):
    directory = next(directory for directory in FIXTURES if directory.name == name)
    copy = shutil.copytree(directory, tmp_path / name)
    tensors = load_file(copy / "model.safetensors")
    assert "lm_head.weight" not in tensors
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}, copy / "model.safetensors")
    expected = Expected.load(directory)
    llm = open_llm(copy)
    for prompt, logits in zip(expected.prompts, expected.logits, strict=True):
        check_logits(prompt_logits(llm, prompt), logits, tolerance(directory, "float32"))


@pytest.fixture(scope="session")
def regenerated(tmp_path_factory) -> Path:
    """All fixtures made again, in a process of its own: torch need not share this one's warning filters."""
    out = tmp_path_factory.mktemp("oracle")
    command = [sys.executable, str(MAKE_FIXTURES), "--out", str(out)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return out


@pytest.mark.oracle
def test_script_makes_the_committed_fixtures(regenerated):
    assert [directory.name for directory in FIXTURES] == sorted(path.name for path in regenerated.iterdir())


@pytest.mark.oracle
@every_fixture
def test_fixture_is_what_the_script_makes(directory, regenerated):
    again = regenerated / directory.name
    assert {path.name for path in directory.iterdir()} == {path.name for path in again.iterdir()}
    for path in directory.glob("*.safetensors"):
        committed, made = load_file(path), load_file(again / path.name)
        assert committed.keys() == made.keys()
        for name, tensor in committed.items():
            assert (tensor.dtype, tensor.shape) == (made[name].dtype, made[name].shape), name
            assert tensor.tobytes() == made[name].tobytes(), name
    for path in directory.glob("config*.json"):
        committed, made = (json.loads(file.read_text()) for file in (path, again / path.name))
        for config in (committed, made):
            config.pop("transformers_version", None)
        assert committed == made
    committed, made = Expected.load(directory), Expected.load(again)
    assert committed.prompts == made.prompts
    assert committed.greedy == made.greedy
    for logits, logits_again in zip(committed.logits, made.logits, strict=True):
        check_logits(logits_again, logits, tolerance(directory, "float32"))
