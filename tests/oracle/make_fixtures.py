"""Make the oracle: tiny random checkpoints and what transformers computes from them.

    python tests/oracle/make_fixtures.py [--out DIR] [VARIANT ...]

needs torch and transformers 5; the engine and the tests need neither, because the results are committed.
Each variant isolates one difference between checkpoints. Its directory holds what `save_pretrained` writes
and `expected.npz`, computed in float32 with eager attention from the saved weights:

    prompt_lens  [P]       int64    tokens in each prompt
    prompt_ids   [sum]     int64    the prompts, one after the other
    logits       [sum, V]  float32  after every prompt token
    greedy       [P, N]    int64    the greedy continuations
    margins      [P, N]    float32  top-1 minus top-2 logit at each greedy step

Some also hold `config_v4.json`, the same config as transformers 4 would spell it, and `beams.json`, a list of beam
searches: {"prompt": index, "beam_width", "max_tokens", "length_penalty", "eos_token_id": id or null, "outputs": the
new tokens of each sequence, best first, "scores": their scores}.

A fixture is only worth something if a wrong engine fails it. So each variant lists `contrasts`, configs that
an engine with a bug would in effect run, and this script refuses a variant whose logits they do not move.
"""

from __future__ import annotations

import argparse
import json
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import transformers

PROMPT_LENS = (1, 4, 16, 67)  # a lone token, a few, one KV block, past every trained length
GREEDY_TOKENS = 24
MIN_MARGIN = 5e-3  # tens of times the tests' tolerance in float32: no rounding can flip a greedy token
MIN_CONTRAST = 2e-2  # likewise: no rounding can hide a bug

BASE = {
    "vocab_size": 160,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-3,  # large enough to be seen in the logits, unlike the usual 1e-6
    "bos_token_id": None,
    "eos_token_id": None,
}
TRAINED_LEN = 32  # `original_max_position_embeddings` of the scaled RoPEs; the longest prompt is twice that


BEAM_VARIANTS = ("qwen3", "llama", "mistral_window")
BEAM_SEARCHES = (  # beam_width, max_tokens, length_penalty, whether a token of the first of them serves as EOS
    (4, 12, 1.0, False),
    (4, 12, 1.0, True),
    (3, 20, 0.0, True),
    (5, 20, 2.0, True),
)


@dataclass(frozen=True)
class Variant:
    """One fixture: `config` is laid over BASE; `contrasts` are laid over both and must change the logits."""

    architecture: str
    config: dict
    contrasts: tuple[dict, ...]
    dtype: str = "bfloat16"
    seed: int = 0  # another one where this one's text only repeats itself
    shard_size: int = 10**9  # bytes
    num_shards: int = 1
    v4_type_key: str | None = None  # the key of the RoPE type in config_v4.json, "type" in old ones
    v4_config: dict = field(default_factory=dict)  # keys that only a transformers 4 file has


def rope(rope_type: str, theta: float, **scaling: object) -> dict:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": theta, **scaling}}


def yarn(theta: float, **scaling: object) -> dict:
    return rope("yarn", theta, factor=4.0, original_max_position_embeddings=TRAINED_LEN, **scaling)


def llama3(**changes: object) -> dict:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return rope("llama3", 10000.0, original_max_position_embeddings=TRAINED_LEN, **{**scaling, **changes})


DEFAULT_THETA = rope("default", 10000.0)
HEAD_DIM_16 = {"head_dim": 16}  # 8 frequencies: enough for all parts of a scaled RoPE to be there
WIDE_RAMP = {"beta_fast": 2.0, "beta_slow": 0.01}

