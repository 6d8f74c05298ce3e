"""build_sampling_batch: parameters and history of a batch as columns."""

import numpy as np
import pytest

from mini_vllm import SamplingParams
from mini_vllm.engine.batch_state import BatchState
from mini_vllm.engine.sampler import build_sampling_batch
from mini_vllm.ops.base import BANNED
from mini_vllm.scheduling.scheduler import ScheduledSequence, SchedulerOutput
from mini_vllm.scheduling.sequence import PENDING, Sequence


def make(prompt, output=(), *, seed=0, eos=(), bad_words=(), **params):
    seq = Sequence(
        0,
        prompt,
        SamplingParams(**params),
        max_num_tokens=100,
        eos_token_ids=eos,
        bad_words_token_ids=bad_words,
        seed=seed,
    )
    seq.token_ids += output
    return seq


def batch_of(*seqs):
    """The batch of a step in which these sequences, and no others, draw their next token. Their seats run backwards."""
    for seat, seq in enumerate(reversed(seqs)):
        seq.seat = seat
    state = BatchState(len(seqs), max_blocks=1, block_size=16)
    state.apply(SchedulerOutput(admitted=list(seqs)))
    return build_sampling_batch([ScheduledSequence(seq, seq.num_tokens - 1, 1, True) for seq in seqs], state)


def row(batch, name, i):
    """Row i of a CSR group as {token id: value}."""
    offsets = getattr(batch, f"{name}_offsets")
    ids = getattr(batch, f"{name}_ids")[offsets[i] : offsets[i + 1]].tolist()
    values = {"bias": batch.bias_values, "penalty": batch.penalty_counts}.get(name)
    assert len(set(ids)) == len(ids)
    return dict.fromkeys(ids) if values is None else dict(zip(ids, values[offsets[i] : offsets[i + 1]], strict=True))


def test_columns_and_dtypes():
    batch = batch_of(make([1, 2], [3], seed=2**64 - 1, top_k=5, top_p=0.5), make([1], temperature=0))
    assert batch.temperature.tolist() == [1.0, 0.0]
    assert batch.top_k.tolist() == [5, 0]
    assert batch.top_p.tolist() == [0.5, 1.0]
    assert batch.min_p.tolist() == [0.0, 0.0]
    assert batch.seeds.tolist() == [2**64 - 1, 0]
    assert batch.positions.tolist() == [3, 1], "the index of the token being drawn"
    dtypes = {
        name: getattr(batch, name).dtype for name in ("temperature", "top_k", "top_p", "min_p", "seeds", "positions")
    }
    assert dtypes == {
        "temperature": np.float32,
        "top_k": np.int32,
        "top_p": np.float32,
        "min_p": np.float32,
        "seeds": np.uint64,
        "positions": np.int32,
    }


@pytest.mark.parametrize(
    ("params", "random", "filters"),
    [
        ([{"temperature": 0}], False, False),
        ([{"temperature": 0, "top_k": 5}], False, False),
        ([{}], True, False),
        ([{"temperature": 0}, {"top_p": 0.9}], True, True),
        ([{"min_p": 0.1}], True, True),
        ([{"top_k": 3}], True, True),
    ],
)
def test_flags_choose_the_kernel(params, random, filters):
    batch = batch_of(*(make([1], **p) for p in params))
    assert (batch.any_random, batch.any_filter) == (random, filters)


def test_groups_nobody_uses_are_absent():
    batch = batch_of(make([1]))
    assert batch.penalty_ids is None
    assert batch.bias_ids is None
    assert batch.allowed_ids is None


def test_penalties_count_the_output_and_know_the_prompt():
    batch = batch_of(make([1]), make([5, 6, 5], [6, 7, 7], repetition_penalty=1.5))
    assert row(batch, "penalty", 0) == {}
    assert row(batch, "penalty", 1) == {5: 0, 6: 1, 7: 2}
    assert batch.repetition_penalty.tolist() == [1.0, 1.5]


def test_allowed_token_ids_are_distinct():
    batch = batch_of(make([1], allowed_token_ids=[4, 9, 4]), make([1]))
    assert list(row(batch, "allowed", 0)) == [4, 9]
    assert row(batch, "allowed", 1) == {}


def test_bans_join_the_logit_bias():
    bad_words = [(8,), (3, 9), (4, 5, 6)]
    seqs = [
        make([1], [3], bad_words=bad_words, logit_bias={7: 2.5}),
        make([3], [], bad_words=bad_words),  # the prompt does not start a bad word
        make([1], [2, 4, 5], bad_words=bad_words),
        make([1], [4], bad_words=bad_words),
    ]
    batch = batch_of(*seqs)
    assert row(batch, "bias", 0) == {7: 2.5, 8: BANNED, 9: BANNED}
    assert row(batch, "bias", 1) == {8: BANNED}
    assert row(batch, "bias", 2) == {8: BANNED, 6: BANNED}
    assert row(batch, "bias", 3) == {8: BANNED}


def test_min_tokens_bans_what_would_stop():
    def biases(num_output):
        seq = make([1], range(10, 10 + num_output), eos=(2,), stop_token_ids=[5], min_tokens=2)
        batch = batch_of(seq)
        return {} if batch.bias_ids is None else row(batch, "bias", 0)

    assert biases(0) == biases(1) == {2: BANNED, 5: BANNED}
    assert biases(2) == {}


def test_legal_extremes_fit_the_columns():
    batch = batch_of(make([1], top_k=2**40, repetition_penalty=1e300), make([1], repetition_penalty=1e-46))
    assert batch.top_k.tolist() == [2**31 - 1, 0]
    assert np.isfinite(batch.repetition_penalty).all()
    assert (batch.repetition_penalty > 0).all()


def test_min_tokens_counts_tokens_that_are_still_being_drawn():
    """They need no token's value, so that such steps may overlap."""
    seq = make([1], [10, PENDING], eos=(2,), min_tokens=2)
    seq.num_pending_tokens = 1
    assert batch_of(seq).bias_ids is None
    seq = make([1], [PENDING], eos=(2,), min_tokens=2)
    seq.num_pending_tokens = 1
    assert row(batch_of(seq), "bias", 0) == {2: BANNED}


def test_each_sequence_has_the_columns_of_its_seat_whoever_is_drawn_beside_it():
    state = BatchState(3, max_blocks=1, block_size=16)
    seqs = [make([1], seed=10 + i, top_k=i + 1) for i in range(3)]
    for seat, seq in zip((2, 0, 1), seqs, strict=True):
        seq.seat = seat
    state.apply(SchedulerOutput(admitted=seqs[:2]))
    state.apply(SchedulerOutput(admitted=seqs[2:]))
    batch = build_sampling_batch([ScheduledSequence(seq, 0, 1, True) for seq in (seqs[2], seqs[0])], state)
    assert (batch.seeds.tolist(), batch.top_k.tolist()) == ([12, 10], [3, 1])


def test_rules_end_with_the_sequence_that_had_them():
    state = BatchState(1, max_blocks=1, block_size=16)
    for seq, has_rules in ((make([1], logit_bias={3: 1.0}), True), (make([1]), False)):
        seq.seat = 0
        state.apply(SchedulerOutput(admitted=[seq]))
        batch = build_sampling_batch([ScheduledSequence(seq, 0, 1, True)], state)
        assert (batch.bias_ids is not None) == state.has_rules[0] == has_rules
