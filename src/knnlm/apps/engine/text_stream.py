"""Tokens → text that is fit to show: no partial characters, no partial stop sequences.

Knows token ids and a function that decodes them; knows no model and no job.
"""

from collections.abc import Callable, Sequence

_UNFINISHED = "\ufffd"  # what the bytes of a partial character are decoded as
_CONTEXT_TOKENS = 4


class TextStream:
    """The text of one completion while it grows.

    decode: token ids → text. context: the tokens before the completion; the last few are decoded
    with it, because some tokenizers write a token differently at the start of a text. stop: texts
    before which the completion ends.

    `text` is the part that is certain: it never gets shorter, and never holds anything that may
    still become part of a character or of a stop sequence.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        context: Sequence[int],
        stop: Sequence[str] = (),
    ) -> None:
        self._decode = decode
        tail = list(context[-_CONTEXT_TOKENS:])
        if decode(tail).endswith(_UNFINISHED):
            tail = []
        self._tokens = tail
        # tokens before `_clean` end in a whole character; their text is in `_decoded` already
        self._context, self._clean = 0, len(tail)
        self._decoded = ""  # whole characters, stop sequences included
        self._stop = tuple(stop)
        self.text = ""
        self.stopped = False
        """Whether a stop sequence was found; `text` ends before it."""
        self.offsets: list[int] = []
        """Where in the text each token begins; past its end for tokens of a stop sequence."""

    def push(self, token: int) -> None:
        """Add a token."""
        self.offsets.append(len(self._decoded))
        self._tokens.append(token)
        self._extend(final=False)

    def finish(self) -> None:
        """Release the text that was held back: there is no further token."""
        if not self.stopped:
            self._extend(final=True)
        if not self.stopped:
            self.text = self._decoded

    def _extend(self, final: bool) -> None:
        known = self._decode(self._tokens[self._context : self._clean])
        grown = self._decode(self._tokens[self._context :])
        fresh = grown[len(known) :]
        if not final and fresh.endswith(_UNFINISHED):
            return
        before = len(self._decoded)
        self._decoded += fresh
        self._context, self._clean = self._clean, len(self._tokens)
        longest = max(map(len, self._stop), default=0)
        found = [
            (place + len(stop), place)
            for stop in self._stop
            if (place := self._decoded.find(stop, max(0, before - longest + 1))) >= 0
        ]
        if found:
            self.stopped = True
            _, place = min(found)  # the stop sequence that is complete first
            self.text = self._decoded[:place]
        else:
            self.text = self._decoded[: len(self._decoded) - self._held()]

    def _held(self) -> int:
        """Return how many of the last characters may begin a stop sequence."""
        longest = min(max(map(len, self._stop), default=1) - 1, len(self._decoded))
        for length in range(longest, 0, -1):
            ending = self._decoded[-length:]
            if any(stop.startswith(ending) for stop in self._stop):
                return length
        return 0