VARIANTS = {
    "qwen3": Variant(
        "Qwen3ForCausalLM",
        {"tie_word_embeddings": True, **HEAD_DIM_16, **rope("default", 1e6)},
        (DEFAULT_THETA, {"rms_norm_eps": 1e-6}),
        v4_type_key="rope_type",
        v4_config={"sliding_window": 8},  # in force only with use_sliding_window
    ),
    "qwen3_sharded": Variant(
        "Qwen3ForCausalLM",
        {**HEAD_DIM_16, **rope("default", 1e6)},
        (DEFAULT_THETA,),
        shard_size=24_000,
        num_shards=3,
    ),
    "qwen3_yarn": Variant(
        "Qwen3ForCausalLM",
        {"tie_word_embeddings": True, **HEAD_DIM_16, **yarn(500.0)},
        (rope("default", 500.0), yarn(500.0, attention_factor=1.0)),
        v4_type_key="rope_type",
    ),
    "qwen2": Variant("Qwen2ForCausalLM", rope("default", 1e6), (DEFAULT_THETA,)),
    "qwen2_tied": Variant(
        "Qwen2ForCausalLM",
        {"tie_word_embeddings": True, **rope("default", 1e6)},
        (DEFAULT_THETA,),
        v4_type_key="type",
        v4_config={"sliding_window": 8, "use_sliding_window": False, "max_window_layers": 1},
    ),
    "qwen2_window": Variant(  # layer 0 sees everything, layers 1 and 2 see 8 tokens
        "Qwen2ForCausalLM",
        {"num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        (
            {"use_sliding_window": False},
            {"sliding_window": 7},
            {"sliding_window": 9},
            {"max_window_layers": 0},
            {"max_window_layers": 2},
        ),
        v4_type_key="type",
    ),
    "qwen2_yarn": Variant(
        "Qwen2ForCausalLM",
        {"num_attention_heads": 2, **yarn(500.0, attention_factor=1.3, beta_fast=2.0, beta_slow=0.25)},
        (
            yarn(500.0, beta_fast=2.0, beta_slow=0.25),
            yarn(500.0, attention_factor=1.3),
            yarn(500.0, attention_factor=1.3, beta_fast=2.0, beta_slow=0.25, truncate=False),
        ),
        v4_type_key="type",
    ),
    "llama": Variant(
        "LlamaForCausalLM",
        {"num_key_value_heads": 4},
        (rope("default", 1e6), {"rms_norm_eps": 1e-6}),
        dtype="float32",
    ),
    "llama_mqa": Variant("LlamaForCausalLM", {"num_key_value_heads": 1}, (rope("default", 1e6),)),
    "llama_bias": Variant("LlamaForCausalLM", {"attention_bias": True}, ({"attention_bias": False},), seed=1),
    "llama_fp16": Variant("LlamaForCausalLM", {"num_key_value_heads": 1}, (), dtype="float16"),
    "llama_head_dim_80": Variant(
        "LlamaForCausalLM",
        {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 80, "tie_word_embeddings": True},
        (rope("default", 1e6),),
    ),
    "llama_linear": Variant(
        "LlamaForCausalLM",
        {**HEAD_DIM_16, **rope("linear", 10000.0, factor=4.0)},
        (DEFAULT_THETA,),
        v4_type_key="type",
    ),
    "llama_llama3": Variant(
        "LlamaForCausalLM",
        {"tie_word_embeddings": True, **HEAD_DIM_16, **llama3()},
        (
            DEFAULT_THETA,
            rope("linear", 10000.0, factor=8.0),
            llama3(low_freq_factor=2.0),
            llama3(high_freq_factor=2.0),
        ),
        v4_type_key="rope_type",
    ),
    "llama_yarn": Variant(  # with these betas the ramp starts between two pairs and ends at its upper bound
        "LlamaForCausalLM",
        {**HEAD_DIM_16, **yarn(20.0, mscale=1.5, mscale_all_dim=0.5, **WIDE_RAMP, truncate=False)},
        (
            yarn(20.0, **WIDE_RAMP, truncate=False),
            yarn(20.0, mscale=1.5, mscale_all_dim=0.5, **WIDE_RAMP),
        ),
    ),
    "mistral": Variant("MistralForCausalLM", {"sliding_window": None}, ({"sliding_window": 64},)),
    "mistral_window": Variant(
        "MistralForCausalLM",
        {"sliding_window": 8},
        ({"sliding_window": None}, {"sliding_window": 7}, {"sliding_window": 9}),
        v4_type_key="rope_type",
    ),
}


