"""How runs are timed: to the second against a clock that the test moves, and on the demo model."""

import json
import math
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest

from mini_vllm import LLMEngine
from mini_vllm.bench import runner
from mini_vllm.bench.runner import RequestTiming, array_bytes, decode_step_bytes, engine_state, generate, stream, trace
from mini_vllm.bench.workloads import Workload, random_workload
from mini_vllm.engine.outputs import CompletionOutput
from mini_vllm.ops.weight import DenseWeight
from mini_vllm.tracing import NULL_TRACER


class Clock:
    """In place of the `time` module."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        assert seconds >= 0
        self.now += seconds


@dataclass
class Output:
    request_id: str
    outputs: list
    finished: bool


class SteppedEngine:
    """A step takes a second and gives each request a token."""

    def __init__(self, clock, cut_short=0):
        self.clock, self.cut_short = clock, cut_short
        self.requests = {}
        self.tracer = NULL_TRACER

    def add_request(self, request_id, prompt, params):
        self.requests[request_id] = [0, params.max_tokens - self.cut_short]

    def has_unfinished_requests(self):
        return bool(self.requests)

    def num_unfinished_requests(self):
        return len(self.requests)

    def step(self):
        self.clock.sleep(1)
        outputs = []
        for request_id, request in list(self.requests.items()):
            request[0] += 1
            finished = request[0] == request[1]
            outputs.append(Output(request_id, [CompletionOutput(0, "", list(range(request[0])))], finished))
            if finished:
                del self.requests[request_id]
        return outputs


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(runner, "time", clock)
    return clock


def stepped(clock, output_lens, **load):
    workload = Workload([[1]] * len(output_lens), output_lens, {})
    return stream(SteppedEngine(clock), workload, workload.sampling_params(0), **load)


def test_arrivals_do_not_wait_for_the_engine(clock):
    run = stepped(clock, [2, 2, 3], arrivals=[0.0, 0.25, 7.0])
    # The second one arrives during the first step, gets its first token in the next one, and has waited since 0.25.
    assert run.requests == [
        RequestTiming(2, ttft=1.0, e2e=2.0, itls=(1.0,)),
        RequestTiming(2, ttft=1.75, e2e=2.75, itls=(1.0,)),
        RequestTiming(3, ttft=1.0, e2e=3.0, itls=(1.0, 1.0)),
    ]
    assert run.elapsed == 10.0  # the engine idles from 3 to 7
    assert run.peak_concurrency == 2
    assert run.num_output_tokens == 7
    assert run.peak_output_throughput == 2.0


def test_max_concurrency_holds_requests_back_and_their_clocks_too(clock):
    run = stepped(clock, [2, 3, 1], max_concurrency=1)
    assert [(request.ttft, request.e2e) for request in run.requests] == [(1, 2), (1, 3), (1, 1)]
    assert (run.elapsed, run.peak_concurrency) == (6.0, 1)


def test_arrivals_and_max_concurrency_together(clock):
    run = stepped(clock, [4, 1, 1], arrivals=[0.0, 1.5, 9.0], max_concurrency=1)
    # The second finds no room before 4, the third finds the engine idle.
    assert [(request.ttft, request.e2e) for request in run.requests] == [(1, 4), (1, 1), (1, 1)]
    assert run.elapsed == 10.0


def test_a_request_that_ends_early_is_no_figure(clock):
    workload = Workload([[1]], [3], {})
    with pytest.raises(RuntimeError, match="request 0 ended after 2 of 3 output tokens"):
        stream(SteppedEngine(clock, cut_short=1), workload, workload.sampling_params(0))


def test_time_per_output_token():
    assert RequestTiming(5, ttft=2.0, e2e=4.0).tpot == 0.5
    assert RequestTiming(1, ttft=2.0, e2e=2.0).tpot is None


# ---- the demo model ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine():
    return LLMEngine(device="cpu", max_model_len=128, enable_prefix_caching=False)


@pytest.fixture(scope="module")
def workload():
    return random_workload(5, 12, 6, vocab_size=2048)


@pytest.mark.parametrize("run", [generate, stream])
def test_both_ways_time_all_tokens_of_all_requests(engine, workload, run):
    result = run(engine, workload, workload.sampling_params(0))
    assert [request.num_output_tokens for request in result.requests] == [6] * 5
    for request in result.requests:
        assert 0 < request.ttft < request.e2e <= result.elapsed
        if run is stream:
            assert len(request.itls) == 5
            assert math.isclose(sum(request.itls), request.e2e - request.ttft)
    assert result.peak_concurrency == 5
    assert not engine.has_unfinished_requests()


def test_generate_refuses_a_run_that_was_cut(engine, workload):
    params = [replace(p, ignore_eos=False, stop_token_ids=list(range(2048))) for p in workload.sampling_params(0)]
    with pytest.raises(RuntimeError, match="ended after 1 of 6"):
        generate(engine, workload, params)


def test_a_trace_has_nested_spans_and_is_valid_json(engine, workload):
    tracer = trace(engine, workload, workload.sampling_params(0), max_concurrency=2)
    assert engine.tracer is NULL_TRACER
    events = json.loads(tracer.to_chrome_json())["traceEvents"]
    steps = [event for event in events if event["name"] == "step"]
    assert len(steps) >= 18  # 3 pairs of requests, 6 tokens each
    for name in ("schedule", "prepare", "launch", "wait", "detokenize"):
        spans = [event for event in events if event["name"] == name]
        assert spans, name
        for span in spans:
            around = [s for s in steps if s["ts"] <= span["ts"] and span["ts"] + span["dur"] <= s["ts"] + s["dur"]]
            assert len(around) == 1, name
    counters = [event for event in events if event["ph"] == "C"]
    assert {event["name"] for event in counters} == {"requests", "kv_blocks"}
    assert max(event["args"].get("running", 0) for event in counters) == 2
    assert max(event["args"].get("in_use", 0) for event in counters) >= 2


def test_decode_step_bytes_counts_weights_once_and_the_context_of_all_sequences(engine):
    config = engine.model_config
    query, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    attention = config.hidden_size * (query + 2 * kv) + query * config.hidden_size + 2 * config.head_dim
    layer = attention + 3 * config.hidden_size * config.intermediate_size + 2 * config.hidden_size
    head = config.vocab_size * config.hidden_size + config.hidden_size
    weights = 4 * (config.num_hidden_layers * layer + head)  # float32
    per_token = 4 * 2 * config.num_hidden_layers * kv
    assert decode_step_bytes(engine, 1, 0) == weights
    assert decode_step_bytes(engine, 3, 100) == weights + 3 * 100 * per_token


def test_a_sliding_window_bounds_what_is_read(engine):
    model = engine.runner.model
    layers = tuple(replace(layer, attention=replace(layer.attention, window=10)) for layer in model.layers)
    windowed = SimpleNamespace(runner=SimpleNamespace(model=replace(model, layers=layers), kv=engine.runner.kv))
    assert decode_step_bytes(windowed, 2, 100) == decode_step_bytes(engine, 2, 10)


def test_array_bytes():
    value = (DenseWeight(np.zeros((3, 4), np.float32), None), [np.zeros(5, np.int8), "text", 7])
    assert array_bytes(value) == 48 + 5


def test_engine_state_counts_from_the_start_of_the_run(workload):
    engine = LLMEngine(device="cpu", max_model_len=128)
    generate(engine, workload, workload.sampling_params(0))
    before = engine.stats()
    prompt = Workload([list(range(40))] * 2, [2, 2], {})
    stream(engine, prompt, prompt.sampling_params(0), max_concurrency=1)
    state = engine_state(engine, before)
    assert state["kv"]["prefix_cache_queries"] == 80
    assert state["kv"]["prefix_cache_hits"] == 32  # two blocks of the second prompt
    assert state["kv"]["num_preemptions"] == 0
    assert 0 < state["kv"]["peak_kv_blocks"] <= state["kv"]["num_kv_blocks"]
    assert (state["device"], state["dtype"], state["model"]) == ("cpu", "float32", "demo model")
    assert 2**20 < state["peak_memory"]["bytes"] < 2**40
    json.dumps(state)
