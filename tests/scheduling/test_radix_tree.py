"""The prefix cache: each rule by example, then random traffic against a naive model."""

import random
from collections import Counter
from dataclasses import dataclass, replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mini_vllm.scheduling.block_manager import BlockManager
from mini_vllm.scheduling.radix_tree import EVICTION_POLICIES, LFU, LRU, Node, RadixTree, SizeAware


class MRU:
    """A user's own policy, and one whose priorities fall with use."""

    def priority(self, node):
        return -node.last_used


# --- helpers: a test's sequences, one block for each character, are strings --------------------------------


@dataclass(eq=False)
class User:
    """What a scheduler keeps of a running sequence: its node, and its blocks, of which it owns each."""

    tokens: list[int]
    node: Node
    table: list[int]


def make_tree(num_blocks=20, *, num_host_blocks=0, block_size=2, policy=None):
    host = BlockManager(num_host_blocks, block_size) if num_host_blocks else None
    return RadixTree(BlockManager(num_blocks, block_size), host, policy)


def tokens(text, block_size=2):
    """A block for each character: "ab" is 97, 0, 98, 0."""
    return [token for char in text for token in (ord(char), *[0] * (block_size - 1))]


def run_text(node):
    """The run of a node as `tokens` understands it, in capitals if it is on the host."""
    run = "".join(map(chr, node.tokens[:: len(node.tokens) // len(node.block_ids)]))
    return run.upper() if node.on_host else run


def text(node):
    """The path to `node`, with "|" between its nodes."""
    return "|".join(reversed([run_text(n) for n in node.path() if n.block_ids]))


def match(tree, prompt, **kwargs):
    return tree.match(tokens(prompt), len(prompt), **kwargs)


def start(tree, prompt, salt=None):
    """Run a sequence as far as that all its blocks are cached; what the tree has is used, on the device."""
    node = match(tree, prompt, salt=salt)
    tree.acquire(node)
    tree.load(node)
    table = node.path_block_ids()
    tree.device.share(table)
    table += tree.device.allocate(len(prompt) - len(table))
    return User(tokens(prompt), tree.extend(node, tokens(prompt), table), table)


def finish(tree, user):
    tree.release(user.node)
    tree.device.release(user.table)


def cache(tree, *prompts, salt=None):
    for prompt in prompts:
        finish(tree, start(tree, prompt, salt))


def check(tree, *users):
    tree.check([user.node for user in users])
    tree.device.check([*(user.table for user in users), tree.owned_blocks()])
    if tree.host is not None:
        tree.host.check([tree.owned_host_blocks()])


def num_free(tree):
    return tree.device.num_free_blocks


def paths(tree):
    """All cached paths that go no further, in order."""
    return sorted(text(node).replace("|", "") for node in tree._nodes() if not node.children)


# --- match -------------------------------------------------------------------------------------------------


def test_nothing_is_found_in_an_empty_tree():
    tree = make_tree()
    node = match(tree, "abc")
    assert (node.depth, node.path_block_ids()) == (0, [])
    assert tree.stats().num_nodes == 0


def test_a_cached_prompt_is_found_with_its_blocks():
    tree = make_tree()
    user = start(tree, "abc")
    node = match(tree, "abc")
    assert node is user.node
    assert (text(node), node.depth, node.path_block_ids()) == ("abc", 3, user.table)
    assert text(match(tree, "abcde")) == "abc"
    check(tree, user)


@pytest.mark.parametrize(
    ("prompt", "max_blocks", "found"),
    [("abcd", 4, "abcd"), ("abcx", 4, "abc"), ("axcd", 4, "a"), ("xbcd", 4, ""), ("abcd", 2, "ab"), ("abcd", 0, "")],
)
def test_a_match_ends_at_the_first_block_that_differs_or_is_one_too_many(prompt, max_blocks, found):
    tree = make_tree()
    user = start(tree, "abcd")
    node = tree.match(tokens(prompt), max_blocks)
    assert (text(node), node.depth) == (found, len(found))
    assert node.path_block_ids() == user.table[: len(found)]
    check(tree, user)


@pytest.mark.parametrize(("num_tokens", "depth"), [(0, 0), (1, 0), (2, 0), (3, 1), (5, 1), (6, 2), (7, 2)])
def test_only_whole_blocks_match(num_tokens, depth):
    tree = make_tree(block_size=3)
    node = tree.match([7] * 9, 3)
    tree.acquire(node)
    tree.extend(node, [7] * 9, tree.device.allocate(3))
    assert tree.match([7] * num_tokens, 99).depth == depth


def test_a_block_that_differs_in_its_last_token_does_not_match():
    tree = make_tree(block_size=3)
    node = tree.match([], 0)
    tree.acquire(node)
    tree.extend(node, [1, 2, 3, 4, 5, 6], tree.device.allocate(2))
    assert tree.match([1, 2, 3, 4, 5, 7], 2).depth == 1
    assert tree.match([1, 2, 4, 4, 5, 6], 2).depth == 0


def test_equal_hashes_are_not_equal_tokens():
    assert hash(-1) == hash(-2)
    tree = make_tree(block_size=1)
    node = tree.match([], 0)
    tree.acquire(node)
    tree.extend(node, [-1, 5], tree.device.allocate(2))
    assert tree.match([-2, 5], 2).depth == 0


def test_tuples_match_what_lists_cached():
    tree = make_tree()
    cache(tree, "abcd")
    assert tree.match(tuple(tokens("abcx")), 4).depth == 3


def test_a_match_inside_a_run_splits_it_and_both_halves_keep_the_users():
    tree = make_tree()
    first, second = start(tree, "abcd"), start(tree, "abcd")
    head = match(tree, "abx")
    assert (text(head), head.depth, head.num_users) == ("ab", 2, 2)
    assert text(first.node) == text(second.node) == "ab|cd"
    assert (first.node.depth, first.node.num_users) == (4, 2)
    assert first.node.path_block_ids() == first.table
    check(tree, first, second)
    finish(tree, first)
    finish(tree, second)
    assert (head.num_users, tree.num_evictable_blocks) == (0, 4)
    check(tree)


def test_both_halves_of_a_split_run_keep_its_hits():
    tree = make_tree(num_host_blocks=9)
    cache(tree, "abcd")
    match(tree, "abcd")
    match(tree, "ab")
    tree.evict(1)
    assert [(text(n), n.num_hits) for n in match(tree, "abcd").path() if n.block_ids] == [
        ("ab|c|D", 2),
        ("ab|c", 2),
        ("ab", 3),
    ]


def test_a_match_touches_its_path_and_nothing_else():
    tree = make_tree()
    cache(tree, "ab", "abcd", "x")
    other = match(tree, "x")
    before = other.last_used
    node = match(tree, "abcd")
    assert [n.num_hits for n in node.path() if n.block_ids] == [1, 2]  # "ab" served "abcd" before
    assert [n.last_used for n in node.path() if n.block_ids] == [before + 1, before + 1]
    assert (other.num_hits, other.last_used) == (1, before)


# --- acquire and release -----------------------------------------------------------------------------------


def test_a_path_is_pinned_by_each_of_its_users():
    tree = make_tree()
    short, long = start(tree, "ab"), start(tree, "abcd")
    assert [n.num_users for n in long.node.path()] == [1, 2, 2]
    finish(tree, short)
    assert [n.num_users for n in long.node.path()] == [1, 1, 1]
    assert (tree.num_evictable_blocks, tree.evict(9)) == (0, [])
    check(tree, long)
    finish(tree, long)
    assert tree.num_evictable_blocks == 4
    check(tree)


def test_a_block_is_owned_by_its_users_and_by_the_tree():
    tree = make_tree(num_blocks=5)
    first, second = start(tree, "abc"), start(tree, "abd")
    assert second.table[:2] == first.table[:2]
    assert num_free(tree) == 1
    finish(tree, first)
    finish(tree, second)
    assert num_free(tree) == 1
    tree.evict(4)
    assert num_free(tree) == 5
    check(tree)


def test_misuse_is_noticed():
    tree = make_tree(num_host_blocks=4)
    user = start(tree, "ab")
    node = user.node
    finish(tree, user)
    with pytest.raises(AssertionError, match="released more often"):
        tree.release(node)
    with pytest.raises(AssertionError, match="acquire the node first"):
        tree.extend(node, tokens("abc"), tree.device.allocate(3))
    with pytest.raises(AssertionError, match="acquire the node first"):
        tree.load(node)
    tree.evict(2)
    with pytest.raises(AssertionError, match="load the node first"):
        node.path_block_ids()
    tree.acquire(node)
    with pytest.raises(AssertionError, match="load the node first"):
        tree.extend(node, tokens("abc"), tree.device.allocate(3))
    tree.load(node)
    with pytest.raises(AssertionError, match="only full blocks"):
        tree.extend(node, tokens("abc")[:-1], tree.device.allocate(3))
    tree.release(node)
    tree.reset()
    with pytest.raises(AssertionError, match="the node has left the tree"):
        tree.acquire(node)
    early, late = match(tree, "ab"), match(tree, "ab")
    tree.acquire(early)
    with pytest.raises(AssertionError, match="another root took this one's place"):
        tree.acquire(late)


def test_both_tiers_have_blocks_of_one_size():
    with pytest.raises(AssertionError, match="as many tokens in either tier"):
        RadixTree(BlockManager(4, 16), BlockManager(4, 8))


# --- extend ------------------------------------------------------------------------------------------------


def test_a_sequence_that_grows_alone_grows_its_node():
    tree = make_tree()
    user = start(tree, "ab")
    node = user.node
    user.table += tree.device.allocate(2)
    assert tree.extend(node, tokens("abcd"), user.table) is node
    assert (text(node), node.depth, node.num_users) == ("abcd", 4, 1)
    check(tree, user)
    user.table += tree.device.allocate(1)  # the tree's list is its own
    check(tree, user)


def test_a_node_that_was_hit_does_not_pass_its_hits_on_to_what_is_appended():
    tree = make_tree()
    cache(tree, "ab")
    user = start(tree, "abc")
    assert text(user.node) == "ab|c"
    assert [n.num_hits for n in user.node.path()] == [0, 1, 0]
    check(tree, user)


def test_a_node_with_other_users_or_children_gets_a_child():
    tree = make_tree()
    first = start(tree, "ab")
    tree.acquire(first.node)
    tree.device.share(first.table)
    second = User(first.tokens, first.node, [*first.table, *tree.device.allocate(1)])
    second.node = tree.extend(second.node, tokens("abc"), second.table)
    assert (text(second.node), second.node.num_users, first.node.num_users) == ("ab|c", 1, 2)
    check(tree, first, second)
    finish(tree, second)
    first.table += tree.device.allocate(1)
    first.node = tree.extend(first.node, tokens("abd"), first.table)
    assert paths(tree) == ["abc", "abd"]
    check(tree, first)


def test_blocks_that_are_cached_already_are_put_in_once_more_by_nobody():
    tree = make_tree()
    node = match(tree, "abcd")
    tree.acquire(node)
    tree.acquire(node)
    first, second = User(tokens("abcd"), node, tree.device.allocate(4)), User([], node, tree.device.allocate(4))
    first.node = tree.extend(node, tokens("abcd"), first.table)
    second.node = tree.extend(node, tokens("abxd"), second.table)
    assert (text(first.node), text(second.node)) == ("ab|cd", "ab|xd")
    assert second.node.path_block_ids() == first.table[:2] + second.table[2:]
    check(tree, first, second)
    finish(tree, second)
    assert num_free(tree) == 20 - 4 - 2
    check(tree, first)


def test_extend_without_new_blocks_changes_nothing():
    tree = make_tree()
    user = start(tree, "ab")
    assert tree.extend(user.node, [*tokens("ab"), 98], user.table) is user.node
    check(tree, user)


def test_is_cached_looks_one_block_ahead_and_only_on_the_device():
    tree = make_tree(num_host_blocks=9)
    cache(tree, "abc")
    node = match(tree, "a")
    assert tree.is_cached(node, tokens("abx"))
    assert not tree.is_cached(node, tokens("axc"))
    assert not tree.is_cached(node, tokens("ab")[:-1])
    assert not tree.is_cached(match(tree, "abc"), tokens("abc"))
    match(tree, "a")
    tree.evict(2)
    assert not tree.is_cached(node, tokens("abx"))


# --- salts -------------------------------------------------------------------------------------------------


def test_salts_do_not_see_each_other_s_prefixes():
    tree = make_tree()
    cache(tree, "abc", salt="one")
    assert match(tree, "abc").depth == match(tree, "abc", salt="two").depth == 0
    assert match(tree, "abc", salt="one").depth == 3


def test_nothing_is_left_of_a_salt_without_blocks_and_users():
    tree = make_tree()
    for salt in map(str, range(10)):
        match(tree, "abc", salt=salt)
    assert tree._roots == {}
    root = match(tree, "abc", salt="one")
    tree.acquire(root)
    assert match(tree, "abc", salt="one") is root
    tree.release(root)
    assert tree._roots == {}
    cache(tree, "abc", salt="two")
    assert set(tree._roots) == {"two"}
    tree.evict(3)
    assert tree._roots == {}
    check(tree)


# --- evict -------------------------------------------------------------------------------------------------


def test_the_least_recently_used_goes_first():
    tree = make_tree()
    cache(tree, "a", "b", "c")
    match(tree, "a")
    tree.evict(1)
    assert paths(tree) == ["a", "c"]
    user = start(tree, "c")
    match(tree, "a")
    finish(tree, user)  # last used when it was released, not when it was matched
    tree.evict(1)
    assert paths(tree) == ["c"]
    check(tree)


def test_leaves_go_first_and_a_run_goes_from_its_end():
    tree = make_tree()
    cache(tree, "abcd", "abx")
    match(tree, "abx")
    for left in (["abc", "abx"], ["abx"], ["ab"], ["a"], []):
        assert tree.evict(1) == []
        assert paths(tree) == left
        check(tree)


def test_as_much_is_freed_as_was_asked_for_or_as_there_is():
    tree = make_tree(num_blocks=10)
    cache(tree, "abc", "xyz")
    user = start(tree, "abq")
    assert (tree.num_evictable_blocks, num_free(tree)) == (4, 3)
    tree.evict(2)
    assert (tree.num_evictable_blocks, num_free(tree)) == (2, 5)
    tree.evict(0)
    assert (tree.num_evictable_blocks, num_free(tree)) == (2, 5)
    tree.evict(99)
    assert (tree.num_evictable_blocks, num_free(tree)) == (0, 7)
    assert paths(tree) == ["abq"]
    check(tree, user)


def test_hits_do_not_pile_up_in_the_queue():
    tree = make_tree(num_blocks=26)
    cache(tree, *"abcdefghijklmnopqrstuvwxyz")
    rng = random.Random(0)
    order = list("abcdefghijklmnopqrstuvwxyz")
    for _ in range(500):
        char = rng.choice(order[1:])
        match(tree, char)
        order.remove(char)
        order.append(char)
        tree.check()
    assert len(tree._device_queue._heap) < 150
    for i in range(26):
        tree.evict(1)
        assert paths(tree) == sorted(order[i + 1 :])


@pytest.mark.parametrize(
    ("policy", "order"), [(LRU(), "a b c"), (LFU(), "b c a"), (MRU(), "c b a"), (SizeAware(), "b a c")]
)
def test_policies_choose_the_order(policy, order):
    tree = make_tree(policy=policy)
    cache(tree, "abcd")  # hit three times, four blocks
    cache(tree, "bcdefg")  # hit twice, six blocks
    cache(tree, "c")  # hit twice, one block
    for prompt in ("abcd", "abcd", "abcd", "bcdefg", "bcdefg", "c", "c"):
        match(tree, prompt)
    sizes = {"a": 4, "b": 6, "c": 1}
    for i, victim in enumerate(order.split()):
        tree.evict(sizes[victim])
        assert [path[0] for path in paths(tree)] == sorted(order.split()[i + 1 :])
        check(tree)


def test_policies_have_names():
    assert [LRU, LFU, SizeAware] == [EVICTION_POLICIES[name] for name in ("lru", "lfu", "size")]


# --- the host tier -----------------------------------------------------------------------------------------


def test_evicted_blocks_move_to_the_host_leaves_first():
    tree = make_tree(num_host_blocks=9)
    user = start(tree, "abcd")
    table = user.table
    finish(tree, user)
    copies = tree.evict(1)
    assert [source for source, _ in copies] == table[3:]
    assert (num_free(tree), tree.host.num_free_blocks) == (17, 8)
    assert paths(tree) == ["abcD"]
    check(tree)
    copies = tree.evict(2)
    assert [source for source, _ in copies] == table[1:3]
    node = match(tree, "abcd")
    assert text(node) == "a|BC|D"
    assert node.parent.block_ids == [target for _, target in copies]
    assert (tree.host_blocks(node), text(tree.device_ancestor(node))) == (3, "a")
    check(tree)
    tree.evict(9)
    assert (tree.num_evictable_blocks, num_free(tree), paths(tree)) == (0, 20, ["ABCD"])
    assert tree.host_blocks(node) == 4
    assert tree.device_ancestor(node).depth == 0
    check(tree)


def test_a_match_splits_runs_on_the_host_too():
    tree = make_tree(num_host_blocks=9)
    cache(tree, "abcd")
    tree.evict(2)
    node = match(tree, "abcx")
    assert (text(node), node.depth) == ("ab|C", 3)
    check(tree)


def test_a_path_is_loaded_from_its_start():
    tree = make_tree(num_host_blocks=9)
    cache(tree, "abcd", "abcx")
    for _ in range(4):
        tree.evict(1)
    node = match(tree, "abcd")
    assert text(node) == "a|B|C|D"
    tree.acquire(node)
    host_ids = [block_id for n in reversed(list(node.path())) for block_id in n.block_ids if n.on_host]
    copies = tree.load(node)
    assert copies == list(zip(host_ids, node.path_block_ids()[1:], strict=True))
    assert paths(tree) == ["abcX", "abcd"]
    assert tree.load(node) == []
    assert (tree.host.num_free_blocks, num_free(tree), tree.num_evictable_blocks) == (8, 16, 0)
    check(tree, User([], node, []))
    tree.release(node)
    tree.evict(1)
    assert paths(tree) == ["abcD", "abcX"]
    check(tree)


def test_a_path_that_waits_for_its_load_is_safe_in_both_tiers():
    tree = make_tree(num_host_blocks=3)
    cache(tree, "ab")
    tree.evict(1)
    node = match(tree, "ab")
    tree.acquire(node)
    cache(tree, "xyz")
    tree.evict(9)
    assert paths(tree) == ["XY", "aB"]
    check(tree, User([], node, []))
    tree.load(node)
    assert paths(tree) == ["XY", "ab"]
    check(tree, User([], node, []))


def test_a_path_may_be_given_up_before_it_is_loaded():
    tree = make_tree(num_host_blocks=3)
    cache(tree, "ab")
    tree.evict(1)
    node = match(tree, "ab")
    tree.acquire(node)
    tree.release(node)
    check(tree)
    tree.evict(1)
    assert paths(tree) == ["AB"]
    check(tree)


def test_extend_exchanges_blocks_on_the_host_for_the_caller_s():
    tree = make_tree(num_host_blocks=9)
    cache(tree, "abcd", "abcdx")
    tree.evict(4)
    node = tree.device_ancestor(match(tree, "abcd"))
    assert text(node) == "a"
    tree.acquire(node)  # recomputes the rest
    table = node.path_block_ids() + tree.device.allocate(3)
    tree.device.share(table[:1])
    user = User(tokens("abcy"), tree.extend(node, tokens("abcy"), table), table)
    assert paths(tree) == ["abcDX", "abcy"]
    assert user.node.path_block_ids() == table
    assert tree.host.num_free_blocks == 7
    check(tree, user)
    finish(tree, user)
    check(tree)


def test_a_full_host_drops_its_own_least_recently_used_leaves_and_no_more_than_it_must():
    tree = make_tree(num_host_blocks=4)
    cache(tree, "abc", "x", "pq")
    tree.evict(4)
    assert paths(tree) == ["ABC", "X", "pq"]
    match(tree, "abc")
    tree.evict(1)
    assert paths(tree) == ["ABC", "pQ"]
    match(tree, "a")
    tree.evict(1)
    assert paths(tree) == ["ABC", "P"]  # "ab" was used last together with "a", but Q earlier than both
    check(tree)


def test_what_does_not_fit_onto_the_host_is_dropped():
    tree = make_tree(num_host_blocks=2)
    cache(tree, "x", "abcde")
    assert len(tree.evict(99)) == 2
    assert paths(tree) == ["AB"]
    check(tree)
    node = match(tree, "ab")
    tree.acquire(node)
    cache(tree, "pq")
    assert tree.evict(99) == []  # the host is full of what is waited for
    assert paths(tree) == ["AB"]
    check(tree, User([], node, []))


def test_a_host_block_that_is_filled_twice_in_one_call_is_copied_once():
    tree = make_tree(num_host_blocks=1)
    cache(tree, "a", "b", "c")
    last = match(tree, "c")
    table = last.path_block_ids()
    assert tree.evict(3) == [(table[0], 0)]
    assert paths(tree) == ["C"]
    check(tree)


def test_what_is_on_the_host_below_a_run_goes_before_the_run_is_cut():
    tree = make_tree(num_host_blocks=2)
    cache(tree, "q", "abc")
    tree.evict(1)
    node = match(tree, "q")
    tree.acquire(node)
    tree.evict(1)
    assert paths(tree) == ["Q", "abC"]
    assert len(tree.evict(2)) == 1
    assert paths(tree) == ["A", "Q"]
    check(tree, User([], node, []))


# --- reset -------------------------------------------------------------------------------------------------


def test_reset_forgets_what_nobody_uses():
    tree = make_tree(num_host_blocks=9)
    cache(tree, "abc", "xyz", salt="one")
    tree.evict(2)
    tree.reset()
    assert (num_free(tree), tree.host.num_free_blocks) == (20, 9)
    assert tree.stats().num_nodes == tree.num_evictable_blocks == match(tree, "abc", salt="one").depth == 0
    assert tree._roots == {}
    assert not tree._device_queue._heap  # nor is anything kept from the garbage collector
    assert not tree._host_queue._heap
    check(tree)


def test_after_a_reset_users_go_on_unseen_and_their_last_one_takes_the_blocks_along():
    tree = make_tree()
    cache(tree, "abxy")
    first, second = start(tree, "abc"), start(tree, "ab")
    tree.reset()
    assert match(tree, "abc").depth == 0
    assert paths(tree) == ["abc"]
    check(tree, first, second)

    first.table += tree.device.allocate(1)
    first.node = tree.extend(first.node, tokens("abcd"), first.table)
    second.table += tree.device.allocate(1)
    second.node = tree.extend(second.node, tokens("abz"), second.table)
    assert match(tree, "ab").depth == 0
    new = start(tree, "abc")
    assert set(new.table).isdisjoint(first.table)
    check(tree, first, second, new)

    finish(tree, first)
    assert num_free(tree) == 20 - 3 - 3
    check(tree, second, new)
    finish(tree, second)
    assert num_free(tree) == 20 - 3
    assert text(match(tree, "abc")) == "abc"
    finish(tree, new)
    assert tree.num_evictable_blocks == 3
    check(tree)


def test_a_root_in_use_is_detached_by_a_reset_too():
    tree = make_tree()
    old = match(tree, "ab")
    tree.acquire(old)
    tree.reset()
    new = start(tree, "ab")
    tree.release(old)
    assert match(tree, "ab") is new.node
    check(tree, new)


def test_a_path_that_is_given_up_before_its_load_but_after_a_reset_is_dropped_from_both_tiers():
    tree = make_tree(num_host_blocks=9)
    cache(tree, "abc")
    tree.evict(2)
    node = match(tree, "abc")
    tree.acquire(node)
    tree.reset()
    tree.release(node)
    assert (num_free(tree), tree.host.num_free_blocks) == (20, 9)
    check(tree)


def test_a_path_that_waits_for_its_load_survives_a_reset():
    tree = make_tree(num_host_blocks=9)
    cache(tree, "abc")
    tree.evict(2)
    node = match(tree, "abc")
    tree.acquire(node)
    tree.reset()
    check(tree, User([], node, []))
    assert len(tree.load(node)) == 2
    tree.acquire(node)
    tree.release(node)
    check(tree, User([], node, []))
    tree.release(node)
    assert (num_free(tree), tree.host.num_free_blocks) == (20, 9)
    check(tree)


# --- stats and check ---------------------------------------------------------------------------------------


def test_stats_count_nodes_blocks_and_tokens():
    tree = make_tree(num_host_blocks=9)
    assert tree.stats().hit_rate == 0.0
    cache(tree, "pqr")
    tree.evict(2)
    users = start(tree, "abc"), start(tree, "abd")
    tree.record(100, 25)
    tree.record(60, 15)
    stats = tree.stats()
    assert (stats.num_nodes, stats.num_cached_blocks, stats.num_host_blocks) == (5, 5, 2)
    assert (stats.num_shared_blocks, stats.queried_tokens, stats.hit_tokens) == (2, 160, 40)
    assert stats.hit_rate == 0.25
    for user in users:
        finish(tree, user)
    assert tree.stats().num_shared_blocks == 0


def corrupt_depth(tree, node):
    node.depth += 1


def corrupt_tokens(tree, node):
    node.tokens.pop()


def corrupt_users(tree, node):
    node.num_users += 1


def corrupt_key(tree, node):
    node.tokens[0] += 1


def corrupt_device_children(tree, node):
    node.parent.num_device_children += 1


def corrupt_queue(tree, node):
    tree._device_queue.clear()


def corrupt_priority(tree, node):
    match(tree, "xyz").last_used += 1


def corrupt_tier(tree, node):
    node.parent.on_host = True


def corrupt_evictable(tree, node):
    tree._num_evictable_blocks += 1


def corrupt_shared(tree, node):
    tree._num_shared_blocks += 1


def corrupt_block(tree, node):
    node.block_ids[0] = node.parent.block_ids[0]


def corrupt_roots(tree, node):
    tree._roots["x"] = tree._roots[None]


def corrupt_empty_root(tree, node):
    tree._roots["x"] = Node(None, [], [], "x")


@pytest.mark.parametrize("corrupt", [f for name, f in sorted(globals().items()) if name.startswith("corrupt_")])
def test_check_notices(corrupt):
    tree = make_tree(num_host_blocks=9)
    cache(tree, "xyz")
    users = [start(tree, "ab"), start(tree, "abcd")]
    check(tree, *users)
    corrupt(tree, users[1].node)
    with pytest.raises(AssertionError):
        tree.check(user.node for user in users)


def test_check_notices_users_that_it_is_not_told_of():
    tree = make_tree()
    user = start(tree, "ab")
    tree.check()
    for users in ([], [user.node] * 2, [user.node.parent], [Node(None, [], [])]):
        with pytest.raises(AssertionError, match=r"users were miscounted|a node that has left the tree"):
            tree.check(users)


# --- random traffic ----------------------------------------------------------------------------------------

Key = tuple  # (generation, salt, tokens of a prefix): what the K/V of the prefix's last block depends on


@dataclass
class Entry:
    """A cached block in the model."""

    last_used: int
    on_host: bool = False


@dataclass(eq=False)
class Request(User):
    """A user that the model knows more of. It waits for its load as long as `table` is None."""

    generation: int
    salt: str | None
    num_cached: int  # blocks that it uses through the tree


class RadixTreeMachine(RuleBasedStateMachine):
    """Sequences come, grow and go as under a scheduler; the tree is compared with a dict of single blocks.

    The model has no nodes: each cached prefix of whole blocks is an entry of its own. Both pools are lists of
    keys, written where a step would compute and copied where the tree says so, so that a block that is handed
    out with some other prefix's K/V is noticed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[Request] = []
        self.cached: dict[Key, Entry] = {}
        self.generation = self.clock = 0

    @initialize(
        num_blocks=st.integers(4, 12),
        num_host_blocks=st.integers(0, 6),
        block_size=st.integers(1, 4),
        policy=st.sampled_from([LRU, LRU, LFU, SizeAware, MRU]),
    )
    def create(self, num_blocks, num_host_blocks, block_size, policy):
        self.block_size, self.policy = block_size, policy()
        self.tree = make_tree(num_blocks, num_host_blocks=num_host_blocks, block_size=block_size, policy=self.policy)
        self.device, self.host = self.tree.device, self.tree.host
        self.device_kv: list[Key | None] = [None] * num_blocks
        self.host_kv: list[Key | None] = [None] * num_host_blocks

    # --- the model ---

    def keys(self, generation, salt, token_ids, num_blocks=None):
        """The keys of the first blocks of a sequence; of all its full blocks if `num_blocks` is None."""
        if num_blocks is None:
            num_blocks = len(token_ids) // self.block_size
        return [(generation, salt, tuple(token_ids[: i * self.block_size])) for i in range(1, num_blocks + 1)]

    def path_keys(self, request):
        return self.keys(request.generation, request.salt, request.tokens, request.num_cached)

    def num_users(self):
        return Counter(key for request in self.requests for key in self.path_keys(request))

    def touch(self, keys):
        self.clock += 1
        for key in keys:
            self.cached[key].last_used = self.clock

    def expect_match(self, token_ids, max_blocks, salt):
        """The keys of the blocks that a match must find."""
        found = []
        for key in self.keys(self.generation, salt, token_ids)[:max_blocks]:
            if key not in self.cached:
                break
            found.append(key)
        self.touch(found)
        return found

    def tree_contents(self):
        """Every block in the tree: its key, and whether it is on the host."""
        generations = {list(r.node.path())[-1]: r.generation for r in self.requests}
        contents = {}
        for node in self.tree._nodes():
            *path, root = node.path()
            token_ids = [token for n in reversed(path) for token in n.tokens]
            generation = self.generation if self.tree._roots.get(root.salt) is root else generations[root]
            keys = self.keys(generation, root.salt, token_ids)[-len(node.block_ids) :]
            kv = self.host_kv if node.on_host else self.device_kv
            assert [kv[block_id] for block_id in node.block_ids] == keys, "a block holds some other prefix's K/V"
            contents.update(dict.fromkeys(keys, node.on_host))
        return contents

    # --- what a scheduler does ---

    def draw_tokens(self, data, *, known=((),), max_blocks=2):
        """Some tokens after one of the `known` prefixes, mostly zeros so that sequences have much in common."""
        prefix = data.draw(st.sampled_from(known), label="prefix")
        length = data.draw(st.integers(1, max_blocks * self.block_size + 1), label="length")
        token = st.sampled_from([0, 0, 0, 0, 1])
        return [*prefix, *data.draw(st.tuples(*[token] * length), label="tokens")]

    def make_room(self, num_blocks):
        missing = num_blocks - self.device.num_free_blocks
        if missing > self.tree.num_evictable_blocks:
            return False
        if missing > 0:
            self.evict_and_check(missing)
        return True

    def evict_and_check(self, count):
        num_free, users, before = self.device.num_free_blocks, self.num_users(), self.tree_contents()
        idle = {key for key, on_host in before.items() if not on_host and not users[key]}
        first_victims = self.first_victims()

        copies = self.tree.evict(count)

        assert len({target for _, target in copies}) == len(copies)
        for source, target in copies:
            self.host_kv[target] = self.device_kv[source]
        for block_id in self.device._free:
            self.device_kv[block_id] = None
        after = self.tree_contents()
        evicted = {key for key in before if not before[key] and after.get(key) is not False}
        assert self.device.num_free_blocks - num_free == len(evicted) == min(count, len(idle))
        assert evicted <= idle
        assert not evicted or evicted & first_victims
        dropped = before.keys() - after.keys()
        kept = {key for key in before if before[key] and key in after and not users[key]}
        assert not any(users[key] for key in dropped)
        assert dropped <= {key for key in before if before[key]} | evicted
        num_host_blocks = sum(before.values()) + len(evicted)
        assert sum(after.values()) == min(num_host_blocks, self.host.num_blocks if self.host else 0)
        if isinstance(self.policy, LRU):
            # Whatever touches a block touches those above it, so leaves first is in order of last_used too.
            self.assert_used_before(evicted, idle - evicted)
            self.assert_used_before(dropped, kept)
        self.cached = {key: Entry(self.cached[key].last_used, on_host) for key, on_host in after.items()}

    def assert_used_before(self, keys, others):
        latest = max((self.cached[key].last_used for key in keys), default=0)
        assert all(latest <= self.cached[key].last_used for key in others)

    def first_victims(self):
        """The last block of each node that the policy allows to be evicted first, by a look at all nodes."""
        nodes = [
            node
            for node in self.tree._nodes()
            if not node.on_host and node.num_users == 0 and all(child.on_host for child in node.children.values())
        ]
        least = min(map(self.policy.priority, nodes), default=None)
        blocks = {node.block_ids[-1] for node in nodes if self.policy.priority(node) == least}
        return {self.device_kv[block_id] for block_id in blocks}

    def write(self, request, start):
        """Compute the K/V of a request from block `start` on."""
        keys = self.keys(request.generation, request.salt, request.tokens)
        for block_id, key in zip(request.table[start:], keys[start:], strict=False):
            self.device_kv[block_id] = key

    def admit(self, request):
        """Load what is on the host and give the request its blocks; send it away if there is no room."""
        num_blocks = self.device.num_blocks_for(len(request.tokens))
        num_host_blocks = self.tree.host_blocks(request.node)
        assert num_host_blocks == sum(self.cached[key].on_host for key in self.path_keys(request))
        if not self.make_room(num_blocks - request.num_cached + num_host_blocks):
            self.finish_request(request)
            return
        copies = self.tree.load(request.node)
        assert len(copies) == num_host_blocks
        for source, target in copies:
            self.device_kv[target] = self.host_kv[source]
        for key in self.path_keys(request):
            self.cached[key].on_host = False
        request.table = request.node.path_block_ids()
        self.device.share(request.table)
        request.table += self.device.allocate(num_blocks - len(request.table))
        self.write(request, request.num_cached)

    def finish_request(self, request):
        self.requests.remove(request)
        self.tree.release(request.node)
        self.device.release(request.table or [])
        self.touch(self.path_keys(request))
        if request.generation < self.generation:
            users = self.num_users()
            for key in self.path_keys(request):
                if not users[key]:
                    del self.cached[key]

    def draw_request(self, data, *, waits=False):
        return data.draw(st.sampled_from([r for r in self.requests if (r.table is None) == waits]), label="request")

    def has_running(self):
        return any(request.table is not None for request in self.requests)

    def extend_and_check(self, request, num_blocks, token_ids):
        request.node = self.tree.extend(request.node, token_ids, request.table[:num_blocks])
        request.num_cached = num_blocks
        self.clock += 1
        for key in self.path_keys(request):
            self.cached.setdefault(key, Entry(self.clock)).on_host = False

    # --- rules ---

    @rule(
        data=st.data(),
        salt=st.sampled_from([None, None, "a"]),
        max_blocks=st.one_of(st.just(99), st.integers(0, 4)),
        then=st.sampled_from(["load", "load", "recompute", "recompute", "wait", "look"]),
        caches=st.sampled_from([True, True, False]),
        leaves=st.sampled_from([True, True, False]),
    )
    def match(self, data, salt, max_blocks, then, caches, leaves):
        known = [(), (), *(tokens for generation, _, tokens in self.cached if generation == self.generation)]
        token_ids = self.draw_tokens(data, known=known, max_blocks=4)
        found = self.expect_match(token_ids, max_blocks, salt)
        node = self.tree.match(token_ids, max_blocks, salt)
        assert node.depth == len(found)
        assert self.tree.host_blocks(node) == sum(self.cached[key].on_host for key in found)
        if then == "look" or len(self.requests) == 5:
            return
        if then == "recompute":
            node = self.tree.device_ancestor(node)
        self.tree.acquire(node)
        request = Request(token_ids, node, None, self.generation, salt, node.depth)
        self.requests.append(request)
        if then != "wait":
            self.admit(request)
        if caches and request.table is not None:
            self.extend_and_check(request, len(token_ids) // self.block_size, token_ids)
        if leaves and request in self.requests:
            self.finish_request(request)

    @precondition(lambda self: any(request.table is None for request in self.requests))
    @rule(data=st.data())
    def stop_waiting(self, data):
        self.admit(self.draw_request(data, waits=True))

    @precondition(has_running)
    @rule(data=st.data(), caches=st.booleans())
    def grow(self, data, caches):
        request = self.draw_request(data)
        new = self.draw_tokens(data)
        num_full = len(request.tokens) // self.block_size
        missing = self.device.num_blocks_for(len(request.tokens) + len(new)) - len(request.table)
        if self.make_room(missing):
            request.tokens += new
            request.table += self.device.allocate(missing)
            self.write(request, num_full)
            if caches:
                self.extend_and_check(request, len(request.tokens) // self.block_size, request.tokens)

    @precondition(has_running)
    @rule(data=st.data(), as_tuple=st.booleans())
    def extend(self, data, as_tuple):
        request = self.draw_request(data)
        num_full = len(request.tokens) // self.block_size
        num_blocks = data.draw(st.one_of(st.just(num_full), st.integers(request.num_cached, num_full)), label="blocks")
        token_ids = tuple(request.tokens) if as_tuple else request.tokens
        self.extend_and_check(request, num_blocks, token_ids)

    @precondition(has_running)
    @rule(data=st.data())
    def fork(self, data):
        """Another sequence on the path of a request, which may be from before a reset."""
        request = self.draw_request(data)
        if len(self.requests) == 5:
            return
        self.tree.acquire(request.node)
        table = request.node.path_block_ids()
        self.device.share(table)
        token_ids = request.tokens[: request.num_cached * self.block_size]
        self.requests.append(replace(request, tokens=token_ids, table=table))

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def finish(self, data):
        self.finish_request(data.draw(st.sampled_from(self.requests), label="request"))

    @precondition(lambda self: self.tree.num_evictable_blocks > 0)
    @rule(count=st.integers(0, 5))
    def evict(self, count):
        self.evict_and_check(count)

    @precondition(lambda self: len(self.cached) > 6)
    @rule()
    def reset(self):
        users = self.num_users()
        self.tree.reset()
        self.generation += 1
        self.cached = {key: entry for key, entry in self.cached.items() if users[key]}

    # --- what must hold ---

    @invariant()
    def tree_and_model_agree(self):
        self.tree.check([request.node for request in self.requests])
        self.device.check([*(request.table or [] for request in self.requests), self.tree.owned_blocks()])
        if self.host is not None:
            self.host.check([self.tree.owned_host_blocks()])
        assert self.tree_contents() == {key: entry.on_host for key, entry in self.cached.items()}
        users = self.num_users()
        on_device = [key for key, entry in self.cached.items() if not entry.on_host]
        stats = self.tree.stats()
        assert self.tree.num_evictable_blocks == sum(users[key] == 0 for key in on_device)
        assert stats.num_cached_blocks == len(on_device)
        assert stats.num_host_blocks == len(self.cached) - len(on_device)
        assert stats.num_shared_blocks == sum(users[key] > 1 for key in on_device)

    @invariant()
    def requests_have_their_own_kv(self):
        for request in self.requests:
            assert request.node.depth == request.num_cached
            if request.table is not None:
                keys = self.keys(request.generation, request.salt, request.tokens)
                assert [self.device_kv[block_id] for block_id in request.table[: len(keys)]] == keys

    @invariant()
    def roots_are_those_in_use(self):
        names = {key[:2] for key in self.cached} | {(r.generation, r.salt) for r in self.requests}
        assert set(self.tree._roots) == {salt for generation, salt in names if generation == self.generation}
        assert len(self.tree._detached) == sum(generation < self.generation for generation, _ in names)

    def teardown(self):
        """Once everybody has left, all blocks come back."""
        while self.requests:
            self.finish_request(self.requests[0])
        if self.generation or self.clock:
            self.evict_and_check(self.device.num_blocks)
            assert self.device.num_free_blocks == self.device.num_blocks
            self.tree.reset()
            assert self.host is None or self.host.num_free_blocks == self.host.num_blocks


TestRadixTreeMachine = RadixTreeMachine.TestCase
TestRadixTreeMachine.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
