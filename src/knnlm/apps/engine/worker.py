"""The work of the model thread: prompts are read one by one, completions grow together.

Knows the kNN-LM and the jobs; knows no thread, no queue and no protocol. Everything here belongs
to one thread.
"""

import copy
import logging
import time
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import torch

from knnlm.apps.engine.decoding import CachedSequences, Decoder, Step
from knnlm.apps.engine.jobs import (
    Completion,
    Failed,
    Grown,
    Job,
    ModelCall,
    PromptRead,
    Returned,
    ScoredToken,
)
from knnlm.apps.engine.metrics import Metrics
from knnlm.apps.engine.sampling import choose_token, seeded_generator
from knnlm.apps.engine.steps import MixedStep, mix_step
from knnlm.apps.engine.text_stream import TextStream
from knnlm.errors import InvalidArgumentError
from knnlm.index.policy import open_index
from knnlm.knn_lm import KNNLM
from knnlm.retrieval.mixer import Mixer

_PROMPT_TOKENS = 256  # read between two steps of what is being generated
_LOG = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class _Prompt:
    """A prompt that the model is reading."""

    job: Completion
    mixer: Mixer
    stream: TextStream
    read: int = 0
    cached: CachedSequences | None = None
    scored: list[ScoredToken] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class _Sample:
    """One sample of a completion while it grows."""

    job: Completion
    number: int
    mixer: Mixer
    generator: torch.Generator
    stream: TextStream
    last_token: int = -1
    tokens: int = 0
    shown: int = 0  # characters posted
    held: list[ScoredToken] = field(default_factory=list)  # not posted yet


