"""Simulated traffic on the real scheduler: nothing gets lost, and policies and cache do what they are for."""

import json
from dataclasses import replace

import pytest
from click.testing import CliRunner

from mini_vllm.bench.report import load_report
from mini_vllm.bench.simulate import LONGEST, Conversation, Server, Simulator, Traffic, Turn, main
from mini_vllm.bench.step_cost import STEP_TABLES, StepCost, StepTable
from mini_vllm.scheduling.policy import POLICIES

COST = StepCost(
    fixed=5e-3,
    per_decode_sequence=2e-5,
    per_context_token=3e-8,
    per_prefill_step=0.0,
    per_prefill_token=2e-5,
    per_attention_pair=1e-9,
    per_moved_token=3e-6,
)
TRAFFIC = Traffic(
    num_requests=200, request_rate=20, turns=4, system_len=200, input_len=50, output_len=100, think_time=2
)
SERVER = Server(num_kv_blocks=4000, max_num_seqs=32, max_num_batched_tokens=256)
SMALL = replace(SERVER, num_kv_blocks=150)  # too small for what is running, let alone for what may come again


def run(traffic=TRAFFIC, server=SERVER, policy="fcfs", conversations=None):
    return Simulator(conversations or traffic.conversations(), server, COST, policy).run()


def mean_ttft(simulation):
    return sum(r.first_token - r.arrival for r in simulation.requests) / len(simulation.requests)


def all_at_once(input_lens, output_len=10):
    return [Conversation(0.0, 0, 0, 0, [Turn(0.0, n, output_len)]) for n in input_lens]


# ---- traffic ----------------------------------------------------------------------------------------------


def test_traffic_is_what_was_asked_for():
    traffic = Traffic(num_requests=4002, turns=4, request_rate=8, system_prompts=3, think_time=5, seed=1)
    conversations = traffic.conversations()
    assert [len(c.turns) for c in conversations] == [4] * 1000 + [2]
    starts = [c.start for c in conversations]
    assert starts == sorted(starts)
    assert starts[-1] == pytest.approx(1000 / 2, rel=0.1)  # 2 conversations a second
    popularity = [sum(c.system_prompt == i for c in conversations) for i in range(3)]
    assert popularity[0] > popularity[1] > popularity[2] > 0
    assert len({(c.system_prompt, c.system_len) for c in conversations}) == 3, "a system prompt has one length"
    turns = [turn for c in conversations for turn in c.turns]
    for values, mean in (
        ([t.input_len for t in turns], traffic.input_len),
        ([t.output_len for t in turns], traffic.output_len),
    ):
        assert sum(values) / len(values) == pytest.approx(mean, rel=0.1)
        assert 1 <= min(values) < mean / 4
        assert 4 * mean < max(values) <= LONGEST * mean
    assert sum(t.think_time for t in turns) / len(turns) == pytest.approx(5, rel=0.1)
    assert {c.priority for c in conversations} == {0, 1, 2}


def test_traffic_follows_its_seed():
    assert TRAFFIC.conversations() == TRAFFIC.conversations()
    assert TRAFFIC.conversations() != replace(TRAFFIC, seed=1).conversations()


# ---- simulation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_seed_gives_the_same_simulation(policy):
    assert run(server=SMALL, policy=policy) == run(server=SMALL, policy=policy)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("server", [SERVER, SMALL, replace(SMALL, swap_blocks=500)])
def test_nothing_gets_lost(server, policy):
    conversations = TRAFFIC.conversations()
    simulation = run(server=server, policy=policy)
    requests = simulation.requests
    assert sorted((r.conversation, r.turn) for r in requests) == [(i, t) for i in range(50) for t in range(4)]
    assert [r.arrival for r in requests] == sorted(r.arrival for r in requests)
    for i, conversation in enumerate(conversations):
        length, earliest = conversation.system_len, conversation.start
        for turn, r in zip(conversation.turns, [r for r in requests if r.conversation == i], strict=True):
            length += turn.input_len
            assert r.num_prompt_tokens == length, "the prompt is all that was said before and the message"
            assert r.num_output_tokens == turn.output_len
            assert r.arrival >= earliest
            assert r.arrival <= r.started < r.first_token <= r.finished <= simulation.elapsed
            assert r.num_cached_tokens < r.num_prompt_tokens
            length += turn.output_len
            earliest = r.finished
    answers = sum(turn.output_len for c in conversations for turn in c.turns)
    assert simulation.num_output_tokens == answers
    # The last token of an answer is never computed. What a preempted request had may have to be computed again.
    once = simulation.num_prompt_tokens - simulation.num_cached_tokens + answers - len(requests)
    if simulation.num_preemptions == 0:
        assert simulation.num_computed_tokens == once
    else:
        assert simulation.num_computed_tokens >= once
    assert 0 < simulation.busy <= simulation.elapsed
    assert max(sample.num_running for sample in simulation.timeline) <= server.max_num_seqs
    assert max(sample.num_used_blocks for sample in simulation.timeline) <= server.num_kv_blocks