def build_config(variant: Variant, changes: dict | None = None) -> transformers.PretrainedConfig:
    model_class = getattr(transformers, variant.architecture)
    # A deep copy, because transformers edits the RoPE dict it is given.
    values = json.loads(json.dumps({**BASE, **DEFAULT_THETA, **variant.config, **(changes or {})}))
    return model_class.config_class(**values, attn_implementation="eager")


def random_weights(model: torch.nn.Module, seed: int) -> None:
    """Overwrite every parameter, each from its own stream, so that no parameter depends on another's shape.

    The initialisation of a training run (standard deviation 0.02) would leave attention uniform and the
    residual stream all embedding; here projections have a gain of 1.5, and norms and biases take part.
    Queries and keys have a gain of 1: attention is then selective, but not so sharp that softmax multiplies
    rounding errors.
    """
    for name, parameter in model.named_parameters():
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        if name.endswith("norm.weight"):
            value = rng.uniform(0.5, 1.5, parameter.shape)
        elif name.endswith("bias"):
            value = rng.normal(0.0, 0.5, parameter.shape)
        else:
            gain = 1.0 if "q_proj" in name or "k_proj" in name else 1.5
            value = rng.normal(0.0, gain / parameter.shape[1] ** 0.5, parameter.shape)
        parameter.data.copy_(torch.from_numpy(value))


def load(directory: Path, config: transformers.PretrainedConfig | None = None) -> torch.nn.Module:
    """The saved checkpoint in float32, under its own config or another one."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, config=config, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@torch.no_grad()
def all_logits(model: torch.nn.Module, token_ids: np.ndarray) -> np.ndarray:
    """Logits after every token, [T, V] float32, in one forward pass without a KV cache."""
    return model(torch.from_numpy(token_ids)[None], use_cache=False).logits[0].numpy()


@torch.no_grad()
def greedy(model: torch.nn.Module, token_ids: np.ndarray) -> np.ndarray:
    """The continuation by `generate`, [GREEDY_TOKENS] int64, with transformers' own KV cache."""
    prompt = torch.from_numpy(token_ids)[None]
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=GREEDY_TOKENS,
        pad_token_id=0,
    )
    return out[0, len(token_ids) :].numpy()


