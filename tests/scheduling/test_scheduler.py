"""The scheduler by example. A plan is written as [(seq_id, start, num_tokens), ...]."""

import pytest

from mini_vllm.sampling_params import SamplingParams
from mini_vllm.scheduling.block_manager import BlockManager
from mini_vllm.scheduling.policy import LENGTH_FACTOR, POLICIES, PRIORITY_TOKENS
from mini_vllm.scheduling.radix_tree import RadixTree
from mini_vllm.scheduling.scheduler import MAX_PREEMPTIONS, Scheduler
from mini_vllm.scheduling.sequence import PENDING, FinishReason, Sequence, SequenceStatus

EOS, STOP, WORD = 0, 1, 5


def make_scheduler(
    *,
    num_blocks=100,
    block_size=4,
    max_num_seqs=8,
    max_num_batched_tokens=100,
    cached=False,
    num_host_blocks=0,
    policy="fcfs",
):
    blocks = BlockManager(num_blocks, block_size)
    host = BlockManager(num_host_blocks, block_size) if num_host_blocks else None
    return Scheduler(
        blocks,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        cache=RadixTree(blocks, host) if cached or host else None,
        policy=POLICIES[policy],
    )


def add(
    scheduler,
    seq_id,
    prompt_len=None,
    *,
    prompt=None,
    max_tokens=100,
    max_num_tokens=None,
    fork_of=None,
    cache_salt=None,
    priority=0,
    **params,
):
    prompt = list(range(100, 100 + prompt_len)) if prompt is None else prompt
    seq = Sequence(
        seq_id,
        prompt,
        SamplingParams(max_tokens=None, stop_token_ids=[STOP], **params),
        max_num_tokens=max_num_tokens or len(prompt) + max_tokens,
        eos_token_ids=[EOS],
        fork_of=fork_of,
        cache_salt=cache_salt,
        priority=priority,
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


def finish_all(scheduler):
    for seq in (*scheduler.running, *scheduler.waiting):
        scheduler.finish(seq, FinishReason.ABORT)
    scheduler.check()


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


@pytest.mark.parametrize(("policy", "order"), [("fcfs", [1, 2]), ("priority", [2, 1])])
def test_nobody_is_admitted_in_a_step_that_preempts(policy, order):
    scheduler = make_scheduler(num_blocks=4, block_size=2, max_num_seqs=4, policy=policy)
    add(scheduler, 0, prompt_len=2)
    add(scheduler, 1, prompt_len=5)
    step(scheduler)
    add(scheduler, 2, prompt_len=1, priority=-1)
    output = step(scheduler)  # two of the three blocks of 1 are free now, and 2 needs but one
    assert ids(output.preempted) == [1]
    assert plan(output) == [(0, 2, 1)]
    assert num_free(scheduler) == 2
    assert ids(scheduler.waiting) == order


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


def test_who_was_preempted_too_often_is_spared_while_another_can_go():
    scheduler, (*_, third) = three_full_sequences()
    third.num_preemptions = MAX_PREEMPTIONS
    output = step(scheduler)
    assert ids(output.preempted) == [1, 2]  # 0 takes the block of 1, and 2 finds none
    assert plan(output) == [(0, 4, 1)]


def test_if_all_were_preempted_too_often_the_last_goes_but_never_the_first():
    scheduler, seqs = three_full_sequences()
    for seq in seqs:
        seq.num_preemptions = MAX_PREEMPTIONS
    seqs[0].num_preemptions = 0
    output = step(scheduler)
    assert ids(output.preempted) == [2, 1]
    assert plan(output) == [(0, 4, 1)]


def test_who_is_part_of_the_step_already_does_not_make_room():
    scheduler = make_scheduler(num_blocks=3, block_size=4)
    *_, third = [add(scheduler, seq_id, prompt_len) for seq_id, prompt_len in enumerate((2, 2, 4))]
    step(scheduler)
    third.num_preemptions = MAX_PREEMPTIONS
    output = step(scheduler)
    assert ids(output.preempted) == [2]
    assert plan(output) == [(0, 2, 1), (1, 2, 1)]


def test_one_that_gives_way_itself_does_not_shield_those_after_it():
    scheduler = make_scheduler(num_blocks=4, block_size=4)
    seqs = [add(scheduler, seq_id, prompt_len=4 if seq_id else 2) for seq_id in range(4)]
    step(scheduler)
    seqs[2].num_preemptions = seqs[3].num_preemptions = MAX_PREEMPTIONS
    output = step(scheduler)
    assert ids(output.preempted) == [1, 3]  # 2 takes the block of 1, and 3 finds none
    assert plan(output) == [(0, 2, 1), (2, 4, 1)]


def test_the_oldest_always_runs():
    scheduler = make_scheduler(num_blocks=3, block_size=2, max_num_seqs=3)
    seqs = [add(scheduler, seq_id, prompt_len=1, max_num_tokens=7) for seq_id in range(4)]
    for seq in seqs:
        while not seq.is_finished:
            assert step(scheduler).scheduled[0].seq is seq
    assert not scheduler.has_unfinished()
    assert all_free(scheduler)


# --- seats ---------------------------------------------------------------------------------------------


def test_running_sequences_have_a_seat_each_and_others_have_none():
    scheduler = make_scheduler(max_num_seqs=2)
    seqs = [add(scheduler, seq_id, prompt_len=4) for seq_id in range(3)]
    output = step(scheduler)
    assert output.admitted == seqs[:2]
    assert [seq.seat for seq in seqs] == [0, 1, None]
    scheduler.finish(seqs[0], FinishReason.STOP)
    output = step(scheduler)
    assert (output.admitted, output.grown) == ([seqs[2]], [seqs[1]])
    assert [seq.seat for seq in seqs] == [None, 1, 0]


def test_a_preempted_sequence_leaves_its_seat_and_may_get_another():
    scheduler, (first, second, third) = three_full_sequences()
    output = step(scheduler)
    assert output.grown == [first]
    assert (second.seat, third.seat) == (None, None)
    scheduler.finish(first, FinishReason.STOP)
    output = step(scheduler)
    assert output.admitted == [second]
    assert second.seat is not None


# --- the prefix cache ----------------------------------------------------------------------------------

A, B, C, D = ([100 * i + 10 * j for j in range(1, 5)] for i in range(1, 5))  # a block each, where block_size is 4


def run_to_the_end(scheduler, seq_id, prompt, max_tokens=1, **arguments):
    """One sequence alone; returns it, and its first plan."""
    seq = add(scheduler, seq_id, prompt=prompt, max_tokens=max_tokens, **arguments)
    output = step(scheduler)
    while not seq.is_finished:
        step(scheduler)
    return seq, output


def num_cached(scheduler, prompt, salt=None):
    """Blocks of a prompt that the cache holds, on the device or the host."""
    return scheduler.cache.match(prompt, len(prompt), salt).depth


def test_equal_prefixes_share_blocks_within_one_step():
    scheduler = make_scheduler(cached=True)
    first = add(scheduler, 0, prompt=[*A, *B, 7, 7])
    second = add(scheduler, 1, prompt=[*A, *B, 8])
    third = add(scheduler, 2, prompt=[*A, 9])
    assert plan(step(scheduler)) == [(0, 0, 10), (1, 8, 1), (2, 4, 1)]
    assert second.block_table[:2] == first.block_table[:2]
    assert third.block_table[:1] == first.block_table[:1]
    assert [seq.num_cached_tokens for seq in (first, second, third)] == [0, 8, 4]
    assert num_free(scheduler) == 100 - 3 - 1 - 1


def test_what_a_chunk_computes_is_shared_from_that_step_on():
    scheduler = make_scheduler(cached=True, max_num_batched_tokens=9)
    add(scheduler, 0, prompt=[*A, *B, *C, 7])
    assert plan(step(scheduler)) == [(0, 0, 9)]
    second = add(scheduler, 1, prompt=[*A, *B, *C, 8])
    assert plan(step(scheduler)) == [(0, 9, 4), (1, 12, 1)]
    assert second.num_cached_tokens == 12


def test_the_last_token_of_a_prompt_is_shared_too_where_a_chunk_left_it_alone():
    scheduler = make_scheduler(cached=True, max_num_batched_tokens=11)
    first = add(scheduler, 0, prompt=[*A, *B, *C])
    assert plan(step(scheduler)) == [(0, 0, 11)]
    second = add(scheduler, 1, prompt=[*A, *B, *C, 7])
    assert plan(step(scheduler)) == [(0, 11, 1), (1, 12, 1)]
    assert first.block_table[:3] == second.block_table[:3]


def test_two_that_compute_the_same_block_keep_one_each():
    scheduler = make_scheduler(cached=True)
    first = add(scheduler, 0, prompt=[*A, *B, *[WORD] * 3])
    step(scheduler)
    second = add(scheduler, 1, prompt=[*A, *B, *[WORD] * 4, 7])
    assert plan(step(scheduler)) == [(0, 11, 1), (1, 8, 5)]  # 0 fills its third block with a token that it has drawn
    assert first.block_table[:2] == second.block_table[:2]
    assert first.block_table[2] != second.block_table[2]
    finish_all(scheduler)
    assert num_free(scheduler) == 100 - 3


@pytest.mark.parametrize(("length", "cached"), [(1, 0), (4, 0), (5, 4), (8, 4), (9, 8), (12, 8), (13, 12)])
def test_a_full_hit_still_computes_one_token_at_least(length, cached):
    """As blocks are shared whole, that is the whole last block if the prompt fills it."""
    scheduler = make_scheduler(cached=True)
    prompt = [*A, *B, *C, 7][:length]
    run_to_the_end(scheduler, 0, prompt, max_tokens=8)
    seq, output = run_to_the_end(scheduler, 1, prompt)
    assert plan(output) == [(1, cached, length - cached)]
    assert seq.num_cached_tokens == cached


def test_the_next_turn_of_a_chat_finds_prompt_and_answer():
    scheduler = make_scheduler(cached=True)
    seq, _ = run_to_the_end(scheduler, 0, [*A, 7], max_tokens=8)
    assert seq.num_tokens == 13
    next_turn, output = run_to_the_end(scheduler, 1, [*seq.token_ids, 8, 9], max_tokens=8)
    assert plan(output) == [(1, 12, 3)]
    assert num_cached(scheduler, next_turn.token_ids) == 5  # of 23 tokens, the last of which was never computed


def test_the_last_token_of_an_answer_is_not_computed_and_not_cached():
    scheduler = make_scheduler(cached=True)
    seq, _ = run_to_the_end(scheduler, 0, [*A, 7], max_tokens=3)
    assert seq.num_tokens == 8
    assert num_cached(scheduler, seq.token_ids) == 1


def test_prefixes_are_shared_under_the_same_salt_only():
    scheduler = make_scheduler(cached=True)
    for seq_id, salt in enumerate([None, "a", "b", "a", None]):
        add(scheduler, seq_id, prompt=[*A, *B, 7], cache_salt=salt)
    assert plan(step(scheduler)) == [(0, 0, 9), (1, 0, 9), (2, 0, 9), (3, 8, 1), (4, 8, 1)]
    finish_all(scheduler)
    _, output = run_to_the_end(scheduler, 5, [*A, *B, 7], cache_salt="b")
    assert plan(output) == [(5, 8, 1)]
    _, output = run_to_the_end(scheduler, 6, [*A, *B, 7], cache_salt="c")
    assert plan(output) == [(6, 0, 9)]


def test_an_aborted_prompt_leaves_what_it_has_computed():
    scheduler = make_scheduler(cached=True, max_num_batched_tokens=9)
    seq = add(scheduler, 0, prompt=[*A, *B, *C, 7])
    step(scheduler)
    scheduler.finish(seq, FinishReason.ABORT)
    scheduler.check()
    assert (num_free(scheduler), scheduler.num_available_blocks) == (98, 100)
    assert plan(run_to_the_end(scheduler, 1, [*A, *B, *C, 7])[1]) == [(1, 8, 5)]


def test_a_preempted_sequence_finds_its_blocks_again_if_nobody_took_them():
    scheduler = make_scheduler(num_blocks=4, cached=True)
    first, second = add(scheduler, 0, prompt=D), add(scheduler, 1, prompt=[*A, *B, 7])
    step(scheduler)
    output = step(scheduler)
    assert (ids(output.preempted), plan(output)) == ([1], [(0, 4, 1)])
    assert scheduler.num_available_blocks == 2
    scheduler.finish(first, FinishReason.STOP)
    assert plan(step(scheduler)) == [(1, 8, 2)]  # 7, and the token it had drawn
    assert second.num_cached_tokens == 0, "what it had computed itself does not count"


def test_the_least_recently_used_make_room_and_what_runs_never_does():
    scheduler = make_scheduler(num_blocks=5, cached=True)
    for seq_id, prompt in enumerate([A, B, C]):
        run_to_the_end(scheduler, seq_id, [*prompt, 7])
    assert num_free(scheduler) == 2
    running = add(scheduler, 3, prompt=[*A, 7])
    assert plan(step(scheduler)) == [(3, 4, 1)]
    run_to_the_end(scheduler, 4, [*D, 7])  # takes the last free block, and that of B
    assert [num_cached(scheduler, prompt) for prompt in (A, B, C, D)] == [1, 0, 1, 1]
    add(scheduler, 5, prompt=[*B, *C, *D])
    assert plan(step(scheduler)) == [(3, 6, 1), (5, 0, 12)]
    assert [num_cached(scheduler, prompt) for prompt in (A, C, D)] == [1, 0, 0]
    assert not running.is_finished


def test_a_hit_is_not_evicted_to_make_room_for_the_rest_of_its_prompt():
    scheduler = make_scheduler(num_blocks=3, cached=True)
    run_to_the_end(scheduler, 0, [*A, 7])
    run_to_the_end(scheduler, 1, [*B, 7])
    _, output = run_to_the_end(scheduler, 2, [*A, *C, 7])
    assert plan(output) == [(2, 4, 5)]


def test_decoding_takes_blocks_of_the_cache_before_those_of_others():
    scheduler = make_scheduler(num_blocks=4, cached=True)
    run_to_the_end(scheduler, 0, [*A, 7])
    for seq_id, prompt in ((1, B), (2, C)):
        add(scheduler, seq_id, prompt=prompt)
    step(scheduler)
    output = step(scheduler)
    assert (plan(output), output.preempted) == ([(1, 4, 1), (2, 4, 1)], [])
    assert (num_cached(scheduler, A), num_free(scheduler)) == (0, 0)


def test_who_waits_for_blocks_does_not_keep_its_hit_from_others():
    scheduler = make_scheduler(num_blocks=4, cached=True)
    run_to_the_end(scheduler, 0, [*A, 7])
    running = add(scheduler, 1, prompt=[*B, *C])
    step(scheduler)
    add(scheduler, 2, prompt=[*A, *D, 7])
    assert plan(step(scheduler)) == [(1, 8, 1)]
    for _ in range(4):  # the fourth block of 1 is the cached one
        step(scheduler)
    assert len(running.block_table) == 4
    assert num_cached(scheduler, A) == 0


def test_a_prompt_to_score_is_computed_whole_and_cached_for_others():
    scheduler = make_scheduler(cached=True)
    run_to_the_end(scheduler, 0, [*A, 7])
    seq, output = run_to_the_end(scheduler, 1, [*A, *B, 7], prompt_logprobs=0)
    assert plan(output) == [(1, 0, 9)]
    assert seq.num_cached_tokens == 0
    assert plan(run_to_the_end(scheduler, 2, [*A, *B, 8])[1]) == [(2, 8, 1)]


def test_a_sequence_that_fits_alone_fits_although_others_cached_the_same_prompt():
    """It computes what is cached in other blocks, which must not be held on its behalf."""
    scheduler = make_scheduler(num_blocks=6, block_size=1, cached=True)
    run_to_the_end(scheduler, 0, [9, 9, 9])
    seq, _ = run_to_the_end(scheduler, 1, [9, 9, 9], max_tokens=4, prompt_logprobs=0)
    assert (seq.finish_reason, seq.num_preemptions) == (FinishReason.LENGTH, 0)


def test_after_a_reset_nothing_is_found_and_what_runs_goes_on():
    scheduler = make_scheduler(cached=True)
    run_to_the_end(scheduler, 0, [*A, 7])
    running = add(scheduler, 1, prompt=[*B, 7])
    step(scheduler)
    scheduler.reset_prefix_cache()
    scheduler.check()
    assert num_free(scheduler) == 100 - 2
    for seq_id, prompt in ((2, A), (3, B)):
        add(scheduler, seq_id, prompt=[*prompt, 7])
    assert plan(step(scheduler)) == [(1, 5, 1), (2, 0, 5), (3, 0, 5)]
    scheduler.finish(running, FinishReason.STOP)
    finish_all(scheduler)
    assert (num_cached(scheduler, A), num_cached(scheduler, B), num_free(scheduler)) == (1, 1, 98)


def test_the_cache_counts_tokens_looked_up_and_found():
    scheduler = make_scheduler(cached=True)
    run_to_the_end(scheduler, 0, [*A, *B, 7])
    run_to_the_end(scheduler, 1, [*A, *B, 8, 9])
    stats = scheduler.cache.stats()
    assert (stats.queried_tokens, stats.hit_tokens) == (19, 8)


# --- forks ---------------------------------------------------------------------------------------------


def add_samples(scheduler, prompt, n, first_id=0, **arguments):
    """A prompt's n samples, as the engine adds them."""
    source = add(scheduler, first_id, prompt=prompt, **arguments)
    forks = [add(scheduler, first_id + i, prompt=prompt, fork_of=source, **arguments) for i in range(1, n)]
    return [source, *forks]


@pytest.fixture(params=[False, True], ids=["no cache", "cache"])
def cached(request):
    return request.param


def test_forks_share_the_full_blocks_and_copy_the_last_one(cached):
    scheduler = make_scheduler(cached=cached)
    source, *forks = add_samples(scheduler, [*A, *B, 7, 8, 9], n=3)
    output = step(scheduler)
    assert (plan(output), output.copies) == ([(0, 0, 11)], [])
    output = step(scheduler)
    assert plan(output) == [(0, 11, 1), (1, 10, 1), (2, 10, 1)]
    assert output.copies == [(source.block_table[2], fork.block_table[2]) for fork in forks]
    assert all(fork.block_table[:2] == source.block_table[:2] for fork in forks)
    assert all(fork.fork_of is None and fork.num_cached_tokens == 10 for fork in forks)
    assert num_free(scheduler) == 100 - 3 - 2
    finish_all(scheduler)
    scheduler.reset_prefix_cache()
    assert all_free(scheduler)


@pytest.mark.parametrize(
    ("prompt", "start", "num_shared", "num_copies"),
    [([*A, *B], 7, 1, 1), ([*A, *B, 7], 8, 2, 0), ([*A, *B, 7, 8], 9, 2, 1), ([7], 0, 0, 0), ([7, 8], 1, 0, 1)],
    ids=["full blocks", "and one", "and two", "one token", "two tokens"],
)
def test_forks_at_the_edges_of_blocks(cached, prompt, start, num_shared, num_copies):
    scheduler = make_scheduler(cached=cached)
    source, fork = add_samples(scheduler, prompt, n=2)
    outputs = [step(scheduler), step(scheduler)]
    output = outputs[0] if fork in outputs[0].admitted else outputs[1]
    assert (1, start, len(prompt) - start) in plan(output)
    assert len(output.copies) == num_copies
    assert [a == b for a, b in zip(source.block_table, fork.block_table, strict=False)][:3].count(True) == num_shared


def test_forks_wait_for_the_prompt_and_those_behind_them_do_not(cached):
    scheduler = make_scheduler(cached=cached, max_num_batched_tokens=9, max_num_seqs=4)
    add_samples(scheduler, [*A, *B, 7, 8, 9], n=2)
    add(scheduler, 2, prompt=C)
    assert plan(step(scheduler)) == [(0, 0, 9)]
    assert plan(step(scheduler)) == [(0, 9, 2), (2, 0, 4)]  # a fork could use the first 10 tokens
    assert plan(step(scheduler)) == [(0, 11, 1), (2, 4, 1), (1, 10, 1)]
    assert ids(scheduler.running) == [0, 1, 2]


def test_a_fork_whose_prompt_was_found_in_the_cache_need_not_wait():
    scheduler = make_scheduler(cached=True)
    run_to_the_end(scheduler, 9, [*A, *B, 7])
    add_samples(scheduler, [*A, *B, 8], n=3)
    output = step(scheduler)
    assert (plan(output), output.copies) == ([(0, 8, 1), (1, 8, 1), (2, 8, 1)], [])


def test_a_fork_waits_for_blocks_that_its_source_found_but_this_step_computes():
    """Its copy comes before the step: the block that it copies from would be another sequence's old one."""
    scheduler = make_scheduler(cached=True, num_blocks=3, block_size=2, max_num_seqs=3, max_num_batched_tokens=4)
    _, aborted, late = add_samples(scheduler, [7, 8], n=3, max_tokens=2)
    source, fork, _ = add_samples(scheduler, [7, 8], n=3, first_id=3, max_tokens=2)
    scheduler.finish(aborted, FinishReason.ABORT)
    assert plan(step(scheduler)) == [(0, 0, 2), (3, 0, 2)]
    scheduler.reset_prefix_cache()
    output = step(scheduler)
    assert (plan(output), output.preempted) == ([(0, 2, 1)], [source])
    output = scheduler.schedule()  # the source is back, and shares the block that `late` fills in this step
    assert (plan(output), output.admitted) == ([(2, 0, 2), (3, 2, 1)], [late, source])
    assert source.block_table[0] == late.block_table[0]
    scheduler.update(output, [WORD, WORD])
    assert fork in step(scheduler).admitted
    finish_all(scheduler)


def test_a_fork_of_a_source_that_is_gone_runs_like_any_other(cached):
    scheduler = make_scheduler(cached=cached)
    source, *_ = add_samples(scheduler, [*A, *B, 7, 8, 9], n=3)
    step(scheduler)
    scheduler.finish(source, FinishReason.ABORT)
    output = step(scheduler)
    if cached:
        assert (plan(output), output.copies) == ([(1, 8, 3), (2, 8, 3)], [])
    else:
        assert (plan(output), output.copies) == ([(1, 0, 11), (2, 0, 11)], [])


def test_a_fork_of_a_source_that_is_aborted_while_it_waits_runs_like_any_other(cached):
    scheduler = make_scheduler(cached=cached)
    source, *_ = add_samples(scheduler, [*A, 7, 8], n=3)
    scheduler.finish(source, FinishReason.ABORT)
    assert plan(step(scheduler)) == [(1, 0, 6), (2, 4, 2) if cached else (2, 0, 6)]


def test_a_fork_of_a_preempted_source_runs_like_any_other(cached):
    scheduler = make_scheduler(num_blocks=4, cached=cached, max_num_seqs=2)
    first = add(scheduler, 0, prompt=C)
    source, fork = add_samples(scheduler, [*A, 7, 8], n=2, first_id=1)
    while source.status is not SequenceStatus.PREEMPTED:
        step(scheduler)
    scheduler.finish(first, FinishReason.STOP)
    scheduler.finish(source, FinishReason.STOP)
    assert plan(step(scheduler)) == [(2, 4, 2) if cached else (2, 0, 6)]
    assert fork.num_cached_tokens == (4 if cached else 0)


def test_samples_run_one_after_the_other_if_there_is_one_seat(cached):
    scheduler = make_scheduler(cached=cached, max_num_seqs=1)
    seqs = add_samples(scheduler, [*A, 7], n=3, max_tokens=2)
    start = 4 if cached else 0
    plans = []
    while scheduler.has_unfinished():
        plans.append(plan(step(scheduler)))
    assert plans == [
        [(0, 0, 5)],
        [(0, 5, 1)],
        [(1, start, 5 - start)],
        [(1, 5, 1)],
        [(2, start, 5 - start)],
        [(2, 5, 1)],
    ]
    assert [seq.num_output_tokens for seq in seqs] == [2, 2, 2]


def test_a_fork_may_go_on_from_generated_tokens_with_another_last_one(cached):
    """As a beam does. What the source has generated becomes the cache's then, so that it outlives both."""
    scheduler = make_scheduler(cached=cached)
    source = add(scheduler, 0, prompt=[*A, 7])
    for _ in range(5):
        step(scheduler)
    assert source.num_tokens == 10
    fork = add(scheduler, 1, prompt=[*source.token_ids[:-1], 8])
    other = add(scheduler, 2, prompt=[*source.token_ids[:-1], 9], fork_of=source)
    fork.fork_of = source
    output = step(scheduler)
    assert plan(output) == [(0, 9, 1), (1, 9, 1), (2, 9, 1)]
    assert output.copies == [(source.block_table[2], seq.block_table[2]) for seq in (fork, other)]
    for seq in (fork, source, other):
        scheduler.finish(seq, FinishReason.STOP)
        scheduler.check()
        assert scheduler.num_available_blocks == 100 - len({b for s in scheduler.running for b in s.block_table})


def test_forks_of_a_sequence_that_scores_its_prompt():
    """It computes what is cached in other blocks; its forks take the cached ones."""
    scheduler = make_scheduler(cached=True)
    run_to_the_end(scheduler, 9, [*A, 7])
    source = add(scheduler, 0, prompt=[*A, *B, 7, 8], prompt_logprobs=0)
    fork = add(scheduler, 1, prompt=[*A, *B, 7, 8], fork_of=source)
    step(scheduler)
    step(scheduler)
    assert fork.status is SequenceStatus.RUNNING
    assert fork.block_table[0] != source.block_table[0]
    scheduler.finish(fork, FinishReason.STOP)
    scheduler.check()
    assert scheduler.num_available_blocks == 100 - 3


def test_a_fork_that_scores_its_prompt_computes_it(cached):
    scheduler = make_scheduler(cached=cached)
    source = add(scheduler, 0, prompt=[7, 8, 9])
    add(scheduler, 1, prompt=[7, 8, 9], fork_of=source, prompt_logprobs=0)
    step(scheduler)
    output = step(scheduler)
    assert (plan(output), output.copies) == ([(0, 3, 1), (1, 0, 3)], [])


def test_a_fork_takes_nothing_over_that_was_computed_before_a_reset():
    scheduler = make_scheduler(cached=True)
    add_samples(scheduler, [7, 8, 9], n=2)
    step(scheduler)
    scheduler.reset_prefix_cache()
    output = step(scheduler)
    assert (plan(output), output.copies) == ([(0, 3, 1), (1, 0, 3)], [])


# --- host memory ---------------------------------------------------------------------------------------


def with_b_on_the_host(num_host_blocks):
    """A pool of 4: A, C and D are cached in it, one block is free; B, the end of "A B", is on the host."""
    scheduler = make_scheduler(num_blocks=4, num_host_blocks=num_host_blocks)
    run_to_the_end(scheduler, 0, [*A, *B, 7])
    _, output = run_to_the_end(scheduler, 1, [*C, *D, 7])
    assert [(t.to_host, t.target) for t in output.transfers] == [(True, 0)]
    assert (num_free(scheduler), scheduler.cache.stats().num_host_blocks) == (1, 1)
    return scheduler


def test_what_went_to_the_host_is_loaded_when_it_is_asked_for():
    scheduler = with_b_on_the_host(num_host_blocks=3)
    seq = add(scheduler, 2, prompt=[*A, *B, 8])
    output = step(scheduler)
    assert plan(output) == [(2, 8, 1)]
    assert output.transfers[0] == (False, 0, seq.block_table[1])
    assert seq.num_cached_tokens == 8


def test_a_host_block_that_a_load_leaves_may_be_filled_in_the_same_step_but_later():
    scheduler = with_b_on_the_host(num_host_blocks=1)
    d = scheduler.cache.match([*C, *D], 2).path_block_ids()[1]
    seq = add(scheduler, 2, prompt=[*A, *B, 8])
    assert step(scheduler).transfers == [(False, 0, seq.block_table[1]), (True, d, 0)]
    assert seq.block_table[2] == d


def test_a_host_block_may_be_filled_twice_in_a_step():
    scheduler = make_scheduler(num_blocks=4, num_host_blocks=1)
    for seq_id, prompt in enumerate([[*A, 7], [*B, 7]]):
        run_to_the_end(scheduler, seq_id, prompt)
    a, b = (scheduler.cache.match(prompt, 1).block_ids[0] for prompt in (A, B))
    for seq_id, prompt in ((2, C), (3, D)):
        add(scheduler, seq_id, prompt=prompt)
    step(scheduler)
    output = step(scheduler)
    assert output.transfers == [(True, a, 0), (True, b, 0)]
    assert (num_cached(scheduler, A), num_cached(scheduler, B)) == (0, 1)


def test_what_is_computed_faster_than_loaded_is_computed():
    scheduler = with_b_on_the_host(num_host_blocks=3)
    scheduler.seconds_to_compute_token = 1e-3
    scheduler.seconds_to_load_block = 4e-3
    seq = add(scheduler, 2, prompt=[*A, *B, 8])
    output = step(scheduler)
    assert plan(output) == [(2, 4, 5)]
    assert [t.to_host for t in output.transfers] == [True]  # D makes room
    assert scheduler.cache.stats().num_host_blocks == 1, "the new B replaces the one on the host"
    assert scheduler.cache.match([*A, *B], 2).path_block_ids() == seq.block_table[:2]

    scheduler = with_b_on_the_host(num_host_blocks=3)
    scheduler.seconds_to_compute_token = 1e-3
    scheduler.seconds_to_load_block = 3.9e-3
    add(scheduler, 2, prompt=[*A, *B, 8])
    assert plan(step(scheduler)) == [(2, 8, 1)]


def test_making_room_for_a_load_comes_before_it():
    scheduler = with_b_on_the_host(num_host_blocks=3)
    c, d = scheduler.cache.match([*C, *D], 2).path_block_ids()
    add(scheduler, 2, prompt=[7])
    step(scheduler)
    assert num_free(scheduler) == 0
    add(scheduler, 3, prompt=[*A, *B, 8])
    transfers = step(scheduler).transfers
    assert [(t.to_host, t.source) for t in transfers] == [(True, d), (False, 0), (True, c)]
    assert transfers[1].target == d


def test_admission_counts_the_blocks_that_loading_takes():
    scheduler = with_b_on_the_host(num_host_blocks=3)
    add(scheduler, 2, prompt=[*C, 7])
    step(scheduler)
    waiting = add(scheduler, 3, prompt=[*A, *B, 8])
    assert plan(step(scheduler)) == [(2, 5, 1)]  # A is there, but only one of B and 8 would find a place
    assert waiting.status is SequenceStatus.WAITING
    scheduler.finish(scheduler.running[0], FinishReason.STOP)
    assert plan(step(scheduler)) == [(3, 8, 1)]


def test_a_preempted_sequence_is_swapped_out_and_in():
    scheduler = make_scheduler(num_blocks=4, num_host_blocks=4)
    first, second = add(scheduler, 0, prompt=D), add(scheduler, 1, prompt=[*A, *B, 7])
    step(scheduler)
    assert ids(step(scheduler).preempted) == [1]
    out = [t for _ in range(4) for t in step(scheduler).transfers]
    assert [t.to_host for t in out] == [True]  # B, when 0 needs a third block
    scheduler.finish(first, FinishReason.STOP)
    output = step(scheduler)
    assert [(t.to_host, t.source) for t in output.transfers][:1] == [(False, out[0].target)]
    assert plan(output) == [(1, 8, 2)]
    assert second.num_output_tokens == 2


# --- policies ------------------------------------------------------------------------------------------


def test_places_are_counted_in_tokens_of_work():
    seq = Sequence(0, range(30), SamplingParams(), max_num_tokens=99, priority=2)
    assert [POLICIES[name](seq, 1000) for name in ("fcfs", "priority", "sjf")] == [
        0,
        1000 + 2 * PRIORITY_TOKENS,
        1000 + 30 * LENGTH_FACTOR,
    ]


def test_priority_runs_lower_numbers_first_and_equals_in_order_of_arrival():
    scheduler = make_scheduler(max_num_seqs=1, policy="priority")
    for seq_id, priority in enumerate([1, 0, 1, -1, 0]):
        add(scheduler, seq_id, prompt_len=4, max_tokens=1, priority=priority)
    assert ids(scheduler.waiting) == [3, 1, 4, 0, 2]
    assert [plan(step(scheduler)) for _ in range(5)] == [[(i, 0, 4)] for i in (3, 1, 4, 0, 2)]


def test_priority_decides_who_makes_room():
    scheduler = make_scheduler(num_blocks=2, policy="priority")
    add(scheduler, 0, prompt_len=4, priority=1)
    step(scheduler)
    add(scheduler, 1, prompt_len=3, priority=0)
    output = step(scheduler)
    assert (plan(output), output.preempted) == ([(0, 4, 1)], [])  # who runs makes no room for one that waits
    scheduler.finish(scheduler.running[0], FinishReason.STOP)
    add(scheduler, 2, prompt_len=4, priority=1)
    assert plan(step(scheduler)) == [(1, 0, 3), (2, 0, 4)]
    assert plan(step(scheduler)) == [(1, 3, 1)]
    assert ids(scheduler.waiting) == [2]


def test_sjf_runs_the_shortest_prompt_first():
    scheduler = make_scheduler(max_num_seqs=1, policy="sjf")
    for seq_id, prompt_len in enumerate([9, 3, 20, 1]):
        add(scheduler, seq_id, prompt_len, max_tokens=1)
    assert [plan(step(scheduler))[0][0] for _ in range(4)] == [3, 1, 0, 2]


def steps_until_it_starts(scheduler, seq, arrivals):
    """Steps that `seq` waits while one request arrives before each."""
    for i in range(1, 2001):
        next(arrivals)
        step(scheduler)
        if seq.status is not SequenceStatus.WAITING:
            return i
    raise AssertionError("it starved")


def arrivals(scheduler, prompt_len, **arguments):
    for seq_id in range(1, 3000):
        yield add(scheduler, seq_id, prompt_len, max_tokens=1, **arguments)


def test_a_thousand_short_ones_do_not_starve_a_long_one():
    scheduler = make_scheduler(block_size=100, max_num_seqs=1, policy="sjf")
    long = add(scheduler, 0, prompt_len=1000, max_tokens=1)
    steps = steps_until_it_starts(scheduler, long, arrivals(scheduler, prompt_len=10))
    # Each short one moves the clock by 10, and the long one must make up for 990 tokens more.
    assert steps == 990 * LENGTH_FACTOR // 10 + 1


def test_a_thousand_long_ones_do_not_starve_a_short_one():
    scheduler = make_scheduler(block_size=100, max_num_seqs=1, policy="sjf")
    for _ in arrivals(scheduler, prompt_len=50):
        if scheduler.num_waiting == 1000:
            break
    step(scheduler)
    short = add(scheduler, 5000, prompt_len=10, max_tokens=1)
    assert plan(step(scheduler)) == [(5000, 0, 10)]
    assert short.is_finished


def test_urgent_requests_do_not_starve_the_others():
    scheduler = make_scheduler(block_size=100, max_num_seqs=1, max_num_batched_tokens=1000, policy="priority")
    patient = add(scheduler, 0, prompt_len=10, max_tokens=1, priority=1)
    steps = steps_until_it_starts(scheduler, patient, arrivals(scheduler, prompt_len=1000))
    assert steps == PRIORITY_TOKENS // 1000 + 1


@pytest.mark.parametrize("policy", POLICIES)
def test_whatever_the_policy_a_prompt_delays_no_decode(policy):
    scheduler = make_scheduler(max_num_batched_tokens=8, policy=policy)
    seqs = [add(scheduler, seq_id, prompt_len=2, priority=1) for seq_id in range(2)]
    step(scheduler)
    long = add(scheduler, 2, prompt_len=60, priority=-1)
    for i in range(1, 10):
        output = step(scheduler)
        assert [seq.num_output_tokens for seq in seqs] == [1 + i, 1 + i]
        assert output.num_tokens == 8
    assert long.num_computed_tokens == 9 * 6


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


# --- overlap: step n + 1 is planned before step n is booked --------------------------------------------


def test_decoding_is_planned_on_with_a_token_that_is_still_being_drawn():
    scheduler = make_scheduler()
    seq = add(scheduler, 0, prompt_len=4, max_tokens=9)
    first, second = scheduler.schedule(), scheduler.schedule()
    assert (plan(first), plan(second)) == ([(0, 0, 4)], [(0, 4, 1)])
    assert seq.token_ids[4:] == [PENDING, PENDING]
    assert (seq.num_output_tokens, seq.last_token_id) == (0, 103)
    scheduler.check()
    assert scheduler.update(first, [7]) == [seq]
    assert (seq.output_token_ids, seq.last_token_id) == ([7], 7)
    third = scheduler.schedule()
    assert plan(third) == [(0, 5, 1)]
    scheduler.update(second, [8])
    scheduler.update(third, [9])
    assert seq.output_token_ids == [7, 8, 9]
    scheduler.check()


def test_a_long_prompt_is_planned_chunk_by_chunk():
    scheduler = make_scheduler(max_num_batched_tokens=8)
    seq = add(scheduler, 0, prompt_len=10)
    first, second, third = scheduler.schedule(), scheduler.schedule(), scheduler.schedule()
    assert [plan(output) for output in (first, second, third)] == [[(0, 0, 8)], [(0, 8, 2)], [(0, 10, 1)]]
    assert scheduler.update(first, []) == []
    assert scheduler.update(second, [7]) == [seq]


@pytest.mark.parametrize("token_id", [EOS, STOP])
def test_after_a_stop_the_token_of_the_step_in_flight_is_dropped(token_id):
    scheduler = make_scheduler()
    seq, other = add(scheduler, 0, prompt_len=4), add(scheduler, 1, prompt_len=4)
    first, second = scheduler.schedule(), scheduler.schedule()
    assert scheduler.update(first, [token_id, WORD]) == [seq, other]
    assert (seq.finish_reason, seq.output_token_ids, seq.block_table) == (FinishReason.STOP, [token_id], [])
    scheduler.check()
    third = scheduler.schedule()
    assert plan(third) == [(1, 5, 1)]
    assert scheduler.update(second, [8, 9]) == [other]
    assert (seq.output_token_ids, other.output_token_ids) == ([token_id], [WORD, 9])
    assert scheduler.update(third, [10]) == [other]


def test_min_tokens_does_not_count_tokens_that_are_planned():
    scheduler = make_scheduler()
    seq = add(scheduler, 0, prompt_len=4, min_tokens=1)
    first, second = scheduler.schedule(), scheduler.schedule()
    scheduler.update(first, [EOS])
    assert not seq.is_finished
    scheduler.update(second, [EOS])
    assert (seq.finish_reason, seq.output_token_ids) == (FinishReason.STOP, [EOS, EOS])


def test_nothing_is_planned_after_the_last_token():
    scheduler = make_scheduler()
    seq = add(scheduler, 0, prompt_len=4, max_tokens=2)
    first, second, third = scheduler.schedule(), scheduler.schedule(), scheduler.schedule()
    assert [plan(output) for output in (first, second, third)] == [[(0, 0, 4)], [(0, 4, 1)], []]
    scheduler.update(first, [7])
    assert not seq.is_finished
    scheduler.update(second, [8])
    scheduler.update(third, [])
    assert (seq.finish_reason, seq.output_token_ids) == (FinishReason.LENGTH, [7, 8])
    assert all_free(scheduler)


def test_abort_while_two_steps_run():
    scheduler = make_scheduler()
    seq, other = add(scheduler, 0, prompt_len=4), add(scheduler, 1, prompt_len=4)
    first, second = scheduler.schedule(), scheduler.schedule()
    abort(scheduler, seq)
    assert seq.output_token_ids == []
    assert scheduler.update(first, [7, 8]) == [other]
    assert scheduler.update(second, [9, 10]) == [other]
    assert (seq.token_ids[4:], other.output_token_ids) == ([], [8, 10])
    scheduler.check()


def test_a_sequence_may_be_preempted_while_its_token_is_drawn():
    scheduler = make_scheduler(num_blocks=2, block_size=4)
    first, second = add(scheduler, 0, prompt_len=4), add(scheduler, 1, prompt_len=4)
    running, planned = scheduler.schedule(), scheduler.schedule()
    assert (ids(planned.preempted), plan(planned)) == ([1], [(0, 4, 1)])
    scheduler.check()
    assert scheduler.update(running, [7, 8]) == [first, second]
    assert (second.status, second.output_token_ids) == (SequenceStatus.PREEMPTED, [8])
    scheduler.finish(first, FinishReason.STOP)
    output = scheduler.schedule()
    assert plan(output) == [(1, 0, 5)]
    assert scheduler.update(planned, [9]) == []
    assert scheduler.update(output, [10]) == [second]
    assert second.output_token_ids == [8, 10]


def test_a_preempted_sequence_may_end_with_the_token_that_was_drawn():
    scheduler = make_scheduler(num_blocks=2, block_size=4)
    first, second = add(scheduler, 0, prompt_len=4), add(scheduler, 1, prompt_len=4)
    running, planned = scheduler.schedule(), scheduler.schedule()
    assert scheduler.update(running, [7, EOS]) == [first, second]
    scheduler.update(planned, [8])
    assert (second.finish_reason, second.token_ids[4:]) == (FinishReason.STOP, [EOS])
    scheduler.finish(first, FinishReason.STOP)
    scheduler.check()
    assert not scheduler.has_unfinished()
    assert plan(step(scheduler)) == []


def test_a_block_is_cached_when_all_its_tokens_are_known():
    """The step in flight fills the block with a token that only the device knows."""
    for is_known in (False, True):
        scheduler = make_scheduler(cached=True)
        seq = add(scheduler, 0, prompt=A[:3])
        first, _ = scheduler.schedule(), scheduler.schedule()
        assert (seq.num_computed_tokens, seq.num_known_tokens) == (4, 3)
        if is_known:
            scheduler.update(first, [7])
        scheduler.finish(seq, FinishReason.STOP)
        scheduler.check()
        assert num_cached(scheduler, [*A[:3], 7]) == is_known


def test_blocks_of_one_that_ended_go_to_others_in_a_later_step_than_the_one_in_flight():
    scheduler = make_scheduler(num_blocks=2, max_num_seqs=2)
    seq = add(scheduler, 0, prompt_len=5)
    blocks = seq.block_table
    first, second = scheduler.schedule(), scheduler.schedule()
    blocks = seq.block_table.copy()
    waiting = add(scheduler, 1, prompt_len=5)
    scheduler.update(first, [EOS])
    third = scheduler.schedule()
    assert (plan(second), plan(third)) == ([(0, 5, 1)], [(1, 0, 5)])
    assert sorted(waiting.block_table) == sorted(blocks)


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


def swap_the_order(scheduler, first, second):
    scheduler.running.reverse()


def lose_a_block(scheduler, first, second):
    first.block_table.pop()


def hold_a_block_of_another(scheduler, first, second):
    first.block_table[0] = second.block_table[0]


def keep_blocks_while_waiting(scheduler, first, second):
    scheduler.waiting[0].block_table = [0]


def claim_too_much_computed(scheduler, first, second):
    first.num_computed_tokens = first.num_tokens + 1


def run_on_after_the_end(scheduler, first, second):
    first.max_num_tokens = first.num_tokens - 1


def forget_the_status(scheduler, first, second):
    second.status = SequenceStatus.FINISHED


def share_a_seat(scheduler, first, second):
    first.seat = second.seat


def lose_a_seat(scheduler, first, second):
    scheduler.finish(second, FinishReason.STOP)
    scheduler._seats.pop()


def lose_one_that_waits(scheduler, first, second):
    scheduler.num_waiting -= 1


def plan_a_token_that_is_known(scheduler, first, second):
    first.num_pending_tokens = 1


def use_a_path_of_others(scheduler, first, second):
    first.cache_node, second.cache_node = second.cache_node, first.cache_node


def lose_a_block_on_the_host(scheduler, first, second):
    scheduler.cache.host.allocate(1)


@pytest.mark.parametrize(
    "damage",
    [
        swap_the_order,
        lose_a_block,
        hold_a_block_of_another,
        keep_blocks_while_waiting,
        claim_too_much_computed,
        run_on_after_the_end,
        forget_the_status,
        share_a_seat,
        lose_a_seat,
        lose_one_that_waits,
        plan_a_token_that_is_known,
        use_a_path_of_others,
        lose_a_block_on_the_host,
    ],
)
def test_check_notices(damage):
    scheduler = make_scheduler(max_num_seqs=2, num_host_blocks=2)
    seqs = [add(scheduler, seq_id, prompt=[seq_id] * 6) for seq_id in range(4)]
    step(scheduler)
    damage(scheduler, *seqs[:2])
    with pytest.raises(AssertionError):
        scheduler.check()