@dataclass(eq=False, slots=True)
class _Batch:
    """Samples that grow together; `cached` holds a sequence for each."""

    samples: list[_Sample]
    cached: CachedSequences


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
        self._batches: list[_Batch] = []

    def close(self) -> None:
        """Stop recording the model's keys."""
        self._hooks.close()

    @property
    def places(self) -> int:
        """How many samples are being generated or prepared."""
        return sum(prompt.job.places for prompt in self._prompts) + sum(
            len(batch.samples) for batch in self._batches
        )

    @property
    def jobs(self) -> set[Job]:
        """The jobs that were begun and are neither finished nor dropped."""
        begun: set[Job] = {prompt.job for prompt in self._prompts}
        return begun.union(sample.job for batch in self._batches for sample in batch.samples)

    def begin(self, job: Job) -> None:
        """Begin a job; a model call is done at once. An error fails this job alone."""
        try:
            self._follow_changes()
            mixer = job.overrides.apply(self._mixer)
            if isinstance(job, Completion) and job.max_tokens == 0 and not job.score_prompt:
                job.post(PromptRead())
                for sample in range(job.samples):
                    job.post(Grown(sample, "", (), "length"))
            elif isinstance(job, Completion):
                stream = TextStream(self._lm.decode, ())
                self._prompts.append(_Prompt(job, mixer, stream))
            elif isinstance(job, ModelCall):
                model = copy.copy(self._model)
                model.mixer = mixer
                job.post(Returned(job.function(model)))
        except Exception as error:
            self._fail(job, error)

    def _follow_changes(self) -> None:
        """Follow entries that were added, forgotten or compacted in the meantime."""
        changed = []
        for retriever in self._mixer.retrievers:
            numbering = retriever.store.numbering
            retriever.store.refresh()
            if retriever.store.numbering != numbering:
                index = open_index(retriever.store, device=str(self._lm.device))
                retriever = replace(retriever, index=index)
            changed.append(retriever)
        self._mixer = replace(self._mixer, retrievers=tuple(changed))

    def _fail(self, job: Job, error: Exception) -> None:
        job.cancel()
        if isinstance(error, InvalidArgumentError):
            job.post(Failed(str(error), invalid=True))
            return
        _LOG.error("a request failed: %r", error, exc_info=error)
        self._metrics.failures.inc()
        job.post(Failed("the server failed at this request; its log says more"))

    def turn(self) -> None:
        """Read some of the waiting prompts, then generate one more token of every sample."""
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
        for batch in list(self._batches):
            try:
                self._advance(batch)
            except Exception as error:  # which sample caused it is unknown
                for sample in batch.samples:
                    if not sample.job.cancelled:
                        self._fail(sample.job, error)
        self._drop_cancelled()

    def _drop_cancelled(self) -> None:
        self._prompts = deque(prompt for prompt in self._prompts if not prompt.job.cancelled)
        for batch in self._batches:
            self._keep(batch, [not sample.job.cancelled for sample in batch.samples])
        self._batches = [batch for batch in self._batches if batch.samples]

    def _keep(self, batch: _Batch, wanted: Sequence[bool]) -> None:
        places = [place for place, is_wanted in enumerate(wanted) if is_wanted]
        if 0 < len(places) < len(batch.samples):
            batch.cached = self._decoder.select(batch.cached, places)
        batch.samples = [batch.samples[place] for place in places]

    def _read_some(self, prompt: _Prompt) -> int:
        """Read the next piece of a prompt; after the last one, begin its samples.

        Returns how many tokens were read.
        """
        job = prompt.job
        left = len(job.prompt) - prompt.read
        size = min(left, _PROMPT_TOKENS) if self._decoder.shares_batches else left
        piece = torch.tensor(job.prompt[prompt.read : prompt.read + size], dtype=torch.int64)
        keep = size if job.score_prompt else 1
        started = time.perf_counter()
        step, prompt.cached = self._decoder.read(piece, prompt.cached, keep)
        self._metrics.model_seconds.inc(time.perf_counter() - started)
        prompt.read += size
        self._metrics.prompt_tokens.inc(size)
        is_last = size == left
        if not job.score_prompt and not is_last:
            return size
        mixed = self._mix(prompt.mixer, step)
        if job.score_prompt:
            self._score(prompt, mixed, prompt.read - size)
        if is_last:
            job.post(PromptRead(tuple(prompt.scored)))
            self._begin_samples(prompt, mixed)
        return size

    def _mix(self, mixer: Mixer, step: Step) -> MixedStep:
        mixed = mix_step(mixer, step)
        self._metrics.search_seconds.inc(mixed.search_seconds)
        return mixed

    def _score(self, prompt: _Prompt, mixed: MixedStep, first: int) -> None:
        """Score the prompt's tokens after each position of a step; `first` is the first one."""
        job = prompt.job
        self._lm.check_numbers(mixed.log_probs)
        if first == 0:
            for token in job.prompt[job.hidden : 1]:
                prompt.stream.push(token)
                prompt.scored.append(ScoredToken(token, self._lm.decode([token]), 0))
        following = job.prompt[first + 1 : first + 1 + len(mixed.log_probs)]
        for position, token in enumerate(following):
            prompt.stream.push(token)
            prompt.scored.append(self._scored(job, prompt.stream, token, mixed, position))

    def _scored(
        self, job: Completion, stream: TextStream, token: int, mixed: MixedStep, position: int
    ) -> ScoredToken:
        """Return the last token of a stream, which follows a position, as the job wants it."""
        text = self._lm.decode([token])
        log_prob = float(mixed.log_probs[position, token])
        top = None
        if job.log_probs is not None:
            top = {text: log_prob}
            best = mixed.log_probs[position].topk(job.log_probs)
            for other, value in zip(best.indices.tolist(), best.values.tolist(), strict=True):
                top.setdefault(self._lm.decode([other]), value)
        return ScoredToken(token, text, stream.offsets[-1], log_prob, top)

    def _begin_samples(self, prompt: _Prompt, mixed: MixedStep) -> None:
        job = prompt.job
        assert prompt.cached is not None
        samples = []
        for number in range(job.samples):
            sample = _Sample(
                job,
                number,
                prompt.mixer,
                seeded_generator(job.sampling.seed, number),
                TextStream(self._lm.decode, job.prompt[job.hidden :], job.stop),
            )
            if job.max_tokens == 0:
                job.post(Grown(number, "", (), "length"))
            elif self._grow(sample, mixed, len(mixed.log_probs) - 1):
                samples.append(sample)
        if job.max_tokens > 0:
            self._metrics.first_token.observe(time.perf_counter() - job.arrived)
        if not samples or job.cancelled:
            return
        if not self._decoder.shares_batches:
            self._batches += [_Batch([one], copy.deepcopy(prompt.cached)) for one in samples]
            return
        cached = self._decoder.select(prompt.cached, [0] * len(samples))
        if self._batches:
            (batch,) = self._batches
            batch.cached = self._decoder.join([batch.cached, cached])
            batch.samples += samples
        else:
            self._batches.append(_Batch(samples, cached))

    def _advance(self, batch: _Batch) -> None:
        """Read the last token of every sample, and choose the next one."""
        started = time.perf_counter()
        step, batch.cached = self._decoder.advance(
            [sample.last_token for sample in batch.samples], batch.cached
        )
        self._metrics.model_seconds.inc(time.perf_counter() - started)
        mixed_alike: dict[tuple[object, ...], list[int]] = {}  # places of samples, by their mixer
        for place, sample in enumerate(batch.samples):
            retrievers = tuple(
                (retriever.parameters, id(retriever.by_distance), id(retriever.index))
                for retriever in sample.mixer.retrievers
            )
            mixed_alike.setdefault((retrievers, id(sample.mixer.gate)), []).append(place)
        goes_on = [True] * len(batch.samples)
        for places in mixed_alike.values():
            part = Step(step.keys[places], step.log_probs[places])
            mixed = self._mix(batch.samples[places[0]].mixer, part)
            for position, place in enumerate(places):
                sample = batch.samples[place]
                try:
                    goes_on[place] = self._grow(sample, mixed, position)
                except Exception as error:
                    self._fail(sample.job, error)
        self._keep(batch, goes_on)

    def _grow(self, sample: _Sample, mixed: MixedStep, position: int) -> bool:
        """Choose a sample's next token, which follows a position, and post its text.

        Returns whether the sample goes on.
        """
        job = sample.job
        self._lm.check_numbers(mixed.log_probs[position])
        token = choose_token(mixed.log_probs[position], job.sampling, sample.generator)
        reason = None
        if token in self._lm.end_tokens:
            reason = "stop"
        else:
            sample.stream.push(token)
            sample.last_token = token
            sample.tokens += 1
            self._metrics.generated_tokens.inc()
            scored = self._scored(job, sample.stream, token, mixed, position)
            if job.sources:
                explanation = mixed.explain(position, token, job.sources, self._lm)
                scored = replace(scored, explanation=explanation)
            sample.held.append(scored)
            if sample.stream.stopped:
                reason = "stop"
            elif sample.tokens == job.max_tokens:
                reason = "length"
        if reason is not None:
            sample.stream.finish()
            reason = "stop" if sample.stream.stopped else reason
        self._post_growth(sample, reason)
        return reason is None

    def _post_growth(self, sample: _Sample, reason: str | None) -> None:
        """Post the text that is certain, and the tokens that begin in it."""
        text = sample.stream.text
        is_whole = reason is not None and not sample.stream.stopped
        ready = [scored for scored in sample.held if is_whole or scored.offset < len(text)]
        sample.held = sample.held[len(ready) :]
        if ready or reason is not None or len(text) > sample.shown:
            grown = Grown(sample.number, text[sample.shown :], tuple(ready), reason)
            sample.job.post(grown)
            sample.shown = len(text)
