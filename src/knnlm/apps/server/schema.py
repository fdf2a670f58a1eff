"""Every field of the JSON in requests and responses: OpenAI's completions, and our own."""

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from knnlm.evaluation.explanation import Source
from knnlm.rules import (
    check_frequency_penalty,
    check_k,
    check_lmbda,
    check_logit_bias,
    check_min_p,
    check_presence_penalty,
    check_repetition_penalty,
    check_sampling_temperature,
    check_seed,
    check_temperature,
    check_top_k,
    check_top_p,
)

UNSUPPORTED = "unsupported_parameter"
"""The code of an error about something that the protocol has and this server does not."""
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
# Rules are the library's; the protocol and this server add some that are narrower.
Neighbors = Annotated[int, AfterValidator(check_k)]
Lmbda = Annotated[float, AfterValidator(check_lmbda)]
KnnTemperature = Annotated[float, AfterValidator(check_temperature)]
Bias = Annotated[float, AfterValidator(check_logit_bias)]
SamplingTemperature = Annotated[float, Field(le=2.0), AfterValidator(check_sampling_temperature)]
TokenId = Annotated[str, Field(pattern="^(0|[1-9][0-9]{0,9})$")]  # a name in JSON is a text
LEAST_LOG_PROB = -9999.0
LogProb = Annotated[
    float, AfterValidator(lambda nats: max(nats, LEAST_LOG_PROB))
]  # no −inf in JSON
StopText = Annotated[str, Field(min_length=1, max_length=1024)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str | None = Field(None, description="The served model's name; may be left out.")
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
    """What to send in a stream besides the text."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = Field(False, description="End with a chunk that counts the tokens.")


class GenerationRequest(_Request):
    """How tokens are generated, and what is told of them: the same after a prompt and in a chat."""

    temperature: SamplingTemperature | None = Field(
        None, description="Sampling temperature; 0 takes the likeliest token. By default 1."
    )
    top_p: Annotated[float, AfterValidator(check_top_p)] | None = Field(
        None, description="Sample from the likeliest tokens that together have this probability."
    )
    top_k: Annotated[int, AfterValidator(check_top_k)] | None = Field(
        None, description="Sample from this many of the likeliest tokens; 0 for all."
    )
    min_p: Annotated[float, AfterValidator(check_min_p)] | None = Field(
        None,
        description="Sample from the tokens at least this many times as likely as the likeliest.",
    )
    presence_penalty: Annotated[float, AfterValidator(check_presence_penalty)] | None = Field(
        None, description="Subtracted from the log-probabilities of tokens generated before."
    )
    frequency_penalty: Annotated[float, AfterValidator(check_frequency_penalty)] | None = Field(
        None, description="The same, as often as they were generated."
    )
    repetition_penalty: Annotated[float, AfterValidator(check_repetition_penalty)] | None = Field(
        None,
        description="Multiplies the log-probabilities of tokens generated before or in the prompt.",
    )
    logit_bias: Annotated[dict[TokenId, Bias], Field(max_length=1 << 14)] | None = Field(
        None, description="Added to the log-probabilities of tokens, by token id."
    )
    n: Annotated[int, Field(ge=1, le=1024)] | None = Field(
        None, description="Continuations for each prompt; by default 1."
    )
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = Field(
        None, description="Texts before which the completion ends."
    )
    seed: Annotated[int, AfterValidator(check_seed)] | None = Field(
        None, description="Makes sampling repeatable."
    )
    stream: bool | None = Field(None, description="Send the text as it grows.")
    stream_options: StreamOptions | None = Field(None, description="With `stream` only.")
    user: str | None = Field(None, description="Ignored.")
    sources: bool | Annotated[int, Field(ge=0, le=64)] | None = Field(
        None, description="How many neighbors to name for each generated token; true for 3."
    )

    @model_validator(mode="after")
    def _check_stream_options(self) -> "GenerationRequest":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options goes with stream: true")
        return self

    @property
    def samples(self) -> int:
        """How many continuations of each prompt."""
        return 1 if self.n is None else self.n

    @property
    def likeliest(self) -> int | None:
        """How many of the likeliest tokens to report; None for no log-probabilities."""
        raise NotImplementedError

    @property
    def echoes(self) -> bool:
        """Whether the text begins with the prompt."""
        return False


class CompletionRequest(GenerationRequest):
    """A prompt, or several, and how to continue them."""

    prompt: Prompt = Field(description="A text, token ids, or a list of texts or of token ids.")
    max_tokens: Annotated[int, Field(ge=0, le=1 << 31)] | None = Field(
        None, description="The most tokens to generate; by default 16."
    )
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = Field(
        None,
        description="Log-probabilities, in nats, of the tokens and of this many of the likeliest.",
    )
    echo: bool | None = Field(None, description="Begin the text with the prompt.")
    # fields of the protocol that are accepted only where they change nothing
    best_of: Annotated[int, Field(ge=1, le=1024)] | None = Field(None, description="Not above n.")
    suffix: Literal[""] | None = Field(None, description="Not supported.")

    @model_validator(mode="after")
    def _check_best_of(self) -> "CompletionRequest":
        if self.best_of is not None and self.best_of > self.samples:
            raise ValueError("best_of must be at most n: the best of more is not chosen")
        return self

    @property
    def likeliest(self) -> int | None:
        """How many of the likeliest tokens to report; None for no log-probabilities."""
        return self.logprobs

    @property
    def echoes(self) -> bool:
        """Whether the text begins with the prompt."""
        return bool(self.echo)


class ExplainRequest(_Request):
    """A text whose tokens are to be explained."""

    text: Text = Field(min_length=1, description="The text.")
    sources: Annotated[int, Field(ge=0, le=64)] = Field(
        3, description="How many neighbors to name for each token."
    )
    before: Annotated[int, Field(ge=0, le=1024)] = Field(
        24, description="Tokens to show before a neighbor's value."
    )
    after: Annotated[int, Field(ge=0, le=1024)] = Field(8, description="Tokens to show after it.")


class LogProbs(BaseModel):
    r"""Log-probabilities, in nats, of every token of a choice under the mixture.

    tokens: what each adds to the text; a character belongs to the token that completes it. bytes:
    of each token, a part of a character's too. top_logprobs: by the tokens' texts, `bytes:\xe4` for
    a part of a character, and `token_id:7` for the less likely of tokens with the same text.
    """

    tokens: list[str]
    bytes: list[list[int]]
    token_logprobs: list[LogProb | None]
    top_logprobs: list[dict[str, LogProb] | None]
    text_offset: list[int]


class TokenExplanation(BaseModel):
    """A token's probabilities and strongest neighbors; log-probabilities in nats."""

    token: int
    text: str
    lm_log_prob: float
    knn_prob: float
    log_prob: float
    gain: float
    sources: list[Source]


class Choice(BaseModel):
    """One continuation, or the next piece of it in a stream.

    coverage: the share of the datastores' entries that were searched for it so far; below 1 only
    where the server was started with partial coverage and a part of a cluster was late.
    """

    index: int
    text: str
    logprobs: LogProbs | None = None
    finish_reason: Literal["stop", "length"] | None = None
    sources: list[TokenExplanation] | None = None
    coverage: float = 1.0


class Usage(BaseModel):
    """Numbers of tokens in the prompts and in all continuations."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionResponse(BaseModel):
    """A whole response, or one chunk of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | None = None


class ModelInfo(BaseModel):
    """The served model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "knnlm"


class ModelList(BaseModel):
    """All models: the only one."""

    object: Literal["list"] = "list"
    data: list[ModelInfo]


class ExplainResponse(BaseModel):
    """The explanation of every token of a text."""

    model: str
    tokens: list[TokenExplanation]


class Health(BaseModel):
    """ok; stopping: new requests are refused; dead: the model thread has failed.

    degraded: a datastore has changed and cannot be opened; requests are answered from its last
    state. entries: of each datastore, as the next request sees it.
    """

    status: Literal["ok", "degraded", "stopping", "dead"]
    model: str
    entries: list[int]


class ErrorInfo(BaseModel):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """The response to every request that is refused or fails."""

    error: ErrorInfo
