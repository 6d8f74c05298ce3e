"""LLMEngine and LLM: what goes in, what comes out, and that nothing leaks."""

import itertools
import math
from types import SimpleNamespace

import pytest

from mini_vllm import LLM, EngineConfig, LLMEngine, SamplingParams
from mini_vllm.engine import llm_engine
from mini_vllm.engine.outputs import Logprob

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
LONG = list(range(100, 130))  # a prompt of 30 tokens: 7 blocks of 4


@pytest.fixture
def engine(demo_llm):
    """The shared engine, which each test must leave empty."""
    engine = demo_llm.llm_engine
    yield engine
    left = list(engine._requests)
    for request_id in left:  # the next test is to start with an empty one
        engine.abort_request(request_id)
    assert not left
    assert not engine.has_unfinished_requests()
    assert_nothing_runs(engine)


def assert_nothing_runs(engine):
    """No block is anybody's but the prefix cache's, and without it they are all free."""
    engine.check()
    blocks = engine.scheduler.block_manager
    assert engine.scheduler.num_available_blocks == blocks.num_blocks
    engine.reset_prefix_cache()
    engine.check()
    assert blocks.num_free_blocks == blocks.num_blocks


def run(engine, *requests):
    """Add requests (id, prompt, params) and step to the end: {id: last output}."""
    for request_id, prompt, params in requests:
        engine.add_request(request_id, prompt, params)
    last = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            last[output.request_id] = output
    return last


# ---- shapes of input and output


def test_the_seed_snippet():
    from mini_vllm import LLMEngine, SamplingParams

    engine = LLMEngine()
    text = engine.generate("Hello, world!", SamplingParams(temperature=0.7, max_tokens=100)).text
    assert isinstance(text, str)
    assert text


def test_every_prompt_form_gives_the_same_tokens(demo_llm):
    text = "Once upon a time"
    ids = demo_llm.get_tokenizer().encode(text)
    forms = [text, ids, tuple(ids), {"prompt": text}, {"prompt_token_ids": ids}, [text], [ids], [{"prompt": text}]]
    results = [demo_llm.generate(form, GREEDY, use_tqdm=False) for form in forms]
    assert all(len(result) == 1 for result in results)
    assert len({tuple(result[0].outputs[0].token_ids) for result in results}) == 1
    assert results[0][0].prompt == text
    assert results[1][0].prompt is None
    assert all(result[0].prompt_token_ids == ids for result in results)


def test_outputs_come_in_the_order_of_prompts_with_their_own_params(demo_llm):
    lengths = [5, 1, 9]
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in lengths]
    outputs = demo_llm.generate(["one", "two", "three"], params, use_tqdm=False)
    assert [output.prompt for output in outputs] == ["one", "two", "three"]
    assert [len(output.outputs[0].token_ids) for output in outputs] == lengths
    assert all(output.finished and output.outputs[0].finish_reason == "length" for output in outputs)


def test_no_prompts_give_no_outputs(demo_llm):
    assert demo_llm.generate([], GREEDY, use_tqdm=False) == []


def test_engine_generate_returns_one_for_one_and_a_list_for_a_list(engine):
    assert engine.generate("a", GREEDY).text == engine.generate(["a"], GREEDY)[0].text


def test_text_is_the_decoded_tokens(demo_llm):
    output = demo_llm.generate("Once upon a time", GREEDY, use_tqdm=False)[0]
    assert output.text == demo_llm.get_tokenizer().decode(output.outputs[0].token_ids)


def test_step_returns_growing_text_and_metrics(engine):
    engine.add_request("r", "The old woman", GREEDY)
    texts, outputs = [], []
    while engine.has_unfinished_requests():
        outputs += engine.step()
        texts.append(outputs[-1].text)
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    assert [output.finished for output in outputs] == [False] * 11 + [True]
    metrics = outputs[-1].metrics
    assert metrics.arrival_time <= metrics.first_scheduled_time <= metrics.first_token_time <= metrics.finished_time
    assert metrics.queue_time >= 0
    assert metrics.time_to_first_token > 0
    assert outputs[0].metrics.finished_time is None


def test_stream_yields_the_same_text_in_pieces(demo_llm, engine):
    pieces = list(demo_llm.stream("Once upon a time", GREEDY))
    assert len(pieces) > 3
    assert "".join(pieces) == demo_llm.generate("Once upon a time", GREEDY, use_tqdm=False)[0].text


