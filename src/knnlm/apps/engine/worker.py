"""The work of the model thread: prompts are read one by one, completions grow together.

Knows the kNN-LM and the jobs; knows no thread, no queue and no protocol. Everything in here is for
one thread.
"""

import copy
import logging
import time
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import torch

from knnlm.apps.engine.decoding import Cached, Decoder, Step
from knnlm.apps.engine.jobs import (
    Answered,
    Completion,
    Explained,
    Failed,
    Grown,
    Job,
    PromptRead,
    Query,
    ScoredToken,
    TextToExplain,
)
from knnlm.apps.engine.metrics import Metrics
from knnlm.apps.engine.sampling import choose_token, seeded_generator
from knnlm.apps.engine.steps import MixedStep, mix_step
from knnlm.apps.engine.text_stream import TextStream
from knnlm.errors import InvalidArgumentError, UnsupportedModelError
from knnlm.evaluation.explain import explain
from knnlm.index.policy import open_index
from knnlm.knn_lm import KNNLM
from knnlm.retrieval.mixer import Mixer

_PROMPT_TOKENS = 256  # read between two steps of what is being generated
_LOG = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class _Prompt:
    """A prompt on its way into the model."""

    job: Completion
    mixer: Mixer
    stream: TextStream
    read: int = 0
    cached: Cached | None = None
    scored: list[ScoredToken] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class _Row:
    """One sample of a completion while it grows."""

    job: Completion
    sample: int
    mixer: Mixer
    generator: torch.Generator
    stream: TextStream
    last_token: int = -1
    tokens: int = 0
    shown: int = 0  # characters posted
    held: list[ScoredToken] = field(default_factory=list)  # not posted yet


@dataclass(eq=False, slots=True)
class _Group:
    """Rows that are advanced together."""

    rows: list[_Row]
    cached: Cached


