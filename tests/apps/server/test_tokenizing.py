"""Tokens of texts of any size, and the patience of those who wait for theirs."""

import asyncio
import random
import time

from conftest import PROSE, byte_tokenizer

from knnlm.apps.server.tokenizing import Tokenizing
from knnlm.model.language_model import tokenize

PIECES = ["a", " ", "\n", "x y", "🙂", "日本", PROSE, "<s>", "\t\r\n", "naïve "]


def test_tokens_are_those_of_the_whole_text_or_too_many() -> None:
    tokenizer = byte_tokenizer()
    tokenizing = Tokenizing(tokenizer)
    chosen = random.Random(0)
    refused = 0
    for _ in range(60):
        size = chosen.choice([0, 5, 1000, 16384, 16385, 40_000, 90_000])
        parts = chosen.sample(PIECES, 3)
        text = ""
        while len(text) < size:
            text += chosen.choice(parts)
        whole = tokenize(tokenizer, [text])[0]
        most = chosen.choice([1, 100, 20_000, 10**6])
        found = asyncio.run(tokenizing.encode(text, most))
        if found is None:
            refused += 1
            assert len(whole) > most
        else:
            assert found == whole
    assert refused > 5


def test_a_short_text_does_not_wait_for_long_ones() -> None:
    async def wait() -> tuple[float, float]:
        tokenizing = Tokenizing(byte_tokenizer())
        long_ones = [
            asyncio.create_task(tokenizing.encode("ab " * 300_000, 10**7)) for _ in range(4)
        ]
        await asyncio.sleep(0.05)
        started = time.monotonic()
        assert await tokenizing.encode("The nearest", 100)
        short = time.monotonic() - started
        leaving, *staying = long_ones
        leaving.cancel()
        await asyncio.gather(*staying)
        return short, time.monotonic() - started

    short, long = asyncio.run(wait())
    assert short < max(0.5, long / 3)