def test_closing_a_stream_aborts_it(demo_llm, engine):
    stream = demo_llm.stream("Once upon a time", GREEDY)
    next(stream)
    assert engine.num_unfinished_requests() == 1
    stream.close()


def test_chat_runs_the_template(demo_llm, engine):
    messages = [{"role": "user", "content": "Tell me a story."}]
    output = demo_llm.chat(messages, GREEDY, use_tqdm=False)[0]
    assert output.prompt_token_ids == demo_llm.get_tokenizer().apply_chat_template(messages)
    both = demo_llm.chat([messages, messages], GREEDY, use_tqdm=False)
    assert [o.text for o in both] == [output.text] * 2


# ---- ends


def test_max_tokens_none_runs_to_the_context_length():
    llm = LLM(max_model_len=40)
    output = llm.generate("Once", SamplingParams(temperature=0, max_tokens=None, ignore_eos=True), use_tqdm=False)[0]
    assert len(output.prompt_token_ids) + len(output.outputs[0].token_ids) == 40
    assert output.outputs[0].finish_reason == "length"


def test_eos_ends_a_sequence_and_stays_out_of_the_text(demo_llm):
    eos = demo_llm.get_tokenizer().eos_token_id
    params = SamplingParams(temperature=0, max_tokens=20, logit_bias={eos: 100.0})
    output = demo_llm.generate("Once", params, use_tqdm=False)[0].outputs[0]
    assert (output.finish_reason, output.stop_reason, output.token_ids, output.text) == ("stop", None, [eos], "")
    params = SamplingParams(temperature=0, max_tokens=5, logit_bias={eos: 100.0}, ignore_eos=True)
    assert demo_llm.generate("Once", params, use_tqdm=False)[0].outputs[0].token_ids == [eos] * 5


def test_min_tokens_holds_back_eos_and_stop_tokens(demo_llm):
    eos = demo_llm.get_tokenizer().eos_token_id
    params = SamplingParams(temperature=0, max_tokens=20, min_tokens=7, logit_bias={eos: 100.0})
    output = demo_llm.generate("Once", params, use_tqdm=False)[0].outputs[0]
    assert output.token_ids.index(eos) == 7
    assert output.finish_reason == "stop"


def test_stop_token_ids_end_a_sequence(demo_llm):
    free = demo_llm.generate("Once upon a time", GREEDY, use_tqdm=False)[0].outputs[0].token_ids
    stop = free[5]
    params = SamplingParams(temperature=0, max_tokens=12, stop_token_ids=[stop])
    output = demo_llm.generate("Once upon a time", params, use_tqdm=False)[0].outputs[0]
    end = free.index(stop) + 1
    assert output.token_ids == free[:end]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    tokenizer = demo_llm.get_tokenizer()
    assert output.text == tokenizer.decode(free[: end - 1])  # as in vLLM, the stop token is not part of the text


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_cuts_the_text(demo_llm, include):
    free = demo_llm.generate("Once upon a time", GREEDY, use_tqdm=False)[0].text
    stop = free[9:13]
    params = SamplingParams(
        temperature=0, max_tokens=12, stop=["not in the text", stop], include_stop_str_in_output=include
    )
    output = demo_llm.generate("Once upon a time", params, use_tqdm=False)[0].outputs[0]
    assert output.text == free[: free.index(stop) + (len(stop) if include else 0)]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    assert "".join(demo_llm.stream("Once upon a time", params)) == output.text


def test_abort_in_every_state_frees_blocks_in_the_same_call():
    engine = LLMEngine(num_kv_blocks=8, block_size=16, max_num_seqs=4, max_num_batched_tokens=16)
    manager = engine.scheduler.block_manager
    for name in ("decoding", "prefilling", "waiting"):
        prompt = [5] * (100 if name == "waiting" else 3 if name == "decoding" else 60)
        engine.add_request(name, prompt, SamplingParams(max_tokens=50, ignore_eos=True))
    engine.step()
    engine.step()
    assert {s.seq_id for s in engine.scheduler.waiting} == {2}
    available = [engine.scheduler.num_available_blocks]
    for name in ("waiting", "prefilling", "decoding"):
        output = engine.abort_request(name)
        assert output.finished
        assert output.outputs[0].finish_reason == "abort"
        assert output.outputs[0].stop_reason is None
        engine.check()
        available.append(engine.scheduler.num_available_blocks)
    assert available == [3, 3, 7, 8]
    assert manager.num_blocks == 8
    assert engine.abort_request("decoding") is None
    assert engine.step() == []


