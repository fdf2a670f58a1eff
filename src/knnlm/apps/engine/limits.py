"""How much work a server accepts: every limit, its default and its rule."""

from dataclasses import dataclass

from knnlm.errors import InvalidArgumentError
from knnlm.rules import LARGEST, check_real, check_whole


@dataclass(frozen=True, slots=True)
class Limits:
    """How much one request, and all requests together, may ask for.

    max_tokens: the most tokens that a completion may generate, or that a text to explain may have.
    max_batch: completions generated at once. max_queue: completions that may wait for a place in
    the batch. max_body_bytes: the size of a request. request_seconds: how long a request may take
    to arrive. grace_seconds: how long running completions may go on when the server is told to
    stop.

    Raises InvalidArgumentError.
    """

    max_tokens: int = 1024
    max_batch: int = 16
    max_queue: int = 256
    max_body_bytes: int = 1 << 20
    request_seconds: float = 30.0
    grace_seconds: float = 30.0

    def __post_init__(self) -> None:
        for name in ("max_tokens", "max_batch", "max_queue", "max_body_bytes"):
            check_whole(name, getattr(self, name), most=LARGEST)
        if not check_real("request_seconds", self.request_seconds) > 0.0:
            raise InvalidArgumentError(
                f"request_seconds must be positive, got {self.request_seconds}"
            )
        if not check_real("grace_seconds", self.grace_seconds) >= 0.0:
            raise InvalidArgumentError(
                f"grace_seconds must be at least 0, got {self.grace_seconds}: 0 ends at once"
            )
