"""The engine on the GPU: the equalities of design, CPU = GPU, nothing leaks, and a real shape against transformers."""

from dataclasses import replace

import numpy as np
import pytest

from mini_vllm import LLM, SamplingParams

pytestmark = pytest.mark.gpu

PROMPTS = [
    "Once upon a time",
    "The king said to his daughter that",
    "a",
    "In the middle of the dark forest there stood an old house, and in the house there lived a witch who",
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
TINY = {"num_kv_blocks": 24, "block_size": 8, "kv_cache_memory": None, "max_model_len": None}
WAYS = {  # in which an engine may run requests without changing what they say
    "eager": {"enforce_eager": True},
    "no overlap": {"overlap": False},
    "no cache": {"enable_prefix_caching": False},
    "small blocks": {"block_size": 4},
    "chunked": {"max_num_batched_tokens": 7, "max_num_seqs": 6},
    "preempted": TINY,
    "preempted eager": {**TINY, "enforce_eager": True},
    "swapped": {**TINY, "swap_space": 1 << 22},
    "few seats": {"max_num_seqs": 2, "policy": "sjf"},
}


def gpu(**arguments):
    defaults = {"max_num_seqs": 16, "max_model_len": 512, "kv_cache_memory": 256 << 20}
    return LLM(device="cuda", dtype="float32", **{**defaults, **arguments})


@pytest.fixture(scope="module")
def gpu_llm():
    return gpu()


def tokens_of(llm, params, prompts=PROMPTS):
    """Of each prompt, the tokens of its samples."""
    outputs = llm.generate(prompts, params, use_tqdm=False)
    llm.llm_engine.check()
    return [[sample.token_ids for sample in output.outputs] for output in outputs]


@pytest.fixture(params=list(PARAMS))
def params(request):
    return PARAMS[request.param]


def test_gpu_equals_cpu(gpu_llm, demo_llm, params):
    assert tokens_of(gpu_llm, params) == tokens_of(demo_llm, params)


def test_alone_equals_in_a_batch(gpu_llm, params):
    together = tokens_of(gpu_llm, params)
    assert [tokens_of(gpu_llm, params, [prompt])[0] for prompt in PROMPTS] == together


@pytest.mark.parametrize("way", WAYS)
def test_how_a_request_is_run_changes_nothing(gpu_llm, way):
    """The second time prompts and outputs are in the prefix cache."""
    engine = gpu_llm.llm_engine
    assert engine.runner._graphs is not None
    assert engine.runner.runs_ahead
    llm = gpu(**WAYS[way])
    for params in PARAMS.values():
        expected = tokens_of(gpu_llm, params)
        assert [tokens_of(llm, params) for _ in range(2)] == [expected, expected]
    if "num_kv_blocks" in WAYS[way]:
        assert llm.llm_engine.stats().num_preemptions > 0
    assert engine.runner._prompt_graphs.captured_sizes


@pytest.mark.parametrize("way", ["eager", "no cache", "chunked", "preempted"])
def test_samples_of_a_request_equal_requests_of_their_own(gpu_llm, way):
    llm = gpu(**WAYS[way])
    for params in (SEEDED, PARAMS["penalised"]):
        single = [tokens_of(gpu_llm, replace(params, seed=params.seed + i)) for i in range(3)]
        expected = [[tokens for (tokens,) in samples] for samples in zip(*single, strict=True)]
        assert tokens_of(gpu_llm, replace(params, n=3)) == tokens_of(llm, replace(params, n=3)) == expected


def test_logprobs_on_the_gpu_are_those_of_the_cpu(gpu_llm, demo_llm):
    params = SamplingParams(temperature=0, max_tokens=8, logprobs=5, prompt_logprobs=3, ignore_eos=True)
    ours, theirs = (llm.generate(PROMPTS[1], params, use_tqdm=False)[0] for llm in (gpu_llm, demo_llm))
    pairs = [*zip(ours.prompt_logprobs[1:], theirs.prompt_logprobs[1:], strict=True)]
    pairs += zip(ours.outputs[0].logprobs, theirs.outputs[0].logprobs, strict=True)
    for mine, reference in pairs:
        assert list(mine) == list(reference)
        for token_id in mine:
            # float32 logits of this model are good to about 1e-5
            assert mine[token_id].logprob == pytest.approx(reference[token_id].logprob, abs=1e-4)
            assert mine[token_id].rank == reference[token_id].rank


def test_a_long_run_returns_to_the_baseline(gpu_llm):
    """Waves of requests of all kinds that share prefixes, one of them lost half-way in each."""
    import cupy

    # What this process holds: others may use the GPU, too.
    allocated_memory = cupy.get_default_memory_pool().used_bytes
    engine = gpu_llm.llm_engine
    manager = engine.scheduler.block_manager

    def wave(seed):
        params = [
            SamplingParams(
                seed=seed + i, max_tokens=5 + i % 60, top_p=0.9, logprobs=i % 3 or None, n=1 + (i % 8 == 0), stop="ll"
            )
            for i in range(48)
        ]
        gpu_llm.generate([PROMPTS[i % len(PROMPTS)] for i in range(48)], params, use_tqdm=False)

    wave(0)
    baseline = allocated_memory()
    graphs = engine.runner._graphs.reserved_bytes, engine.runner._prompt_graphs.reserved_bytes
    for seed in range(5):
        wave(100 * seed)
        engine.add_request("lost", PROMPTS[3], SamplingParams(max_tokens=100))
        engine.step()
        engine.abort_request("lost")
    engine.check()
    assert engine.stats().prefix_cache_hits > 0
    assert engine.scheduler.num_available_blocks == manager.num_blocks
    engine.reset_prefix_cache()
    assert manager.num_free_blocks == manager.num_blocks
    assert allocated_memory() <= baseline + (1 << 20)
    assert (engine.runner._graphs.reserved_bytes, engine.runner._prompt_graphs.reserved_bytes) == graphs


def test_a_context_that_does_not_fit_is_refused_with_figures():
    with pytest.raises(ValueError, match="no memory is left for the KV cache"):
        LLM(device="cuda", gpu_memory_utilization=0.001)


def test_qwen3_shape_agrees_with_transformers(tmp_path, prompt_logits):
    """A random model of Qwen3-0.6B's width and heads (6 layers) in float32 and bfloat16, on the same GPU."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from mini_vllm.bench.presets import PRESETS

    config = transformers.Qwen3Config(**{**PRESETS["qwen3-0.6b"], "num_hidden_layers": 6, "initializer_range": 0.05})
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    ids = np.random.default_rng(0).integers(0, 10000, 300).tolist()
    model = model.to("cuda", torch.float32)
    torch.backends.cuda.matmul.allow_tf32 = False
    with torch.no_grad():
        exact = model(torch.tensor([ids], device="cuda")).logits[0].float().cpu().numpy()
        half = model.to(torch.bfloat16)(torch.tensor([ids], device="cuda")).logits[0].float().cpu().numpy()
    scale = np.abs(exact).max()

    arguments = {"device": "cuda", "max_model_len": 512, "kv_cache_memory": 1 << 30, "skip_tokenizer_init": True}
    ours = prompt_logits(LLM(tmp_path, dtype="float32", **arguments), ids)
    # float32: sums of up to 3072 products through 6 layers, relative to the largest logit
    assert np.abs(ours - exact).max() < 1e-4 * scale

    ours = prompt_logits(LLM(tmp_path, dtype="bfloat16", **arguments), ids)
    theirs_off, ours_off = np.abs(half - exact).mean(), np.abs(ours - exact).mean()
    assert ours_off < 1.5 * theirs_off, "bfloat16 must be as close to the exact logits as transformers' bfloat16 is"
