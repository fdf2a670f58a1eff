"""Jobs for the model thread, and the events with which it answers them."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

from knnlm.apps.engine.sampling import SamplingOptions
from knnlm.apps.engine.turns import Turns
from knnlm.evaluation.explanation import Explanation
from knnlm.knn_lm import KNNLM
from knnlm.retrieval.mixer import Mixer, override_mixer

_SHORT_TOKENS, _SHORT_PROMPT = 16, 256


class Lane(Enum):
    """Jobs that wait for each other: short completions do not wait for long ones, or for calls."""

    short = auto()
    long = auto()
    call = auto()


@dataclass(frozen=True, slots=True)
class LikelyToken:
    """A token that might stand in some place; name: see `TokenTexts.names`; data: its own bytes."""

    token: int
    name: str
    data: bytes
    log_prob: float


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token of a prompt or a completion.

    text: what it adds to the prompt's or the completion's text; data: its own bytes. offset: where
    its text begins, in characters. log_prob: under the mixture, in nats; None for a token that
    nothing precedes. top: the likeliest tokens in its place, the likeliest first; then the token
    itself, if it is none of them.
    """

    token: int
    text: str = ""
    data: bytes = b""
    offset: int = 0
    log_prob: float | None = None
    top: tuple[LikelyToken, ...] | None = None
    explanation: Explanation | None = None


@dataclass(frozen=True, slots=True)
class PromptRead:
    """The first event of a completion; tokens: the prompt's, if they were to be scored."""

    tokens: tuple[ScoredToken, ...] = ()


@dataclass(frozen=True, slots=True)
class Grown:
    """New text of one sample; offsets count from the end of the prompt.

    finish_reason: "stop" or "length" in the last event of a sample. coverage: the least of the
    sample's searches so far, its prompt's among them; see `Neighbors`.
    """

    sample: int
    text: str
    tokens: tuple[ScoredToken, ...]
    finish_reason: str | None
    coverage: float = 1.0


@dataclass(frozen=True, slots=True)
class Returned:
    """The only event of a model call: the value that its function returned."""

    value: Any


@dataclass(frozen=True, slots=True)
class Failed:
    """The last event of a job that cannot be done.

    invalid: the job itself was wrong, as the message says. unavailable: it may be done later, or by
    another engine: this one was closed, or a cluster was late.
    """

    message: str
    invalid: bool = False
    unavailable: bool = False


Event = PromptRead | Grown | Returned | Failed


@dataclass(frozen=True, slots=True)
class Overrides:
    """A job's own k, λ and T: each one value for all datastores, or one for each datastore.

    None stands for the value that the engine was started with.
    """

    k: int | Sequence[int] | None = None
    lmbda: float | Sequence[float] | None = None
    temperature: float | Sequence[float] | None = None

    def apply(self, mixer: Mixer) -> Mixer:
        """Return the mixer with these values; raises InvalidArgumentError."""
        return override_mixer(mixer, k=self.k, lmbda=self.lmbda, temperature=self.temperature)


@dataclass(eq=False, slots=True)
class Job:
    """Anything that waits for the model thread.

    post: takes the job's events; called in the model thread. Any thread may cancel a job: it then
    gets no further events, and its places become free.
    """

    post: Callable[[Event], None]
    overrides: Overrides
    cancelled: bool = field(default=False, init=False)
    places: int = field(default=1, init=False)
    """How many places it takes in the queue and in the batch."""
    lane: Lane = field(default=Lane.call, init=False)
    arrived: float = field(default_factory=time.perf_counter, init=False)

    def cancel(self) -> None:
        """Give the job up."""
        self.cancelled = True


@dataclass(eq=False, slots=True)
class Completion(Job):
    """A prompt and how to continue it.

    prompt: the token ids that the model reads; the first `hidden` of them, a start token, belong
    to no text. samples: how many continuations. stop: texts before which a continuation ends;
    ends: tokens that end it, besides the model's own.
    log_probs: how many of the likeliest tokens to report with every token; None for no
    log-probabilities. score_prompt: whether to score the prompt's tokens too. sources: how many
    neighbors to name for each generated token.
    """

    prompt: Sequence[int]
    hidden: int
    max_tokens: int
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    samples: int = 1
    stop: tuple[str, ...] = ()
    ends: frozenset[int] = frozenset()
    log_probs: int | None = None
    score_prompt: bool = False
    sources: int = 0

    def __post_init__(self) -> None:
        self.places = self.samples
        is_short = self.max_tokens <= _SHORT_TOKENS and len(self.prompt) <= _SHORT_PROMPT
        is_short = is_short and self.samples == 1
        self.lane = Lane.short if is_short else Lane.long


@dataclass(eq=False, slots=True)
class ModelCall(Job):
    """Work that needs the kNN-LM, which only the model thread may use.

    function: does it in turns, between which others go on; a turn should last a tenth of a second.
    """

    function: Callable[[KNNLM], Turns[Any]]
