"""From the tokens of a completion to the text that a client sees, piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_HALF = "\ufffd"  # what a decoder gives for the first bytes of a character


class TextStream:
    """The text of one completion as its tokens arrive.

    It ends before the first of ``stops`` that is met; what may be the beginning of one, or half a
    character, is kept back until it is known. Pieces put together are the whole text.
    """

    def __init__(self, decode: Callable[[list[int]], str], stops: Sequence[str] = ()) -> None:
        self._decode, self._stops = decode, [s for s in stops if s]
        self._ids: list[int] = []
        self._shown = 0
        self.stopped = False  # a stop string was met

    def push(self, token_ids: Sequence[int], *, last: bool = False) -> str:
        """The text that these tokens add; ``last``: no more will come."""
        if self.stopped:
            return ""
        self._ids += token_ids
        text = self._decode(self._ids)
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

    def _beginning(self, text: str) -> int:
        """Characters at the end of ``text`` that a stop string may begin with."""
        longest = max(map(len, self._stops), default=0) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(s.startswith(text[-length:]) for s in self._stops):
                return length
        return 0
