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
from knnlm.apps.server.chat_schema import ChatRequest
from knnlm.apps.server.http_errors import HTTPError
from knnlm.apps.server.schema import CompletionRequest, ExplainRequest, GenerationRequest
from knnlm.apps.server.tokenizing import Tokenizing
from knnlm.errors import InvalidArgumentError, KNNLMError
from knnlm.retrieval.retriever import for_each

_DEFAULT_MAX_TOKENS = 16  # the protocol's own
_DEFAULT_SOURCES = 3
_DEFAULT_PASSAGE = 24 + 1 + 8  # tokens, of a source of a generated token
# bytes of an answer, about: of a token, of a likely alternative, of a source, of a passage's token
_TOKEN_BYTES, _ALTERNATIVE_BYTES, _SOURCE_BYTES, _PASSAGE_TOKEN_BYTES = 128, 32, 256, 6


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A prompt: the token ids that the model reads, and its text if `echo` returns it.

    hidden: how many tokens at its start the client did not send. max_tokens: how many may follow.
    ends: tokens that end what follows, besides the model's own.
    """

    tokens: Sequence[int]
    hidden: int
    text: str
    max_tokens: int
    ends: frozenset[int] = frozenset()


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
        self._check_numbers(request, len(given), max_tokens=_max_tokens(request))
        encoded = [await self._encode(request, one) for one in given]
        self._check_answer(request, encoded)
        return encoded

    async def conversation(self, request: ChatRequest) -> list[EncodedPrompt]:
        """Tokenize the conversation of a request, with exactly the tokens of its template.

        There is one prompt. Without a number of tokens the answer has what room there is.
        """
        asked, param = request.most_tokens, "max_completion_tokens"
        if request.max_tokens is not None:
            param = "max_tokens"
        self._check_numbers(request, 1, **{param: 1 if asked is None else asked})
        messages = [message.plain() for message in request.messages]
        try:
            tokens = await self._tokenizing.encode_chat(messages, self._window)
            ends = await self._tokenizing.turn_ends()
        except KNNLMError as error:
            raise HTTPError(400, str(error), param="messages") from error
        if tokens == []:
            raise HTTPError(
                400, "messages: the chat template makes no token of them", param="messages"
            )
        least = 1 if asked is None else asked
        if tokens is None or len(tokens) + least > self._window:
            raise self._too_long("messages", tokens, param, least)
        most = min(self.limits.max_tokens, self._window - len(tokens)) if asked is None else asked
        encoded = [EncodedPrompt(tokens, 0, "", most, ends)]
        self._check_answer(request, encoded)
        return encoded

    async def _encode(
        self, request: CompletionRequest, prompt: str | int | list[str] | list[int]
    ) -> EncodedPrompt:
        max_tokens = _max_tokens(request)
        tokens: list[int] | None
        if isinstance(prompt, str):
            encoded = await self._tokenizing.encode(prompt, self._window)
            tokens = None if encoded is None else [self._facts.start_token, *encoded]
        else:
            assert isinstance(prompt, list)
            tokens = [token for token in prompt if isinstance(token, int)]
        if tokens is None or len(tokens) + max_tokens > self._window:
            raise self._too_long("prompt", tokens, "max_tokens", max_tokens)
        if isinstance(prompt, str):
            return EncodedPrompt(tokens, 1, prompt, max_tokens)
        if max(tokens) >= self._facts.vocab_size:
            raise HTTPError(
                400,
                f"prompt: token ids must be below {self._facts.vocab_size}, the size of the "
                f"vocabulary, got {max(tokens)}",
                param="prompt",
            )
        text = await self._tokenizing.decode(tokens) if request.echo else ""
        return EncodedPrompt(tokens, 0, text, max_tokens)

    @property
    def _window(self) -> int:
        return self._facts.max_window or self.limits.max_positions

    def _too_long(
        self, param: str, tokens: Sequence[int] | None, limit: str, max_tokens: int
    ) -> HTTPError:
        """Return the error for a prompt that is too long; tokens: None for too many to count."""
        sent = f"more than {self._window}" if tokens is None else str(len(tokens))
        what = f"{sent} tokens, the start token included" if param == "prompt" else f"{sent} tokens"
        return HTTPError(
            400,
            f"{param} ({what}) and {limit} ({max_tokens}) must fit the model's {self._window} "
            "positions; shorten one of them",
            param=param,
            code="context_length_exceeded",
        )

    def completions(
        self,
        request: GenerationRequest,
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
                max_tokens=prompt.max_tokens,
                sampling=sampling,
                samples=request.samples,
                stop=tuple(stop),
                ends=prompt.ends,
                log_probs=request.likeliest,
                score_prompt=request.echoes and request.likeliest is not None,
                sources=_sources(request),
            )
            for number, prompt in enumerate(prompts)
        ]

    def _check_numbers(self, request: GenerationRequest, prompts: int, **max_tokens: int) -> None:
        """Refuse numbers beyond the limits; max_tokens: by the name that the client used."""
        limits, samples = self.limits, request.samples
        for param, number in (max_tokens | {"n": samples}).items():
            most = limits.max_batch if param == "n" else limits.max_tokens
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

    def _check_answer(self, request: GenerationRequest, prompts: Sequence[EncodedPrompt]) -> None:
        samples = request.samples
        generated = samples * sum(prompt.max_tokens for prompt in prompts)
        tokens = generated
        if request.echoes:
            tokens += samples * sum(len(prompt.tokens) for prompt in prompts)
        size = generated * _sources(request) * _source_bytes(_DEFAULT_PASSAGE)
        if request.likeliest is not None:
            size += tokens * (_TOKEN_BYTES + request.likeliest * _ALTERNATIVE_BYTES)
        self._check_bytes(size, "fewer tokens, prompts, samples, logprobs or sources")

    def _check_bytes(self, size: int, remedy: str) -> None:
        most = self.limits.max_answer_bytes
        if size > most:
            raise HTTPError(
                400,
                f"the answer must have at most {most} bytes on this server, and would have about "
                f"{size}: ask for {remedy}",
            )

    def overrides(self, request: GenerationRequest | ExplainRequest) -> Overrides:
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


def _logit_bias(request: GenerationRequest) -> dict[int, float]:
    return {int(token): bias for token, bias in (request.logit_bias or {}).items()}


def _sources(request: GenerationRequest) -> int:
    if isinstance(request.sources, bool) or request.sources is None:
        return _DEFAULT_SOURCES if request.sources else 0
    return request.sources


def _source_bytes(passage_tokens: int) -> int:
    return _SOURCE_BYTES + passage_tokens * _PASSAGE_TOKEN_BYTES


def count_prompt_tokens(prompts: Sequence[EncodedPrompt]) -> int:
    """Return how many tokens a client has sent."""
    return sum(len(prompt.tokens) - prompt.hidden for prompt in prompts)