def fail():
    raise MemoryError("no memory")


@pytest.mark.parametrize("where", ["launch", "wait", "launch ahead", "wait ahead"])
def test_a_failing_step_ends_all_requests_and_the_engine_lives_on(demo_llm, engine, monkeypatch, where):
    """What it had planned may never have been computed: the prefix cache forgets everything."""
    monkeypatch.setattr(engine.runner, "runs_ahead", "ahead" in where)
    expected = demo_llm.generate(LONG, GREEDY, use_tqdm=False)[0].outputs[0].token_ids
    for i in range(3):
        engine.add_request(str(i), LONG, GREEDY)
    engine.step()
    assert engine.stats().num_cached_kv_blocks > 0
    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "launch", lambda plan: fail() if "launch" in where else fail)
        with pytest.raises(MemoryError):
            list(iter(engine.step, []))  # a step that was in flight already is waited for first
    assert not engine.has_unfinished_requests()
    assert engine.stats().num_cached_kv_blocks == 0
    assert_nothing_runs(engine)
    assert run(engine, ("again", LONG, GREEDY))["again"].outputs[0].token_ids == expected


def test_an_interrupt_aborts_what_generate_started(demo_llm, engine, monkeypatch):
    steps = iter(range(3))
    launch = engine.runner.launch

    def interrupted(plan):
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return launch(plan)

    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "launch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            demo_llm.generate(["a", "b"], GREEDY, use_tqdm=False)
    assert not engine.has_unfinished_requests()


@pytest.mark.parametrize("ahead", [False, True], ids=["", "ahead"])
@pytest.mark.parametrize("how", ["length", "stop token", "stop string", "abort"])
def test_blocks_are_available_in_the_step_that_ends_a_request(demo_llm, engine, monkeypatch, ahead, how):
    monkeypatch.setattr(engine.runner, "runs_ahead", ahead)
    free = demo_llm.generate("Once upon a time", GREEDY, use_tqdm=False)[0]
    params = {
        "length": SamplingParams(temperature=0, max_tokens=5, ignore_eos=True),
        "stop token": SamplingParams(temperature=0, stop_token_ids=[free.outputs[0].token_ids[4]]),
        "stop string": SamplingParams(temperature=0, stop=free.text[9:13]),
        "abort": GREEDY,
    }[how]
    engine.add_request("other", "The king", SamplingParams(max_tokens=30, ignore_eos=True))
    engine.add_request("r", "Once upon a time", params)
    finished = None
    for _ in range(12):
        finished = next((o for o in engine.step() if o.request_id == "r" and o.finished), None)
        if finished or (how == "abort" and (finished := engine.abort_request("r"))):
            break
    assert finished.outputs[0].finish_reason == how.split()[0]
    (other,) = engine.scheduler.running
    engine.check()
    blocks = engine.scheduler.block_manager
    assert engine.scheduler.num_available_blocks == blocks.num_blocks - len(other.block_table)
    engine.abort_request("other")


