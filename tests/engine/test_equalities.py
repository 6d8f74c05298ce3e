"""The equalities that pin the engine: how a request is run must not change what it says.

alone = in a batch, chunked = whole, preempted = not, for greedy and for seeded requests. Runs on the demo
model in float32. A different batch shape may change a logit's last bits; a token could flip only where two
candidates are closer than that, which a fixed set of prompts and seeds rules out.
"""

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
PARAMS = {
    "greedy": SamplingParams(temperature=0, max_tokens=40, ignore_eos=True),
    "seeded": SamplingParams(temperature=0.9, top_k=50, top_p=0.95, seed=1234, max_tokens=40, ignore_eos=True),
    "penalised": SamplingParams(
        temperature=0.8,
        min_p=0.02,
        repetition_penalty=1.2,
        frequency_penalty=0.3,
        seed=5,
        max_tokens=40,
        ignore_eos=True,
    ),
}


@pytest.fixture(params=list(PARAMS))
def params(request):
    return PARAMS[request.param]


@pytest.fixture(scope="module")
def alone(demo_llm):
    """Each prompt run by itself, per kind of parameters."""
    return {
        name: [demo_llm.generate(prompt, params, use_tqdm=False)[0].outputs[0].token_ids for prompt in PROMPTS]
        for name, params in PARAMS.items()
    }


@pytest.fixture
def expected(alone, params):
    return alone[next(name for name, p in PARAMS.items() if p is params)]


def tokens_of(llm, params):
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    llm.llm_engine.check()
    return [output.outputs[0].token_ids for output in outputs]


def test_alone_equals_in_a_batch(demo_llm, params, expected):
    assert tokens_of(demo_llm, params) == expected


def test_two_in_a_batch_equals_alone(params, expected):
    assert tokens_of(LLM(max_num_seqs=2), params) == expected


@pytest.mark.parametrize(("budget", "block_size"), [(7, 16), (16, 3), (33, 1)])
def test_chunked_equals_whole(params, expected, budget, block_size):
    llm = LLM(max_num_batched_tokens=budget, max_num_seqs=6, block_size=block_size, max_model_len=256)
    assert tokens_of(llm, params) == expected


def test_preempted_equals_not(params, expected):
    llm = LLM(num_kv_blocks=24, block_size=8)
    preempted = []
    schedule = llm.llm_engine.scheduler.schedule

    def spy():
        output = schedule()
        preempted.extend(output.preempted)
        return output

    llm.llm_engine.scheduler.schedule = spy
    assert tokens_of(llm, params) == expected
    assert preempted, "the pool was meant to be too small for all prompts at once"


def test_a_request_does_not_see_those_that_come_and_go(demo_llm, params, expected):
    """Requests join one step after the other, and one is aborted half-way."""
    engine = demo_llm.llm_engine
    finished = {}
    for i, prompt in enumerate(PROMPTS):
        engine.add_request(str(i), prompt, params)
        engine.add_request(f"noise {i}", "noise", SamplingParams(seed=i, max_tokens=30))
        for output in engine.step():
            if output.finished:
                finished[output.request_id] = output
        engine.check()
    engine.abort_request("noise 5")
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                finished[output.request_id] = output
    assert [finished[str(i)].outputs[0].token_ids for i in range(len(PROMPTS))] == expected


def test_sample_i_of_a_request_is_a_request_with_seed_plus_i(demo_llm):
    params = SamplingParams(temperature=1.0, seed=40, max_tokens=20, n=4)
    together = demo_llm.generate(PROMPTS[0], params, use_tqdm=False)[0]
    for sample in together.outputs:
        single = SamplingParams(temperature=1.0, seed=40 + sample.index, max_tokens=20)
        assert demo_llm.generate(PROMPTS[0], single, use_tqdm=False)[0].outputs[0].token_ids == sample.token_ids
    assert len({tuple(sample.token_ids) for sample in together.outputs}) > 1


def test_engine_seed_makes_unseeded_requests_reproducible():
    def run(seed):
        outputs = LLM(seed=seed).generate(PROMPTS[:3], SamplingParams(max_tokens=12), use_tqdm=False)
        return [output.outputs[0].token_ids for output in outputs]

    assert run(1) == run(1)
    assert run(1) != run(2)
