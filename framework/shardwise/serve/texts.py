"""From the tokens of a completion to the text that a client sees, piece by piece."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence

_HALF = "\ufffd"  # what a decoder gives for the first bytes of a character


class TextStream:
    """The text of one completion as its tokens arrive.

    It ends before the first of ``stops`` that is met; what may be the beginning of one, or half a
    character, is kept back until it is known. Pieces put together are the whole text.

    ``bounds``: (tokens, characters) from the start to each place where neither is cut.
    """

    def __init__(self, decode: Callable[[list[int]], str], stops: Sequence[str] = ()) -> None:
        self._decode, self._stops = decode, [s for s in stops if s]
        self._ids: list[int] = []
        self._shown = 0
        self.bounds = [(0, 0)]
        self.stopped = False  # a stop string was met

    def push(self, token_ids: Sequence[int], *, last: bool = False) -> str:
        """The text that these tokens add; ``last``: no more will come."""
        if self.stopped:
            return ""
        for token in token_ids:
            self._ids.append(token)
            text = self._decode(self._ids)
            if not text.endswith(_HALF):
                self.bounds.append((len(self._ids), len(text)))
        if not token_ids:
            text = self._decode(self._ids)
        if last and self.bounds[-1][0] < len(self._ids):
            self.bounds.append((len(self._ids), len(text)))
        # The stop that is complete first; of several, the one that begins first.
        met = [(at + len(s), at) for s in self._stops if (at := text.find(s)) >= 0]
        if met:
            self.stopped, text = True, text[: min(met)[1]]
        elif not last:
            text = text.rstrip(_HALF)
            text = text[: len(text) - self._beginning(text)]
        piece = text[self._shown :]
        self._shown = max(self._shown, len(text))
        return piece

    @property
    def num_whole(self) -> int:
        """How many of ``bounds`` lie in what was shown: text behind them was not, or not whole."""
        return bisect.bisect_right(self.bounds, self._shown, key=lambda bound: bound[1])

    def _beginning(self, text: str) -> int:
        """Characters at the end of ``text`` that a stop string may begin with."""
        longest = max(map(len, self._stops), default=0) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(s.startswith(text[-length:]) for s in self._stops):
                return length
        return 0
