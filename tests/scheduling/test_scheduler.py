"""The scheduler by example. A plan is written as [(seq_id, start, num_tokens), ...]."""

import pytest

from mini_vllm.sampling_params import SamplingParams
from mini_vllm.scheduling.block_manager import BlockManager
from mini_vllm.scheduling.scheduler import Scheduler
from mini_vllm.scheduling.sequence import FinishReason, Sequence, SequenceStatus

EOS, STOP, WORD = 0, 1, 5


def make_scheduler(*, num_blocks=100, block_size=4, max_num_seqs=8, max_num_batched_tokens=100):
    return Scheduler(
        BlockManager(num_blocks, block_size),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
    )


def add(scheduler, seq_id, prompt_len, *, max_tokens=100, max_num_tokens=None, **params):
    seq = Sequence(
        seq_id,
        range(100, 100 + prompt_len),
        SamplingParams(max_tokens=None, stop_token_ids=[STOP], **params),
        max_num_tokens=max_num_tokens or prompt_len + max_tokens,
        eos_token_ids=[EOS],
    )
    scheduler.add(seq)
    return seq


def plan(output):
    return [(s.seq.seq_id, s.start, s.num_tokens) for s in output.scheduled]


def step(scheduler, *token_ids):
    """One whole step, `WORD` for each sequence that samples unless told otherwise; returns the output."""
    output = scheduler.schedule()
    scheduler.check()
    num_samples = sum(s.samples for s in output.scheduled)
    scheduler.update(output, token_ids or [WORD] * num_samples)
    scheduler.check()
    return output


def ids(seqs):
    return [seq.seq_id for seq in seqs]


def num_free(scheduler):
    return scheduler.block_manager.num_free_blocks


def all_free(scheduler):
    return num_free(scheduler) == scheduler.block_manager.num_blocks


# --- continuous batching -------------------------------------------------------------------------------


def test_a_prompt_runs_whole_and_then_decodes_a_token_a_step():
    scheduler = make_scheduler()
    seq = add(scheduler, 0, prompt_len=6, max_tokens=3)
    assert seq.status is SequenceStatus.WAITING
    assert plan(step(scheduler)) == [(0, 0, 6)]
    assert seq.status is SequenceStatus.RUNNING
    assert plan(step(scheduler)) == [(0, 6, 1)]
    assert plan(step(scheduler)) == [(0, 7, 1)]
    assert seq.output_token_ids == [WORD, WORD, WORD]
    assert seq.finish_reason is FinishReason.LENGTH
    assert not scheduler.has_unfinished()
    assert all_free(scheduler)


def test_sequences_join_and_leave_between_steps():
    scheduler = make_scheduler()
    add(scheduler, 0, prompt_len=4, max_tokens=3)
    assert plan(step(scheduler)) == [(0, 0, 4)]
    add(scheduler, 1, prompt_len=2, max_tokens=1)
    add(scheduler, 2, prompt_len=3, max_tokens=3)
    assert plan(step(scheduler)) == [(0, 4, 1), (1, 0, 2), (2, 0, 3)]  # 1 ends with its first token
    assert plan(step(scheduler)) == [(0, 5, 1), (2, 3, 1)]  # 0 ends
    add(scheduler, 3, prompt_len=1, max_tokens=1)
    assert plan(step(scheduler)) == [(2, 4, 1), (3, 0, 1)]
    assert not scheduler.has_unfinished()


def test_an_empty_scheduler_plans_nothing():
    scheduler = make_scheduler()
    output = step(scheduler)
    assert (output.scheduled, output.preempted, output.num_tokens) == ([], [], 0)


def test_a_seat_is_given_on_when_its_sequence_ends():
    scheduler = make_scheduler(max_num_seqs=2)
    for seq_id in range(3):
        add(scheduler, seq_id, prompt_len=2, max_tokens=2)
    assert plan(step(scheduler)) == [(0, 0, 2), (1, 0, 2)]
    assert plan(step(scheduler, EOS, WORD)) == [(0, 2, 1), (1, 2, 1)]
    assert plan(step(scheduler)) == [(2, 0, 2)]


