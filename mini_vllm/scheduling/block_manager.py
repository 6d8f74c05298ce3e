"""The pool of KV-cache blocks: a free list and reference counts, as plain integers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable


class BlockManager:
    """Hands out block ids 0 to num_blocks - 1, each the cache space of `block_size` tokens in every layer.

    A block's reference count is the number of its owners (sequences, and later the prefix tree); it is free
    at 0. The manager never sees a token.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"num_blocks and block_size must be >= 1, got {num_blocks} and {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._ref_counts = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: the block freed last is the warmest
        self._fewest_free = num_blocks

    @property
    def num_free_blocks(self) -> int:
        return len(self._free)

    @property
    def peak_used_blocks(self) -> int:
        """The most blocks that had owners at a time."""
        return self.num_blocks - self._fewest_free

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """Take `count` free blocks with one owner each. The caller has checked `num_free_blocks`."""
        assert count <= len(self._free), f"{count} blocks wanted, {len(self._free)} free"
        block_ids = [self._free.pop() for _ in range(count)]
        for block_id in block_ids:
            self._ref_counts[block_id] = 1
        self._fewest_free = min(self._fewest_free, len(self._free))
        return block_ids

    def share(self, block_ids: Iterable[int]) -> None:
        """Add an owner to blocks that have one already."""
        for block_id in block_ids:
            assert self._ref_counts[block_id] > 0, f"block {block_id} is free and cannot be shared"
            self._ref_counts[block_id] += 1

    def release(self, block_ids: Iterable[int]) -> None:
        """Take an owner away; blocks without owners become free."""
        for block_id in block_ids:
            assert self._ref_counts[block_id] > 0, f"block {block_id} is released twice"
            self._ref_counts[block_id] -= 1
            if self._ref_counts[block_id] == 0:
                self._free.append(block_id)

    def check(self, owned: Iterable[Iterable[int]]) -> None:
        """Recount everything from the owners' lists of block ids; raises AssertionError on any difference."""
        counts = Counter(block_id for block_ids in owned for block_id in block_ids)
        expected = [counts.get(block_id, 0) for block_id in range(self.num_blocks)]
        assert self._ref_counts == expected, "reference counts differ from what the owners hold"
        free = [block_id for block_id, count in enumerate(expected) if count == 0]
        assert sorted(self._free) == free, "the free list differs from the blocks without owners"
