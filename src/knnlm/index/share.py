"""A share of an index: one of several equal parts that together hold all of its entries."""

from dataclasses import dataclass

from knnlm.rules import check_whole


@dataclass(frozen=True, slots=True)
class Share:
    """Share `number`, counted from 0, of an index that is divided into `of` shares.

    Raises InvalidArgumentError.
    """

    number: int
    of: int

    def __post_init__(self) -> None:
        check_whole("shares", self.of)
        check_whole("share", self.number, least=0, most=self.of - 1)

    @property
    def is_last(self) -> bool:
        """Whether no share comes after it."""
        return self.number == self.of - 1

    def edges(self, total: int) -> tuple[int, int]:
        """Return the first of its numbers among 0 … total − 1, and one past its last."""
        return total * self.number // self.of, total * (self.number + 1) // self.of