def test_admission_is_first_come_first_served_even_if_a_later_one_would_fit():
    scheduler = make_scheduler(num_blocks=4, block_size=4)
    running = add(scheduler, 0, prompt_len=4, max_tokens=4)
    step(scheduler)
    add(scheduler, 1, prompt_len=16, max_tokens=1)
    add(scheduler, 2, prompt_len=1, max_tokens=1)
    assert plan(step(scheduler)) == [(0, 4, 1)]
    scheduler.finish(running, FinishReason.STOP)
    assert plan(step(scheduler)) == [(1, 0, 16)]
    assert plan(step(scheduler)) == [(2, 0, 1)]


# --- one token budget: chunked prefill, mixed with decodes ---------------------------------------------


def test_a_long_prompt_is_cut_into_chunks_of_the_budget():
    scheduler = make_scheduler(max_num_batched_tokens=8)
    seq = add(scheduler, 0, prompt_len=20)
    outputs = [step(scheduler) for _ in range(4)]
    assert [plan(output) for output in outputs] == [[(0, 0, 8)], [(0, 8, 8)], [(0, 16, 4)], [(0, 20, 1)]]
    assert [output.scheduled[0].samples for output in outputs] == [False, False, True, True]
    assert seq.num_output_tokens == 2


@pytest.mark.parametrize(("prompt_len", "chunks"), [(7, [7]), (8, [8]), (9, [8, 1]), (16, [8, 8]), (17, [8, 8, 1])])
def test_chunks_at_the_edges_of_the_budget(prompt_len, chunks):
    scheduler = make_scheduler(max_num_batched_tokens=8)
    add(scheduler, 0, prompt_len, max_tokens=1)
    outputs = []
    while scheduler.has_unfinished():
        outputs.append(step(scheduler))
    assert [output.num_tokens for output in outputs] == chunks
    assert [output.scheduled[0].samples for output in outputs] == [False] * (len(chunks) - 1) + [True]


def test_decodes_never_wait_behind_a_long_prompt():
    scheduler = make_scheduler(max_num_seqs=4, max_num_batched_tokens=8)
    add(scheduler, 0, prompt_len=2)
    add(scheduler, 1, prompt_len=2)
    step(scheduler)
    add(scheduler, 2, prompt_len=15)
    assert plan(step(scheduler)) == [(0, 2, 1), (1, 2, 1), (2, 0, 6)]
    assert plan(step(scheduler)) == [(0, 3, 1), (1, 3, 1), (2, 6, 6)]
    assert plan(step(scheduler)) == [(0, 4, 1), (1, 4, 1), (2, 12, 3)]
    assert plan(step(scheduler)) == [(0, 5, 1), (1, 5, 1), (2, 15, 1)]


def test_what_a_finished_prompt_leaves_of_the_budget_goes_to_the_next_one():
    scheduler = make_scheduler(max_num_batched_tokens=8)
    for seq_id, prompt_len in enumerate((5, 6, 5)):
        add(scheduler, seq_id, prompt_len)
    assert plan(step(scheduler)) == [(0, 0, 5), (1, 0, 3)]
    assert plan(step(scheduler)) == [(0, 5, 1), (1, 3, 3), (2, 0, 4)]
    assert plan(step(scheduler)) == [(0, 6, 1), (1, 6, 1), (2, 4, 1)]


def test_with_the_smallest_budget_every_running_sequence_still_gets_its_token():
    scheduler = make_scheduler(max_num_seqs=3, max_num_batched_tokens=3)
    for seq_id in range(4):
        add(scheduler, seq_id, prompt_len=3, max_tokens=9)
    assert plan(step(scheduler)) == [(0, 0, 3)]
    assert plan(step(scheduler)) == [(0, 3, 1), (1, 0, 2)]
    assert plan(step(scheduler)) == [(0, 4, 1), (1, 2, 1), (2, 0, 1)]
    assert plan(step(scheduler)) == [(0, 5, 1), (1, 3, 1), (2, 1, 1)]
    assert plan(step(scheduler)) == [(0, 6, 1), (1, 4, 1), (2, 2, 1)]


def test_a_budget_below_max_num_seqs_is_a_bug_of_the_caller():
    with pytest.raises(AssertionError, match="every running sequence must get its token"):
        make_scheduler(max_num_seqs=4, max_num_batched_tokens=3)


# --- blocks --------------------------------------------------------------------------------------------