def test_a_small_pool_preempts_and_swaps():
    roomy, small, swapping = run(), run(server=SMALL), run(server=replace(SMALL, swap_blocks=2000))
    assert roomy.num_preemptions == 0
    assert small.num_preemptions > 0
    assert small.num_moved_blocks == 0 < swapping.num_moved_blocks
    assert small.num_cached_tokens < swapping.num_cached_tokens
    assert swapping.num_computed_tokens < small.num_computed_tokens


def test_the_cache_saves_what_is_shared():
    def hit_rate(**changes):
        simulation = run(replace(TRAFFIC, **changes))
        return simulation.num_cached_tokens / simulation.num_prompt_tokens

    nothing = hit_rate(turns=1, system_prompts=0)
    system = hit_rate(turns=1)
    conversations = hit_rate(turns=4)
    assert nothing == 0
    assert 0 < system < conversations
    assert conversations > 0.6
    off = run(server=replace(SERVER, enable_prefix_caching=False))
    on = run()
    assert off.num_cached_tokens == 0
    assert on.num_computed_tokens + on.num_cached_tokens == off.num_computed_tokens
    assert mean_ttft(on) < mean_ttft(off)


def test_sjf_answers_sooner_and_the_longest_still_ends():
    lengths = [2000, *[100] * 30, 2000, *[50] * 30]
    conversations = all_at_once(lengths)
    fcfs, sjf = (run(conversations=conversations, policy=policy) for policy in ("fcfs", "sjf"))
    assert mean_ttft(sjf) < 0.7 * mean_ttft(fcfs)
    first_tokens = sorted(sjf.requests, key=lambda r: r.first_token)
    assert [r.num_prompt_tokens for r in first_tokens[-2:]] == [2000, 2000]
    assert all(r.num_output_tokens == 10 for r in sjf.requests)


def test_priority_answers_the_important_sooner():
    conversations = [replace(c, priority=i % 2) for i, c in enumerate(all_at_once([100] * 60))]

    def ttfts(policy, level):
        requests = run(conversations=conversations, policy=policy).requests
        return [r.first_token for r in requests if r.priority == level]

    assert max(ttfts("priority", 0)) <= min(ttfts("priority", 1)), "a step may end the one and start the other"
    assert max(ttfts("fcfs", 0)) > min(ttfts("fcfs", 1))


def test_time_is_the_sum_of_the_steps_and_the_gaps():
    conversations = [replace(c, start=100.0 * i) for i, c in enumerate(all_at_once([64, 64], output_len=3))]
    simulation = run(conversations=conversations)
    prefill = COST.fixed + 64 * COST.per_prefill_token + 64 * 65 / 2 * COST.per_attention_pair
    decodes = [COST.fixed + COST.per_decode_sequence + n * COST.per_context_token for n in (65, 66)]
    for i, r in enumerate(simulation.requests):
        assert r.arrival == r.started == 100.0 * i
        assert r.first_token == pytest.approx(100.0 * i + prefill)
        assert r.finished == pytest.approx(100.0 * i + prefill + sum(decodes))
    assert simulation.num_steps == 6
    assert simulation.busy == pytest.approx(2 * (prefill + sum(decodes)))
    assert simulation.elapsed == simulation.requests[1].finished


def test_a_request_waits_for_the_step_that_is_planned_already():
    """It comes while the first step runs; the second is planned by then, as on a GPU."""
    conversations = [replace(c, start=start) for c, start in zip(all_at_once([64, 64]), (0.0, 1e-6), strict=True)]
    first, second = run(conversations=conversations).requests
    assert second.started == pytest.approx(
        first.first_token + COST.fixed + COST.per_decode_sequence + 65 * COST.per_context_token
    )


