"""The work of the model thread: prompts are read one by one, completions grow together.

Knows the kNN-LM and the jobs; knows no thread, no queue and no protocol. Everything here belongs
to one thread.
"""

import copy
import logging
import time
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from knnlm.apps.engine.calls import Calls
from knnlm.apps.engine.followed_model import FollowedModel
from knnlm.apps.engine.jobs import (
    Completion,
    Failed,
    Grown,
    Job,
    Lane,
    ModelCall,
    PromptRead,
    ScoredToken,
)
from knnlm.apps.engine.metrics import Metrics
from knnlm.apps.engine.samples import Sample
from knnlm.apps.engine.sampling import Sampler
from knnlm.apps.engine.scored_tokens import score_token, with_texts
from knnlm.apps.engine.steps import MixedStep, mix_step
from knnlm.apps.engine.text_stream import TextStream
from knnlm.errors import ClusterError, InvalidArgumentError
from knnlm.knn_lm import KNNLM
from knnlm.model.decoding import CachedSequences, Decoder, Step
from knnlm.retrieval.draft_lengths import DraftedText, PassCosts, choose_lengths
from knnlm.retrieval.mixer import Mixer

_PROMPT_TOKENS = 256  # read between two steps of what is being generated
_NEIGHBORS = 1 << 20  # found for them at most, where each of many votes
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
    coverage: float = 1.0  # the least of the searches

    @property
    def left(self) -> int:
        """How many tokens the model has not read."""
        return len(self.job.prompt) - self.read


@dataclass(eq=False, slots=True)
class _Batch:
    """Samples that grow together; `cached` holds a sequence for each.

    is_shared: whether others may join.
    """

    samples: list[Sample]
    cached: CachedSequences
    is_shared: bool = False


