"""The presets are the models that they are named after."""

import math
from pathlib import Path

import numpy as np
import pytest

from mini_vllm.bench.presets import PRESETS, preset_arguments, write_preset
from mini_vllm.config import ModelConfig
from mini_vllm.models.weights import load_decoder

# As the model cards on the Hugging Face hub count them.
PARAMETERS = {
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.1-8b": 8_030_261_248,
    "qwen2.5-7b": 7_615_616_512,
}


class Counted:
    """A source of weights and a backend in one, which count elements and hold none."""

    def __init__(self):
        self.count = 0

    def tensor(self, name, shape):
        self.count += math.prod(shape)
        return np.broadcast_to(np.float32(0), shape)

    def load_weight(self, parts):
        return parts

    def to_device(self, host):
        return host


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_its_model_s_number_of_parameters(name):
    counted = Counted()
    load_decoder(ModelConfig.from_hf(PRESETS[name]), counted, counted, max_model_len=8)
    assert counted.count == PARAMETERS[name]


def test_presets_differ_where_their_families_do():
    configs = {name: ModelConfig.from_hf(config) for name, config in PRESETS.items()}
    assert {name for name, config in configs.items() if config.qkv_bias} == {"qwen2.5-7b"}
    assert {name for name, config in configs.items() if config.qk_norm} == {n for n in configs if "qwen3" in n}
    assert {name for name, config in configs.items() if config.rope.type == "llama3"} == {
        "llama-3.2-1b",
        "llama-3.1-8b",
    }
    assert (configs["llama-3.2-1b"].rope.factor, configs["llama-3.1-8b"].rope.factor) == (32, 8)


def test_a_preset_s_directory_lives_as_long_as_it_is_used():
    with preset_arguments("qwen3-0.6b") as arguments:
        assert arguments["load_format"] == "dummy"
        directory = Path(arguments["model"])
        assert [path.name for path in directory.iterdir()] == ["config.json"]
    assert not directory.exists()
    with preset_arguments(None) as arguments:
        assert arguments == {}


def test_an_unknown_preset_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"'gpt-5' is not one of qwen3-0\.6b"):
        write_preset("gpt-5", tmp_path)
