"""Steps with prompt tokens replayed as CUDA graphs are those launched one by one, whatever they are made of."""

import numpy as np
import pytest

from mini_vllm import LLM, SamplingParams
from mini_vllm.engine.padding import PROMPT_SIZES, padded_sizes
from mini_vllm.ops.base import map_arrays

pytestmark = pytest.mark.gpu

PROMPTS = [
    "Once upon a time",
    "a",
    "In the middle of the dark forest there stood an old house, and in the house there lived a witch who",
    "The wolf " * 20,
    "The king said to his daughter that",
    "a",
]
GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
SEEDED = SamplingParams(temperature=0.9, top_k=50, top_p=0.95, seed=1234, max_tokens=20, ignore_eos=True)
SCORED = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=3, prompt_logprobs=3)
WAYS = {
    "roomy": {"max_num_seqs": 256},
    "cached": {"block_size": 1},
    "chunked": {"max_num_batched_tokens": 40, "max_num_seqs": 6, "block_size": 4},
    "one seat": {"max_num_seqs": 1, "block_size": 1},
    "one token": {"max_num_seqs": 1, "max_num_batched_tokens": 1},
}
TOLERANCE = {
    # The sums are the same, in another order where a product with more rows has another kernel.
    "float32": 1e-4,
    # And what is rounded to 8 bits some 40 times on its way differs in the last one now and then.
    "bfloat16": 2.0**-5,
}


def gpu(dtype="float32", **arguments):
    defaults = {"max_num_seqs": 16, "max_model_len": 512, "kv_cache_memory": 256 << 20}
    return LLM(device="cuda", dtype=dtype, **{**defaults, **arguments})


def compare_with_eager(llm, dtype):
    """From now on run each step that is replayed eagerly, too. Returns (tokens, sequences) of those steps."""
    runner, seen = llm.llm_engine.runner, []
    ops, replay = runner.ops, runner._prompt_graphs.forward

    def forward(host):
        hidden = replay(host)
        got = ops.to_host(hidden).astype(np.float32)
        ids, positions = ops.to_device(host.input_ids), ops.to_device(host.positions)
        meta = map_arrays(host.attn, ops.to_device)
        expected = ops.to_host(runner.model.forward(ids, positions, meta, runner.kv, runner._drawn)).astype(np.float32)
        if host.last is not None:
            expected = expected[host.last.rows]
        error = np.linalg.norm(got - expected, axis=1) / np.linalg.norm(expected, axis=1)
        step = len(host.input_ids), len(host.attn.seq_lens)
        assert error.max() < TOLERANCE[dtype], f"tokens, sequences: {step}: {error}"
        seen.append(step)
        return hidden

    runner._prompt_graphs.forward = forward
    return seen


def tokens_of(llm, params, prompts=PROMPTS):
    outputs = llm.generate(prompts, params, use_tqdm=False)
    llm.llm_engine.check()
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("way", WAYS)
def test_hidden_states_are_those_of_an_eager_step(way, dtype):
    """Prompts whole and in chunks, among decoding sequences, and in the prefix cache but for one token."""
    llm = gpu(dtype, **WAYS[way])
    seen = compare_with_eager(llm, dtype)
    for params in (GREEDY, SEEDED, SCORED):
        tokens_of(llm, params)
        tokens_of(llm, params)
    assert llm.llm_engine.stats().prefix_cache_hits > 0
    if way == "cached":
        assert (len(PROMPTS), len(PROMPTS)) in seen, "the cache holds all prompts, and each brings one token"
    if way == "chunked":
        assert any(1 < num_seqs < num_tokens for num_tokens, num_seqs in seen), "decoding sequences and a chunk"
    if way == "one seat":
        assert (1, 1) in seen, "one token of one sequence, in front of padding"