def test_steps_overlap_again_when_the_last_request_with_penalties_has_ended(engine, monkeypatch):
    monkeypatch.setattr(engine.runner, "runs_ahead", True)
    engine.add_request("usual", "Once", SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
    for params in (SamplingParams(max_tokens=3, presence_penalty=0.5), SamplingParams(max_tokens=3, bad_words=["the"])):
        for ends_by_itself in (True, False):
            engine.add_request("penalised", "Once", params)
            engine.step()
            assert engine._in_flight is None
            while ends_by_itself and engine.num_unfinished_requests() == 2:
                engine.step()
            engine.abort_request("penalised")
            engine.step()
            assert engine._in_flight is not None
    engine.abort_request("usual")


# ---- the queue


def start_with_one_seat(**arguments):
    """An engine with one seat, taken by "running"."""
    engine = LLMEngine(max_num_seqs=1, **arguments)
    engine.add_request("running", "Once", GREEDY)
    engine.step()
    return engine


def abort_all(engine, *request_ids):
    for request_id in request_ids:
        engine.abort_request(request_id)
    assert not engine.has_unfinished_requests()
    assert_nothing_runs(engine)


def test_a_full_queue_refuses_what_comes_next():
    engine = start_with_one_seat(max_num_queued_requests=2)
    for name in ("first", "second", "third"):
        engine.add_request(name, "Once", GREEDY)
    assert engine.num_unfinished_requests() == 3
    outputs = {output.request_id: output for output in engine.step()}
    assert set(outputs) == {"third", "running"}
    assert outputs["third"].finished
    assert outputs["third"].metrics.first_scheduled_time is None
    (refused,) = outputs["third"].outputs
    assert (refused.finish_reason, refused.token_ids, refused.text) == ("abort", [], "")
    assert refused.stop_reason == "2 requests are waiting already (max_num_queued_requests)"
    engine.abort_request("first")
    engine.add_request("fourth", "Once", GREEDY)
    assert [output.request_id for output in engine.step()] == ["running"]
    abort_all(engine, "running", "second", "fourth")


def test_who_runs_does_not_count_as_queued_nor_do_the_samples_of_a_request():
    engine = LLMEngine(max_num_seqs=1, max_num_queued_requests=1)
    engine.add_request("a", "Once", SamplingParams(n=3, seed=0, max_tokens=2, ignore_eos=True))
    engine.step()
    assert engine.stats().num_waiting == 2
    engine.add_request("b", "Once", GREEDY)
    assert all(output.request_id == "a" for output in engine.step())
    abort_all(engine, "a", "b")


def test_a_refused_request_is_reported_even_if_nothing_runs():
    engine = start_with_one_seat(max_num_queued_requests=1)
    engine.add_request("waiting", "Once", GREEDY)
    engine.add_request("refused", "Once", GREEDY)
    engine.abort_request("running")
    engine.abort_request("waiting")
    assert engine.has_unfinished_requests()
    assert [(o.request_id, o.finished) for o in engine.step()] == [("refused", True)]
    assert not engine.has_unfinished_requests()
    assert engine.step() == []


def test_who_has_waited_too_long_ends_unstarted(monkeypatch):
    clock = SimpleNamespace(now=100.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(llm_engine, "time", clock)
    engine = start_with_one_seat(max_queue_time=2.0)
    engine.add_request("early", "Once", GREEDY)
    clock.now += 1
    engine.add_request("late", "Once", GREEDY)
    clock.now += 1
    assert [output.request_id for output in engine.step()] == ["running"]
    clock.now += 0.5
    outputs = {output.request_id: output for output in engine.step()}
    assert set(outputs) == {"early", "running"}
    assert outputs["early"].outputs[0].finish_reason == "abort"
    assert outputs["early"].outputs[0].stop_reason == "it waited more than 2 s for its first step (max_queue_time)"
    assert not outputs["running"].finished, "who has started is never overdue"
    engine.abort_request("running")
    engine.step()
    clock.now += 100
    assert [(o.request_id, o.finished) for o in engine.step()] == [("late", False)]
    abort_all(engine, "late")


def test_priority_decides_who_goes_next_where_the_policy_looks_at_it():
    for policy, order in (("priority", ["running", "urgent", "usual"]), ("fcfs", ["running", "usual", "urgent"])):
        engine = start_with_one_seat(policy=policy)
        engine.add_request("usual", "Once", GREEDY)
        engine.add_request("urgent", "Once", GREEDY, priority=-1)
        finished = []
        while engine.has_unfinished_requests():
            finished += [output.request_id for output in engine.step() if output.finished]
        assert finished == order


@pytest.mark.parametrize("priority", [1.0, "1", None, True])
def test_a_priority_is_an_integer(engine, priority):
    with pytest.raises(ValueError, match=f"priority must be an integer, got {priority!r}"):
        engine.add_request("r", "a", GREEDY, priority=priority)


# ---- the prefix cache


def cached_tokens(engine, prompt, params=None):
    return engine.generate(prompt, params or SamplingParams(temperature=0, max_tokens=1)).num_cached_tokens


@pytest.fixture
def fresh_engine():
    return LLMEngine(block_size=4, num_kv_blocks=64)


def test_outputs_tell_how_much_of_the_prompt_was_cached(fresh_engine):
    assert [cached_tokens(fresh_engine, LONG) for _ in range(2)] == [0, 28]
    assert cached_tokens(fresh_engine, [*LONG[:15], 7, *LONG[16:]]) == 12
    assert cached_tokens(fresh_engine, LONG[:8]) == 4, "one token at least is computed, and blocks are found whole"
    engine = LLMEngine(enable_prefix_caching=False)
    assert [cached_tokens(engine, LONG) for _ in range(2)] == [0, 0]


def test_the_next_turn_finds_the_answer(fresh_engine):
    answer = fresh_engine.generate(LONG, GREEDY).outputs[0].token_ids
    assert cached_tokens(fresh_engine, [*LONG, *answer, 7]) == 40  # of 30 and 12, the last of which was not computed


def test_prefixes_are_found_under_the_same_salt_only(fresh_engine):
    salted = {"prompt_token_ids": LONG, "cache_salt": "a"}
    assert [cached_tokens(fresh_engine, prompt) for prompt in (LONG, salted, salted, LONG)] == [0, 0, 28, 28]
    assert cached_tokens(fresh_engine, {**salted, "cache_salt": "b"}) == 0
    assert cached_tokens(fresh_engine, {**salted, "cache_salt": None}) == 28


def test_a_text_prompt_may_have_a_salt(fresh_engine):
    story = "Once upon a time there was a king who had a daughter"
    salted = {"prompt": story, "cache_salt": "a"}
    assert cached_tokens(fresh_engine, story) == cached_tokens(fresh_engine, salted) == 0
    assert cached_tokens(fresh_engine, salted) > 0


def test_reset_prefix_cache_forgets_and_what_runs_goes_on(demo_llm):
    llm = LLM(block_size=4)
    engine = llm.llm_engine
    expected = demo_llm.generate(LONG, GREEDY, use_tqdm=False)[0].outputs[0].token_ids
    engine.add_request("running", LONG, GREEDY)
    engine.step()
    llm.reset_prefix_cache()
    assert engine.stats().num_cached_kv_blocks == 7, "what is in use is forgotten when it is used no more"
    last = run(engine, ("new", LONG, GREEDY))
    assert last["new"].num_cached_tokens == 0
    assert last["running"].outputs[0].token_ids == last["new"].outputs[0].token_ids == expected
    assert cached_tokens(engine, LONG) == 28
    engine.reset_prefix_cache()
    assert cached_tokens(engine, LONG) == 0


def test_scoring_a_prompt_gives_the_same_with_a_warm_cache(fresh_engine):
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=2)
    first = fresh_engine.generate(LONG, params)
    assert cached_tokens(fresh_engine, LONG) == 28
    again = fresh_engine.generate(LONG, params)
    assert again.num_cached_tokens == 0
    assert again.prompt_logprobs == first.prompt_logprobs


@pytest.mark.parametrize(("policy", "left"), [("lru", [8, 4, 8]), ("lfu", [12, 0, 8]), ("size", [12, 4, 4])])
def test_the_policy_says_what_the_cache_forgets(policy, left):
    """Blocks of three prompts, of 12, 4 and 8, that are left when 4 must go; the first was hit, before the others."""
    engine = LLMEngine(block_size=4, num_kv_blocks=32, prefix_cache_policy=policy)
    prompts = [[10 * (i + 1)] * (4 * n + 1) for i, n in enumerate((12, 4, 8))]
    for prompt in (prompts[0], *prompts):
        cached_tokens(engine, prompt)
    cached_tokens(engine, [99] * 45)
    assert [engine.scheduler.cache.match(prompt, 99).depth for prompt in prompts] == left


def test_stats():
    engine = LLMEngine(block_size=4, num_kv_blocks=20, max_num_seqs=2)
    stats = engine.stats()
    assert (stats.num_kv_blocks, stats.num_free_kv_blocks, stats.num_running, stats.num_waiting) == (20, 20, 0, 0)
    for i in range(3):
        engine.add_request(str(i), LONG, GREEDY)
    engine.step()
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting) == (2, 1)
    assert (stats.num_cached_kv_blocks, stats.num_free_kv_blocks) == (7, 20 - 7 - 2)
    assert (stats.prefix_cache_queries, stats.prefix_cache_hits) == (60, 28)
    while engine.has_unfinished_requests():
        engine.step()
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.prefix_cache_hits) == (0, 0, 56)
    assert stats.num_free_kv_blocks + stats.num_cached_kv_blocks == 20
    assert stats.peak_kv_blocks == 7 + 4 + 4
    assert (stats.num_preemptions, stats.num_host_kv_blocks) == (0, 0)