def test_a_conversation_that_never_fits_is_refused():
    with pytest.raises(ValueError, match=r"the longest conversation has 510 tokens, but the KV cache holds 160"):
        run(conversations=all_at_once([500]), server=replace(SERVER, num_kv_blocks=10))


# ---- command ----------------------------------------------------------------------------------------------

ARGUMENTS = ["--num-requests", "60", "--turns", "3", "--input-len", "20", "--output-len", "10", "--think-time", "1"]


def test_command_compares_policies(tmp_path):
    path = tmp_path / "report.json"
    result = CliRunner().invoke(main, [*ARGUMENTS, "--output-json", str(path)])
    assert result.exit_code == 0, result.output
    for text in ("60 requests of 20 conversations", "Prefix cache hit rate", "Preemptions", "TTFT, ms: mean", "P99"):
        assert text in result.output
    report = load_report(path)
    assert report["policies"] == list(POLICIES)
    assert report["workload"]["num_requests"] == 60
    for policy in POLICIES:
        assert f"{policy}: " in result.output
        assert 0 < report["metrics"][f"hit_rate @ {policy}"]["median"] < 1
        assert set(report["timelines"][policy]) == {"seconds", "num_running", "num_waiting", "num_used_blocks"}


def test_command_takes_the_engine_s_settings(tmp_path):
    path, table = tmp_path / "report.json", tmp_path / "table.json"
    StepTable.read(STEP_TABLES["qwen3-0.6b"]).write(table)
    settings = {"num_kv_blocks": 500, "block_size": 8, "max_num_seqs": 16, "max_num_batched_tokens": 64}
    settings["swap_blocks"] = 100
    options = [text for name, value in settings.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    load = ["--request-rate", "inf", "--system-prompts", "0", "--seed", "3"]
    arguments = [*ARGUMENTS, *options, *load, "--policy", "sjf", "--policy", "sjf", "--step-times", str(table)]
    result = CliRunner().invoke(main, [*arguments, "--output-json", str(path)])
    assert result.exit_code == 0, result.output
    report = json.loads(path.read_text())
    assert report["policies"] == ["sjf"]
    assert settings.items() <= report["engine"].items()
    assert report["engine"]["step_cost"]["fixed"] == StepCost.fit(StepTable.read(STEP_TABLES["qwen3-0.6b"])).fixed
    assert (report["workload"]["request_rate"], report["workload"]["seed"]) == ("inf", 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy", "lottery"], "'lottery' is not one of 'fcfs', 'priority', 'sjf'"),
        (["--num-requests", "0"], "0 is not in the range"),
        (["--request-rate", "0"], "0.0 is not in the range"),
        (["--max-num-seqs", "300", "--max-num-batched-tokens", "200"], "must be at least --max-num-seqs"),
        (["--swap-blocks", "8", "--no-prefix-caching"], "leave out --no-prefix-caching"),
        (["--output-json", "/no/such/directory/file.json"], "directory /no/such/directory does not exist"),
        (["--plot", "/no/such/directory/plot.png"], "directory /no/such/directory does not exist"),
    ],
)
def test_bad_usage_is_named(arguments, message):
    result = CliRunner().invoke(main, [*ARGUMENTS, *arguments])
    assert result.exit_code == 2
    assert message in result.output


def test_a_pool_that_is_too_small_is_named():
    result = CliRunner().invoke(main, [*ARGUMENTS, "--num-kv-blocks", "2"])
    assert result.exit_code == 1
    assert "raise --num-kv-blocks" in result.output


def test_plot_without_matplotlib_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = CliRunner().invoke(main, [*ARGUMENTS, "--plot", str(tmp_path / "plot.png")])
    assert result.exit_code == 1
    assert "pip install" in result.output
    assert "fcfs" not in result.output, "it is said before anything is simulated"


def test_plot_draws_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "plot.png"
    result = CliRunner().invoke(main, [*ARGUMENTS, "--plot", str(path)])
    assert result.exit_code == 0, result.output
    assert path.read_bytes().startswith(b"\x89PNG")
