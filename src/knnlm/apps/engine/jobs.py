"""What the model thread is asked to do, and what it answers: the contract with the HTTP side."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from knnlm.apps.engine.steps import Overrides
from knnlm.evaluation.explanation import Explanation
from knnlm.knn_lm import KNNLM


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token of an answer.

    offset: of its text in the choice's text, in characters. log_prob: under the mixture, in nats;
    None for a token that nothing precedes. top: the likeliest tokens in its place, the token itself
    among them.
    """

    token: int
    text: str
    offset: int
    log_prob: float | None = None
    top: dict[str, float] | None = None
    explanation: Explanation | None = None


@dataclass(frozen=True, slots=True)
class PromptRead:
    """The first event of a completion; tokens: the prompt's, where they were to be scored."""

    tokens: tuple[ScoredToken, ...] = ()


@dataclass(frozen=True, slots=True)
class Grown:
    """New text of one sample; offsets count from the end of the prompt.

    finish_reason: "stop" or "length" in the last event of a sample.
    """

    sample: int
    text: str
    tokens: tuple[ScoredToken, ...]
    finish_reason: str | None


@dataclass(frozen=True, slots=True)
class Explained:
    """The only event of an explanation."""

    explanations: Sequence[Explanation]


@dataclass(frozen=True, slots=True)
class Failed:
    """The last event of a job that cannot be done.

    refused: it is the request that was wrong, in what the message says.
    """

    message: str
    refused: bool = False
    stopping: bool = False


@dataclass(frozen=True, slots=True)
class Answered:
    """The only event of a query."""

    value: Any


Event = PromptRead | Grown | Explained | Answered | Failed


@dataclass(eq=False, slots=True)
class Job:
    """Anything that waits for the model thread.

    post: takes the events, in the model thread. The job may be cancelled from any thread: then it
    gets no further events and its place is freed.
    """

    post: Callable[[Event], None]
    overrides: Overrides
    cancelled: bool = field(default=False, init=False)
    places: int = field(default=1, init=False)
    """Of the queue and of the batch, that it takes."""
    arrived: float = field(default_factory=time.perf_counter, init=False)

    def cancel(self) -> None:
        """Give it up."""
        self.cancelled = True


@dataclass(eq=False, slots=True)
class Completion(Job):
    """A prompt and how it is to be continued.

    prompt: what the model reads, a start token included; `hidden` of its tokens are not the
    client's. samples: how many continuations. score_prompt: whether log-probabilities of the
    prompt are asked for. log_probs: how many likely tokens are asked for with every token; None for
    no log-probabilities. sources: neighbors named for each generated token.
    """

    prompt: Sequence[int]
    hidden: int
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    samples: int = 1
    stop: tuple[str, ...] = ()
    log_probs: int | None = None
    score_prompt: bool = False
    sources: int = 0

    def __post_init__(self) -> None:
        self.places = self.samples


@dataclass(eq=False, slots=True)
class TextToExplain(Job):
    """A text to explain, with `options` of `knnlm.explain`."""

    text: str
    options: dict[str, Any]


@dataclass(eq=False, slots=True)
class Query(Job):
    """Anything else that only the model thread may ask the kNN-LM."""

    ask: Callable[[KNNLM], Any]