def test_stats_count_preemptions_and_blocks_on_the_host():
    engine = LLMEngine(block_size=4, num_kv_blocks=20, swap_space=1 << 22)
    engine.generate([LONG, [*LONG[1:], 5]], SamplingParams(temperature=0, max_tokens=40, ignore_eos=True))
    stats = engine.stats()
    assert stats.num_preemptions > 0
    assert stats.num_host_kv_blocks > 0
    assert_nothing_runs(engine)
    assert engine.stats().num_host_kv_blocks == 0


def test_stats_without_a_prefix_cache():
    engine = LLMEngine(enable_prefix_caching=False)
    engine.generate(LONG, GREEDY)
    stats = engine.stats()
    assert (stats.num_cached_kv_blocks, stats.prefix_cache_queries) == (0, 0)
    assert stats.num_free_kv_blocks == stats.num_kv_blocks
    engine.reset_prefix_cache()


# ---- log probabilities


def test_logprobs_are_of_the_raw_distribution(demo_llm):
    params = SamplingParams(temperature=0.5, seed=3, max_tokens=6, logprobs=4, ignore_eos=True, logit_bias={7: 5.0})
    output = demo_llm.generate("The king", params, use_tqdm=False)[0].outputs[0]
    assert len(output.logprobs) == 6
    for token_id, entry in zip(output.token_ids, output.logprobs, strict=True):
        assert next(iter(entry)) == token_id
        top = sorted((lp for lp in entry.values() if lp.rank <= 4), key=lambda lp: lp.rank)
        assert [lp.rank for lp in top] == [1, 2, 3, 4]
        assert all(a.logprob >= b.logprob for a, b in itertools.pairwise(top))
        assert len(entry) == (4 if entry[token_id].rank <= 4 else 5)
        assert all(isinstance(lp, Logprob) and lp.logprob <= 0 for lp in entry.values())
    expected = sum(e[t].logprob for t, e in zip(output.token_ids, output.logprobs, strict=True))
    assert output.cumulative_logprob == pytest.approx(expected)
    assert demo_llm.generate("The king", GREEDY, use_tqdm=False)[0].outputs[0].logprobs is None


