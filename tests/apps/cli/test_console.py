"""The terminal primitives: amounts, JSON, and progress bars."""

import io
import json
import sys

import pytest

from knnlm.apps.cli.console import OUT, amount, prepare_streams, print_json
from knnlm.apps.cli.progress_bar import RichProgress
from knnlm.apps.cli.reports import new_table


def test_a_failure_leaves_no_half_drawn_bar(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        with RichProgress().task("work", 9, "steps") as advance:
            advance(1)
            raise ValueError("bad")

    with pytest.raises(ValueError, match="bad"):
        fail()
    assert capsys.readouterr() == ("", "")


def test_amounts() -> None:
    amounts = [amount(number, "bytes") for number in (0, 999, 1234, 5.5e6, 7e9, 3e12)]
    assert amounts == ["0", "999", "1.23 k", "5.5 M", "7 G", "3 T"]
    assert amount(1234567.8, "tokens") == "1,234,568"


def test_json_has_null_for_numbers_that_it_cannot_hold(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": [float("inf"), 1.5], "b": (float("nan"), {"c": float("-inf")}), "λ": 2})
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert json.loads(out) == {"a": [None, 1.5], "b": [None, {"c": None}], "λ": 2}


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "shift_jis", "utf-8"])
def test_tables_are_straight_in_every_encoding(
    monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding))
    prepare_streams()
    table = new_table("", "λ", left="λ")
    for text in ("a", "λ and T", "naïve", "🙂🙂", "ｱｲｳ", "\udce9"):
        table.add_row(text, OUT.render_str(text, style="bold"))
    OUT.print(table)
    sys.stdout.flush()
    lines = written.getvalue().decode(encoding).splitlines()
    assert len(lines) == 10
    assert len({OUT.render_str(line).cell_len for line in lines}) == 1
