"""Turns tokens into text as they come: whole grapheme clusters, no stop string, the pieces joined equal the whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import regex

_REPLACEMENT = "\ufffd"
# More tokens than one character can be spread over: four bytes, one token each, with room to spare. Held back longer than that,
# a replacement character is the model's own and not half of something.
_MAX_HELD_TOKENS = 8


class TextStream:
    """Feeds on token ids, gives pieces of text.

    Thai, Lao and Chinese have no spaces, so that waiting for one would hold a whole answer back; but a vowel sign or a tone mark
    may still join the last character, and a character may be spread over several tokens. Held back is only what may still change:
    an incomplete character, the last grapheme cluster (UAX #29, `regex`' \\X), and what may be the beginning of a stop string.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stop = tuple(stop)
        self._ids: list[int] = []
        # Decoded again and again is only the window ids[_prefix:]; ids[_prefix:_read] is what has been read out of it.
        self._prefix = 0
        self._read = 0
        self._pending = ""
        self._sent: list[str] = []
        self.stopped = False

    @property
    def text(self) -> str:
        """All that has been given out."""
        return "".join(self._sent)

    def put(self, token_id: int) -> str:
        """Takes a token, gives the text that is settled now; often empty. Sets `stopped` when a stop string has come."""
        if self.stopped:
            return ""
        self._ids.append(token_id)
        return self._settle(self._decoded(last=False), last=False)

    def end(self) -> str:
        """Gives what was held back."""
        if self.stopped:
            return ""
        return self._settle(self._decoded(last=True), last=True)

    def _decoded(self, *, last: bool) -> str:
        """What the tokens not read yet add to the text; empty while they end within a character."""
        before = self._decode(self._ids[self._prefix : self._read])
        after = self._decode(self._ids[self._prefix :])
        if not last and after.endswith(_REPLACEMENT) and len(self._ids) - self._read < _MAX_HELD_TOKENS:
            return ""
        # The window keeps the last tokens read, since some decoders treat a beginning differently (a leading space).
        self._prefix, self._read = self._read, len(self._ids)
        return after[len(before) :]

    def _settle(self, new: str, *, last: bool) -> str:
        text = self._pending + new
        cut = _first_stop(text, self._stop)
        if cut is not None:
            self.stopped = True
            self._pending = ""
            return self._give(text[:cut])
        if last:
            self._pending = ""
            return self._give(text)
        edge = _settled_chars(text, len(text) - _stop_beginning_chars(text, self._stop))
        self._pending = text[edge:]
        return self._give(text[:edge])

    def _give(self, piece: str) -> str:
        if piece:
            self._sent.append(piece)
        return piece


def _settled_chars(text: str, limit: int) -> int:
    """The last border of two grapheme clusters that is not beyond `limit`; the last cluster may still grow."""
    return max((match.start() for match in regex.finditer(r"\X", text) if match.start() <= limit), default=0)


def _first_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the first stop string begins."""
    places = [place for word in stop if (place := text.find(word)) >= 0]
    return min(places, default=None)


def _stop_beginning_chars(text: str, stop: Sequence[str]) -> int:
    """Characters at the end that may be the beginning of a stop string."""
    return max(
        (size for word in stop for size in range(1, min(len(word), len(text) + 1)) if text.endswith(word[:size])),
        default=0,
    )
