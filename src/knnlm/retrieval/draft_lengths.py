"""How long a draft pays: what is expected of it, against what it costs to read.

Knows drafts, not where they come from; knows no model.
"""

from collections import defaultdict, deque
from collections.abc import Sequence
from functools import partial

from knnlm.index.protocol import Neighbors
from knnlm.retrieval.drafts import NO_DRAFT, Draft, Drafter
from knnlm.retrieval.retriever import Retriever

_ASSUMED_COST = 0.05
"""What each further position of a pass costs until it is measured, in passes that read one."""
_LEAST_GAIN = 1.04  # in tokens a second; what is expected may be wrong
_PLAIN_PASSES = 2  # that are measured before drafts are read; the first may be slow
_REMEMBERED = 16  # passes of a kind whose time is remembered
_TRUST = 6.0  # tokens before what a text shows counts as much as what texts have shown on average

# How often a drafted token was the one chosen, by how many tokens before it agreed (up to 1, 2, 3,
# 5, 8, 11, more) and by the share of the places that say the same (up to 0.5, 0.9, 1). Measured on
# 12 files of Python's library reference that were continued greedily, with the others stored.
_MATCHES = (1, 2, 3, 5, 8, 11)
_SHARES = (0.5, 0.9)
_CHANCES = (
    (0.22, 0.50, 0.50),
    (0.28, 0.60, 0.62),
    (0.36, 0.65, 0.75),
    (0.36, 0.66, 0.90),
    (0.45, 0.78, 0.90),
    (0.50, 0.80, 0.92),
    (0.50, 0.80, 0.98),
)


class Chances:
    """How likely the drafts for one text are to be right; learns from those that were made."""

    def __init__(self) -> None:
        self._expected = self._right = _TRUST

    def of(self, draft: Draft) -> list[float]:
        """Return the chance that a draft is right as far as each of its tokens."""
        factor, chance = self._right / self._expected, 1.0
        chances = []
        for match, share in zip(draft.matches, draft.shares, strict=True):
            chance *= min(factor * _usual_chance(match, share), 1.0)
            chances.append(chance)
        return chances

    def learn(self, draft: Draft, chosen: Sequence[int]) -> None:
        """Compare a draft, read or not, with the tokens that were chosen in its place."""
        known = zip(draft.tokens, draft.matches, draft.shares, chosen, strict=False)
        for token, match, share, other in known:
            self._expected += _usual_chance(match, share)
            if token != other:
                return
            self._right += 1.0


def _usual_chance(match: int, share: float) -> float:
    by_share = _CHANCES[sum(match > edge for edge in _MATCHES)]
    return by_share[sum(share > edge for edge in _SHARES)]


class PassCosts:
    """How long passes take, by how much they read; learns from passes.

    The fastest of the last passes of a kind counts: whatever else the machine does makes them
    slower.
    """

    def __init__(self) -> None:
        remember = partial(deque[float], maxlen=_REMEMBERED)
        self._seconds: defaultdict[tuple[int, int], deque[float]] = defaultdict(remember)

    def note(self, sequences: int, width: int, seconds: float) -> None:
        """Learn from a pass that read `width` positions of each of some sequences."""
        self._seconds[sequences, width].append(seconds)

    def knows(self, sequences: int) -> bool:
        """Whether passes that read one position of each sequence were measured."""
        return len(self._seconds[sequences, 1]) >= _PLAIN_PASSES

    def of(self, sequences: int, width: int) -> float:
        """Return the cost of a pass, in passes that read one position of each sequence."""
        if own := self._seconds[sequences, width]:
            return min(own) / min(self._seconds[sequences, 1])
        return 1.0 + _ASSUMED_COST * sequences * (width - 1)


class DraftedText:
    """A text while it grows, and the draft that the model reads after its last token."""

    def __init__(self, text: Sequence[int]) -> None:
        self._drafter = Drafter(text)
        self._chances = Chances()
        self._draft = NO_DRAFT
        self.reading: list[int] = []
        """The draft that is read: as much of what is guessed as pays."""

    def push(self, chosen: Sequence[int]) -> None:
        """Add the tokens that were chosen, in the place of the draft."""
        self._chances.learn(self._draft, chosen)
        for token in chosen:
            self._drafter.push(token)
        self._draft, self.reading = NO_DRAFT, []

    def guess(self, searched: Sequence[tuple[Retriever, Neighbors]], query: int, most: int) -> None:
        """Guess what follows, at most so many tokens; see `Drafter.draft`."""
        self._draft = self._drafter.draft(searched, query).first(most)

    @property
    def chances(self) -> list[float]:
        """The chance that the guess is right as far as each of its tokens."""
        return self._chances.of(self._draft)

    def read_first(self, count: int) -> None:
        """Choose how much of the guess is read."""
        self.reading = self._draft.tokens[:count]


def choose_lengths(texts: Sequence[DraftedText | None], costs: PassCosts) -> None:
    """Choose what is read of the drafts for texts in one pass: what brings most tokens a second.

    None stands for a text without drafts. All rows of a pass are as wide as the longest. Nothing
    is read before the costs are known.
    """
    drafted = [text for text in texts if text is not None]
    chances = [text.chances for text in drafted] if costs.knows(len(texts)) else []
    expected = float(len(texts))  # tokens, with drafts of the length that is looked at
    best, best_rate = 0, _LEAST_GAIN * expected
    for length in range(1, max(map(len, chances), default=0) + 1):
        expected += sum(own[length - 1] for own in chances if len(own) >= length)
        rate = expected / costs.of(len(texts), length + 1)
        if rate > best_rate:
            best, best_rate = length, rate
    for text in drafted:
        text.read_first(best)
