"""Steps padded to fixed sizes say what they say unpadded, here in NumPy; the graphs that run them need a GPU."""

from __future__ import annotations

import itertools
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_vllm import LLM, SamplingParams
from mini_vllm.config import EngineConfig
from mini_vllm.engine.model_input import ModelInput
from mini_vllm.engine.model_runner import ModelRunner
from mini_vllm.engine.padding import (
    DECODE_SIZES,
    MAX_PROMPT_TOKENS,
    PROMPT_SIZES,
    Column,
    Mirror,
    buffer_size,
    column_views,
    decode_columns,
    decode_values,
    fill_columns,
    max_prompt_tokens,
    padded_attention,
    padded_size,
    padded_sizes,
    prompt_columns,
    prompt_values,
)
from mini_vllm.models.decoder import LastTokens
from mini_vllm.ops.numpy_ops import NumpyOps

# ---- sizes --------------------------------------------------------------------------------------------------------


def test_padded_sizes():
    assert padded_sizes(DECODE_SIZES, 1) == [1]
    assert padded_sizes(DECODE_SIZES, 8) == [1, 2, 4, 8]
    assert padded_sizes(DECODE_SIZES, 100) == [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 100]
    assert padded_sizes(PROMPT_SIZES, 7) == [7]
    prompts = [16, 32, 64, 128, 256, 384, 512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048]
    assert padded_sizes(PROMPT_SIZES, 2048) == prompts


@pytest.mark.parametrize("first", [DECODE_SIZES, PROMPT_SIZES])
@given(limit=st.integers(1, 10_000))
def test_sizes_grow_up_to_the_limit(first, limit):
    sizes = padded_sizes(first, limit)
    assert sizes[-1] == limit
    assert all(0 < b - a <= max(a, first[-1]) for a, b in itertools.pairwise(sizes))


def test_no_more_prompt_tokens_than_a_step_can_have():
    assert max_prompt_tokens(EngineConfig(max_num_batched_tokens=300)) == 300
    assert max_prompt_tokens(EngineConfig(max_num_batched_tokens=10_000)) == MAX_PROMPT_TOKENS


# ---- columns ------------------------------------------------------------------------------------------------------


@given(st.data())
def test_columns_of_one_buffer(data):
    """Whatever was there before: the step's values, then padding, and each column aligned for its type."""
    columns = {
        f"column {i}": Column(
            data.draw(st.integers(1, 9)),
            data.draw(st.sampled_from([np.int32, np.float32, np.uint64])),
            data.draw(st.sampled_from([None, 0, 1, 7])),
        )
        for i in range(data.draw(st.integers(1, 4)))
    }
    buffer = np.full(buffer_size(columns), 0xEE, np.uint8)
    views = column_views(columns, buffer)
    for _ in range(2):
        values, expected = {}, {}
        for name, column in columns.items():
            mine = data.draw(st.lists(st.integers(0, 100), max_size=column.rows))
            if mine or data.draw(st.booleans()):
                values[name] = np.array(mine, column.dtype)
            last = mine[-1] if mine else 0
            padding = last if column.padding is None else column.padding
            expected[name] = mine + [padding] * (column.rows - len(mine))
        fill_columns(columns, views, values)
        for name, column in columns.items():
            assert views[name].dtype == column.dtype
            assert views[name].flags.aligned
            assert views[name].tolist() == expected[name]


def test_a_step_has_a_value_for_each_column():
    """One by another name would silently be padding."""
    assert decode_values(Mock(), Mock()).keys() == decode_columns(3).keys()
    assert prompt_values(Mock()).keys() == prompt_columns(3, 2).keys()


def test_padding_of_a_decode_step_is_greedy_and_sees_no_key():
    columns = decode_columns(3)
    views = column_views(columns, np.empty(buffer_size(columns), np.uint8))
    fill_columns(columns, views, {"temperature": np.array([0.5], np.float32), "top_p": np.array([0.25], np.float32)})
    assert views["temperature"].tolist() == [0.5, 0, 0]
    assert views["top_p"].tolist() == [0.25, 1, 1]
    assert views["slot_mapping"].tolist() == [-1, -1, -1]
    assert views["seq_lens"].tolist() == [0, 0, 0]


# ---- block tables -------------------------------------------------------------------------------------------------


@st.composite
def corners(draw):
    """Rows for the top left corner of an array [4, 6], of few values, so that one is often like the one before."""
    height, width = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    values = draw(st.lists(st.integers(0, 1), min_size=height * width, max_size=height * width))
    return np.array(values, np.int32).reshape(height, width)


@given(st.lists(corners(), max_size=8), st.data())
def test_rows_are_copied_when_the_device_holds_others(steps, data):
    steps = [step for step in steps for _ in range(data.draw(st.integers(1, 2)))]
    mirror, device = Mirror((4, 6)), np.zeros((4, 6), np.int32)
    for rows in steps:
        corner = device[: len(rows), : rows.shape[1]]
        is_copied = mirror.update(rows)
        assert is_copied == (corner != rows).any()
        if is_copied:
            corner[:] = rows


# ---- whole steps --------------------------------------------------------------------------------------------------


class PoisonedOps(NumpyOps):
    """Leaves what nobody may look at in the rows of tokens without a sequence."""

    def attention(self, q, k_cache, v_cache, meta, *rules):
        out = super().attention(q, k_cache, v_cache, meta, *rules)
        out[meta.cu_seqlens_q[-1] :] = np.nan
        return out


