"""Turns tokens into text as they come: whole grapheme clusters, no stop string, the pieces joined equal the whole.

    token ──► _Characters: whole characters ──► _StopWatch: no stop string ──► whole grapheme clusters ──► piece

Work and memory for a token do not grow with the answer, nor with what is held back: an unfinished character (3 bytes), a cluster
(its first 32 code points), and what may be the beginning of a stop string (one character less than the longest).

Characters come from a decoder of whole token lists, over a short window. `tokenizers.decoders.DecodeStream` (0.23.3) is quicker:
1 µs a token where this takes 11, half of it in transformers' decode(). But it raises "Invalid prefix encountered" when a run of
byte tokens (<0xE0>) turns out to be no UTF-8, which would end the answer; it never gives an unfinished end; and while bytes stay
invalid it holds everything back, and decodes all of it again for each token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import regex

_CLUSTER = regex.compile(r"\X")
_REPLACEMENT = "\ufffd"
# A character of UTF-8 that is not whole yet has at most three bytes, and decoders show it as one to three replacement characters.
_MAX_UNFINISHED = 3
# Tokens decoded together. More are more work a token, fewer must be begun anew more often; 8 was the quickest.
_WINDOW_TOKENS = 8
# A longer window has no token border between two characters, as in noise. It goes on with its last half: UTF-8 finds itself
# again within three bytes, and the characters not given out yet take nine bytes at most.
_MAX_WINDOW_TOKENS = 32
# No cluster that people write is as long (a family with skin tones has 11 code points, Unicode's stream-safe text 30 marks a
# letter); a longer one is given out as it comes.
_MAX_CLUSTER_CHARS = 32


class TextStream:
    """Feeds on token ids, gives pieces of text.

    Thai, Lao and Chinese have no spaces, so that waiting for one would hold a whole answer back; but a vowel sign or a tone mark
    may still join the last character, and a character may be spread over several tokens. Held back is only what may still change:
    an unfinished character, the last grapheme cluster (UAX #29, `regex`' \\X), and what may be the beginning of a stop string.

    `decode` gives the text of token ids, special tokens left out. Of the stop strings the one that is complete first counts,
    character by character, however the tokens cut the text; of two that end together the longer.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self._characters = _Characters(decode)
        self._stops = [_StopWatch(word) for word in stop]
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
        new = self._characters.put(token_id)
        return self._settle(new, last=False) if new else ""

    def end(self) -> str:
        """Gives what was held back."""
        if self.stopped:
            return ""
        return self._settle(self._characters.end(), last=True)

    def _settle(self, new: str, *, last: bool) -> str:
        text = self._pending + new
        limit = len(text)
        if any(watch.awaits(new) for watch in self._stops):
            for end, char in enumerate(new, start=len(self._pending) + 1):
                if stop_chars := _longest(watch.put(char) for watch in self._stops):
                    self.stopped = True
                    return self._give(text, end - stop_chars, keep=False)
            limit -= _longest(watch.matched for watch in self._stops)
        if last:
            return self._give(text, len(text), keep=False)
        return self._give(text, _settled_chars(text, limit), keep=True)

    def _give(self, text: str, count: int, *, keep: bool) -> str:
        self._pending = text[count:] if keep else ""
        piece = text[:count]
        if piece:
            self._sent.append(piece)
        return piece


class _Characters:
    """Token ids to characters that no later token will change.

    Exact for byte-level tokenizers, whatever the bytes. A byte-fallback decoder shows a run of byte tokens as replacement
    characters alone when one of them is bad: there, what was given before the bad one stays, and a replacement character that
    the model itself writes counts as bad.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []  # the window
        self._text = ""  # and its text,
        self._given = ""  # of which this has been given out
        # Where in the window the text was whole characters last, and the time before: a window begun there still has text
        # before the next token, without which some decoders would take a leading space away.
        self._whole = 0
        self._whole_before = 0

    def put(self, token_id: int) -> str:
        """What is certain now."""
        self._ids.append(token_id)
        before, text = self._text, self._decode(self._ids)
        # A special token: the window does without it, or many would push out what matters. (Asked for twice, since a beginning's
        # space has no text either, but does matter.)
        if text == before and not self._decode([token_id, token_id]):
            self._ids.pop()
            return ""
        self._text = text
        if not text.startswith(self._given):
            # Within a run of byte tokens all of it looks bad until its last character is whole.
            if text.endswith(_REPLACEMENT) and len(self._ids) - self._whole <= _MAX_UNFINISHED:
                return ""
            text = self._begin_anew()
        unfinished = 0
        if text.endswith(_REPLACEMENT):
            unfinished = min(_MAX_UNFINISHED, len(text) - len(text.rstrip(_REPLACEMENT)))
        new = text[len(self._given) : len(text) - unfinished]
        self._given += new
        if not unfinished:
            self._whole_before, self._whole = self._whole, len(self._ids)
            if len(self._ids) > _WINDOW_TOKENS:
                self._keep_from(self._whole_before)
        elif len(self._ids) > _MAX_WINDOW_TOKENS:
            self._keep_from(len(self._ids) - _MAX_WINDOW_TOKENS // 2, unfinished)
        return new

    def end(self) -> str:
        """The rest, an unfinished character as the decoder shows it."""
        text = self._decode(self._ids)
        if not text.startswith(self._given):
            text = self._begin_anew()
        return text[len(self._given) :]

    def _keep_from(self, start: int, unfinished: int = 0) -> None:
        """Lets go of the window's first tokens; of the last characters so many have not been given out."""
        del self._ids[:start]
        self._text = self._decode(self._ids)
        self._given = self._text[: max(0, len(self._text) - unfinished)]
        self._whole, self._whole_before = max(0, self._whole - start), 0

    def _begin_anew(self) -> str:
        """The decoder changed what has been given out; that stays, and only the text after it is read from now on."""
        del self._ids[: self._whole]
        self._text = self._decode(self._ids)
        self._given = "" if self._whole else self._text[: len(self._given)]
        self._whole = self._whole_before = 0
        return self._text


class _StopWatch:
    """Looks for one stop string, a character at a time (Knuth, Morris, Pratt), however long it is."""

    def __init__(self, word: str) -> None:
        self._word = word
        # For each beginning of the word that has been met: how much of its end is a beginning of the word too.
        self._borders: list[int] = []
        self.matched = 0

    def awaits(self, text: str) -> bool:
        """Whether this text, that comes next, can have to do with the stop string; if not, it need not be put."""
        return self.matched > 0 or self._word[0] in text

    def put(self, char: str) -> int:
        """Takes a character; the stop string's length when it is complete, else 0."""
        word, borders = self._word, self._borders
        matched = self._extended(self.matched, char)
        if matched > len(borders):
            borders.append(self._extended(borders[-1], char) if borders else 0)
        self.matched = matched
        return matched if matched == len(word) else 0

    def _extended(self, matched: int, char: str) -> int:
        while matched and self._word[matched] != char:
            matched = self._borders[matched - 1]
        return matched + 1 if self._word[matched] == char else 0


def _longest(counts: Iterable[int]) -> int:
    return max(counts, default=0)


def _settled_chars(text: str, limit: int) -> int:
    """The last border of two grapheme clusters that is not beyond `limit`; the last cluster may still grow.

    Whether there is a border depends on the text before it and on one character after it.
    """
    border = 0
    for cluster in _CLUSTER.finditer(text[: limit + 1]):
        if cluster.start() <= limit:
            border = cluster.start()
    return border if limit - border <= _MAX_CLUSTER_CHARS else limit