def test_logprobs_zero_returns_the_sampled_token_only(demo_llm):
    params = SamplingParams(temperature=0, max_tokens=3, logprobs=0, ignore_eos=True)
    output = demo_llm.generate("The king", params, use_tqdm=False)[0].outputs[0]
    assert [list(entry) for entry in output.logprobs] == [[t] for t in output.token_ids]


def test_prompt_logprobs_are_those_of_generation(demo_llm):
    """Score the prompt plus its greedy continuation: the continuation's entries must agree with generation."""
    first = demo_llm.generate("Once upon", SamplingParams(temperature=0, max_tokens=8, logprobs=2), use_tqdm=False)[0]
    ids = first.prompt_token_ids + first.outputs[0].token_ids
    for budget in (2048, 5):
        llm = demo_llm if budget == 2048 else LLM(max_num_batched_tokens=budget, max_num_seqs=2)
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=2)
        scored = llm.generate(ids, params, use_tqdm=False)[0].prompt_logprobs
        assert len(scored) == len(ids)
        assert scored[0] is None
        for generated, again in zip(first.outputs[0].logprobs, scored[len(first.prompt_token_ids) :], strict=True):
            assert list(generated) == list(again)
            for token_id in generated:
                assert generated[token_id].logprob == pytest.approx(again[token_id].logprob, abs=1e-4)
                assert generated[token_id].rank == again[token_id].rank


def test_prompt_logprobs_survive_preemption_and_n():
    engine = LLMEngine(num_kv_blocks=12, block_size=4)
    params = SamplingParams(temperature=1.0, seed=0, n=3, max_tokens=20, prompt_logprobs=0, ignore_eos=True)
    engine.add_request("r", "In a dark forest there lived a witch", params)
    seqs = list(engine.scheduler.waiting)
    assert [seq.sampling_params.prompt_logprobs for seq in seqs] == [0, None, None], "one of them scores it"
    while engine.has_unfinished_requests():
        (output,) = engine.step()[-1:] or (None,)
    assert any(seq.num_preemptions for seq in seqs), "the pool was meant to be too small for all three"
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
    assert all(math.isfinite(next(iter(entry.values())).logprob) for entry in output.prompt_logprobs[1:])


# ---- rules of sampling, end to end


