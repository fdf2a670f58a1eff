"""A conversation with a kNN-LM: what was said, the answer as it grows, and the passages behind it.

Knows the engine's worker, which it drives in its own thread; knows no terminal.
"""

import signal
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import FrameType

from knnlm.apps.engine.jobs import Completion, Event, Failed, Grown, Overrides
from knnlm.apps.engine.metrics import Metrics
from knnlm.apps.engine.sampling import SamplingOptions
from knnlm.apps.engine.worker import Worker
from knnlm.errors import InvalidArgumentError, KNNLMError
from knnlm.evaluation.explanation import Explanation, Source
from knnlm.knn_lm import KNNLM
from knnlm.text.conversations import Message

_SOURCES = 8  # neighbors that are kept for each token


class Conversation:
    """Everything said so far, the oldest first, and how to go on.

    system: what the model is told before all else. max_tokens: of an answer. drafts: see `Worker`.
    Raises UnsupportedModelError for a model without a chat template.
    """

    def __init__(
        self,
        model: KNNLM,
        system: str | None = None,
        max_tokens: int = 512,
        sampling: SamplingOptions | None = None,
        *,
        drafts: bool = True,
    ) -> None:
        self._model = model
        self._template = model.lm.chat_template
        self._ends = self._template.turn_ends
        self._worker = Worker(model, Metrics(), drafts)
        self._system: list[Message] = [{"role": "system", "content": system}] if system else []
        self._max_tokens = max_tokens
        self._sampling = sampling or SamplingOptions(temperature=0.0)
        self._overrides = Overrides()
        self.messages: list[Message] = [*self._system]
        self.explanations: list[Explanation] = []
        """Of the tokens of the last answer."""

    def clear(self) -> None:
        """Forget what was said."""
        self.messages, self.explanations = [*self._system], []

    @property
    def lmbda(self) -> float | None:
        """The weight λ of the neighbors from now on; None for the one that was chosen at first."""
        return self._overrides.lmbda if isinstance(self._overrides.lmbda, float) else None

    @lmbda.setter
    def lmbda(self, lmbda: float | None) -> None:
        overrides = Overrides(lmbda=lmbda)
        overrides.apply(self._model.mixer)  # raises InvalidArgumentError for a λ that cannot be
        self._overrides = overrides

    def answer(self, said: str) -> Iterator[str]:
        """Say something, and yield the answer's text as it grows; Ctrl-C ends it.

        What an answer has until then is remembered. Raises InvalidArgumentError for a conversation
        that the template refuses or that does not fit the model; it then stays as it was.
        """
        messages: list[Message] = [*self.messages, {"role": "user", "content": said}]
        events: deque[Event] = deque()
        job = self._job(messages, events)
        explanations: list[Explanation] = []
        parts: list[str] = []
        with _ended_by_interrupt(job):
            self._worker.begin(job)
            is_over = False
            while not is_over:
                if job.cancelled and not events:
                    break
                self._worker.turn()
                while events:
                    event = events.popleft()
                    if isinstance(event, Failed):
                        raise _failure(event)
                    if isinstance(event, Grown):
                        is_over = event.finish_reason is not None
                        explanations += [one.explanation for one in event.tokens if one.explanation]
                        parts.append(event.text)
                        yield event.text
        self.messages = [*messages, {"role": "assistant", "content": "".join(parts)}]
        self.explanations = explanations

    def _job(self, messages: list[Message], events: deque[Event]) -> Completion:
        tokens = self._template.encode(messages)
        room = (self._model.lm.max_window or len(tokens) + self._max_tokens) - len(tokens)
        if room < 1:
            raise InvalidArgumentError(
                f"the conversation ({len(tokens)} tokens) must leave room for an answer in the "
                f"model's {self._model.lm.max_window} positions: begin a new one"
            )
        seed = self._sampling.seed + len(messages)  # or every answer would draw the same numbers
        return Completion(
            events.append,
            self._overrides,
            prompt=tokens,
            hidden=0,
            max_tokens=min(self._max_tokens, room),
            sampling=replace(self._sampling, seed=seed),
            ends=self._ends,
            sources=_SOURCES,
        )


def _failure(event: Failed) -> Exception:
    return (InvalidArgumentError if event.invalid else KNNLMError)(event.message)


@contextmanager
def _ended_by_interrupt(job: Completion) -> Iterator[None]:
    """Make Ctrl-C cancel a job instead of breaking off the model's step."""

    def cancel(number: int, frame: FrameType | None) -> None:
        job.cancel()

    before = signal.signal(signal.SIGINT, cancel)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@dataclass(frozen=True, slots=True)
class Written:
    """Consecutive tokens of an answer for which one stored passage voted, token by token.

    text: of these tokens. votes: the sum of the passage's shares of p_kNN at them. source: the
    passage at the last of them; first: the position in its document of the first.
    """

    text: str
    votes: float
    source: Source
    first: int


def written_by_passages(explanations: list[Explanation]) -> list[Written]:
    """Return what stored passages voted for in an answer, the most votes first.

    Only sources that are among the strongest of their token count.
    """
    found: list[Written] = []
    # by datastore, document, and how far the passage's place is ahead of the answer's
    growing: dict[tuple[str, str, int], Written] = {}
    for number, explanation in enumerate(explanations):
        before, growing = growing, {}
        for source in explanation.sources:
            if source.token != explanation.token:
                continue
            place = (source.store, source.document, source.position - number)
            known = before.pop(place, None)
            growing[place] = Written(
                (known.text if known else "") + explanation.text,
                (known.votes if known else 0.0) + source.weight,
                source,
                known.first if known else source.position,
            )
        found += before.values()
    return sorted([*found, *growing.values()], key=lambda one: -one.votes)
