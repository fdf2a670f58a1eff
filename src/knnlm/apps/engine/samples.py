"""Samples of completions while they grow: their tokens are chosen, and their text is posted.

Knows jobs and the steps of the model that were mixed; knows no model pass and no batch.
"""

from dataclasses import dataclass, field, replace

from knnlm.apps.engine.jobs import Completion, Grown, ScoredToken
from knnlm.apps.engine.metrics import Metrics
from knnlm.apps.engine.sampling import Sampler
from knnlm.apps.engine.scored_tokens import score_token, with_texts
from knnlm.apps.engine.steps import MixedStep
from knnlm.apps.engine.text_stream import TextStream
from knnlm.model.language_model import LanguageModel
from knnlm.retrieval.draft_lengths import DraftedText
from knnlm.retrieval.mixer import Mixer


@dataclass(eq=False, slots=True)
class Sample:
    """One sample of a completion while it grows; text: where it may be drafted."""

    job: Completion
    number: int
    mixer: Mixer
    sampler: Sampler
    stream: TextStream
    text: DraftedText | None
    last_token: int = -1
    tokens: int = 0
    shown: int = 0  # characters posted
    held: list[ScoredToken] = field(default_factory=list)  # not posted yet
    coverage: float = 1.0  # the least of the searches

    @property
    def piece(self) -> list[int]:
        """What the model reads next: the last token, and a draft."""
        return [self.last_token, *(self.text.reading if self.text is not None else ())]

    def grow(
        self, lm: LanguageModel, metrics: Metrics, mixed: MixedStep, first: int
    ) -> tuple[int, bool]:
        """Choose tokens after the positions of its piece, as far as the draft says the same.

        first: the position of the piece's first token in the step. Returns how many tokens were
        chosen, and whether the sample goes on.
        """
        draft = self.piece[1:]
        for count, guess in enumerate([*draft, None], start=1):
            goes_on = self._choose(lm, metrics, mixed, first + count - 1)
            if not goes_on or self.last_token != guess:
                break
        metrics.drafted_tokens.inc(len(draft))
        metrics.accepted_tokens.inc(count - 1)
        if self.text is not None and goes_on:
            searched = list(zip(mixed.retrievers, mixed.neighbors, strict=True))
            self.text.push([*draft[: count - 1], self.last_token])
            room = self.job.max_tokens - self.tokens - 1
            self.text.guess(searched, first + count - 1, room)
        return count, goes_on

    def _choose(self, lm: LanguageModel, metrics: Metrics, mixed: MixedStep, position: int) -> bool:
        """Choose the token that follows a position, and post its text; return whether to go on."""
        job = self.job
        self.coverage = min(self.coverage, mixed.coverage)
        lm.check_numbers(mixed.log_probs[position])
        token = self.sampler.next_token(mixed.log_probs[position])
        reason = None
        if token in lm.end_tokens or token in job.ends:
            reason = "stop"
        else:
            scored = score_token(
                lm.token_texts, token, self.stream.last, mixed.log_probs[position], job.log_probs
            )
            self.stream.push(token)
            self.last_token = token
            self.tokens += 1
            metrics.generated_tokens.inc()
            if job.sources:
                explanation = mixed.explain(position, self.stream.last, job.sources, lm)
                scored = replace(scored, explanation=explanation)
            self.held.append(scored)
            if self.stream.stopped:
                reason = "stop"
            elif self.tokens == job.max_tokens:
                reason = "length"
        if reason is not None:
            self.stream.finish()
            reason = "stop" if self.stream.stopped else reason
        self._post(lm, reason)
        return reason is None

    def _post(self, lm: LanguageModel, reason: str | None) -> None:
        """Post the text that is certain, and the tokens that begin in it."""
        text = self.stream.text
        is_whole = reason is not None and not self.stream.stopped
        first = self.tokens - len(self.held)
        certain = with_texts(self.held, lm.token_texts, self.stream, first)
        ready = [scored for scored in certain if is_whole or scored.offset < len(text)]
        self.held = self.held[len(ready) :]
        if ready or reason is not None or len(text) > self.shown:
            new_text = text[self.shown :]
            self.job.post(Grown(self.number, new_text, tuple(ready), reason, self.coverage))
            self.shown = len(text)