def test_an_admitted_prompt_owns_blocks_for_all_its_tokens_before_its_first_chunk():
    scheduler = make_scheduler(num_blocks=6, block_size=4, max_num_batched_tokens=8)
    first = add(scheduler, 0, prompt_len=17)
    add(scheduler, 1, prompt_len=5)
    assert plan(step(scheduler)) == [(0, 0, 8)]
    assert len(first.block_table) == 5
    assert plan(step(scheduler)) == [(0, 8, 8)]
    assert plan(step(scheduler)) == [(0, 16, 1)]  # 1 needs two blocks and one is left


def test_a_new_block_is_taken_only_for_a_token_that_needs_one():
    scheduler = make_scheduler(block_size=4)
    seq = add(scheduler, 0, prompt_len=3)
    owned = []
    for _ in range(7):
        step(scheduler)
        owned.append(len(seq.block_table))
    assert seq.num_computed_tokens == 9
    assert owned == [1, 1, 2, 2, 2, 2, 3]


def test_block_size_one_takes_a_block_for_every_token():
    scheduler = make_scheduler(num_blocks=5, block_size=1)
    seq = add(scheduler, 0, prompt_len=3, max_tokens=3)
    for num_blocks in (3, 4):
        step(scheduler)
        assert len(seq.block_table) == len(set(seq.block_table)) == num_blocks
    step(scheduler)
    assert seq.finish_reason is FinishReason.LENGTH
    assert all_free(scheduler)


@pytest.mark.parametrize("prompt_len", [1, 7, 8, 9, 16])
def test_a_pool_exactly_as_large_as_one_sequence_is_enough(prompt_len):
    # The K/V of the last token is never needed: 17 tokens fit into 4 blocks of 4.
    scheduler = make_scheduler(num_blocks=4, block_size=4, max_num_batched_tokens=8)
    seqs = [add(scheduler, seq_id, prompt_len, max_num_tokens=17) for seq_id in range(3)]
    steps = 0
    while scheduler.has_unfinished():
        step(scheduler)
        steps += 1
        assert steps <= 3 * 16  # the oldest one gets a token at least in each step
    assert [seq.num_tokens for seq in seqs] == [17, 17, 17]
    assert {seq.finish_reason for seq in seqs} == {FinishReason.LENGTH}
    assert seqs[0].num_preemptions == 0
    assert all_free(scheduler)


# --- preemption ----------------------------------------------------------------------------------------


def three_full_sequences(**limits):
    """Sequences 0, 1, 2 with one full block each, no block left: the next decode of each needs one more."""
    scheduler = make_scheduler(num_blocks=3, block_size=4, **limits)
    seqs = [add(scheduler, seq_id, prompt_len=4, max_tokens=6) for seq_id in range(3)]
    assert plan(step(scheduler)) == [(0, 0, 4), (1, 0, 4), (2, 0, 4)]
    assert num_free(scheduler) == 0
    return scheduler, seqs


def test_when_all_hit_the_last_free_block_in_one_step_the_newest_make_room():
    scheduler, (first, second, third) = three_full_sequences()
    output = step(scheduler)
    assert ids(output.preempted) == [2, 1]  # 0 takes the block of 2; 1 would need another and gives way
    assert plan(output) == [(0, 4, 1)]
    assert (first.num_preemptions, second.num_preemptions, third.num_preemptions) == (0, 1, 1)
    assert second.status is third.status is SequenceStatus.PREEMPTED


def test_the_preempted_wait_in_order_of_arrival_ahead_of_newcomers():
    scheduler, _ = three_full_sequences()
    add(scheduler, 3, prompt_len=1)
    step(scheduler)
    assert ids(scheduler.waiting) == [1, 2, 3]


def test_a_preempted_sequence_owns_nothing_and_recomputes_everything():
    scheduler, (first, second, _) = three_full_sequences()
    step(scheduler)
    assert second.token_ids == [100, 101, 102, 103, WORD]
    assert (second.block_table, second.num_computed_tokens) == ([], 0)
    scheduler.finish(first, FinishReason.STOP)
    output = step(scheduler)
    assert plan(output) == [(1, 0, 5)]  # prompt and output so far, and then the token it was about to draw
    assert output.scheduled[0].samples
    assert second.output_token_ids == [WORD, WORD]
    assert second.num_computed_tokens == 5


