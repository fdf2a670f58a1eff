"""The frame of every experiment: arguments, cached work, results and a picture.

`--work` caches datastores, the model's predictions of held-out text, and neighbors, each under a
digest of its inputs, so that experiments share them and a second run takes seconds.
"""

import argparse
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import HeldOut
from safetensors.torch import load_file, save_file
from texts import DOMAINS, Domain
from torch import Tensor

import knnlm
from knnlm.apps.cli.progress_bar import RichProgress
from knnlm.datastore.datastore import Datastore
from knnlm.index.exact import ExactIndex
from knnlm.index.protocol import Neighbors
from knnlm.mixture.interpolation import Voters
from knnlm.mixture.lm_summary import LMSummary
from knnlm.mixture.rows import join
from knnlm.model.language_model import LanguageModel
from knnlm.model.reading import cut_documents, read_scores
from knnlm.provenance import write_results
from knnlm.text.documents import Documents
from knnlm.text.windows import Window, Windowing

MAX_K = 1024
RESULTS = Path(__file__).parent / "results"


class Experiment:
    """An experiment's command line, and the work it shares with other experiments."""

    def __init__(
        self,
        docstring: str,
        argv: Sequence[str] | None,
        valid_tokens: int = 16_384,
        test_tokens: int = 73_728,
    ) -> None:
        self.parser = argparse.ArgumentParser(description=docstring.splitlines()[0])
        add = self.parser.add_argument
        add("--model", required=True, help="hub name, folder or .gguf file")
        add("--work", type=Path, required=True, help="folder for datastores and neighbors")
        for split in ("train", "valid", "test"):
            add(f"--{split}", nargs="+", help="files, folders, globs or hf:NAME[:CONFIG][:SPLIT]")
        add("--domains", nargs="+", choices=DOMAINS, default=list(DOMAINS))
        add("--text-column", default="text")
        add("--entries", type=int, help="maximum entries of a datastore")
        add("--valid-tokens", type=int, default=valid_tokens)
        add("--test-tokens", type=int, default=test_tokens)
        add("--paper-protocol", action="store_true", help="build 1536/1536, score 512 after 2560")
        add("--results", type=Path, default=RESULTS)
        self.add_argument = add
        self._argv = argv

    @cached_property
    def arguments(self) -> argparse.Namespace:
        """The command line."""
        return self.parser.parse_args(self._argv)

    @property
    def work(self) -> Path:
        """The folder of all cached work."""
        work: Path = self.arguments.work
        return work

    @cached_property
    def lm(self) -> LanguageModel:
        """The language model."""
        return LanguageModel.load(self.arguments.model)

    @cached_property
    def progress(self) -> RichProgress:
        """Progress bars in the terminal."""
        return RichProgress()

    @property
    def built(self) -> Windowing:
        """How the text of a datastore is cut into windows."""
        paper = self.arguments.paper_protocol
        return Windowing(3072, 1536, "stream") if paper else Windowing(self._window, 0, "stream")

    @property
    def scored(self) -> Windowing:
        """How held-out text is cut into windows."""
        return Windowing(3072, 2560, "stream") if self.arguments.paper_protocol else self.built

    @property
    def _window(self) -> int:
        return min(1024, self.lm.max_window or 1024)

    @cached_property
    def domain(self) -> Domain:
        """The collection under test: the given one, else Python's reference."""
        given = self.arguments
        if given.train is None:
            return self.domain_named("Python")
        if given.valid is None or given.test is None:
            self.parser.error("--train must come with --valid and --test: text to tune and test on")
        return Domain("given", given.train, given.valid, given.test, given.entries)

    @property
    def domains(self) -> list[Domain]:
        """The given collection, else the three default ones."""
        if self.arguments.train is not None:
            return [self.domain]
        return [self.domain_named(name) for name in self.arguments.domains]

    def domain_named(self, name: str) -> Domain:
        """Return one of the three default collections."""
        domain = DOMAINS[name](self.work)
        return replace(domain, entries=self.arguments.entries or domain.entries)

    def store(self, domain: Domain | None = None, lm: LanguageModel | None = None) -> Datastore:
        """Build a domain's datastore, or resume an interrupted build, or open a finished one."""
        domain, lm = domain or self.domain, lm or self.lm
        documents = self.documents(domain.train)
        digest = self._digest(lm, documents, self.built, domain.entries)
        path, complete = self.work / f"{digest}.store", self.work / f"{digest}.complete"
        if complete.exists():
            return Datastore(path)
        self.work.mkdir(parents=True, exist_ok=True)
        store = knnlm.build(
            path,
            lm,
            documents,
            **asdict(self.built),
            max_entries=domain.entries,
            progress=self.progress,
        )
        complete.write_text(f"{domain.name}, {store.rows} entries\n", encoding="utf-8")
        return store

    def valid(self, domain: Domain | None = None, lm: LanguageModel | None = None) -> HeldOut:
        """Return the model's predictions of the text to tune on."""
        sources = (domain or self.domain).valid
        return self._read(sources, self.arguments.valid_tokens, lm or self.lm)

    def test(self, domain: Domain | None = None, lm: LanguageModel | None = None) -> HeldOut:
        """Return the model's predictions of the text to measure on."""
        sources = (domain or self.domain).test
        return self._read(sources, self.arguments.test_tokens, lm or self.lm)

    def windows(
        self,
        sources: Sequence[str],
        tokens: int,
        windowing: Windowing | None = None,
        lm: LanguageModel | None = None,
    ) -> list[Window]:
        """Cut the first tokens of a text into windows; by default those of a datastore."""
        documents = self.documents(sources)
        return list(cut_documents(lm or self.lm, documents, windowing or self.built, tokens))

    def documents(self, sources: Sequence[str]) -> Documents:
        """Return the documents of a text."""
        return knnlm.read_documents(*sources, text_column=self.arguments.text_column)

    def _digest(
        self, lm: LanguageModel, documents: Documents, windowing: Windowing, tokens: int | None
    ) -> str:
        texts = [document.fingerprint() for document in documents]
        return digest_of(lm.weights_fingerprint, lm.key, texts, asdict(windowing), tokens)

    def _read(self, sources: Sequence[str], tokens: int, lm: LanguageModel) -> HeldOut:
        documents = self.documents(sources)
        digest = self._digest(lm, documents, self.scored, tokens)
        digest = digest_of(digest, LMSummary._fields)  # what an older version kept lacks some
        tensors = self.kept(digest, lambda: self._score(documents, tokens, lm))
        ends = (tensors["targets"] == lm.start_token).nonzero()[:, 0].tolist()
        # every document except the first begins with a start token
        parts = np.split(tensors["targets"].numpy(), ends)
        texts = [lm.decode(part[i > 0 :]) for i, part in enumerate(parts)]
        summary = LMSummary(*(tensors.pop(name) for name in LMSummary._fields))
        return HeldOut(
            **tensors,
            lm=summary,
            words=sum(len(text.split()) for text in texts),
            size_bytes=sum(len(text.encode()) for text in texts),
            digest=digest,
        )

    def _score(self, documents: Documents, tokens: int, lm: LanguageModel) -> dict[str, Tensor]:
        windows = list(cut_documents(lm, documents, self.scored, tokens))
        parts = []
        with self.progress.task("read", sum(w.new for w in windows), "tokens") as advance:
            for scores in read_scores(lm, windows, summarize=True):
                parts.append(scores)
                advance(windows[scores.number].new)
        parts.sort(key=lambda scores: scores.number)
        summary = join([part.summary for part in parts if part.summary is not None])
        spans = [span for window in windows for span in window.spans]
        columns = {
            "keys": torch.cat([part.keys for part in parts]),
            "inputs": torch.from_numpy(np.concatenate([w.inputs[w.context :] for w in windows])),
            "targets": torch.from_numpy(np.concatenate([w.targets for w in windows])),
            "lm_log_probs": torch.cat([part.log_probs for part in parts]),
            "documents": torch.tensor([s.document for s in spans]).repeat_interleave(
                torch.tensor([s.count for s in spans])
            ),
            **summary._asdict(),
        }
        return {name: column.cpu().contiguous() for name, column in columns.items()}

    def voters(self, store: Datastore, held_out: HeldOut, kept_rows: int | None = None) -> Voters:
        """Return the 1,024 nearest entries of each token as voters; see `neighbors`."""
        found = self.neighbors(store, held_out, kept_rows)
        tokens = store.values[found.rows.clamp_min(0)].masked_fill(~found.present, -1)
        return Voters(found.squared_distances, tokens)

    def neighbors(
        self, store: Datastore, held_out: HeldOut, kept_rows: int | None = None
    ) -> Neighbors:
        """Return the 1,024 nearest entries of each token, by exact search.

        kept_rows: search only this many entries, the first ones.
        """

        def search() -> dict[str, Tensor]:
            view = store if kept_rows is None else FirstRows(store.path, kept_rows)
            index = ExactIndex(view, str(self.lm.device))
            found = [
                index.search(queries.to(self.lm.device), min(MAX_K, len(view)))
                for queries in self.progress_over(torch.split(held_out.keys, 1024), "search")
            ]
            rows = torch.cat([part.rows for part in found]).cpu()
            distances = torch.cat([part.squared_distances for part in found]).cpu()
            return {"squared_distances": distances, "rows": rows.to(torch.int32)}

        digest = digest_of(store.path.name, store.rows, held_out.digest, kept_rows)
        found = self.kept(digest, search)
        return Neighbors(found["squared_distances"], found["rows"].long())

    def progress_over(self, parts: Sequence[Tensor], description: str) -> Iterator[Tensor]:
        """Yield tensors and report the rows done as progress."""
        with self.progress.task(description, sum(map(len, parts)), "tokens") as advance:
            for part in parts:
                yield part
                advance(len(part))

    def kept(self, digest: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return the tensors cached under a digest; make them if there are none."""
        path = self.work / "kept" / f"{digest}.safetensors"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = path.with_suffix(".aside")
            save_file(make(), aside)
            aside.rename(path)
        return load_file(path)

    def write(self, name: str, results: dict[str, Any]) -> None:
        """Write `results/NAME.json` with its provenance."""
        given = self.arguments
        setting = {
            "model": given.model,
            "windows_built": asdict(self.built),
            "windows_scored": asdict(self.scored),
            "valid_tokens": given.valid_tokens,
            "test_tokens": given.test_tokens,
        }
        write_results(given.results / f"{name}.json", {"setting": setting, **results})

    @contextmanager
    def picture(self, name: str, panels: int = 1) -> Iterator[list[Any]]:
        """Draw `results/NAME.png` on panels side by side."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # draws without a display
        from matplotlib.figure import Figure

        figure = Figure(figsize=(max(6.4, 4.4 * panels), 3.8), layout="constrained")
        FigureCanvasAgg(figure)
        axes = list(figure.subplots(1, panels, squeeze=False)[0])
        yield axes
        for panel in axes:
            panel.spines[["top", "right"]].set_visible(False)
            panel.grid(visible=True, color="#e5e7e9", linewidth=0.7)
            panel.set_axisbelow(True)
            if panel.get_legend_handles_labels()[0]:
                below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.15)}
                panel.legend(fontsize=8, frameon=False, ncols=2, **below)
        figure.savefig(self.arguments.results / f"{name}.png", dpi=110)


class FirstRows(Datastore):
    """A view of a datastore's first rows."""

    def __init__(self, path: Path, kept_rows: int) -> None:
        self._kept_rows = kept_rows
        super().__init__(path)

    def refresh(self) -> bool:
        """Update to what other writers have committed, among the first rows."""
        changed = super().refresh()
        self.rows = min(self.rows, self._kept_rows)
        return changed

    def key_blocks(self, max_rows: int, first_row: int = 0) -> Iterator[tuple[int, Tensor]]:
        """Yield (first row, keys) for each block of the first rows."""
        for start, keys in super().key_blocks(max_rows, first_row):
            if start >= self.rows:
                return
            yield start, keys[: self.rows - start]


def digest_of(*made_of: Any) -> str:
    """Return a digest of plain values, which names what is made from them."""
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]