class PaddedSteps:
    """Takes the place of the graphs in a runner on the CPU, and compares each step with itself unpadded."""

    def __init__(self, runner: ModelRunner, max_num_seqs: int, max_num_tokens: int) -> None:
        self.runner, self.max_num_tokens = runner, max_num_tokens
        self.model = replace(runner.model, ops=PoisonedOps())
        self.seen: list[tuple[int, int, int]] = []  # tokens, tokens with padding, longest chunk
        self._sizes = padded_sizes(PROMPT_SIZES, max_num_tokens)
        self._tables = np.full((max(max_num_seqs, 2), -(-runner.max_model_len // runner.kv.block_size)), 1 << 30)
        self._layout = prompt_columns(max_num_tokens, len(self._tables))
        self._column = column_views(self._layout, np.full(buffer_size(self._layout), 0xEE, np.uint8))

    def forward(self, host: ModelInput) -> np.ndarray:
        caches = self.runner.kv.keys + self.runner.kv.values
        before = [cache.copy() for cache in caches]
        kv, drawn = self.runner.kv, self.runner._drawn
        expected = self.model.forward(host.input_ids, host.positions, host.attn, kv, drawn)
        if host.last is not None:
            expected = expected[host.last.rows]
        written = [cache.copy() for cache in caches]
        for cache, old in zip(caches, before, strict=True):
            cache[:] = old

        attn, count = host.attn, len(host.input_ids)
        size = padded_size(self._sizes, count)
        fill_columns(self._layout, self._column, prompt_values(host))
        rows, blocks = attn.block_tables.shape
        self._tables[:rows, :blocks] = attn.block_tables
        meta = padded_attention(self._column, self._tables, size, self.runner.max_model_len)
        ids, positions = self._column["input_ids"][:size], self._column["positions"][:size]
        last, num_rows = None, size
        if host.last is not None:
            num_rows = len(meta.seq_lens)
            last = LastTokens(self._column["last_rows"][:num_rows], np.arange(num_rows + 1, dtype=np.int32))
        hidden = self.model.forward(ids, positions, meta, kv, drawn, last)
        assert hidden.shape == (num_rows, self.model.config.hidden_size)
        # The same sums; the BLAS may take them in another order where a matrix has another height.
        np.testing.assert_allclose(hidden[: len(expected)], expected, rtol=0, atol=1e-4)
        for cache, reference in zip(caches, written, strict=True):
            np.testing.assert_allclose(cache, reference, rtol=0, atol=1e-4)
        self.seen.append((count, size, int(np.diff(attn.cu_seqlens_q).max())))
        return hidden[: len(expected)]


PROMPTS = [
    "Once upon a time",
    "a",
    "In the middle of the dark forest there stood an old house, and in the house there lived a witch who",
    "The wolf " * 20,
    "a",
]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=12, ignore_eos=True),
    SamplingParams(temperature=0.9, top_p=0.9, seed=7, max_tokens=12, ignore_eos=True, logprobs=2, prompt_logprobs=2),
]
WAYS = {
    "roomy": {"max_num_seqs": 16},
    "cached": {"max_num_seqs": 16, "block_size": 1, "num_kv_blocks": 256},
    "chunked": {"max_num_batched_tokens": 7, "max_num_seqs": 6},
    "one seat": {"max_num_seqs": 1, "max_num_batched_tokens": 40},
    "one token": {"max_num_seqs": 1, "max_num_batched_tokens": 1},
}


@pytest.mark.parametrize("ahead", [False, True], ids=["", "ahead"])
@pytest.mark.parametrize("way", WAYS)
def test_padded_steps_equal_unpadded_ones(demo_llm, way, ahead):
    """Mixed steps, chunks, steps of one token a sequence, and prompts that the prefix cache holds but for a token."""
    llm = LLM(device="cpu", max_model_len=128, **{"num_kv_blocks": 64, "block_size": 4, **WAYS[way]})
    config, runner = llm.llm_engine.config, llm.llm_engine.runner
    runner.runs_ahead = ahead
    runner._prompt_graphs = steps = PaddedSteps(runner, config.max_num_seqs, config.max_num_batched_tokens)
    for params in PARAMS:
        expected = demo_llm.generate(PROMPTS, params, use_tqdm=False)
        for _ in range(2):
            outputs = llm.generate(PROMPTS, params, use_tqdm=False)
            llm.llm_engine.check()
            for got, reference in zip(outputs, expected, strict=True):
                assert got.outputs[0].token_ids == reference.outputs[0].token_ids
                if params.prompt_logprobs is not None:
                    assert len(got.prompt_logprobs) == len(reference.prompt_logprobs)
                    for mine, theirs in zip(got.prompt_logprobs[1:], reference.prompt_logprobs[1:], strict=True):
                        assert list(mine) == list(theirs)
    if way == "roomy":
        assert any(longest == 1 < count for count, _, longest in steps.seen)
        assert any(longest > 1 for *_, longest in steps.seen)
    if way == "cached":
        assert any(longest == 1 < count for count, _, longest in steps.seen), "all prompts but for a token of each"
    assert any(count < size for count, size, _ in steps.seen) == (way != "one token")


def test_a_longer_step_is_not_padded(demo_llm):
    llm = LLM(device="cpu", num_kv_blocks=64)
    runner = llm.llm_engine.runner
    runner._prompt_graphs = steps = PaddedSteps(runner, 256, 16)
    got, expected = (each.generate(PROMPTS[3], PARAMS[0], use_tqdm=False)[0] for each in (llm, demo_llm))
    assert got.outputs[0].token_ids == expected.outputs[0].token_ids
    assert {count for count, *_ in steps.seen} == {1}, "the prompt's step has more than 16 tokens"