def test_recomputation_is_chunked_like_any_prompt():
    scheduler = make_scheduler(num_blocks=4, block_size=4, max_num_seqs=2, max_num_batched_tokens=4)
    first = add(scheduler, 0, prompt_len=4)
    second = add(scheduler, 1, prompt_len=8)
    for _ in range(4):
        step(scheduler)
    assert second.output_token_ids == [WORD]
    assert ids(step(scheduler).preempted) == [1]
    scheduler.finish(first, FinishReason.STOP)
    assert [plan(step(scheduler)) for _ in range(3)] == [[(1, 0, 4)], [(1, 4, 4)], [(1, 8, 1)]]
    assert second.output_token_ids == [WORD, WORD]


def test_nobody_is_admitted_in_a_step_that_preempts():
    scheduler = make_scheduler(num_blocks=4, block_size=2, max_num_seqs=4)
    add(scheduler, 0, prompt_len=2)
    add(scheduler, 1, prompt_len=5)
    step(scheduler)
    add(scheduler, 2, prompt_len=1)
    output = step(scheduler)  # two of the three blocks of 1 are free now, and 2 needs but one
    assert ids(output.preempted) == [1]
    assert plan(output) == [(0, 2, 1)]
    assert num_free(scheduler) == 2
    assert ids(scheduler.waiting) == [1, 2]


def test_a_half_computed_prompt_can_be_preempted_by_an_older_decode():
    scheduler = make_scheduler(num_blocks=4, block_size=4, max_num_seqs=2, max_num_batched_tokens=6)
    add(scheduler, 0, prompt_len=4)
    prompt = add(scheduler, 1, prompt_len=12)
    assert plan(step(scheduler)) == [(0, 0, 4), (1, 0, 2)]
    output = step(scheduler)
    assert ids(output.preempted) == [1]
    assert plan(output) == [(0, 4, 1)]
    assert prompt.num_computed_tokens == 0


def test_room_is_made_for_an_older_sequence_but_not_more_than_needed():
    scheduler = make_scheduler(num_blocks=6, block_size=4)
    add(scheduler, 0, prompt_len=4)
    add(scheduler, 1, prompt_len=6)
    add(scheduler, 2, prompt_len=10)
    assert plan(step(scheduler)) == [(0, 0, 4), (1, 0, 6), (2, 0, 10)]
    output = step(scheduler)
    assert ids(output.preempted) == [2]
    assert plan(output) == [(0, 4, 1), (1, 6, 1)]


def test_the_oldest_always_runs():
    scheduler = make_scheduler(num_blocks=3, block_size=2, max_num_seqs=3)
    seqs = [add(scheduler, seq_id, prompt_len=1, max_num_tokens=7) for seq_id in range(4)]
    for seq in seqs:
        while not seq.is_finished:
            assert step(scheduler).scheduled[0].seq is seq
    assert not scheduler.has_unfinished()
    assert all_free(scheduler)


# --- abort ---------------------------------------------------------------------------------------------


def abort(scheduler, seq):
    free_before, owned = num_free(scheduler), len(seq.block_table)
    scheduler.finish(seq, FinishReason.ABORT)
    scheduler.check()
    assert num_free(scheduler) == free_before + owned
    assert (seq.status, seq.finish_reason) == (SequenceStatus.FINISHED, FinishReason.ABORT)
    assert (seq.block_table, seq.num_computed_tokens) == ([], 0)


def test_abort_while_waiting():
    scheduler = make_scheduler(max_num_seqs=1)
    first, second, third = (add(scheduler, seq_id, prompt_len=4) for seq_id in range(3))
    step(scheduler)
    assert second.status is SequenceStatus.WAITING
    abort(scheduler, second)
    scheduler.finish(first, FinishReason.STOP)
    assert plan(step(scheduler)) == [(2, 0, 4)]
    assert third.status is SequenceStatus.RUNNING


def test_abort_in_the_middle_of_a_prompt():
    scheduler = make_scheduler(max_num_batched_tokens=8)
    seq = add(scheduler, 0, prompt_len=20)
    step(scheduler)
    assert (seq.num_computed_tokens, len(seq.block_table)) == (8, 5)
    abort(scheduler, seq)
    assert all_free(scheduler)
    assert plan(step(scheduler)) == []


