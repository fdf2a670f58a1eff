"""Small datastores: their texts, what must be equal however they came to be, the disk they fill."""

import hashlib
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import PROSE, byte_tokenizer, tiny_llama
from torch import Tensor

from knnlm.datastore.datastore import Datastore
from knnlm.model.language_model import LanguageModel
from knnlm.text.documents import Document


def distinct_documents(count: int) -> list[Document]:
    """Return documents d0, d1, … of one to three paragraphs, no two of which are alike."""
    return [
        Document(f"d{n}", f"{n} and {n * n}: {PROSE[3 * n % 97 :]}" + PROSE * (n % 3))
        for n in range(count)
    ]


def model_with_keys_times(factor: float) -> LanguageModel:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[-1].post_attention_layernorm.weight.mul_(factor)
    return LanguageModel(model, byte_tokenizer(), name="broken")


def stored_keys(store: Datastore) -> Tensor:
    return torch.cat([block for _, block in store.key_blocks(1 << 20)])


def slow_knn_probs(
    lm: LanguageModel, store: Datastore, tokens: Tensor, k: int, temperature: float
) -> Tensor:
    """p_kNN of every next token in float64, entry by entry, from brute-force distances."""
    keys, alive = stored_keys(store).double(), store.alive
    probs = torch.zeros(*tokens.shape, lm.vocab_size, dtype=torch.float64)
    queries = lm.keys(tokens).double()
    for row in range(tokens.shape[0]):
        for position in range(tokens.shape[1]):
            squared = (keys - queries[row, position]).square().sum(dim=1)
            squared[~alive] = torch.inf
            nearest, rows = squared.topk(min(k, int(alive.sum())), largest=False)
            weights = torch.softmax(-nearest / temperature, dim=0)
            for weight, entry in zip(weights, rows.tolist(), strict=True):
                probs[row, position, int(store.values[entry])] += weight
    return probs


def contents(store: Datastore) -> tuple[Tensor, Tensor, list[tuple[str, int, int, int]]]:
    """All that must not depend on how a datastore came to be."""
    documents = [(d.name, d.start, d.stop, d.tokens) for d in store.documents()]
    return stored_keys(store), store.values, documents


def assert_same(one: Datastore, other: Datastore) -> None:
    (keys, values, documents), (keys2, values2, documents2) = contents(one), contents(other)
    assert documents == documents2
    assert torch.equal(values, values2)
    assert torch.equal(keys, keys2)


class SmallDisk:
    """A file system of its own, of a size that a test chooses."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def resize(self, kibibytes: int) -> None:
        _mount("-o", f"remount,size={kibibytes}k", str(self.path))

    def make_read_only(self) -> None:
        _mount("-o", "remount,ro", str(self.path))

    def fill(self) -> Path:
        """Leave no free byte; returns the file to delete afterwards."""
        filler = self.path / "filler"
        with filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(1024))
            except OSError:
                return filler


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


@contextmanager
def small_disk(path: Path, kibibytes: int) -> Iterator[SmallDisk]:
    """Mount a disk; skips the test where that is not allowed."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    path.mkdir()
    try:
        _mount("-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs", str(path))
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this machine does not let root mount a tmpfs")
    try:
        yield SmallDisk(path)
    finally:
        # lazily: tensors may still be mapped from its files
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def snapshot(folder: Path) -> dict[str, str]:
    """Return the digest of every file below a folder, by its path."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "folder"
        for path in folder.rglob("*")
    }


def is_progress(line: str) -> bool:
    """A bar, or the unit of its rate where the line was too long for both."""
    return "━" in line or re.fullmatch(r"(\w+/s)?", line.strip()) is not None
