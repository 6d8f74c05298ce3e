"""Who leaves the prefix cache first: policies, and the queue that asks them."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable
from itertools import count
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from mini_vllm.scheduling.radix_tree import Node


class EvictionPolicy(Protocol):
    def priority(self, node: Node) -> Any:
        """A value to compare, from the state of `node` alone; the smallest is evicted first."""


class LRU:
    """The least recently used first."""

    def priority(self, node: Node) -> int:
        return node.last_used


class LFU:
    """The least often hit first; of these, the least recently used."""

    def priority(self, node: Node) -> tuple[int, int]:
        return node.num_hits, node.last_used


class SizeAware:
    """The fewest hits per block first, so that a long run must earn its room; of these, the least recently used."""

    def priority(self, node: Node) -> tuple[float, int]:
        return (1 + node.num_hits) / len(node.block_ids), node.last_used


class EvictionQueue:
    """The idle leaves of one tier in the order in which they leave it: a heap that forgets lazily.

    Whatever changes an idle leaf pushes it again. An entry counts only as long as its node is an idle leaf of
    this tier and has that priority.
    """

    def __init__(self, policy: EvictionPolicy, *, on_host: bool) -> None:
        self._policy = policy
        self._on_host = on_host
        self._heap: list[tuple[Any, int, Node]] = []
        self._tickets = count()  # break ties, for nodes cannot be compared
        self._limit = 64

    def push(self, node: Node) -> None:
        if len(self._heap) >= self._limit:  # drop the outdated entries before they pile up
            nodes = dict.fromkeys(node for _, _, node in self._heap if self._is_candidate(node))
            self._heap = [self._entry(node) for node in nodes]
            heapq.heapify(self._heap)
            self._limit = 2 * len(self._heap) + 64
        heapq.heappush(self._heap, self._entry(node))

    def pop(self) -> Node | None:
        while self._heap:
            priority, _, node = heapq.heappop(self._heap)
            if self._is_candidate(node) and priority == self._policy.priority(node):
                return node
        return None

    def clear(self) -> None:
        self._heap.clear()

    def check(self, nodes: Iterable[Node]) -> None:
        """The heap must be one, with an entry for the present priority of every candidate among `nodes`."""
        for i, entry in enumerate(self._heap[1:]):
            assert self._heap[i // 2][:2] < entry[:2], "the heap is out of order"
        priorities = defaultdict(list)
        for priority, _, node in self._heap:
            priorities[node].append(priority)
        for node in filter(self._is_candidate, nodes):
            assert self._policy.priority(node) in priorities[node], "an idle leaf is not queued"

    def _entry(self, node: Node) -> tuple[Any, int, Node]:
        return self._policy.priority(node), next(self._tickets), node

    def _is_candidate(self, node: Node) -> bool:
        return node.on_host == self._on_host and node.is_idle_leaf
