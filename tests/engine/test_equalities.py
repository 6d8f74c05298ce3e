"""The equalities that pin the engine: how a request is run must not change what it says.

alone = in a batch, chunked = whole, prefix cache = none, preempted = not, swapped = computed again, forked = on its
own, overlapped = step by step; for greedy, seeded and penalised requests, and for some that a stop string ends. Runs on
the demo model in float32. A different batch shape may change a logit's last bits; a token could flip only where two
candidates are closer than that, which a fixed set of prompts and seeds rules out.
"""

from dataclasses import replace

import pytest

from mini_vllm import LLM, SamplingParams

PROMPTS = [
    "Once upon a time",
    "The king said to his daughter that",
    "a",
    "In the middle of the dark forest there stood an old house, and in the house there lived a witch who",
    "There was once a fisherman",
    "The wolf " * 20,
]
SEEDED = SamplingParams(temperature=0.9, top_k=50, top_p=0.95, seed=1234, max_tokens=40, ignore_eos=True)
PARAMS = {
    "greedy": SamplingParams(temperature=0, max_tokens=40, ignore_eos=True),
    "seeded": SEEDED,
    "penalised": SamplingParams(
        temperature=0.8,
        min_p=0.02,
        repetition_penalty=1.2,
        frequency_penalty=0.3,
        seed=5,
        max_tokens=40,
        ignore_eos=True,
    ),
    "stopped": replace(SEEDED, stop=["nt", "ll"]),
}
TINY = {"num_kv_blocks": 24, "block_size": 8}  # room for one long prompt or for a few that have just begun
SWAP = {**TINY, "swap_space": 1 << 22}
CHUNKED = {"max_num_batched_tokens": 7, "max_num_seqs": 6, "block_size": 3}


@pytest.fixture(params=list(PARAMS))
def params(request):
    return PARAMS[request.param]


def cpu(*, ahead=False, **arguments):
    """`ahead`: plan each step before the tokens of the one before are known, as on a GPU."""
    llm = LLM(device="cpu", **arguments)
    llm.llm_engine.runner.runs_ahead = ahead
    return llm


@pytest.fixture(scope="module")
def alone():
    """What each prompt says by itself, without a prefix cache, for parameters as they are asked for."""
    llm = cpu(enable_prefix_caching=False)
    known = {}

    def says(params):
        if params not in known:
            known[params] = [said(llm, params, [prompt])[0] for prompt in PROMPTS]
        return known[params]

    return says


@pytest.fixture
def expected(alone, params):
    return alone(params)


def said(llm, params, prompts=PROMPTS):
    """(tokens, text) of each prompt's only sample."""
    return [(sample.token_ids, sample.text) for (sample,) in samples_of(llm, params, prompts)]


def samples_of(llm, params, prompts=PROMPTS):
    outputs = llm.generate(prompts, params, use_tqdm=False)
    engine = llm.llm_engine
    engine.check()
    assert engine.scheduler.num_available_blocks == engine.scheduler.block_manager.num_blocks
    return [output.outputs for output in outputs]


def plans_of(llm):
    """A list that will hold all that the engine plans from now on."""
    plans, schedule = [], llm.llm_engine.scheduler.schedule

    def spy():
        plans.append(schedule())
        return plans[-1]

    llm.llm_engine.scheduler.schedule = spy
    return plans


def test_alone_equals_in_a_batch(demo_llm, params, expected):
    assert said(demo_llm, params) == expected


def test_two_in_a_batch_equals_alone(params, expected):
    assert said(cpu(max_num_seqs=2), params) == expected


def test_stop_strings_end_some_of_the_prompts(alone):
    ends = [len(tokens) for tokens, _ in alone(PARAMS["stopped"])]
    assert min(ends) < 20 < max(ends)


@pytest.mark.parametrize(("budget", "block_size"), [(7, 16), (16, 3), (33, 1)])
def test_chunked_equals_whole(params, expected, budget, block_size):
    llm = cpu(max_num_batched_tokens=budget, max_num_seqs=6, block_size=block_size, max_model_len=256)
    assert said(llm, params) == expected


@pytest.mark.parametrize("block_size", [1, 16])
def test_cached_equals_not(params, expected, block_size):
    llm = cpu(block_size=block_size, max_model_len=256)
    assert said(llm, params) == expected
    hits = llm.llm_engine.stats().prefix_cache_hits
    assert said(llm, params) == expected
    assert llm.llm_engine.stats().prefix_cache_hits >= hits + 40


