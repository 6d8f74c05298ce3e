"""From sampled tokens to text, one at a time: never half a character, never half a stop string.

A token may end in the middle of a character or of a stop string, so text is handed out only once nothing that
follows can change it.
"""

from __future__ import annotations

import codecs
import functools
from collections import deque
from collections.abc import Sequence
from itertools import islice

from mini_vllm.tokenizer import Tokenizer

MAX_STOP_CHARS = 65_536


class IncrementalDetokenizer:
    """Text of one sequence as its tokens arrive; ends it at a stop string.

    prompt_token_ids: what comes before. Its text is not repeated, but it decides whether a leading space counts, and
        a character that it left unfinished is completed.
    stop: strings that end the text. The one that ends first wins, the longest of those that end together; it is
        left out unless include_stop_str_in_output. Together at most MAX_STOP_CHARS characters, else `ValueError`.
    min_tokens: a stop string counts only if it ends in text of a later token (vLLM's rule).

    The text equals that of `Tokenizer.decode`, except that an unfinished character at the end is dropped, and
    that of the bytes of a broken SentencePiece byte sequence only the broken ones become U+FFFD.
    Cost per token: a dictionary look-up, a few bytes of UTF-8 and, with stop strings, one step per character.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int],
        *,
        skip_special_tokens: bool = True,
        stop: Sequence[str] = (),
        include_stop_str_in_output: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self.stop_reason: str | None = None
        self._tokenizer = tokenizer
        self._skipped = frozenset(tokenizer.all_special_ids) if skip_special_tokens else frozenset()
        self._stops = _StopStrings.of(tuple(stop)) if stop else None
        self._include_stop = include_stop_str_in_output
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._state = 0  # of self._stops, after all characters so far
        self._pieces: list[str] = []
        self._held = ""  # may still become part of a stop string
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        # An unfinished character has at most three bytes, so the prompt's last three tokens with text hold it.
        with_text = (i for i in reversed(prompt_token_ids) if i not in self._skipped and tokenizer.token_bytes(i))
        last = list(islice(with_text, 3))
        self._at_start = not last
        for token_id in reversed(last):
            self._decode(token_id)

    @property
    def text(self) -> str:
        """All settled text: whole characters, and no ending that may become a stop string."""
        if len(self._pieces) > 1:
            self._pieces = ["".join(self._pieces)]
        return self._pieces[0] if self._pieces else ""

    def append(self, token_id: int) -> str:
        """Take the next output token; return the text that it settled. Does nothing after a stop string."""
        if self.stop_reason is not None:
            return ""
        self._num_tokens += 1
        text = self._decode(token_id)
        return self._settle(self._until_stop(text) if self._stops and text else text)

    def finish(self) -> str:
        """Settle and return what was held back; an unfinished character is dropped. No token may follow."""
        held, self._held = self._held, ""
        return self._settle(held)

    def _settle(self, text: str) -> str:
        if text:
            self._pieces.append(text)
        return text

    def _decode(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        data = self._tokenizer.token_bytes(token_id)
        if data and self._at_start:  # the first token with text, which may lose all of it
            self._at_start = False
            data = self._tokenizer.token_bytes(token_id, at_start=True)
        return self._utf8.decode(data)

    def _until_stop(self, new: str) -> str:
        """Text that is settled after `new`; sets stop_reason where a stop string ends in it."""
        text = self._held + new
        stops, state, eligible = self._stops, self._state, self._num_tokens > self._min_tokens
        for end, char in enumerate(new, len(self._held) + 1):
            state = stops.next_state(state, char)
            if eligible and (found := stops.found[state]):
                self.stop_reason, self._held = found, ""
                return text[: end if self._include_stop else end - len(found)]
        # A stop string that will be shown hides nothing, so there is no need to wait for it.
        cut = len(text) if self._include_stop else len(text) - stops.num_held[state]
        self._state, self._held = state, text[cut:]
        return text[:cut]


class _StopStrings:
    """Aho-Corasick automaton: finds many strings in a stream at a constant cost per character.

    State 0 is the empty string; every other state stands for a prefix of a stop string, namely for the
    longest one that the text ends in.
    found[state]: the longest stop string that ends here, or None.
    num_held[state]: length of the longest ending that may still become a stop string.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        size = sum(map(len, stops))
        if size > MAX_STOP_CHARS or "" in stops:
            raise ValueError(
                f"stop strings must not be empty and have at most {MAX_STOP_CHARS} characters in all, got {size} "
                f"characters in {len(stops)} strings; use fewer or shorter ones"
            )
        self.found: list[str | None] = [None]
        self.num_held = [0]
        self._next: dict[tuple[int, str], int] = {}
        self._fallback = [0]  # the state of the longest proper ending that is a prefix too
        children: list[list[tuple[str, int]]] = [[]]
        for stop in stops:
            state = 0
            for depth, char in enumerate(stop, 1):
                child = self._next.get((state, char))
                if child is None:
                    child = self._next[state, char] = len(self.found)
                    children[state].append((char, child))
                    children.append([])
                    self.found.append(None)
                    self.num_held.append(depth)
                    self._fallback.append(0)
                state = child
            self.found[state] = stop

        queue = deque([0])
        while queue:  # breadth first: a fallback is shorter, hence complete before it is needed
            state = queue.popleft()
            fallback = self._fallback[state]
            self.found[state] = self.found[state] or self.found[fallback]
            if not children[state]:  # nothing longer begins with this
                self.num_held[state] = self.num_held[fallback]
            for char, child in children[state]:
                self._fallback[child] = self.next_state(fallback, char) if state else 0
                queue.append(child)

    def next_state(self, state: int, char: str) -> int:
        following = self._next.get((state, char))
        while following is None and state:
            state = self._fallback[state]
            following = self._next.get((state, char))
        return following or 0

    @classmethod
    @functools.lru_cache(maxsize=8)  # the requests of a batch often share their stop strings
    def of(cls, stops: tuple[str, ...]) -> _StopStrings:
        return cls(stops)