def test_abort_while_decoding():
    scheduler = make_scheduler()
    first, second = (add(scheduler, seq_id, prompt_len=4) for seq_id in range(2))
    step(scheduler)
    step(scheduler)
    abort(scheduler, first)
    assert plan(step(scheduler)) == [(1, 5, 1)]
    assert (first.num_output_tokens, second.num_output_tokens) == (2, 3)


def test_abort_while_preempted():
    scheduler, (first, second, third) = three_full_sequences()
    step(scheduler)
    assert second.status is SequenceStatus.PREEMPTED
    abort(scheduler, second)
    scheduler.finish(first, FinishReason.STOP)
    assert plan(step(scheduler)) == [(2, 0, 5)]
    assert third.output_token_ids == [WORD, WORD]


def test_abort_while_the_step_runs_drops_the_token_and_keeps_the_others_in_line():
    scheduler = make_scheduler()
    first, second, third = (add(scheduler, seq_id, prompt_len=4) for seq_id in range(3))
    output = scheduler.schedule()
    abort(scheduler, second)
    assert scheduler.update(output, [7, 8, 9]) == [first, third]
    scheduler.check()
    assert [seq.output_token_ids for seq in (first, second, third)] == [[7], [], [9]]
    scheduler.finish(first, FinishReason.ABORT)
    scheduler.finish(third, FinishReason.ABORT)
    assert all_free(scheduler)


def test_abort_of_a_chunk_that_runs():
    scheduler = make_scheduler(max_num_batched_tokens=8)
    first, second = add(scheduler, 0, prompt_len=4), add(scheduler, 1, prompt_len=20)
    output = scheduler.schedule()
    assert plan(output) == [(0, 0, 4), (1, 0, 4)]
    abort(scheduler, second)
    assert scheduler.update(output, [WORD]) == [first]
    assert second.num_computed_tokens == 0
    scheduler.check()


def test_abort_of_one_that_the_planned_step_preempts():
    scheduler, (first, second, _) = three_full_sequences()
    output = scheduler.schedule()
    assert second in output.preempted
    abort(scheduler, second)
    assert scheduler.update(output, [WORD]) == [first]
    scheduler.check()
    assert ids(scheduler.waiting) == [2]


def test_a_request_that_arrives_while_the_step_runs_waits_for_the_next_one():
    scheduler = make_scheduler()
    add(scheduler, 0, prompt_len=4)
    output = scheduler.schedule()
    add(scheduler, 1, prompt_len=4)
    scheduler.update(output, [WORD])
    assert plan(step(scheduler)) == [(0, 4, 1), (1, 0, 4)]


def test_a_finished_sequence_stays_as_it_is():
    scheduler = make_scheduler()
    seq = add(scheduler, 0, prompt_len=4, max_tokens=1)
    step(scheduler)
    scheduler.finish(seq, FinishReason.ABORT)
    assert seq.finish_reason is FinishReason.LENGTH
    assert all_free(scheduler)
    scheduler.check()


# --- how sequences end ---------------------------------------------------------------------------------


def run_alone(*token_ids, max_tokens=100, **params):
    """Feed these sampled tokens to a sequence with a prompt of 4 until it ends or they do."""
    scheduler = make_scheduler()
    seq = add(scheduler, 0, prompt_len=4, max_tokens=max_tokens, **params)
    for token_id in token_ids:
        assert not seq.is_finished, "the sequence ended too early"
        step(scheduler, token_id)
    assert all_free(scheduler) == seq.is_finished
    return seq


@pytest.mark.parametrize(("token_id", "stop_reason"), [(EOS, None), (STOP, STOP)])
def test_eos_and_stop_tokens_end_the_sequence_and_are_part_of_it(token_id, stop_reason):
    seq = run_alone(WORD, token_id)
    assert seq.finish_reason is FinishReason.STOP
    assert seq.stop_reason == stop_reason
    assert seq.output_token_ids == [WORD, token_id]


def test_ignore_eos_goes_on_after_eos_but_not_after_a_stop_token():
    assert run_alone(EOS, WORD, EOS, ignore_eos=True).finish_reason is None
    seq = run_alone(EOS, STOP, ignore_eos=True)
    assert (seq.finish_reason, seq.stop_reason) == (FinishReason.STOP, STOP)


