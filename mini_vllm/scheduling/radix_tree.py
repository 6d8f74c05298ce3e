"""The prefix cache: a radix tree from token prefixes to KV blocks (RadixAttention, Zheng et al., 2024).

An edge is a run of whole blocks: prefixes are shared block by block, and no block is ever split.

Ownership: the tree is one more owner of every block it lists, beside the sequences that hold it. A sequence
`acquire`s the node where its cached prefix ends, which pins the whole path. Blocks of nodes that nobody's path
goes through belong to the tree alone; `evict` frees them, leaves first. Hence the one rule for sequences: whoever
holds a block that the tree lists has acquired its node.

Tiers: with a `host` pool, evicted runs move there, and a path is device nodes followed by host nodes. The tree
never sees K/V: `evict` and `load` return the copies that make their bookkeeping true. The caller makes them in
the order in which it got them, and before the step writes to any block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import compress, count
from operator import ne

from mini_vllm.scheduling.block_manager import BlockManager
from mini_vllm.scheduling.eviction import LFU, LRU, EvictionPolicy, EvictionQueue, SizeAware

EVICTION_POLICIES: dict[str, type[EvictionPolicy]] = {"lru": LRU, "lfu": LFU, "size": SizeAware}


class Node:
    """A run of blocks; the way from the root to its end is a cached prefix. A root has no blocks.

    tokens: the run's tokens, block_size for each of block_ids.
    children: by the tokens of their first block.
    num_device_children: those of them that are on the device.
    depth: blocks from the root to the end of this node.
    num_users: acquisitions that end at or below this node.
    last_used: the tree's clock when this path was last matched or released.
    num_hits: matches that went through this node.
    salt: of a root; what keeps its prefixes apart from those of others.
    """

    __slots__ = (
        "block_ids",
        "children",
        "depth",
        "last_used",
        "num_device_children",
        "num_hits",
        "num_users",
        "on_host",
        "parent",
        "salt",
        "tokens",
    )

    def __init__(self, parent: Node | None, tokens: list[int], block_ids: list[int], salt: str | None = None) -> None:
        self.parent = parent
        self.tokens = tokens
        self.block_ids = block_ids
        self.children: dict[tuple[int, ...], Node] = {}
        self.num_device_children = 0
        self.depth = len(block_ids) + (parent.depth if parent is not None else 0)
        self.num_users = 0
        self.on_host = False
        self.last_used = 0
        self.num_hits = 0
        self.salt = salt

    def path(self) -> Iterator[Node]:
        """This node, its parent, and so on up to the root."""
        node: Node | None = self
        while node is not None:
            yield node
            node = node.parent

    def path_block_ids(self) -> list[int]:
        """Device blocks from the root to the end of this node."""
        assert not self.on_host, "load the node first"
        return [block_id for node in reversed(list(self.path())) for block_id in node.block_ids]

    @property
    def is_idle_leaf(self) -> bool:
        """Whether the node may leave its tier: nobody uses it, and it has no child there."""
        has_children = self.children if self.on_host else self.num_device_children
        return self.num_users == 0 and not has_children and self.parent is not None

    def inherit(self, node: Node) -> None:
        """Take over what both parts of a split node have in common."""
        self.num_users, self.on_host = node.num_users, node.on_host
        self.last_used, self.num_hits = node.last_used, node.num_hits


@dataclass(frozen=True)
class PrefixCacheStats:
    num_nodes: int  # without the roots
    num_cached_blocks: int  # on the device
    num_host_blocks: int
    num_shared_blocks: int  # on the device, in use by two sequences or more
    queried_tokens: int
    hit_tokens: int

    @property
    def hit_rate(self) -> float:
        return self.hit_tokens / self.queried_tokens if self.queried_tokens else 0.0


class RadixTree:
    """The cached prefixes of all salts, in blocks of `device` and of an optional `host` tier.

    A node is good from `acquire` to `release`; one that `match` returned, until the next evict, load or reset.
    """

    def __init__(
        self, device: BlockManager, host: BlockManager | None = None, policy: EvictionPolicy | None = None
    ) -> None:
        assert host is None or host.block_size == device.block_size, "a block holds as many tokens in either tier"
        policy = policy if policy is not None else LRU()
        self.device, self.host = device, host
        self._block_size = device.block_size
        self._device_queue = EvictionQueue(policy, on_host=False)
        self._host_queue = EvictionQueue(policy, on_host=True)
        self._roots: dict[str | None, Node] = {}  # by salt; each has children or users
        self._detached: set[Node] = set()  # roots from before a reset, as long as they have users
        self._clock = 0
        self._num_nodes = self._num_device_blocks = self._num_host_blocks = 0
        self._num_shared_blocks = self._num_evictable_blocks = 0
        self._queried_tokens = self._hit_tokens = 0

    # --- sequences come, grow and go ---

    def match(self, token_ids: Sequence[int], max_blocks: int, salt: str | None = None) -> Node:
        """The deepest node whose path is a prefix of the first `max_blocks` whole blocks; the root if there is none.

        A host node is not ready for use: acquire it and `load` it, or acquire its `device_ancestor`.
        """
        max_blocks = min(max_blocks, len(token_ids) // self._block_size)
        self._clock += 1
        node = self._roots.get(salt)
        if node is None:
            return Node(None, [], [], salt)  # becomes the salt's root when it is acquired
        while node.depth < max_blocks and (child := self._step(node, token_ids, max_blocks)) is not None:
            node = child
            node.num_hits += 1
            node.last_used = self._clock
            self._offer(node)
        return node

    def acquire(self, node: Node) -> None:
        """A sequence starts to use the path to `node`, which is then safe from eviction."""
        for ancestor in node.path():
            if ancestor.parent is None and ancestor.num_users == 0 and not ancestor.children:
                assert not ancestor.block_ids, "the node has left the tree since it was matched"
                root = self._roots.setdefault(ancestor.salt, ancestor)
                assert root is ancestor, "another root took this one's place since it was matched"
            self._add_users(ancestor, 1)

    def release(self, node: Node) -> None:
        """A sequence stops using the path to `node`. What was cached before a reset goes with its last user."""
        self._clock += 1
        path = list(node.path())
        for ancestor in path:
            assert ancestor.num_users > 0, "the path is released more often than it was acquired"
            self._add_users(ancestor, -1)
            ancestor.last_used = self._clock
            self._offer(ancestor)
        root = path.pop()
        if root in self._detached:
            for ancestor in path:
                if ancestor.num_users == 0:
                    self._drop_tail(ancestor, len(ancestor.block_ids))
        self._forget_if_empty(root)

    def extend(self, node: Node, token_ids: Sequence[int], block_ids: Sequence[int]) -> Node:
        """Cache the blocks after `node`; the caller's acquisition moves from there to the node that is returned.

        `token_ids` and `block_ids` are the sequence's, from its first token on; every block listed is full. Where
        the tree has the same tokens already, it keeps its block and the caller a duplicate. A block on the host it
        exchanges for the caller's, which holds the same K/V.
        """
        assert node.num_users > 0, "acquire the node first"
        assert not node.on_host, "load the node first"
        assert len(token_ids) >= len(block_ids) * self._block_size, "only full blocks can be cached"
        while node.depth < len(block_ids):
            child = self._step(node, token_ids, len(block_ids))
            if child is None:
                return self._append(node, token_ids, block_ids)
            self._add_users(child, 1)
            if child.on_host:
                device_ids = list(block_ids[node.depth : child.depth])
                self.device.share(device_ids)
                self.host.release(child.block_ids)
                self._move(child, device_ids, on_host=False)
            node = child
        return node

    def is_cached(self, node: Node, token_ids: Sequence[int]) -> bool:
        """Whether the block after `node` is on the device already: who computes it once more keeps a duplicate."""
        child = node.children.get(self._key(token_ids, node.depth * self._block_size))
        return child is not None and not child.on_host

    # --- room ---

    @property
    def num_evictable_blocks(self) -> int:
        """Device blocks of nodes that nobody uses; `evict` can free them all."""
        return self._num_evictable_blocks

    def evict(self, count: int) -> list[tuple[int, int]]:
        """Free `count` device blocks, or as many as it can; returns the (device block, host block) copies to make.

        What the host tier has no room for, once it has dropped what it may, is gone.
        """
        sources: dict[int, int] = {}  # by host block: one that is filled, dropped and filled again is copied once
        while count > 0 and (node := self._device_queue.pop()) is not None:
            num_blocks = min(count, len(node.block_ids))
            count -= num_blocks
            num_kept = min(num_blocks, self._make_host_room(num_blocks))
            if num_kept < num_blocks:
                self._drop_tail(node, num_blocks - num_kept)
            if num_kept > 0:
                tail = self._split_tail(node, num_kept)
                host_ids = self.host.allocate(num_kept)
                sources.update(zip(host_ids, tail.block_ids, strict=True))
                self.device.release(tail.block_ids)
                self._move(tail, host_ids, on_host=True)
        return [(device_id, host_id) for host_id, device_id in sources.items()]

    def device_ancestor(self, node: Node) -> Node:
        """The deepest node of the path that is on the device: where to go on if recomputing is cheaper than `load`."""
        return next(ancestor for ancestor in node.path() if not ancestor.on_host)

    def host_blocks(self, node: Node) -> int:
        """Blocks of the path that are on the host; they are its last ones."""
        return node.depth - self.device_ancestor(node).depth

    def load(self, node: Node) -> list[tuple[int, int]]:
        """Bring an acquired path to the device; returns the (host block, device block) copies to make.

        The caller has seen to it that `host_blocks(node)` device blocks are free. The host blocks are free at once.
        """
        assert node.num_users > 0, "acquire the node first"
        copies: list[tuple[int, int]] = []
        for ancestor in reversed(list(node.path())):
            if ancestor.on_host:
                device_ids = self.device.allocate(len(ancestor.block_ids))
                copies += zip(ancestor.block_ids, device_ids, strict=True)
                self.host.release(ancestor.block_ids)
                self._move(ancestor, device_ids, on_host=False)
        return copies

    def reset(self) -> None:
        """Forget everything. Paths in use are found by no later match, and freed when their last user releases them."""
        for node in reversed(list(self._nodes())):  # children before their parents
            if node.num_users == 0:
                self._drop_tail(node, len(node.block_ids))
        self._detached.update(self._roots.values())
        self._roots.clear()
        self._device_queue.clear()
        self._host_queue.clear()

    # --- what is there ---

    def record(self, queried_tokens: int, hit_tokens: int) -> None:
        """Count a request: how many tokens it looked up, and how many it found."""
        self._queried_tokens += queried_tokens
        self._hit_tokens += hit_tokens

    def stats(self) -> PrefixCacheStats:
        return PrefixCacheStats(
            num_nodes=self._num_nodes,
            num_cached_blocks=self._num_device_blocks,
            num_host_blocks=self._num_host_blocks,
            num_shared_blocks=self._num_shared_blocks,
            queried_tokens=self._queried_tokens,
            hit_tokens=self._hit_tokens,
        )

    def owned_blocks(self) -> Iterator[int]:
        """Device blocks that the tree owns."""
        return (block_id for node in self._nodes() if not node.on_host for block_id in node.block_ids)

    def owned_host_blocks(self) -> Iterator[int]:
        return (block_id for node in self._nodes() if node.on_host for block_id in node.block_ids)

    def _nodes(self) -> Iterator[Node]:
        """All nodes but the roots, parents before their children."""
        stack = [*self._roots.values(), *self._detached]
        while stack:
            node = stack.pop()
            if node.parent is not None:
                yield node
            stack += node.children.values()

    # --- changes to single nodes; each leaves the counters and queues right ---

    def _step(self, node: Node, token_ids: Sequence[int], max_blocks: int) -> Node | None:
        """The child that goes on with `token_ids`, cut where they part or at `max_blocks`; None if there is none."""
        start = node.depth * self._block_size
        child = node.children.get(self._key(token_ids, start))
        if child is None:
            return None
        ahead = token_ids[start : min(child.depth, max_blocks) * self._block_size]
        if ahead == child.tokens:  # most often so, and faster to find out than where they part
            return child
        differs = map(ne, child.tokens, ahead)
        num_blocks = next(compress(count(), differs), len(ahead)) // self._block_size
        return child if num_blocks == len(child.block_ids) else self._split_head(child, num_blocks)

    def _key(self, tokens: Sequence[int], start: int = 0) -> tuple[int, ...]:
        return tuple(tokens[start : start + self._block_size])

    def _split_head(self, node: Node, num_blocks: int) -> Node:
        """Give the first blocks of a run to a new node, which is returned; `node` keeps its depth and its users."""
        cut = num_blocks * self._block_size
        self._count(node, -1)
        head = Node(node.parent, node.tokens[:cut], node.block_ids[:num_blocks])
        head.inherit(node)
        head.parent.children[self._key(head.tokens)] = head
        node.parent = head
        del node.tokens[:cut], node.block_ids[:num_blocks]
        head.children[self._key(node.tokens)] = node
        self._count(head, 1)
        self._count(node, 1)
        self._offer(node)
        return head

    def _split_tail(self, node: Node, num_blocks: int) -> Node:
        """Give the last blocks of an idle leaf to a new node, which is returned; all of them: `node` itself.

        `_split_head` would do, but moves the whole head; this moves the tail, so a long run goes block by block.
        """
        num_left = len(node.block_ids) - num_blocks
        if num_left == 0:
            return node
        cut = num_left * self._block_size
        self._count(node, -1)
        node.depth -= num_blocks
        tail = Node(node, node.tokens[cut:], node.block_ids[num_left:])
        tail.inherit(node)
        del node.tokens[cut:], node.block_ids[num_left:]
        tail.children, node.children = node.children, {self._key(tail.tokens): tail}
        for child in tail.children.values():
            child.parent = tail
        self._count(node, 1)
        self._count(tail, 1)
        return tail

    def _append(self, node: Node, token_ids: Sequence[int], block_ids: Sequence[int]) -> Node:
        """Cache all blocks after `node`, in a new child unless only the caller has ever used `node`."""
        new_tokens = token_ids[node.depth * self._block_size : len(block_ids) * self._block_size]
        new_blocks = block_ids[node.depth :]
        self.device.share(new_blocks)
        # A run that grows block by block stays one node. One that was hit must not pass its hits on to its tail.
        if node.num_users == 1 and node.num_hits == 0 and not node.children and node.parent is not None:
            self._count(node, -1)
            node.tokens += new_tokens
            node.block_ids += new_blocks
            node.depth = len(block_ids)
        else:
            parent, node = node, Node(node, list(new_tokens), list(new_blocks))
            parent.children[self._key(new_tokens)] = node
            node.num_users = 1
        self._count(node, 1)
        return node

    def _make_host_room(self, num_blocks: int) -> int:
        """Drop from the host tier until so many blocks are free there or nothing idle is left; returns what is free."""
        if self.host is None:
            return 0
        while (missing := num_blocks - self.host.num_free_blocks) > 0 and (node := self._host_queue.pop()) is not None:
            self._drop_tail(node, min(missing, len(node.block_ids)))
        return self.host.num_free_blocks

    def _drop_tail(self, node: Node, num_blocks: int) -> None:
        """Free the last blocks of an idle leaf; with all of them gone, so is the leaf."""
        assert not node.children, "host nodes leave the tree before what is above them does"
        num_left = len(node.block_ids) - num_blocks
        (self.host if node.on_host else self.device).release(node.block_ids[num_left:])
        self._count(node, -1)
        if num_left > 0:
            del node.tokens[num_left * self._block_size :], node.block_ids[num_left:]
            node.depth -= num_blocks
            self._count(node, 1)
            self._offer(node)
        else:
            parent, node.parent = node.parent, None
            del parent.children[self._key(node.tokens)]
            self._offer(parent)
            self._forget_if_empty(parent)

    def _forget_if_empty(self, root: Node) -> None:
        if root.parent is None and root.num_users == 0 and not root.children:
            self._detached.discard(root)
            if self._roots.get(root.salt) is root:
                del self._roots[root.salt]

    def _move(self, node: Node, block_ids: list[int], *, on_host: bool) -> None:
        """Put a node's run into other blocks; the pools know already."""
        self._count(node, -1)
        node.block_ids, node.on_host = block_ids, on_host
        self._count(node, 1)
        self._offer(node)
        self._offer(node.parent)

    def _add_users(self, node: Node, num_users: int) -> None:
        self._count(node, -1)
        node.num_users += num_users
        self._count(node, 1)

    def _count(self, node: Node, sign: int) -> None:
        """Take a node out of the counters before it changes (-1), and put it back in afterwards (1)."""
        if node.parent is None:
            return
        self._num_nodes += sign
        num_blocks = sign * len(node.block_ids)
        if node.on_host:
            self._num_host_blocks += num_blocks
            return
        node.parent.num_device_children += sign
        self._num_device_blocks += num_blocks
        if node.num_users == 0:
            self._num_evictable_blocks += num_blocks
        elif node.num_users > 1:
            self._num_shared_blocks += num_blocks

    def _offer(self, node: Node) -> None:
        """Queue a node that changed, if it may leave its tier."""
        if node.is_idle_leaf:
            (self._host_queue if node.on_host else self._device_queue).push(node)

    def check(self, users: Iterable[Node] | None = None) -> None:
        """Recount everything from scratch; raises AssertionError on any broken invariant.

        `users` are the nodes that sequences hold, one for each acquisition. A node acquired and not loaded yet is
        the one case of a host node with users, which only the caller can know.
        """
        roots, nodes = [*self._roots.values(), *self._detached], list(self._nodes())
        for salt, root in self._roots.items():
            assert root.salt == salt
        for root in roots:
            assert root.parent is None
            assert (root.depth, root.block_ids, root.on_host) == (0, [], False), "a root has no blocks"
            assert root.children or root.num_users, "an empty root is left over"
        for node in roots + nodes:
            children = node.children.values()
            assert len(node.tokens) == len(node.block_ids) * self._block_size
            assert node.num_users >= sum(child.num_users for child in children), "a parent has its children's users"
            assert node.num_device_children == sum(not child.on_host for child in children)
            for key, child in node.children.items():
                assert child.parent is node
                assert key == self._key(child.tokens), "a child is found by the tokens of its first block"
                assert child.depth == node.depth + len(child.block_ids) > node.depth
                assert child.on_host or not node.on_host, "a device node is below a host node"
        for node in nodes:
            assert node.num_users or not self._detached.intersection(node.path()), "an idle node outlived a reset"
        device_nodes = [node for node in nodes if not node.on_host]
        for block_ids in (list(self.owned_blocks()), list(self.owned_host_blocks())):
            assert len(block_ids) == len(set(block_ids)), "a block is in the tree twice"
        assert self._num_nodes == len(nodes)
        assert self._num_device_blocks == sum(len(node.block_ids) for node in device_nodes)
        assert self._num_host_blocks == sum(len(node.block_ids) for node in nodes if node.on_host)
        assert self._num_shared_blocks == sum(len(node.block_ids) for node in device_nodes if node.num_users > 1)
        assert self._num_evictable_blocks == sum(len(node.block_ids) for node in device_nodes if node.num_users == 0)
        self._device_queue.check(nodes)
        self._host_queue.check(nodes)
        if users is not None:
            counts = Counter(node for user in users for node in user.path())
            for node in roots + nodes:
                assert node.num_users == counts.pop(node, 0), "users were miscounted"
            assert not counts, "a sequence holds a node that has left the tree"