@torch.no_grad()
def beam_searches(model: torch.nn.Module, prompts: list[np.ndarray]) -> list[dict]:
    """All BEAM_SEARCHES of all prompts by `generate`."""
    found = []
    for index, prompt in enumerate(prompts):
        frequent = None
        for beam_width, max_tokens, length_penalty, has_eos in BEAM_SEARCHES:
            ids = torch.from_numpy(prompt)[None]
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                num_beams=beam_width,
                num_return_sequences=beam_width,
                max_new_tokens=max_tokens,
                length_penalty=length_penalty,
                early_stopping=False,
                eos_token_id=frequent if has_eos else None,
                pad_token_id=BASE["vocab_size"] - 1,
                return_dict_in_generate=True,
                output_scores=True,
            )
            outputs = out.sequences[:, len(prompt) :].tolist()
            if has_eos:  # behind EOS there is padding
                outputs = [row[: row.index(frequent) + 1] if frequent in row else row for row in outputs]
            else:
                frequent = outputs[0][max_tokens // 2]
            found.append(
                {
                    "prompt": index,
                    "beam_width": beam_width,
                    "max_tokens": max_tokens,
                    "length_penalty": length_penalty,
                    "eos_token_id": frequent if has_eos else None,
                    "outputs": outputs,
                    "scores": [round(score, 6) for score in out.sequences_scores.tolist()],
                }
            )
    assert any(len(output) < search["max_tokens"] for search in found for output in search["outputs"])
    return found


def draw_prompt(model: torch.nn.Module, length: int, seed: int) -> tuple[np.ndarray, ...]:
    """The first random prompt whose continuation is varied and never close to a tie.

    Returns:
        The prompt, the logits of its tokens, its greedy continuation and the margin of each greedy step.
    """
    for attempt in range(100):
        prompt = np.random.default_rng([seed, length, attempt]).integers(0, BASE["vocab_size"], length)
        tokens = greedy(model, prompt)
        steps = all_logits(model, np.concatenate([prompt, tokens]))[length - 1 : -1]
        assert (steps.argmax(-1) == tokens).all(), "transformers disagrees with itself with and without cache"
        first, second = np.sort(steps, axis=-1)[:, :-3:-1].T
        margins = first - second
        if margins.min() > MIN_MARGIN and len(set(tokens.tolist())) > GREEDY_TOKENS // 3:
            return prompt, all_logits(model, prompt), tokens, margins
    raise AssertionError(f"no prompt of {length} tokens has a varied continuation: change the variant's seed")


def v4_spelling(config: dict, variant: Variant) -> dict:
    """The same config as transformers 4 wrote it: RoPE in two keys, `torch_dtype`, no derived layer types."""
    newer = ("layer_types", "transformers_version")
    config = {key: value for key, value in config.items() if key not in newer}
    scaling = config.pop("rope_parameters")
    config["rope_theta"] = scaling.pop("rope_theta")
    rope_type = scaling.pop("rope_type")
    config["rope_scaling"] = {variant.v4_type_key: rope_type, **scaling} if scaling else None
    config["torch_dtype"] = config.pop("dtype")
    return {**config, **variant.v4_config}


def max_difference(model: torch.nn.Module, prompts: list[np.ndarray], logits: list[np.ndarray]) -> float:
    """Largest distance between a model's logits and those given, over all prompts."""
    pairs = zip(prompts, logits, strict=True)
    return max(float(np.abs(all_logits(model, prompt) - expected).max()) for prompt, expected in pairs)


def make_fixture(name: str, directory: Path) -> None:
    """Write the variant `name` into `directory`, which is made.

    Raises:
        AssertionError: where the variant would not catch the bugs it is there for.
    """
    variant = VARIANTS[name]
    seed = zlib.crc32(name.encode()) + variant.seed
    model = getattr(transformers, variant.architecture)(build_config(variant))
    random_weights(model, seed)
    model.to(getattr(torch, variant.dtype)).save_pretrained(directory, max_shard_size=variant.shard_size)
    assert len(list(directory.glob("*.safetensors"))) == variant.num_shards

    model = load(directory)
    drawn = [draw_prompt(model, length, seed) for length in PROMPT_LENS]
    prompts, logits, tokens, margins = map(list, zip(*drawn, strict=True))
    np.savez_compressed(
        directory / "expected.npz",
        prompt_lens=np.array(PROMPT_LENS),
        prompt_ids=np.concatenate(prompts),
        logits=np.concatenate(logits),
        greedy=np.stack(tokens),
        margins=np.stack(margins),
    )

    if name in BEAM_VARIANTS:
        (directory / "beams.json").write_text(json.dumps(beam_searches(model, prompts)) + "\n")

    for changes in variant.contrasts:
        difference = max_difference(load(directory, build_config(variant, changes)), prompts, logits)
        assert difference > MIN_CONTRAST, f"{name} hardly differs from {changes}: {difference:.1e}"

    if variant.v4_type_key is not None:
        config = v4_spelling(json.loads((directory / "config.json").read_text()), variant)
        path = directory / "config_v4.json"
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        same = load(directory, type(model.config).from_json_file(path))
        assert max_difference(same, prompts, logits) == 0, f"transformers reads {path} differently"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = ", ".join(VARIANTS)
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help=f"all by default, of {names}")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "fixtures")
    args = parser.parse_args()
    if unknown := set(args.variants) - VARIANTS.keys():
        parser.error(f"unknown variants {sorted(unknown)}; known are {names}")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)  # so that the order of summation does not depend on the number of cores
    for name in args.variants or VARIANTS:
        make_fixture(name, args.out / name)
        print(name)


if __name__ == "__main__":
    main()