def token_ids(length, seed):
    return np.random.default_rng(seed).integers(0, 2000, length).tolist()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_sizes_at_their_bounds_in_the_memory_taken_at_the_start(dtype):
    llm = gpu(dtype, max_model_len=2048, enable_prefix_caching=False, skip_tokenizer_init=True)
    graphs = llm.llm_engine.runner._prompt_graphs
    reserved = graphs.reserved_bytes
    assert not graphs.captured_sizes
    seen = compare_with_eager(llm, dtype)
    drawn, scored = (SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=n) for n in (None, 0))
    sizes = padded_sizes(PROMPT_SIZES, graphs.max_num_tokens)
    lengths = sorted({length for size in sizes for length in (size - 1, size, size + 1)} - {2048, 2049})
    for params in (drawn, scored):
        for seed in range(2):  # capture, then replay
            for i, length in enumerate(lengths):
                tokens_of(llm, params, [token_ids(length, 100 * seed + i)])
            tokens_of(llm, params, [token_ids(1024, seed), token_ids(1024, seed + 2)])
    assert [num_tokens for num_tokens, _ in seen] == 4 * [*lengths, 2048]
    assert graphs.captured_sizes == sizes
    assert graphs.reserved_bytes == reserved


def test_longer_steps_are_not_replayed():
    prompts = [token_ids(1500, seed) for seed in range(3)]
    arguments = {"max_model_len": 2048, "max_num_batched_tokens": 6000, "skip_tokenizer_init": True}
    llm, eager = gpu(**arguments), gpu(**arguments, enforce_eager=True)
    seen = compare_with_eager(llm, "float32")
    assert tokens_of(llm, GREEDY, prompts) == tokens_of(eager, GREEDY, prompts)
    assert not seen
    assert tokens_of(llm, GREEDY, prompts[:1]) == tokens_of(eager, GREEDY, prompts[:1])
    assert seen


@pytest.mark.parametrize("overlap", [False, True])
def test_requests_that_join_one_after_the_other(overlap):
    """Most steps are mixed, of ever other sizes; each is prepared while the one before it runs."""

    def run(**arguments):
        engine, finished = gpu(max_num_seqs=8, **arguments).llm_engine, {}

        def step():
            finished.update((o.request_id, o.outputs[0].token_ids) for o in engine.step() if o.finished)

        for i in range(30):
            engine.add_request(str(i), PROMPTS[i % len(PROMPTS)] + " and" * i, (GREEDY, SEEDED, SCORED)[i % 3])
            step()
        while engine.has_unfinished_requests():
            step()
        engine.check()
        return finished

    assert run(overlap=overlap) == run(overlap=overlap, enforce_eager=True)


def test_block_tables_are_copied_when_they_change():
    """Which with one sequence is once a block; they are in place for every step, whichever runner it is for."""
    llm = gpu(block_size=16, max_num_seqs=4, enable_prefix_caching=False)
    runner = llm.llm_engine.runner
    tables, ops, num_copies, seen = runner._graphs._context.block_tables, runner.ops, 0, []
    upload, copy_rows = tables.upload, tables._buffer.upload_rows

    def count(rows):
        nonlocal num_copies
        num_copies += 1
        copy_rows(rows)

    def check(host_tables):
        upload(host_tables)
        height, width = host_tables.shape
        np.testing.assert_array_equal(ops.to_host(tables.data)[:height, :width], host_tables)
        seen.append(num_copies)

    tables._buffer.upload_rows, tables.upload = count, check
    params = SamplingParams(temperature=0, max_tokens=81, ignore_eos=True)
    first = tokens_of(llm, params, ["a"])
    assert len(seen) == 81
    assert num_copies <= 81 // 16 + 1
    assert tokens_of(llm, params, [*PROMPTS, "a"])[-1] == first[0]


def test_scored_prompts():
    llm, eager = gpu(), gpu(enforce_eager=True)
    for _ in range(2):
        pairs = zip(*(each.generate(PROMPTS, SCORED, use_tqdm=False) for each in (llm, eager)), strict=True)
        for ours, theirs in pairs:
            assert ours.outputs[0].token_ids == theirs.outputs[0].token_ids
            mine = [*ours.prompt_logprobs[1:], *ours.outputs[0].logprobs]
            references = [*theirs.prompt_logprobs[1:], *theirs.outputs[0].logprobs]
            for entries, reference in zip(mine, references, strict=True):
                assert list(entries) == list(reference)
                for token_id, entry in entries.items():
                    # float32 logits of this model are good to about 1e-5
                    assert entry.logprob == pytest.approx(reference[token_id].logprob, abs=1e-4)