class Worker:
    """Runs jobs on a kNN-LM, a turn at a time; `close` gives the model back."""

    def __init__(self, model: KNNLM, metrics: Metrics) -> None:
        self._model = model
        self._lm = model.lm
        self._mixer = model.mixer
        self._metrics = metrics
        self._hooks = ExitStack()
        self._decoder = Decoder(self._lm, self._hooks.enter_context(self._lm.capture()))
        self._prompts: deque[_Prompt] = deque()
        self._groups: list[_Group] = []
        self._ends = self._lm.end_tokens

    def close(self) -> None:
        """Stop recording the model's keys."""
        self._hooks.close()

    @property
    def places(self) -> int:
        """How many samples are being generated or prepared."""
        return sum(prompt.job.places for prompt in self._prompts) + sum(
            len(group.rows) for group in self._groups
        )

    @property
    def jobs(self) -> set[Job]:
        """What was begun and is neither finished nor dropped."""
        begun: set[Job] = {prompt.job for prompt in self._prompts}
        return begun.union(row.job for group in self._groups for row in group.rows)

    def begin(self, job: Job) -> None:
        """Take a job on; an explanation is done at once. What fails, fails the job alone."""
        try:
            self._follow_changes()
            mixer = job.overrides.of(self._mixer)
            if isinstance(job, Completion) and job.max_tokens == 0 and not job.score_prompt:
                job.post(PromptRead())
                for sample in range(job.samples):
                    job.post(Grown(sample, "", (), "length"))
            elif isinstance(job, Completion):
                stream = TextStream(self._lm.decode, ())
                self._prompts.append(_Prompt(job, mixer, stream))
            elif isinstance(job, TextToExplain):
                self._explain(job, mixer)
            elif isinstance(job, Query):
                job.post(Answered(job.ask(self._with(mixer))))
        except Exception as error:
            self._fail(job, error)

    def _follow_changes(self) -> None:
        """See what was added, forgotten or compacted meanwhile."""
        changed = []
        for retriever in self._mixer.retrievers:
            numbering = retriever.store.numbering
            retriever.store.refresh()
            if retriever.store.numbering != numbering:
                index = open_index(retriever.store, device=str(self._lm.device))
                retriever = replace(retriever, index=index)
            changed.append(retriever)
        self._mixer = replace(self._mixer, retrievers=tuple(changed))

    def _explain(self, job: TextToExplain, mixer: Mixer) -> None:
        explanations = explain(self._with(mixer), job.text, **job.options)
        _check_numbers(torch.tensor([one.log_prob for one in explanations]))
        job.post(Explained(explanations))

    def _with(self, mixer: Mixer) -> KNNLM:
        model = copy.copy(self._model)
        model.mixer = mixer
        return model

    def _fail(self, job: Job, error: Exception) -> None:
        job.cancel()
        if isinstance(error, InvalidArgumentError):
            job.post(Failed(str(error), refused=True))
            return
        _LOG.error("a request failed: %r", error, exc_info=error)
        self._metrics.failures.inc()
        job.post(Failed("the server failed at this request; its log says more"))

    def turn(self) -> None:
        """Read some of the waiting prompts, then one more token of everything that grows."""
        self._drop_cancelled()
        budget = _PROMPT_TOKENS
        while budget > 0 and self._prompts:
            prompt = self._prompts[0]
            try:
                budget -= self._read_some(prompt)
            except Exception as error:
                self._fail(prompt.job, error)
            if prompt.job.cancelled or prompt.read == len(prompt.job.prompt):
                self._prompts.popleft()
        for group in list(self._groups):
            try:
                self._advance(group)
            except Exception as error:  # nobody can tell whose fault it is
                for row in group.rows:
                    if not row.job.cancelled:
                        self._fail(row.job, error)
        self._drop_cancelled()

    def _drop_cancelled(self) -> None:
        self._prompts = deque(prompt for prompt in self._prompts if not prompt.job.cancelled)
        for group in self._groups:
            self._keep(group, [not row.job.cancelled for row in group.rows])
        self._groups = [group for group in self._groups if group.rows]

    def _keep(self, group: _Group, wanted: Sequence[bool]) -> None:
        places = [place for place, is_wanted in enumerate(wanted) if is_wanted]
        if 0 < len(places) < len(group.rows):
            group.cached = self._decoder.keep(group.cached, places)
        group.rows = [group.rows[place] for place in places]

    def _read_some(self, prompt: _Prompt) -> int:
        """Read the next piece of a prompt; at its end, begin its samples. Returns the tokens."""
        job = prompt.job
        left = len(job.prompt) - prompt.read
        size = min(left, _PROMPT_TOKENS) if self._decoder.shares_batches else left
        piece = torch.tensor(job.prompt[prompt.read : prompt.read + size], dtype=torch.int64)
        step, prompt.cached = self._timed_read(
            piece, prompt.cached, size if job.score_prompt else 1
        )
        prompt.read += size
        self._metrics.prompt_tokens.inc(size)
        is_last = size == left
        if not job.score_prompt and not is_last:
            return size
        mixture = self._mix(prompt.mixer, step)
        if job.score_prompt:
            self._score(prompt, mixture, prompt.read - size)
        if is_last:
            job.post(PromptRead(tuple(prompt.scored)))
            self._begin_samples(prompt, mixture)
        return size

    def _timed_read(
        self, piece: torch.Tensor, cached: Cached | None, keep: int
    ) -> tuple[Step, Cached]:
        started = time.perf_counter()
        answer = self._decoder.read(piece, cached, keep)
        self._metrics.model_seconds.inc(time.perf_counter() - started)
        return answer

    def _mix(self, mixer: Mixer, step: Step) -> MixedStep:
        mixture = mix_step(mixer, step)
        self._metrics.search_seconds.inc(mixture.search_seconds)
        return mixture

    def _score(self, prompt: _Prompt, mixture: MixedStep, first: int) -> None:
        """Give the prompt's tokens after the positions `first`, … their log-probabilities."""
        job = prompt.job
        _check_numbers(mixture.log_probs)
        if first == 0:
            for token in job.prompt[job.hidden : 1]:
                prompt.stream.push(token)
                prompt.scored.append(ScoredToken(token, self._lm.decode([token]), 0))
        following = job.prompt[first + 1 : first + 1 + len(mixture.log_probs)]
        for place, token in enumerate(following):
            prompt.stream.push(token)
            prompt.scored.append(self._scored(job, prompt.stream, token, mixture, place))

    def _scored(
        self, job: Completion, stream: TextStream, token: int, mixture: MixedStep, place: int
    ) -> ScoredToken:
        """Describe the last token of a stream as far as the job asks for it."""
        text = self._lm.decode([token])
        log_prob = float(mixture.log_probs[place, token])
        top = None
        if job.log_probs is not None:
            top = {text: log_prob}
            best = mixture.log_probs[place].topk(job.log_probs)
            for other, value in zip(best.indices.tolist(), best.values.tolist(), strict=True):
                top.setdefault(self._lm.decode([other]), value)
        return ScoredToken(token, text, stream.offsets[-1], log_prob, top)

    def _begin_samples(self, prompt: _Prompt, mixture: MixedStep) -> None:
        job = prompt.job
        assert prompt.cached is not None
        rows = []
        for sample in range(job.samples):
            row = _Row(
                job,
                sample,
                prompt.mixer,
                seeded_generator(job.seed, sample),
                TextStream(self._lm.decode, job.prompt[job.hidden :], job.stop),
            )
            if job.max_tokens == 0:
                job.post(Grown(sample, "", (), "length"))
            elif self._grow(row, mixture, len(mixture.log_probs) - 1):
                rows.append(row)
        if job.max_tokens > 0:
            self._metrics.first_token.observe(time.perf_counter() - job.arrived)
        if not rows or job.cancelled:
            return
        if not self._decoder.shares_batches:
            self._groups += [_Group([row], copy.deepcopy(prompt.cached)) for row in rows]
            return
        cached = self._decoder.keep(prompt.cached, [0] * len(rows))
        if self._groups:
            (group,) = self._groups
            group.cached = self._decoder.join([group.cached, cached])
            group.rows += rows
        else:
            self._groups.append(_Group(rows, cached))

    def _advance(self, group: _Group) -> None:
        started = time.perf_counter()
        step, group.cached = self._decoder.advance(
            [row.last_token for row in group.rows], group.cached
        )
        self._metrics.model_seconds.inc(time.perf_counter() - started)
        alike: dict[tuple[object, ...], list[int]] = {}
        for place, row in enumerate(group.rows):
            retrievers = row.mixer.retrievers
            asked = tuple((retriever.parameters, id(retriever.index)) for retriever in retrievers)
            alike.setdefault((asked, id(row.mixer.gate)), []).append(place)
        goes_on = [True] * len(group.rows)
        for places in alike.values():
            part = Step(step.keys[places], step.log_probs[places])
            mixture = self._mix(group.rows[places[0]].mixer, part)
            for number, place in enumerate(places):
                row = group.rows[place]
                try:
                    goes_on[place] = self._grow(row, mixture, number)
                except Exception as error:
                    self._fail(row.job, error)
        self._keep(group, goes_on)

    def _grow(self, row: _Row, mixture: MixedStep, place: int) -> bool:
        """Choose a row's next token and post what is certain of its text; return if it goes on."""
        job = row.job
        _check_numbers(mixture.log_probs[place])
        token = choose_token(mixture.log_probs[place], job.temperature, job.top_p, row.generator)
        reason = None
        if token in self._ends:
            reason = "stop"
        else:
            row.stream.push(token)
            row.last_token = token
            row.tokens += 1
            self._metrics.generated_tokens.inc()
            scored = self._scored(job, row.stream, token, mixture, place)
            if job.sources:
                explanation = mixture.explain(place, token, job.sources, self._lm)
                scored = replace(scored, explanation=explanation)
            row.held.append(scored)
            if row.stream.stopped:
                reason = "stop"
            elif row.tokens == job.max_tokens:
                reason = "length"
        if reason is not None:
            row.stream.finish()
            reason = "stop" if row.stream.stopped else reason
        self._post_growth(row, reason)
        return reason is None

    def _post_growth(self, row: _Row, reason: str | None) -> None:
        text = row.stream.text
        is_whole = reason is not None and not row.stream.stopped
        ready = [scored for scored in row.held if is_whole or scored.offset < len(text)]
        row.held = row.held[len(ready) :]
        if ready or reason is not None or len(text) > row.shown:
            row.job.post(Grown(row.sample, text[row.shown :], tuple(ready), reason))
            row.shown = len(text)


def _check_numbers(log_probs: torch.Tensor) -> None:
    if bool(log_probs.isnan().any()):
        raise UnsupportedModelError("the model's probabilities must be numbers, but some are NaN")
