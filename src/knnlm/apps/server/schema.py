"""What OpenAI's completions protocol looks like on the wire, and our own fields in it."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from knnlm.evaluation.explanation import Source

Text = Annotated[str, Field(max_length=1 << 20)]
TokenIds = Annotated[
    list[Annotated[int, Field(ge=0, lt=1 << 31)]], Field(min_length=1, fail_fast=True)
]
Prompt = (
    Text
    | Annotated[list[Text], Field(min_length=1, fail_fast=True)]
    | TokenIds
    | Annotated[list[TokenIds], Field(min_length=1, fail_fast=True)]
)
Neighbors = Annotated[int, Field(ge=1, le=1 << 31)]
Lmbda = Annotated[float, Field(ge=0.0, le=1.0)]
# beyond these, distances divided by it are no numbers in float32
KnnTemperature = Annotated[float, Field(ge=1e-30, le=1e30)]
StopText = Annotated[str, Field(min_length=1, max_length=1024)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str | None = Field(None, description="The served model's name, or nothing.")
    k: Neighbors | list[Neighbors] | None = Field(
        None, description="Neighbors that vote: one number, or one for each datastore."
    )
    lmbda: Lmbda | list[Lmbda] | None = Field(
        None, description="Weight λ of the neighbors: one number, or one for each datastore."
    )
    knn_temperature: KnnTemperature | list[KnnTemperature] | None = Field(
        None, description="T of exp(−d²/T): one number, or one for each datastore."
    )


class StreamOptions(BaseModel):
    """What a stream holds besides the text."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = Field(False, description="End with a chunk that counts the tokens.")


class CompletionRequest(_Request):
    """A prompt, or several, and how to continue them."""

    prompt: Prompt = Field(description="A text, token ids, or a list of texts or of token ids.")
    max_tokens: Annotated[int, Field(ge=0, le=1 << 31)] | None = Field(
        None, description="Tokens to generate at most; by default 16."
    )
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] | None = Field(
        None, description="Of sampling; 0 takes the likeliest token. By default 1."
    )
    top_p: Annotated[float, Field(ge=0.0, le=1.0)] | None = Field(
        None, description="Sample from the likeliest tokens that together have this probability."
    )
    n: Annotated[int, Field(ge=1, le=1024)] | None = Field(
        None, description="Continuations of every prompt; by default 1."
    )
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = Field(
        None, description="Texts before which the completion ends."
    )
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = Field(
        None, description="Makes sampling repeatable."
    )
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = Field(
        None, description="Log-probabilities of the tokens and of so many likely ones, in nats."
    )
    echo: bool | None = Field(None, description="Begin the text with the prompt.")
    stream: bool | None = Field(None, description="Send the text as it grows.")
    stream_options: StreamOptions | None = Field(None, description="With `stream` only.")
    user: str | None = Field(None, description="Ignored.")
    sources: bool | Annotated[int, Field(ge=0, le=64)] | None = Field(
        None,
        description="Name the strongest neighbors of each generated token: so many, or true for 3.",
    )
    # of the protocol, accepted where they change nothing
    best_of: Annotated[int, Field(ge=1, le=1024)] | None = Field(None, description="Not above n.")
    suffix: Literal[""] | None = Field(None, description="Not supported.")
    presence_penalty: Annotated[float, Field(ge=0.0, le=0.0)] | None = Field(
        None, description="Not supported."
    )
    frequency_penalty: Annotated[float, Field(ge=0.0, le=0.0)] | None = Field(
        None, description="Not supported."
    )
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = Field(
        None, description="Not supported."
    )

    @model_validator(mode="after")
    def _go_together(self) -> "CompletionRequest":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options goes with stream: true")
        if self.best_of is not None and self.best_of > (self.n or 1):
            raise ValueError("best_of must be at most n: the best of more is not chosen")
        return self


class ExplainRequest(_Request):
    """A text whose tokens are to be explained."""

    text: Text = Field(min_length=1, description="The text.")
    sources: Annotated[int, Field(ge=0, le=64)] = Field(
        3, description="Neighbors named for each token."
    )
    before: Annotated[int, Field(ge=0, le=1024)] = Field(
        24, description="Tokens of a passage before its value."
    )
    after: Annotated[int, Field(ge=0, le=1024)] = Field(8, description="Tokens after it.")


class LogProbs(BaseModel):
    """Of every token of a choice, in nats, under the mixture."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TokenExplanation(BaseModel):
    """What model and datastore gave to a token; log-probabilities in nats."""

    token: int
    text: str
    lm_log_prob: float
    knn_prob: float
    log_prob: float
    gain: float
    sources: list[Source]


class Choice(BaseModel):
    """One continuation, or the next piece of it in a stream."""

    index: int
    text: str
    logprobs: LogProbs | None = None
    finish_reason: Literal["stop", "length"] | None = None
    sources: list[TokenExplanation] | None = None


class Usage(BaseModel):
    """Tokens of the prompts and of all continuations."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionResponse(BaseModel):
    """An answer, or one chunk of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | None = None


class ModelInfo(BaseModel):
    """What is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "knnlm"


class ModelList(BaseModel):
    """All models: one."""

    object: Literal["list"] = "list"
    data: list[ModelInfo]


class ExplainResponse(BaseModel):
    """Every token of the text."""

    model: str
    tokens: list[TokenExplanation]


class Health(BaseModel):
    """ok; stopping, when nothing new is accepted; dead, when the model thread has failed."""

    status: Literal["ok", "stopping", "dead"]
    model: str
    entries: list[int]


class ErrorInfo(BaseModel):
    """What is wrong, as OpenAI says it."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """The answer to every request that is refused or fails."""

    error: ErrorInfo
