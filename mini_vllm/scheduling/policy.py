"""The order in which requests get their turn.

A policy gives a sequence its place once, when it arrives. The place is counted in tokens of work: what the engine
had computed by then, plus a handicap. Since that clock only goes forward, a handicap is paid off in the end: nothing
starves, and nobody's place ever has to be looked at again.
"""

from __future__ import annotations

from collections.abc import Callable

from mini_vllm.scheduling.sequence import Sequence

Policy = Callable[[Sequence, int], float]
"""(sequence, tokens computed so far) -> its place; lower goes first, ties go to the earlier arrival."""

PRIORITY_TOKENS = 100_000  # work that a request lets pass for one level of priority below another
LENGTH_FACTOR = 8  # work that a request lets pass for each token of its own


def fcfs(seq: Sequence, clock: int) -> float:
    """First come, first served."""
    return 0


def priority(seq: Sequence, clock: int) -> float:
    """Lower `priority` first, as in vLLM; a level is worth PRIORITY_TOKENS of waiting."""
    return clock + seq.priority * PRIORITY_TOKENS


def sjf(seq: Sequence, clock: int) -> float:
    """Shortest job first: by the length of the prompt, for that is all there is to know at the door.

    What the prefix cache will spare is not counted, so it does not suit conversations with long histories.
    """
    return clock + seq.num_tokens * LENGTH_FACTOR


POLICIES: dict[str, Policy] = {"fcfs": fcfs, "priority": priority, "sjf": sjf}