def test_allowed_token_ids_and_bad_words(demo_llm):
    tokenizer = demo_llm.get_tokenizer()
    allowed = [tokenizer.encode(word)[0] for word in (" the", " king", " queen")]
    params = SamplingParams(temperature=1.0, seed=0, max_tokens=30, allowed_token_ids=allowed)
    assert set(demo_llm.generate("a", params, use_tqdm=False)[0].outputs[0].token_ids) <= set(allowed)

    free = demo_llm.generate("Once upon a time", GREEDY, use_tqdm=False)[0].text
    word = free.split()[1]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, bad_words=[word])
    banned = demo_llm.generate("Once upon a time", params, use_tqdm=False)[0].text
    assert word in free.split()
    assert word not in banned.split()


def test_banning_everything_allowed_still_gives_an_allowed_token(demo_llm):
    tokenizer = demo_llm.get_tokenizer()
    (only,) = tokenizer.encode(" the")
    params = SamplingParams(temperature=0.7, seed=1, max_tokens=4, allowed_token_ids=[only], bad_words=["the"])
    assert demo_llm.generate("a", params, use_tqdm=False)[0].outputs[0].token_ids == [only] * 4


def test_repetition_penalty_changes_what_is_said(demo_llm):
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, repetition_penalty=1.8)
    ids = demo_llm.generate("the the the the", params, use_tqdm=False)[0].outputs[0].token_ids
    assert len(set(ids)) == len(ids)


# ---- the door


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "empty"),
        ([[]], "empty"),
        ({"prompt_token_ids": []}, "empty"),
        (None, "NoneType"),
        (7, "int"),
        ([1, "a"], "'a'"),
        ([1, 2.5], "2.5"),
        ([1, True], "True"),
        ([-1], "-1"),
        ([2**63], str(2**63)),
        ([2048], "0 to 2047"),
        ({"text": "a"}, "'text'"),
        ({"prompt": 3}, "prompt"),
        ({"prompt_token_ids": "abc"}, "str"),
        (["a", 7], "prompt 1"),
        ("\ud800", "surrogate"),
        ({"prompt": "a", "cache_salt": ""}, "cache_salt must be a string that is not empty, got ''"),
        ({"prompt_token_ids": [1], "cache_salt": 3}, "cache_salt must be a string that is not empty, got 3"),
        ({"cache_salt": "a"}, "a prompt must be"),
        (["a", {"prompt": "a", "cache_salt": b"x"}], "prompt 1: cache_salt"),
        ([5] * 5000, "5000 tokens"),
    ],
)
def test_bad_prompts_are_refused(demo_llm, engine, prompt, message):
    with pytest.raises(ValueError, match=message):
        demo_llm.generate(prompt, GREEDY, use_tqdm=False)


def test_one_bad_prompt_stops_the_list_before_anything_runs(demo_llm, engine):
    with pytest.raises(ValueError, match=r"prompt 2: .*empty"):
        demo_llm.generate(["a", "b", ""], GREEDY, use_tqdm=False)
    assert not engine.has_unfinished_requests()


def test_the_longest_prompt_fits_and_one_more_token_does_not():
    llm = LLM(num_kv_blocks=4, block_size=8)  # a pool of 32 tokens
    output = llm.generate([5] * 31, GREEDY, use_tqdm=False)[0]
    assert len(output.outputs[0].token_ids) == 1
    assert output.outputs[0].finish_reason == "length"
    with pytest.raises(ValueError, match=r"32 tokens.*max_model_len=32.*at most 31"):
        llm.generate([5] * 32, GREEDY, use_tqdm=False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stop_token_ids": [2048]}, "stop_token_ids: token id 2048"),
        ({"allowed_token_ids": [99999]}, "allowed_token_ids: token id 99999"),
        ({"logit_bias": {5000: 1.0}}, "logit_bias: token id 5000"),
    ],
)
def test_token_ids_in_parameters_must_be_in_the_vocabulary(demo_llm, engine, fields, message):
    with pytest.raises(ValueError, match=message):
        demo_llm.generate("a", SamplingParams(**fields), use_tqdm=False)


def test_other_bad_arguments(demo_llm, engine):
    with pytest.raises(ValueError, match="2 sampling_params for 1 prompts"):
        demo_llm.generate("a", [GREEDY, GREEDY], use_tqdm=False)
    with pytest.raises(ValueError, match="must be a SamplingParams, got dict"):
        demo_llm.generate("a", {"temperature": 1}, use_tqdm=False)
    with pytest.raises(ValueError, match="n=2"):
        demo_llm.stream("a", SamplingParams(n=2))
    engine.add_request("x", "a", GREEDY)
    with pytest.raises(ValueError, match="'x' is in use"):
        engine.add_request("x", "b", GREEDY)
    with pytest.raises(ValueError, match="must be a string"):
        engine.add_request(5, "b", GREEDY)
    with pytest.raises(RuntimeError, match="needs the engine for itself"):
        engine.generate("a", GREEDY)
    engine.abort_request("x")


