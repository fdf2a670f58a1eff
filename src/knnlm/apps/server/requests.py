"""Requests → jobs: prompts become token ids, fields become a job's options.

Uses no model: any thread may do it.
"""

import copy
import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial

from knnlm.apps.engine.engine import ModelFacts
from knnlm.apps.engine.jobs import Completion, Event, Overrides
from knnlm.apps.engine.limits import Limits
from knnlm.apps.engine.sampling import SamplingOptions
from knnlm.apps.server.http_errors import HTTPError
from knnlm.apps.server.schema import CompletionRequest, ExplainRequest, Prompt
from knnlm.errors import InvalidArgumentError
from knnlm.model.language_model import detokenize, tokenize
from knnlm.retrieval.retriever import for_each

_DEFAULT_MAX_TOKENS = 16  # the protocol's own
_DEFAULT_SOURCES = 3


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A prompt: the token ids that the model reads, and the text that `echo` returns.

    hidden: how many tokens at its start the client did not send.
    """

    tokens: Sequence[int]
    hidden: int
    text: str


class RequestReader:
    """Turns requests into jobs; raises HTTPError for those that ask for too much."""

    def __init__(self, facts: ModelFacts, limits: Limits) -> None:
        self._facts = facts
        self._limits = limits
        # a tokenizer serves one thread at a time, and the model thread uses the original
        self._tokenizer = copy.deepcopy(facts.tokenizer)
        self._lock = threading.Lock()

    def encode(self, prompt: Prompt) -> list[EncodedPrompt]:
        """Tokenize the prompts of a request.

        A start token is put before a text, as in a datastore; token ids are taken as they are.
        """
        if isinstance(prompt, str):
            return self._encode_texts([prompt])
        if isinstance(prompt[0], str):
            return self._encode_texts([text for text in prompt if isinstance(text, str)])
        lists = [prompt] if isinstance(prompt[0], int) else prompt
        encoded = []
        for tokens in lists:
            ids = [token for token in tokens if isinstance(token, int)]
            if max(ids) >= self._facts.vocab_size:
                raise HTTPError(
                    400,
                    f"prompt: token ids must be below {self._facts.vocab_size}, the size of the "
                    f"vocabulary, got {max(ids)}",
                    param="prompt",
                )
            with self._lock:
                text = detokenize(self._tokenizer, ids)
            encoded.append(EncodedPrompt(ids, 0, text))
        return encoded

    def _encode_texts(self, texts: list[str]) -> list[EncodedPrompt]:
        with self._lock:
            tokenized = tokenize(self._tokenizer, texts)
        return [
            EncodedPrompt([self._facts.start_token, *tokens], 1, text)
            for text, tokens in zip(texts, tokenized, strict=True)
        ]

    def completions(
        self,
        request: CompletionRequest,
        prompts: Sequence[EncodedPrompt],
        post: Callable[[int, Event], None],
    ) -> list[Completion]:
        """Return a job for every prompt; `post` takes the prompt's number and an event."""
        samples = request.n or 1
        max_tokens = _DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens
        self._check_sizes(request, prompts, samples, max_tokens)
        # a request's sampling options are its fields of the same names; without a seed it gets one
        # that cannot be guessed
        given = {field.name: getattr(request, field.name) for field in fields(SamplingOptions)}
        chosen = {name: value for name, value in given.items() if value is not None}
        sampling = SamplingOptions(**{"seed": secrets.randbits(62)} | chosen)
        overrides = self.overrides(request)
        stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
        sources = request.sources
        if isinstance(sources, bool) or sources is None:
            sources = _DEFAULT_SOURCES if sources else 0
        return [
            Completion(
                post=partial(post, number),
                overrides=overrides,
                prompt=prompt.tokens,
                hidden=prompt.hidden,
                max_tokens=max_tokens,
                sampling=sampling,
                samples=samples,
                stop=tuple(stop),
                log_probs=request.logprobs,
                score_prompt=bool(request.echo) and request.logprobs is not None,
                sources=sources,
            )
            for number, prompt in enumerate(prompts)
        ]

    def _check_sizes(
        self,
        request: CompletionRequest,
        prompts: Sequence[EncodedPrompt],
        samples: int,
        max_tokens: int,
    ) -> None:
        limits = self._limits
        for param, number, most in [
            ("max_tokens", max_tokens, limits.max_tokens),
            ("n", samples, limits.max_batch),
        ]:
            if number > most:
                message = f"{param} must be at most {most} on this server, got {number}"
                raise HTTPError(400, message, param=param)
        if len(prompts) * samples > limits.max_queue:
            raise HTTPError(
                400,
                f"prompt: {len(prompts)} prompts with n = {samples} are more completions than the "
                f"{limits.max_queue} that this server queues; send fewer at once",
                param="prompt",
            )
        window = self._facts.max_window
        longest = max(len(prompt.tokens) for prompt in prompts)
        if window is not None and longest + max_tokens > window:
            raise HTTPError(
                400,
                f"prompt ({longest} tokens, the start token included) and max_tokens "
                f"({max_tokens}) must fit the model's {window} positions; shorten one of them",
                param="prompt",
                code="context_length_exceeded",
            )

    def overrides(self, request: CompletionRequest | ExplainRequest) -> Overrides:
        """Return the request's own k, λ and T."""
        try:  # checked here because only the protocol knows the name knn_temperature
            for_each("knn_temperature", request.knn_temperature, len(self._facts.entries))
        except InvalidArgumentError as error:
            raise HTTPError(400, str(error)) from error
        return Overrides(request.k, request.lmbda, request.knn_temperature)

    def check_length(self, text: str) -> None:
        """Check that a text to explain has tokens, and not too many."""
        tokens = len(self._encode_texts([text])[0].tokens) - 1
        if not 1 <= tokens <= self._limits.max_tokens:
            raise HTTPError(
                400,
                f"text must have 1 to {self._limits.max_tokens} tokens on this server, got "
                f"{tokens}",
                param="text",
            )


def count_prompt_tokens(prompts: Sequence[EncodedPrompt]) -> int:
    """Return how many tokens a client has sent."""
    return sum(len(prompt.tokens) - prompt.hidden for prompt in prompts)