class Worker:
    """Runs jobs on a kNN-LM, a turn at a time; `close` gives the model back.

    drafts: whether it may read several tokens of a completion in one pass, guessed before.
    """

    def __init__(self, model: KNNLM, metrics: Metrics, drafts: bool = True) -> None:
        self.followed = FollowedModel(model, metrics)
        self._lm = model.lm
        self._metrics = metrics
        self._hooks = ExitStack()
        self._decoder = Decoder(self._lm, self._hooks.enter_context(self._lm.capture()))
        self._prompts: deque[_Prompt] = deque()
        self._batches: list[_Batch] = []
        self._calls = Calls(self._fail)
        self._turns = 0
        self._drafts = drafts
        self._costs = PassCosts()

    def close(self) -> None:
        """Stop recording the model's keys."""
        self._hooks.close()

    @property
    def places(self) -> int:
        """How many samples are being generated or prepared."""
        return self.load[Lane.short] + self.load[Lane.long]

    @property
    def load(self) -> Counter[Lane]:
        """How many places the jobs of each lane take."""
        load = Counter({Lane.call: len(self._calls.jobs)})
        for prompt in self._prompts:
            load[prompt.job.lane] += prompt.job.places
        for batch in self._batches:
            load.update(sample.job.lane for sample in batch.samples)
        return load

    @property
    def jobs(self) -> set[Job]:
        """The jobs that were begun and are neither finished nor dropped."""
        begun: set[Job] = {prompt.job for prompt in self._prompts}
        samples = (sample for batch in self._batches for sample in batch.samples)
        return begun.union(self._calls.jobs, (sample.job for sample in samples))

    def begin(self, job: Job) -> None:
        """Begin a job, on the newest state of the datastores. An error fails this job alone."""
        try:
            model = copy.copy(self.followed.follow())
            model.mixer = mixer = job.overrides.apply(model.mixer)
            if isinstance(job, Completion) and job.max_tokens == 0 and not job.score_prompt:
                job.post(PromptRead())
                for sample in range(job.samples):
                    job.post(Grown(sample, "", (), "length"))
            elif isinstance(job, Completion):
                stream = TextStream(self._lm.token_texts)
                self._prompts.append(_Prompt(job, mixer, stream))
            elif isinstance(job, ModelCall):
                model.mixer = mixer.searching_all()  # its answers do not tell of less
                self._calls.begin(job, job.function(model))
        except Exception as error:
            self._fail(job, error)

    def _fail(self, job: Job, error: Exception) -> None:
        if job.cancelled:  # another of its samples has failed, or nobody listens
            return
        job.cancel()
        if isinstance(error, InvalidArgumentError):
            job.post(Failed(str(error), invalid=True))
            return
        self._metrics.failures.inc()
        if isinstance(error, ClusterError):
            _LOG.error("a request failed: %s", error)
            message = "a part of the datastore was not searched in time; try again in a moment"
            job.post(Failed(message, unavailable=True))
            return
        _LOG.error("a request failed: %r", error, exc_info=error)
        job.post(Failed("the server failed at this request; its log says more"))

    def turn(self) -> None:
        """Read some of the waiting prompts, generate a token of every sample, go on with calls."""
        self._drop_cancelled()
        self._turns += 1
        budget = _PROMPT_TOKENS
        while budget > 0 and self._prompts:
            prompt = self._next_prompt()
            try:
                budget -= self._read_some(prompt)
            except Exception as error:
                self._fail(prompt.job, error)
            if prompt.job.cancelled or prompt.left == 0:
                self._prompts.remove(prompt)
        for batch in list(self._batches):
            try:
                self._advance(batch)
            except Exception as error:  # the model's step is shared: whose error it is, is unknown
                self._fail_batch(batch, error)
        self._calls.turn()
        self._drop_cancelled()

    def _next_prompt(self) -> _Prompt:
        """Return the oldest prompt or, every other turn, the one of which the least is left.

        So a short prompt does not wait for long ones, and a long one is not put off for ever.
        """
        if self._turns % 2:
            return min(self._prompts, key=lambda prompt: prompt.left)
        return self._prompts[0]

    def _fail_batch(self, batch: _Batch, error: Exception) -> None:
        for sample in batch.samples:
            self._fail(sample.job, error)

    def _drop_cancelled(self) -> None:
        self._calls.drop_cancelled()
        self._prompts = deque(prompt for prompt in self._prompts if not prompt.job.cancelled)
        for batch in self._batches:
            try:
                self._keep(batch, [not sample.job.cancelled for sample in batch.samples])
            except Exception as error:
                self._fail_batch(batch, error)
                batch.samples = []
        self._batches = [batch for batch in self._batches if batch.samples]

    def _keep(self, batch: _Batch, wanted: Sequence[bool]) -> None:
        places = [place for place, is_wanted in enumerate(wanted) if is_wanted]
        if 0 < len(places) < len(batch.samples):
            batch.cached = self._decoder.select(batch.cached, places)
        batch.samples = [batch.samples[place] for place in places]

    def _read_some(self, prompt: _Prompt) -> int:
        """Read the next piece of a prompt; after the last one, begin its samples.

        Returns how many tokens were read; more if each of them had many neighbors.
        """
        job, left = prompt.job, prompt.left
        size = left
        cost = 1
        if self._decoder.may_read_pieces(len(job.prompt)):
            if job.score_prompt:
                k = sum(retriever.parameters.k for retriever in prompt.mixer.searched)
                cost = max(1, _PROMPT_TOKENS * k // _NEIGHBORS)
            size = min(left, max(1, _PROMPT_TOKENS // cost))
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
        prompt.coverage = min(prompt.coverage, mixed.coverage)
        if job.score_prompt:
            self._score(prompt, mixed, prompt.read - size)
        if is_last:
            prompt.stream.finish()
            scored = with_texts(prompt.scored, self._lm.token_texts, prompt.stream)
            job.post(PromptRead(tuple(scored)))
            self._begin_samples(prompt, mixed)
        return size * cost

    def _mix(self, mixer: Mixer, step: Step) -> MixedStep:
        mixed = mix_step(mixer, step)
        self._metrics.search_seconds.inc(mixed.search_seconds)
        self._metrics.coverage.set(mixed.coverage)
        if mixed.coverage < 1.0:
            self._metrics.partial_searches.inc()
        return mixed

    def _score(self, prompt: _Prompt, mixed: MixedStep, first: int) -> None:
        """Score the prompt's tokens after each position of a step; `first` is the first one."""
        job = prompt.job
        self._lm.check_numbers(mixed.log_probs)
        if first == 0:
            for token in job.prompt[job.hidden : 1]:
                prompt.stream.push(token)
                prompt.scored.append(ScoredToken(token))
        following = job.prompt[first + 1 : first + 1 + len(mixed.log_probs)]
        for position, token in enumerate(following):
            prompt.scored.append(
                self._score_token(job, prompt.stream, token, mixed.log_probs[position])
            )
            prompt.stream.push(token)

    def _score_token(
        self, job: Completion, stream: TextStream, token: int, log_probs: Float[Tensor, " vocab"]
    ) -> ScoredToken:
        """Return a stream's next token as the job wants it; its text is still to come."""
        return score_token(self._lm.token_texts, token, stream.last, log_probs, job.log_probs)

    def _begin_samples(self, prompt: _Prompt, mixed: MixedStep) -> None:
        job = prompt.job
        assert prompt.cached is not None
        samples = []
        for number in range(job.samples):
            sample = Sample(
                job,
                number,
                prompt.mixer,
                Sampler(job.sampling, number, job.prompt),
                TextStream(self._lm.token_texts, job.prompt[job.hidden :], job.stop),
                DraftedText(job.prompt) if self._may_draft(prompt) else None,
                coverage=prompt.coverage,
            )
            if job.max_tokens == 0:
                job.post(Grown(number, "", (), "length", prompt.coverage))
            elif sample.grow(self._lm, self._metrics, mixed, len(mixed.log_probs) - 1)[1]:
                samples.append(sample)
        if job.max_tokens > 0:
            self._metrics.first_token.observe(time.perf_counter() - job.arrived)
        if not samples or job.cancelled:
            return
        if not self._decoder.shares_batches(len(job.prompt) + job.max_tokens):
            self._batches += [_Batch([one], copy.deepcopy(prompt.cached)) for one in samples]
            return
        cached = self._decoder.select(prompt.cached, [0] * len(samples))
        shared = next((batch for batch in self._batches if batch.is_shared), None)
        if shared is not None:
            shared.cached = self._decoder.join([shared.cached, cached])
            shared.samples += samples
        else:
            self._batches.append(_Batch(samples, cached, is_shared=True))

    def _may_draft(self, prompt: _Prompt) -> bool:
        positions = len(prompt.job.prompt) + prompt.job.max_tokens
        return self._drafts and prompt.mixer.counts and self._decoder.takes_back(positions)

    def _advance(self, batch: _Batch) -> None:
        """Read the last token of every sample, with a draft after it, and choose what follows."""
        started = time.perf_counter()
        choose_lengths([sample.text for sample in batch.samples], self._costs)
        pieces = [sample.piece for sample in batch.samples]
        width = max(map(len, pieces))
        step, batch.cached = self._decoder.advance(pieces, batch.cached)
        self._metrics.model_seconds.inc(time.perf_counter() - started)
        read = [len(piece) for piece in pieces]  # of each piece, as much as stays
        goes_on = [True] * len(pieces)
        groups = deque(_mixed_alike(batch.samples))
        while groups:
            places = groups.popleft()
            positions = [
                place * width + column for place in places for column in range(len(pieces[place]))
            ]
            try:
                mixed = self._mix(
                    batch.samples[places[0]].mixer,
                    Step(step.keys[positions], step.log_probs[positions]),
                )
            except Exception as error:
                if len(places) > 1:  # one of them may have caused it
                    groups.extend([place] for place in places)
                else:
                    self._fail(batch.samples[places[0]].job, error)
                continue
            first = 0
            for place in places:
                sample = batch.samples[place]
                try:
                    read[place], goes_on[place] = sample.grow(self._lm, self._metrics, mixed, first)
                except Exception as error:
                    self._fail(sample.job, error)
                first += len(pieces[place])
        self._costs.note(len(pieces), width, time.perf_counter() - started)
        if width > 1:
            batch.cached = self._decoder.take_back(batch.cached, [width - own for own in read])
        self._keep(batch, goes_on)


def _mixed_alike(samples: Sequence[Sample]) -> list[list[int]]:
    """Return the places of samples that share snapshots and parameters, group by group."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for place, sample in enumerate(samples):
        retrievers = tuple(
            (retriever.parameters, id(retriever.by_distance), id(retriever.index))
            for retriever in sample.mixer.retrievers
        )
        groups.setdefault((retrievers, id(sample.mixer.gate)), []).append(place)
    return list(groups.values())