def test_equal_prompts_that_share_blocks_in_one_step_say_the_same(alone):
    llm = cpu(block_size=4)
    (tokens, text) = alone(PARAMS["greedy"])[3]
    assert said(llm, PARAMS["greedy"], [PROMPTS[3]] * 3) == [(tokens, text)] * 3
    assert llm.llm_engine.stats().prefix_cache_hits > 0


def test_preempted_equals_not(params, expected):
    llm = cpu(**TINY)
    assert said(llm, params) == expected
    assert llm.llm_engine.stats().num_preemptions > 0, "the pool was meant to be too small for all prompts at once"


@pytest.mark.parametrize("seconds_to_load_block", [0.0, 1e9], ids=["load", "compute"])
def test_swapped_equals_not(params, expected, seconds_to_load_block):
    llm = cpu(**SWAP)
    llm.llm_engine.scheduler.seconds_to_load_block = seconds_to_load_block
    plans = plans_of(llm)
    for _ in range(2):
        assert said(llm, params) == expected
    directions = {transfer.to_host for plan in plans for transfer in plan.transfers}
    assert directions == ({True, False} if seconds_to_load_block == 0 else {True})


@pytest.mark.parametrize("arguments", [{}, TINY, SWAP, CHUNKED], ids=["roomy", "tiny", "swap", "chunked"])
def test_overlapped_equals_not(params, expected, arguments):
    llm = cpu(ahead=True, **arguments)
    for _ in range(2):
        assert said(llm, params) == expected


def test_steps_overlap_unless_they_are_not_to(params):
    for overlap in (True, False):
        llm = cpu(ahead=True, overlap=overlap)
        engine = llm.llm_engine
        for i, prompt in enumerate(PROMPTS):
            engine.add_request(str(i), prompt, params)
        in_flight = []
        while engine.has_unfinished_requests():
            engine.step()
            in_flight.append(engine._in_flight is not None)
        # Penalties look at all tokens before, so that these must be known.
        assert any(in_flight) == (overlap and not params.has_penalties)


@pytest.mark.parametrize("ahead", [False, True], ids=["", "ahead"])
@pytest.mark.parametrize("arguments", [{}, TINY, CHUNKED], ids=["roomy", "tiny", "chunked"])
@pytest.mark.parametrize("name", [name for name, params in PARAMS.items() if params.temperature > 0])
def test_samples_of_a_request_equal_requests_of_their_own(alone, name, arguments, ahead):
    """Sample i is a request with seed + i, although it takes over what sample 0 has computed."""
    params = PARAMS[name]
    llm = cpu(ahead=ahead, **arguments)
    plans = plans_of(llm)
    together = samples_of(llm, replace(params, n=3))
    for i in range(3):
        assert [(s[i].token_ids, s[i].text) for s in together] == alone(replace(params, seed=params.seed + i))
    assert any(plan.copies for plan in plans)


@pytest.mark.parametrize("ahead", [False, True], ids=["", "ahead"])
def test_a_request_does_not_see_those_that_come_and_go(params, expected, ahead):
    """Requests join one step after the other, and one is aborted half-way."""
    engine = cpu(ahead=ahead).llm_engine
    finished = {}

    def step():
        finished.update((output.request_id, output.outputs[0]) for output in engine.step() if output.finished)
        engine.check()

    for i, prompt in enumerate(PROMPTS):
        engine.add_request(str(i), prompt, params)
        engine.add_request(f"noise {i}", "noise", SamplingParams(seed=i, max_tokens=30))
        step()
    engine.abort_request("noise 5")
    while engine.has_unfinished_requests():
        step()
    assert [(finished[str(i)].token_ids, finished[str(i)].text) for i in range(len(PROMPTS))] == expected


def test_samples_of_a_request_differ(demo_llm):
    (samples,) = samples_of(demo_llm, SamplingParams(temperature=1.0, seed=40, max_tokens=20, n=4), PROMPTS[:1])
    assert len({tuple(sample.token_ids) for sample in samples}) > 1


def test_engine_seed_makes_unseeded_requests_reproducible():
    def run(seed):
        return said(cpu(seed=seed), SamplingParams(max_tokens=12), PROMPTS[:3])

    assert run(1) == run(1)
    assert run(1) != run(2)
