"""How much work a server accepts: every limit, its default and its rule."""

from dataclasses import dataclass, fields

from knnlm.errors import InvalidArgumentError
from knnlm.rules import LARGEST, check_real, check_whole


@dataclass(frozen=True, slots=True)
class Limits:
    """How much one request, and all requests together, may ask for.

    max_tokens: the most tokens that a completion may generate, or that a text to explain may have.
    max_batch: completions generated at once; a quarter more if they are short. max_queue:
    completions that may wait for a place in the batch. max_body_bytes: the size of a request.
    max_answer_bytes: the size of an answer, estimated from what is asked for. max_k: the neighbors
    of one position that a request may ask for. max_positions: for a prompt and its completion, of a
    model that has no limit of its own. request_seconds: how long a request may take to arrive.
    grace_seconds: how long running completions may go on when the server is told to stop.

    Raises InvalidArgumentError.
    """

    max_tokens: int = 1024
    max_batch: int = 16
    max_queue: int = 256
    max_body_bytes: int = 1 << 20
    max_answer_bytes: int = 1 << 24
    max_k: int = 4096
    max_positions: int = 1 << 15
    request_seconds: float = 30.0
    grace_seconds: float = 30.0

    def __post_init__(self) -> None:
        for limit in fields(self):
            if limit.name.startswith("max_"):
                check_whole(limit.name, getattr(self, limit.name), most=LARGEST)
        if not check_real("request_seconds", self.request_seconds) > 0.0:
            raise InvalidArgumentError(
                f"request_seconds must be positive, got {self.request_seconds}"
            )
        if not check_real("grace_seconds", self.grace_seconds) >= 0.0:
            raise InvalidArgumentError(
                f"grace_seconds must be at least 0, got {self.grace_seconds}: 0 ends at once"
            )
