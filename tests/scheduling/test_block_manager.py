import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mini_vllm.scheduling.block_manager import BlockManager


def test_every_block_is_handed_out_once():
    manager = BlockManager(num_blocks=5, block_size=16)
    first, second = manager.allocate(2), manager.allocate(3)
    assert sorted(first + second) == [0, 1, 2, 3, 4]
    assert manager.num_free_blocks == 0
    manager.check([first, second])


def test_the_block_released_last_is_reused_first():
    manager = BlockManager(num_blocks=4, block_size=16)
    first, second, third = manager.allocate(3)
    manager.release([third, first])
    assert manager.allocate(2) == [first, third]
    manager.check([[first, second, third]])


def test_a_shared_block_is_free_when_its_last_owner_releases_it():
    manager = BlockManager(num_blocks=2, block_size=16)
    blocks = manager.allocate(2)
    manager.share(blocks[:1])
    manager.release(blocks)
    assert manager.num_free_blocks == 1
    manager.check([blocks[:1]])
    manager.release(blocks[:1])
    assert manager.num_free_blocks == 2
    manager.check([])


@pytest.mark.parametrize(
    ("block_size", "num_tokens", "num_blocks"),
    [(1, 0, 0), (1, 1, 1), (1, 7, 7), (16, 0, 0), (16, 1, 1), (16, 16, 1), (16, 17, 2), (16, 32, 2)],
)
def test_num_blocks_for_rounds_up(block_size, num_tokens, num_blocks):
    assert BlockManager(num_blocks=1, block_size=block_size).num_blocks_for(num_tokens) == num_blocks


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 16), (-1, 16), (4, 0), (4, -16)])
def test_a_pool_needs_a_block_and_a_block_a_token(num_blocks, block_size):
    with pytest.raises(ValueError, match=f"must be >= 1, got {num_blocks} and {block_size}"):
        BlockManager(num_blocks, block_size)


def test_misuse_is_noticed():
    manager = BlockManager(num_blocks=2, block_size=16)
    (block,) = manager.allocate(1)
    with pytest.raises(AssertionError, match="2 blocks wanted, 1 free"):
        manager.allocate(2)
    manager.check([[block]])  # a refused allocation takes nothing
    manager.release([block])
    with pytest.raises(AssertionError, match=f"block {block} is released twice"):
        manager.release([block])
    with pytest.raises(AssertionError, match=f"block {block} is free and cannot be shared"):
        manager.share([block])
    manager.check([])


@pytest.mark.parametrize("owners", [[], [[0]], [[0, 1, 1]], [[0, 1], [0]], [[0, 1, 2]]])
def test_check_notices_owners_who_hold_less_or_more(owners):
    manager = BlockManager(num_blocks=3, block_size=16)
    assert sorted(manager.allocate(2)) == [0, 1]
    with pytest.raises(AssertionError, match="reference counts differ"):
        manager.check(owners)


@pytest.mark.parametrize("free", [[], [2, 2], [1, 2], [0]])
def test_check_notices_a_broken_free_list(free):
    manager = BlockManager(num_blocks=3, block_size=16)
    owned = manager.allocate(2)
    manager._free = free
    with pytest.raises(AssertionError, match="the free list differs"):
        manager.check([owned])


class BlockManagerMachine(RuleBasedStateMachine):
    """Random allocate, share and release against a naive model: a list of owners' lists of block ids."""

    @initialize(num_blocks=st.integers(1, 8))
    def create(self, num_blocks):
        self.manager = BlockManager(num_blocks, block_size=16)
        self.all_blocks = set(range(num_blocks))
        self.owners: list[list[int]] = []

    @property
    def free(self):
        return self.all_blocks - {block for owner in self.owners for block in owner}

    @rule(data=st.data())
    def allocate(self, data):
        count = data.draw(st.integers(0, len(self.free)), label="count")
        blocks = self.manager.allocate(count)
        assert len(blocks) == len(set(blocks)) == count
        assert self.free.issuperset(blocks)
        self.owners.append(blocks)

    @rule(excess=st.integers(1, 3))
    def allocate_too_many(self, excess):
        with pytest.raises(AssertionError, match="blocks wanted"):
            self.manager.allocate(len(self.free) + excess)

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def share_a_prefix(self, data):
        owner = data.draw(st.sampled_from(self.owners), label="owner")
        blocks = owner[: data.draw(st.integers(0, len(owner)), label="blocks")]
        self.manager.share(blocks)
        self.owners.append(blocks)

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def release(self, data):
        owner = self.owners.pop(data.draw(st.integers(0, len(self.owners) - 1), label="owner"))
        held_by_others = {block for other in self.owners for block in other}
        free_before = self.manager.num_free_blocks
        self.manager.release(owner)
        assert self.manager.num_free_blocks == free_before + len(set(owner) - held_by_others)

    @invariant()
    def model_and_manager_agree(self):
        self.manager.check(self.owners)
        assert self.manager.num_free_blocks == len(self.free)


TestBlockManagerMachine = BlockManagerMachine.TestCase
TestBlockManagerMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
