"""Tokens → text that is fit to show: no partial characters, no partial stop sequences.

Knows tokens and their texts; knows no model and no job.
"""

from collections.abc import Sequence

from knnlm.model.token_text import CONTEXT_TOKENS, UNFINISHED, GrowingText, TokenTexts


class TextStream:
    """The text of one completion while it grows.

    before: the tokens before the completion. stop: texts before which the completion ends.

    `text` is the part that is certain: it never gets shorter, and never holds anything that may
    still become part of a character or of a stop sequence.
    """

    def __init__(
        self, texts: TokenTexts, before: Sequence[int] = (), stop: Sequence[str] = ()
    ) -> None:
        self._growing = GrowingText(texts, before)
        self._decoded = ""  # of the tokens with a certain text, stop sequences included
        self._stop = tuple(stop)
        self.last: list[int] = list(before[-CONTEXT_TOKENS:])
        """The last few tokens."""
        self.text = ""
        self.stopped = False
        """Whether a stop sequence was found; `text` ends before it."""
        self.pieces: list[str] = []
        """The text that each token adds, of those whose text is certain."""
        self.offsets: list[int] = []
        """Where in the text each of them begins; past its end for tokens of a stop sequence."""

    def push(self, token: int) -> None:
        """Add a token."""
        self.last = [*self.last, token][-CONTEXT_TOKENS:]
        self._extend(self._growing.push(token))

    def finish(self) -> None:
        """Release the text that was held back: there is no further token."""
        if not self.stopped:
            self._extend(self._growing.finish())
        if not self.stopped:
            self.text = self._decoded

    def _extend(self, pieces: Sequence[str]) -> None:
        before = len(self._decoded)
        self._append(pieces)
        longest = max(map(len, self._stop), default=0)
        seen = self._decoded
        if self._stop:
            seen += self._growing.ahead().rstrip(UNFINISHED)
        found = [
            (place + len(stop), place)
            for stop in self._stop
            if (place := seen.find(stop, max(0, before - longest + 1))) >= 0
        ]
        if found:
            self.stopped = True
            self._append(self._growing.finish())
            _, place = min(found)  # the stop sequence that is complete first
            self.text = self._decoded[:place]
        else:
            self.text = self._decoded[: len(self._decoded) - self._held()]

    def _append(self, pieces: Sequence[str]) -> None:
        for piece in pieces:
            self.offsets.append(len(self._decoded))
            self.pieces.append(piece)
            self._decoded += piece

    def _held(self) -> int:
        """Return how many of the last characters may begin a stop sequence."""
        longest = min(max(map(len, self._stop), default=1) - 1, len(self._decoded))
        for length in range(longest, 0, -1):
            ending = self._decoded[-length:]
            if any(stop.startswith(ending) for stop in self._stop):
                return length
        return 0
