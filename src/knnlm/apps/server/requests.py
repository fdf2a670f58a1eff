"""Requests → jobs: prompts become token ids, fields become a job's options.

Uses no model, and refuses what asks for too much before it costs anything.
"""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial

from knnlm.apps.engine.engine import ModelFacts
from knnlm.apps.engine.jobs import Completion, Event, Overrides
from knnlm.apps.engine.limits import Limits
from knnlm.apps.engine.sampling import SamplingOptions
from knnlm.apps.server.http_errors import HTTPError
from knnlm.apps.server.schema import CompletionRequest, ExplainRequest
from knnlm.apps.server.tokenizing import Tokenizing
from knnlm.errors import InvalidArgumentError
from knnlm.retrieval.retriever import for_each

_DEFAULT_MAX_TOKENS = 16  # the protocol's own
_DEFAULT_SOURCES = 3
_DEFAULT_PASSAGE = 24 + 1 + 8  # tokens, of a source of a generated token
# bytes of an answer, about: of a token, of a likely alternative, of a source, of a passage's token
_TOKEN_BYTES, _ALTERNATIVE_BYTES, _SOURCE_BYTES, _PASSAGE_TOKEN_BYTES = 128, 32, 256, 6


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A prompt: the token ids that the model reads, and its text if `echo` returns it.

    hidden: how many tokens at its start the client did not send.
    """

    tokens: Sequence[int]
    hidden: int
    text: str


class RequestReader:
    """Turns requests into jobs; raises HTTPError for those that ask for too much."""

    def __init__(self, facts: ModelFacts, limits: Limits) -> None:
        self._facts = facts
        self.limits = limits
        self._tokenizing = Tokenizing(facts.encoder, facts.control_tokens)

    async def prompts(self, request: CompletionRequest) -> list[EncodedPrompt]:
        """Tokenize the prompts of a request.

        A start token is put before a text, as in a datastore; token ids are taken as they are.
        """
        prompt = request.prompt
        given = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
        self._check_numbers(request, len(given))
        encoded = [await self._encode(request, one) for one in given]
        self._check_answer(request, encoded)
        return encoded

    async def _encode(
        self, request: CompletionRequest, prompt: str | int | list[str] | list[int]
    ) -> EncodedPrompt:
        max_tokens = _max_tokens(request)
        window = self._facts.max_window or self.limits.max_positions
        if isinstance(prompt, str):
            tokens = await self._tokenizing.encode(prompt, window)
            count = None if tokens is None else 1 + len(tokens)
            ids = [self._facts.start_token, *(tokens or ())]
        else:
            assert isinstance(prompt, list)
            ids = [token for token in prompt if isinstance(token, int)]
            count = len(ids)
        if count is None or count + max_tokens > window:
            sent = f"more than {window}" if count is None else str(count)
            raise HTTPError(
                400,
                f"prompt ({sent} tokens, the start token included) and max_tokens ({max_tokens}) "
                f"must fit the model's {window} positions; shorten one of them",
                param="prompt",
                code="context_length_exceeded",
            )
        if isinstance(prompt, str):
            return EncodedPrompt(ids, 1, prompt)
        if max(ids) >= self._facts.vocab_size:
            raise HTTPError(
                400,
                f"prompt: token ids must be below {self._facts.vocab_size}, the size of the "
                f"vocabulary, got {max(ids)}",
                param="prompt",
            )
        return EncodedPrompt(ids, 0, await self._tokenizing.decode(ids) if request.echo else "")

    def completions(
        self,
        request: CompletionRequest,
        prompts: Sequence[EncodedPrompt],
        post: Callable[[int, Event], None],
    ) -> list[Completion]:
        """Return a job for every prompt; `post` takes the prompt's number and an event."""
        # a request's sampling options are its fields of the same names; without a seed it gets one
        # that cannot be guessed
        given = {field.name: getattr(request, field.name) for field in fields(SamplingOptions)}
        given["logit_bias"] = _logit_bias(request)
        chosen = {name: value for name, value in given.items() if value is not None}
        sampling = SamplingOptions(**{"seed": secrets.randbits(62)} | chosen)
        overrides = self.overrides(request)
        stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
        return [
            Completion(
                post=partial(post, number),
                overrides=overrides,
                prompt=prompt.tokens,
                hidden=prompt.hidden,
                max_tokens=_max_tokens(request),
                sampling=sampling,
                samples=request.n or 1,
                stop=tuple(stop),
                log_probs=request.logprobs,
                score_prompt=bool(request.echo) and request.logprobs is not None,
                sources=_sources(request),
            )
            for number, prompt in enumerate(prompts)
        ]

    def _check_numbers(self, request: CompletionRequest, prompts: int) -> None:
        limits, samples = self.limits, request.n or 1
        for param, number, most in [
            ("max_tokens", _max_tokens(request), limits.max_tokens),
            ("n", samples, limits.max_batch),
        ]:
            if number > most:
                message = f"{param} must be at most {most} on this server, got {number}"
                raise HTTPError(400, message, param=param)
        largest = max(_logit_bias(request), default=0)
        if largest >= self._facts.vocab_size:
            raise HTTPError(
                400,
                f"logit_bias: token ids must be below {self._facts.vocab_size}, the size of the "
                f"vocabulary, got {largest}",
                param="logit_bias",
            )
        if prompts * samples > limits.max_queue:
            raise HTTPError(
                400,
                f"prompt: {prompts} prompts with n = {samples} are more completions than the "
                f"{limits.max_queue} that this server queues; send fewer at once",
                param="prompt",
            )

    def _check_answer(self, request: CompletionRequest, prompts: Sequence[EncodedPrompt]) -> None:
        samples = request.n or 1
        generated = len(prompts) * samples * _max_tokens(request)
        tokens = generated
        if request.echo:
            tokens += samples * sum(len(prompt.tokens) for prompt in prompts)
        size = generated * _sources(request) * _source_bytes(_DEFAULT_PASSAGE)
        if request.logprobs is not None:
            size += tokens * (_TOKEN_BYTES + request.logprobs * _ALTERNATIVE_BYTES)
        self._check_bytes(size, "fewer tokens, prompts, samples, logprobs or sources")

    def _check_bytes(self, size: int, remedy: str) -> None:
        most = self.limits.max_answer_bytes
        if size > most:
            raise HTTPError(
                400,
                f"the answer must have at most {most} bytes on this server, and would have about "
                f"{size}: ask for {remedy}",
            )

    def overrides(self, request: CompletionRequest | ExplainRequest) -> Overrides:
        """Return the request's own k, λ and T."""
        try:  # checked here because only the protocol knows the name knn_temperature
            for_each("knn_temperature", request.knn_temperature, len(self._facts.entries))
        except InvalidArgumentError as error:
            raise HTTPError(400, str(error)) from error
        ks = request.k if isinstance(request.k, list) else [request.k]
        largest = max((k for k in ks if k is not None), default=0)
        if largest > self.limits.max_k:
            raise HTTPError(
                400,
                "k must be at most the number of entries, and at most "
                f"{self.limits.max_k} on this server, got {largest}: ask for fewer",
            )
        return Overrides(request.k, request.lmbda, request.knn_temperature)

    async def text_to_explain(self, request: ExplainRequest) -> list[int]:
        """Return the tokens of a text to explain; neither they nor the answer are too many."""
        most = self.limits.max_tokens
        tokens = await self.encode(request.text, most)
        if tokens is None or not 1 <= len(tokens) <= most:
            count = "more" if tokens is None else len(tokens)
            raise HTTPError(
                400, f"text must have 1 to {most} tokens on this server, got {count}", param="text"
            )
        passage = request.before + 1 + request.after
        token_bytes = 2 * _TOKEN_BYTES + request.sources * _source_bytes(passage)
        remedy = "a shorter text, fewer sources, or less before and after them"
        self._check_bytes(len(tokens) * token_bytes, remedy)
        return tokens

    async def encode(self, text: str, most: int) -> list[int] | None:
        """Return the tokens of a text; see `Tokenizing.encode`."""
        return await self._tokenizing.encode(text, most)


def _max_tokens(request: CompletionRequest) -> int:
    return _DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens


def _logit_bias(request: CompletionRequest) -> dict[int, float]:
    return {int(token): bias for token, bias in (request.logit_bias or {}).items()}


def _sources(request: CompletionRequest) -> int:
    if isinstance(request.sources, bool) or request.sources is None:
        return _DEFAULT_SOURCES if request.sources else 0
    return request.sources


def _source_bytes(passage_tokens: int) -> int:
    return _SOURCE_BYTES + passage_tokens * _PASSAGE_TOKEN_BYTES


def count_prompt_tokens(prompts: Sequence[EncodedPrompt]) -> int:
    """Return how many tokens a client has sent."""
    return sum(len(prompt.tokens) - prompt.hidden for prompt in prompts)