def test_each_of_several_eos_ids_ends_the_sequence():
    scheduler = make_scheduler()
    seqs = [Sequence(seq_id, [9], SamplingParams(), max_num_tokens=10, eos_token_ids=[0, 7]) for seq_id in range(3)]
    for seq in seqs:
        scheduler.add(seq)
    step(scheduler, 7, 0, 5)
    assert [seq.finish_reason for seq in seqs] == [FinishReason.STOP, FinishReason.STOP, None]
    assert [seq.stop_reason for seq in seqs] == [None, None, None]


@pytest.mark.parametrize("token_id", [EOS, STOP])
def test_before_min_tokens_nothing_stops(token_id):
    assert run_alone(token_id, token_id, min_tokens=2).finish_reason is None
    assert run_alone(token_id, token_id, token_id, min_tokens=2).finish_reason is FinishReason.STOP
    assert run_alone(token_id, token_id, max_tokens=2, min_tokens=2).finish_reason is FinishReason.LENGTH


def test_max_num_tokens_counts_prompt_and_output():
    seq = run_alone(WORD, WORD, max_num_tokens=6)
    assert seq.finish_reason is FinishReason.LENGTH
    assert seq.num_tokens == 6


def test_a_stop_token_in_the_last_place_counts_as_stop():
    assert run_alone(WORD, STOP, max_tokens=2).finish_reason is FinishReason.STOP


def test_stop_tokens_inside_the_prompt_do_not_count():
    scheduler = make_scheduler()
    seq = Sequence(0, [EOS, STOP, EOS], SamplingParams(), max_num_tokens=9, eos_token_ids=[EOS])
    scheduler.add(seq)
    step(scheduler)
    assert seq.finish_reason is None


def test_a_prompt_that_leaves_no_room_for_a_token_is_a_bug_of_the_caller():
    for prompt, max_num_tokens in (([], 4), ([9] * 4, 4), ([9] * 5, 4)):
        with pytest.raises(AssertionError, match="refuses such prompts at the door"):
            Sequence(0, prompt, SamplingParams(), max_num_tokens=max_num_tokens)


# --- update and check ----------------------------------------------------------------------------------


def test_update_returns_those_that_got_a_token_finished_or_not():
    scheduler = make_scheduler(max_num_batched_tokens=8)
    first, second, third = add(scheduler, 0, 2), add(scheduler, 1, 2), add(scheduler, 2, prompt_len=9)
    output = scheduler.schedule()
    assert [s.samples for s in output.scheduled] == [True, True, False]
    assert scheduler.update(output, [EOS, WORD]) == [first, second]
    assert [seq.is_finished for seq in (first, second, third)] == [True, False, False]


def test_update_wants_a_token_for_each_sampling_sequence():
    scheduler = make_scheduler()
    add(scheduler, 0, prompt_len=2)
    output = scheduler.schedule()
    with pytest.raises(AssertionError, match="2 tokens for 1 sampling sequences"):
        scheduler.update(output, [WORD, WORD])


def swap_the_queue(scheduler, first, second):
    scheduler.waiting.reverse()


def lose_a_block(scheduler, first, second):
    first.block_table.pop()


def hold_a_block_of_another(scheduler, first, second):
    first.block_table[0] = second.block_table[0]


def keep_blocks_while_waiting(scheduler, first, second):
    scheduler.waiting[0].block_table = [0]


def claim_too_much_computed(scheduler, first, second):
    first.num_computed_tokens = first.num_tokens


def run_on_after_the_end(scheduler, first, second):
    first.max_num_tokens = first.num_tokens


def forget_the_status(scheduler, first, second):
    second.status = SequenceStatus.FINISHED


@pytest.mark.parametrize(
    "damage",
    [
        swap_the_queue,
        lose_a_block,
        hold_a_block_of_another,
        keep_blocks_while_waiting,
        claim_too_much_computed,
        run_on_after_the_end,
        forget_the_status,
    ],
)
def test_check_notices(damage):
    scheduler = make_scheduler(max_num_seqs=2)
    seqs = [add(scheduler, seq_id, prompt_len=6) for seq_id in range(4)]
    step(scheduler)
    damage(scheduler, *seqs[:2])
    with pytest.raises(AssertionError):
        scheduler.check()
