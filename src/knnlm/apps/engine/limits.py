"""How much the server takes on."""

from dataclasses import dataclass

from knnlm.errors import InvalidArgumentError


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request, and all of them together, may ask for.

    max_tokens: tokens that a completion may generate, and of a text to explain. max_batch:
    completions generated at once. max_queue: completions waiting for a place. max_body_bytes: of a
    request. request_seconds: in which a request must have arrived whole. grace_seconds: that
    running completions get when the server is told to stop.

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
            if getattr(self, name) < 1:
                raise InvalidArgumentError(
                    f"{name} must be at least 1, got {getattr(self, name)}: choose a larger one"
                )
        if not self.request_seconds > 0.0:
            raise InvalidArgumentError(
                f"request_seconds must be positive, got {self.request_seconds}"
            )
        if not self.grace_seconds >= 0.0:
            raise InvalidArgumentError(
                f"grace_seconds must be at least 0, got {self.grace_seconds}: 0 ends at once"
            )
