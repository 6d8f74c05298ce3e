"""The cost of a step: what is fitted is what was measured."""

import json

import pytest
from click.testing import CliRunner

from mini_vllm.bench.runner import with_engine
from mini_vllm.bench.step_cost import (
    STEP_TABLES,
    StepCost,
    StepTable,
    StepTime,
    main,
    measure_step_times,
    recorded,
)
from mini_vllm.engine.llm_engine import LLMEngine
from mini_vllm.sampling_params import SamplingParams
from mini_vllm.scheduling.scheduler import ScheduledSequence, SchedulerOutput, Transfer

COST = StepCost(
    fixed=5e-3,
    per_decode_sequence=2e-5,
    per_context_token=3e-8,
    per_prefill_step=2e-3,
    per_prefill_token=2e-5,
    per_attention_pair=1e-9,
    per_moved_token=1e-6,
)
# (sequences, tokens of each that are computed, tokens of each in the end)
STEPS = [(1, 1, 100), (64, 1, 100), (64, 1, 3000), (2, 500, 500), (1, 4000, 4000), (3, 500, 2000)]


def plan_of(sequences: int, new: int, seen: int) -> SchedulerOutput:
    return SchedulerOutput(scheduled=[ScheduledSequence(None, seen - new, new, True)] * sequences)


def table_of(steps, cost: StepCost = COST) -> StepTable:
    rows = [
        StepTime(n * new, n, n * seen, cost.seconds(plan_of(n, new, seen), block_size=16)) for n, new, seen in steps
    ]
    return StepTable(rows, cost.per_moved_token, "made up")


def test_a_step_costs_what_it_says():
    plan = SchedulerOutput(
        scheduled=[
            ScheduledSequence(None, 99, 1, True),  # reads 100 tokens
            ScheduledSequence(None, 49, 1, True),
            ScheduledSequence(None, 10, 3, False),  # sees 11 + 12 + 13
        ],
        transfers=[Transfer(True, 0, 0), Transfer(False, 1, 1)],
    )
    expected = 5e-3 + 2e-3 + 2 * 2e-5 + 150 * 3e-8 + 3 * 2e-5 + 36 * 1e-9 + 2 * 16 * 1e-6
    assert COST.seconds(plan, block_size=16) == pytest.approx(expected, rel=1e-12)


def test_the_fit_finds_the_costs_of_which_a_table_is_made():
    table = table_of(STEPS)
    fitted = StepCost.fit(table)
    assert vars(fitted) == pytest.approx(vars(COST), rel=1e-6)
    assert fitted.error(table.rows) < 1e-9


def test_no_cost_is_negative():
    table = table_of(STEPS)
    faster = [row._replace(seconds=row.seconds * (0.5 if row.sequences == 64 else 1)) for row in table.rows]
    fitted = StepCost.fit(StepTable(faster, 0.0, "more sequences are faster"))
    assert min(vars(fitted).values()) == 0
    assert fitted.fixed > 0
    assert fitted.error(faster) > 0.1


@pytest.mark.parametrize("missing", [slice(0, 3), slice(3, 6), slice(1, 6)])
def test_a_table_that_leaves_a_cost_open_is_refused(missing):
    steps = STEPS.copy()
    del steps[missing]
    with pytest.raises(ValueError, match="leave a cost open"):
        StepCost.fit(table_of(steps))


def test_rows_that_cannot_be_are_refused():
    table = table_of(STEPS)
    for impossible in (
        {"seconds": 0.0},
        {"sequences": 0},
        {"context": table.rows[0].tokens - 1},
        {"sequences": table.rows[0].tokens + 1},
    ):
        rows = [table.rows[0]._replace(**impossible), *table.rows[1:]]
        with pytest.raises(ValueError, match="a row of step times needs"):
            StepCost.fit(StepTable(rows, 0.0, ""))


@pytest.mark.parametrize("name", STEP_TABLES)
def test_a_linear_model_is_enough_for_the_tables(name):
    table = StepTable.read(STEP_TABLES[name])
    cost = StepCost.fit(table)
    assert cost.error(table.rows) < 0.2
    assert cost.fixed > 0
    assert cost.per_moved_token > 0


def test_a_table_survives_its_file(tmp_path):
    table, path = table_of(STEPS), tmp_path / "table.json"
    table.write(path)
    assert StepTable.read(path) == table


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"rows": [[1, 2, 3]], "seconds_per_moved_token": 0, "source": ""}', '{"rows": 1}'],
)
def test_a_file_that_is_no_table_is_named(tmp_path, content):
    path = tmp_path / "table.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"table\.json (is not a table of step times|cannot be read as JSON)"):
        StepTable.read(path)


def test_measured_steps_are_the_steps_that_ran():
    engine = LLMEngine(device="cpu", max_num_batched_tokens=16, max_num_seqs=4, num_kv_blocks=64)
    with recorded(engine.runner) as rows:
        engine.generate([list(range(24)), list(range(100, 108))], SamplingParams(max_tokens=3, ignore_eos=True))
    assert [row[:3] for row in rows] == [
        (16, 1, 16),
        (16, 2, 24 + 8),
        (2, 2, 25 + 9),
        (2, 2, 26 + 10),
    ]
    assert all(row.seconds > 0 for row in rows)
    engine.generate([1, 2, 3], SamplingParams(max_tokens=1))
    assert len(rows) == 4, "nothing is recorded after the context"


def test_an_engine_is_measured_into_a_table_that_can_be_fitted(tmp_path):
    arguments = {
        "device": "cpu",
        "max_num_batched_tokens": 64,
        "max_num_seqs": 16,
        "num_kv_blocks": 64,
        "swap_space": 1 << 22,
    }
    table = with_engine(arguments, lambda engine: measure_step_times(engine, (1, 4), (8, 64), num_steps=4))
    kinds = [(row.tokens, row.sequences) for row in table.rows]
    assert kinds == [(1, 1), (1, 1), (4, 4), (4, 4), (4, 1), (64, 16), (64, 4), (64, 1), (64, 1)]
    assert [row.context for row in table.rows[4:]] == [4, 64, 64, 64, 128]
    assert table.seconds_per_moved_token > 0
    StepCost.fit(table)
    table.write(tmp_path / "table.json")
    assert json.loads((tmp_path / "table.json").read_text())["source"].startswith("mini-vllm ")


def test_command_writes_a_table(tmp_path):
    path = tmp_path / "table.json"
    sizes = ["--batch-size", "1", "--batch-size", "2", "--context", "8", "--context", "64"]
    arguments = [*sizes, "--device", "cpu", "--max-num-batched-tokens", "64", "--steps", "3", "--swap-space", "4194304"]
    result = CliRunner().invoke(main, [*arguments, "--output", str(path)])
    assert result.exit_code == 0, result.output
    table = StepTable.read(path)
    assert [row.tokens for row in table.rows] == [1, 1, 2, 2, 4, 64, 64, 64, 64]
    assert f"{table.rows[0].seconds * 1e3:.3f}" in result.output
