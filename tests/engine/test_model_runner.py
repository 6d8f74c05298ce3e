"""ModelRunner moves blocks between and within the caches as a plan says."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mini_vllm import LLM
from mini_vllm.models.kv_cache import KVCache
from mini_vllm.scheduling.scheduler import SchedulerOutput, Transfer

NUM_BLOCKS = 4  # on the device and on the host
BLOCKS = st.integers(0, NUM_BLOCKS - 1)


@pytest.fixture(scope="module")
def runner():
    config = LLM(device="cpu").llm_engine.model_config
    swap_space = NUM_BLOCKS * KVCache.bytes_per_block(config, 2, np.dtype("float32"))
    runner = LLM(device="cpu", block_size=2, num_kv_blocks=NUM_BLOCKS, swap_space=swap_space).llm_engine.runner
    assert runner.host_kv.num_blocks == NUM_BLOCKS
    return runner


def label(cache, first):
    """Fill each block of all layers with numbers that name it."""
    for layer, (keys, values) in enumerate(zip(cache.keys, cache.values, strict=True)):
        for block in range(NUM_BLOCKS):
            keys[block], values[block] = 100 * layer + first + block, 100 * layer + first + block + 50


def labels(cache):
    """The names in a cache, once it is certain that all layers, keys and values agree on them."""
    names = cache.keys[0][:, 0, 0, 0]
    for layer, (keys, values) in enumerate(zip(cache.keys, cache.values, strict=True)):
        assert (keys == 100 * layer + names[:, None, None, None]).all()
        assert (values == 100 * layer + names[:, None, None, None] + 50).all()
    return names.astype(int).tolist()


@settings(deadline=None)
@given(transfers=st.lists(st.builds(Transfer, st.booleans(), BLOCKS, BLOCKS), max_size=8), data=st.data())
def test_transfers_happen_in_order_and_then_the_copies(runner, transfers, data):
    first, second, *targets = data.draw(st.permutations(range(NUM_BLOCKS)))  # no target is another one's source
    copies = [(data.draw(st.sampled_from([first, second])), target) for target in targets]
    device, host = list(range(10, 10 + NUM_BLOCKS)), list(range(20, 20 + NUM_BLOCKS))
    label(runner.kv, 10)
    label(runner.host_kv, 20)
    for to_host, source, target in transfers:
        if to_host:
            host[target] = device[source]
        else:
            device[target] = host[source]
    for source, target in copies:
        device[target] = device[source]
    runner._move_blocks(SchedulerOutput(transfers=transfers, copies=copies))
    assert (labels(runner.kv), labels(runner.host_kv)) == (device, host)


def test_a_block_that_is_filled_twice_in_a_row_is_copied_once(runner, monkeypatch):
    """The copies of one launch run at the same time: which of two would be the last one?"""
    calls = []
    monkeypatch.setattr(runner.ops, "copy_blocks", lambda *arrays: calls.append(arrays[-1].tolist()))
    transfers = [(True, 0, 3), (True, 1, 2), (True, 2, 3), (False, 3, 0), (False, 2, 1), (True, 0, 3)]
    runner._move_blocks(SchedulerOutput(transfers=[Transfer(*transfer) for transfer in transfers]))
    num_layers = len(runner.kv.keys)
    by_launch = [sorted(pairs) for pairs in calls[::num_layers]]
    assert by_launch == [[[1, 2], [2, 3]], [[2, 1], [3, 0]], [[0, 3]]]


def test_loading_a_block_takes_time(runner):
    assert 0 < runner.seconds_to_load_block() < 1