def test_unknown_arguments_are_named():
    with pytest.raises(ValueError, match=r"unknown engine argument swap, tensor_parallel; known are model"):
        LLM(tensor_parallel=2, swap=4)
    with pytest.raises(ValueError, match="device must be one of"):
        LLM(device="tpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_model_len": 10**6}, "exceeds the model's"),
        ({"max_model_len": 512, "num_kv_blocks": 4}, r"needs 32 KV blocks.*has 4.*64 tokens"),
        ({"kv_cache_memory": 10}, "hold no KV block"),
        ({"swap_space": 4}, "swap_space=4 bytes hold no KV block: one of 16 tokens takes"),
    ],
)
def test_a_cache_that_cannot_hold_what_was_asked_is_refused_with_figures(arguments, message):
    with pytest.raises(ValueError, match=message):
        LLM(**arguments)


def test_engine_from_config_and_without_tokenizer():
    engine = LLMEngine.from_config(EngineConfig(skip_tokenizer_init=True))
    output = engine.generate([1, 2, 3], GREEDY)
    assert output.text == ""
    assert len(output.outputs[0].token_ids) == 12
    with pytest.raises(ValueError, match="needs a tokenizer"):
        engine.generate("text", GREEDY)
    with pytest.raises(ValueError, match="need a tokenizer"):
        engine.generate([1], SamplingParams(stop="x"))


def test_cuda_without_a_gpu_says_what_is_missing(monkeypatch):
    from mini_vllm.ops import cuda

    monkeypatch.setattr(cuda, "driver_cuda_version", lambda: None)
    with pytest.raises(cuda.CudaUnavailable, match="no NVIDIA driver"):
        LLM(device="cuda")
    assert LLM(device="auto").llm_engine.runner.ops.device == "cpu"


def test_dummy_weights_need_a_config_only(tmp_path):
    from mini_vllm.demo import DEMO_DIR

    (tmp_path / "config.json").write_text((DEMO_DIR / "config.json").read_text())

    def run(seed):
        llm = LLM(tmp_path, load_format="dummy", seed=seed)
        return llm.generate([1, 2, 3], GREEDY, use_tqdm=False)[0].outputs[0].token_ids

    assert run(0) == run(0)
    assert run(0) != run(1)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_on_the_cpu_agrees_with_float32_for_a_while(demo_llm, dtype):
    """A bf16 logit is off by about 2^-8 of its size; the first tokens of a confident model survive that."""
    expected = demo_llm.generate("Once upon a", GREEDY, use_tqdm=False)[0].outputs[0].token_ids
    actual = LLM(dtype=dtype).generate("Once upon a", GREEDY, use_tqdm=False)[0].outputs[0].token_ids
    assert actual[:2] == expected[:2]


def test_default_sampling_params_come_from_the_checkpoint(demo_llm):
    import json

    from mini_vllm.demo import DEMO_DIR

    config = json.loads((DEMO_DIR / "generation_config.json").read_text())
    assert demo_llm.get_default_sampling_params().temperature == config["temperature"]
    assert LLM(generation_config="none").get_default_sampling_params() == SamplingParams()


def test_a_refusal_outlives_a_step_that_fails(monkeypatch):
    engine = LLMEngine(max_num_queued_requests=1)
    engine.add_request("a", "Once upon a time", SamplingParams(max_tokens=4))
    engine.add_request("b", "Once upon a time", SamplingParams(max_tokens=4))
    with pytest.raises(RuntimeError, match="needs the engine for itself"):
        engine.generate("The king")
    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "launch", lambda plan: pytest.fail("no power"))
        with pytest.raises(BaseException, match="no power"):
            engine.step()
    (refused,) = engine.step()
    assert refused.request_id == "b"
    assert refused.outputs[0].finish_reason == "abort"
    assert not engine.has_unfinished_requests()
    assert len(engine.generate("The king", SamplingParams(max_tokens=3, ignore_eos=True)).outputs[0].token_ids) == 3
