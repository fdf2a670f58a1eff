"""Every field of the JSON of OpenAI's chat completions, in requests and responses."""

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)
from pydantic_core import PydanticCustomError

from knnlm.apps.server.schema import (
    UNSUPPORTED,
    GenerationRequest,
    LogProb,
    Text,
    TokenExplanation,
    Usage,
)

_NOT_SUPPORTED: Any = Field(None, description="Not supported.")


def _only(*allowed: Any) -> BeforeValidator:
    """Refuse a field by its name, except for values that change nothing."""

    def check(value: Any) -> None:
        if value is not None and value not in allowed:
            raise PydanticCustomError(UNSUPPORTED, "not supported by this server: leave it out")

    return BeforeValidator(check)


class TextPart(BaseModel):
    """A part of a message's content."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: Text


def _check_parts(content: Any) -> Any:
    """Refuse images and the like by their name."""
    for part in content if isinstance(content, list) else ():
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise PydanticCustomError(
                UNSUPPORTED,
                "{kind} is not supported by this server: send text",
                {"kind": kind[:40]},
            )
    return content


def _check_role(role: Any) -> Any:
    if role in ("tool", "function"):
        raise PydanticCustomError(
            UNSUPPORTED, "messages of a {role} are not supported by this server", {"role": role}
        )
    return role


Role = Literal["system", "developer", "user", "assistant"]
Content = Text | Annotated[list[TextPart], Field(min_length=1, fail_fast=True)]


class ChatMessage(BaseModel):
    """What somebody has said; a developer counts as the system."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Annotated[Role, BeforeValidator(_check_role)]
    content: Annotated[Content, BeforeValidator(_check_parts)]
    # what an answer of the protocol has, and may be sent back with it
    name: Annotated[None, _only()] = _NOT_SUPPORTED
    refusal: Annotated[None, _only()] = _NOT_SUPPORTED
    annotations: Annotated[None, _only([])] = _NOT_SUPPORTED
    audio: Annotated[None, _only()] = _NOT_SUPPORTED
    tool_calls: Annotated[None, _only([])] = _NOT_SUPPORTED
    function_call: Annotated[None, _only()] = _NOT_SUPPORTED

    def plain(self) -> dict[str, str]:
        """Return the message as a chat template takes it."""
        content = self.content
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": content}


MaxTokens = Annotated[int, Field(ge=1, le=1 << 31)]


class ChatRequest(GenerationRequest):
    """A conversation, and how to answer it."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)] = Field(
        description="The conversation so far; the answer is the assistant's."
    )
    max_completion_tokens: MaxTokens | None = Field(
        None, description="The most tokens to generate; by default as many as there is room for."
    )
    max_tokens: MaxTokens | None = Field(None, description="The older name of the same.")
    logprobs: bool | None = Field(None, description="Report the tokens' log-probabilities.")
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = Field(
        None, description="And those of this many of the likeliest; with `logprobs` only."
    )
    # fields of the protocol that are accepted only where they change nothing
    tools: Annotated[None, _only([])] = _NOT_SUPPORTED
    tool_choice: Annotated[None, _only("none", "auto")] = _NOT_SUPPORTED
    parallel_tool_calls: Annotated[None, _only(True, False)] = Field(
        None, description="Without effect."
    )
    functions: Annotated[None, _only([])] = _NOT_SUPPORTED
    function_call: Annotated[None, _only("none", "auto")] = _NOT_SUPPORTED
    response_format: Annotated[None, _only({"type": "text"})] = _NOT_SUPPORTED
    modalities: Annotated[None, _only(["text"])] = _NOT_SUPPORTED
    audio: Annotated[None, _only()] = _NOT_SUPPORTED
    prediction: Annotated[None, _only()] = _NOT_SUPPORTED
    reasoning_effort: Annotated[None, _only("none")] = _NOT_SUPPORTED
    verbosity: Annotated[None, _only()] = _NOT_SUPPORTED
    web_search_options: Annotated[None, _only()] = _NOT_SUPPORTED
    moderation: Annotated[None, _only()] = _NOT_SUPPORTED
    store: Annotated[None, _only(False)] = _NOT_SUPPORTED
    service_tier: Annotated[None, _only("auto", "default")] = _NOT_SUPPORTED
    metadata: dict[str, str] | None = Field(None, description="Ignored.")
    safety_identifier: str | None = Field(None, description="Ignored.")
    prompt_cache_key: str | None = Field(None, description="Ignored.")

    @model_validator(mode="after")
    def _check_pairs(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs: true")
        if None not in (both := {self.max_tokens, self.max_completion_tokens}) and len(both) > 1:
            raise ValueError("max_tokens is the older name of max_completion_tokens: send one")
        return self

    @property
    def most_tokens(self) -> int | None:
        """The most tokens to generate, by either name."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def likeliest(self) -> int | None:
        """How many of the likeliest tokens to report; None for no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


class TokenLogProb(BaseModel):
    r"""A token and its log-probability, in nats; `bytes:\xe4` is a part of a character."""

    token: str
    logprob: LogProb
    bytes: list[int]


class ContentLogProb(TokenLogProb):
    """A token of an answer, and the likeliest in its place.

    token: what it adds to the content; a character belongs to the token that completes it.
    """

    top_logprobs: list[TokenLogProb]


class ChatLogProbs(BaseModel):
    """Log-probabilities of every token of an answer under the mixture."""

    content: list[ContentLogProb]
    refusal: None = None


class Answer(BaseModel):
    """What the assistant says."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


FinishReason = Literal["stop", "length"]


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: Answer
    logprobs: ChatLogProbs | None = None
    finish_reason: FinishReason
    sources: list[TokenExplanation] | None = None


class ChunkChoice(BaseModel):
    """The next piece of an answer: in its delta the role, then more content, at the end nothing."""

    index: int
    delta: dict[Literal["role", "content"], str]
    logprobs: ChatLogProbs | None = None
    finish_reason: FinishReason | None = None
    sources: list[TokenExplanation] | None = None


class ChatResponse(BaseModel):
    """Whole answers."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChatChunk(BaseModel):
    """One chunk of a stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
