"""From the `model` argument to a directory: local paths, the hub's cache, and no network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from mini_vllm.models.hub import resolve_model

ROOT = Path(__file__).resolve().parents[2]
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "max_position_embeddings": 32,
    "tie_word_embeddings": True,
}


def test_directory(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path)) == tmp_path
    monkeypatch.chdir(tmp_path.parent)
    assert resolve_model(tmp_path.name).resolve() == tmp_path.resolve()
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    assert resolve_model(f"~/{tmp_path.name}") == tmp_path


def test_directory_without_config(tmp_path):
    with pytest.raises(ValueError, match=r"is a directory without config\.json") as error:
        resolve_model(str(tmp_path))
    assert str(tmp_path) in str(error.value)


def test_file(tmp_path):
    path = tmp_path / "model.safetensors"
    path.touch()
    with pytest.raises(ValueError, match="is a file; give the directory") as error:
        resolve_model(str(path))
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "model",
    ["/no/such/directory", "./nowhere", "~no-such-user/x", "a/b/c", "bad id", "-x", "a--b", "x" * 1000, "a\0b"],
    ids=lambda model: ascii(model[:20]),
)
def test_neither_a_path_nor_an_id(model):
    with pytest.raises(ValueError, match="is neither a directory nor a hub id such as") as error:
        resolve_model(model)
    assert repr(model) in str(error.value)


def run_python(code: str, hub_home: Path, **environment: str) -> str:
    """Standard output of a fresh process: huggingface_hub reads its variables when it is imported."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(hub_home), **environment}
    for name in ("HF_HUB_CACHE", "HF_TOKEN", "HUGGINGFACE_HUB_CACHE"):
        environment.pop(name, None)
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


RESOLVE = """
from mini_vllm.models.hub import resolve_model
try:
    print(resolve_model("some-org/some-model"))
except ValueError as error:
    print("ValueError:", error)
"""


@pytest.mark.parametrize(
    "environment",
    [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9", "NO_PROXY": "*"}],  # nothing listens there
    ids=["offline", "unreachable"],
)
def test_neither_cache_nor_network(tmp_path, environment):
    message = run_python(RESOLVE, tmp_path, **environment)
    assert message.startswith("ValueError: model 'some-org/some-model' is not a local directory")
    for words in ("not in the hub cache", "HF_HUB_OFFLINE", "give the path of its directory"):
        assert words in message


def fake_cached_model(hub_home: Path) -> Path:
    """A model as huggingface_hub lays it out: blobs by hash, a snapshot of links, a ref that names it."""
    repo = hub_home / "hub" / "models--some-org--some-model"
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot, blobs = repo / "snapshots" / commit, repo / "blobs"
    for directory in (snapshot, blobs, repo / "refs"):
        directory.mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    (blobs / "1").write_text(json.dumps(CONFIG))
    shapes = {
        "model.embed_tokens.weight": (16, 8),
        "model.norm.weight": (8,),
        "model.layers.0.input_layernorm.weight": (8,),
        "model.layers.0.post_attention_layernorm.weight": (8,),
        **{f"model.layers.0.self_attn.{n}_norm.weight": (4,) for n in "qk"},
        "model.layers.0.self_attn.q_proj.weight": (8, 8),
        **{f"model.layers.0.self_attn.{n}_proj.weight": (4, 8) for n in "kv"},
        "model.layers.0.self_attn.o_proj.weight": (8, 8),
        **{f"model.layers.0.mlp.{n}_proj.weight": (8, 8) for n in ("gate", "up", "down")},
    }
    rng = np.random.default_rng(0)
    save_file({name: rng.standard_normal(s).astype(np.float32) for name, s in shapes.items()}, blobs / "2")
    (snapshot / "config.json").symlink_to("../../blobs/1")
    (snapshot / "model.safetensors").symlink_to("../../blobs/2")
    return snapshot


GENERATE = """
from mini_vllm import LLM, SamplingParams
llm = LLM("some-org/some-model", device="cpu", skip_tokenizer_init=True, num_kv_blocks=4)
output = llm.generate({"prompt_token_ids": [1, 2]}, SamplingParams(temperature=0, max_tokens=3), use_tqdm=False)
print(len(output[0].outputs[0].token_ids))
"""


def test_cached_model_loads_offline(tmp_path):
    snapshot = fake_cached_model(tmp_path)
    assert run_python(RESOLVE, tmp_path, HF_HUB_OFFLINE="1").strip() == str(snapshot)
    assert run_python(GENERATE, tmp_path, HF_HUB_OFFLINE="1").strip() == "3"
