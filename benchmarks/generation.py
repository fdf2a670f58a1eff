"""The time of generating with a datastore, with drafts and without, against the LM alone.

    python benchmarks/generation.py STORE TEXT… --code STORE TEXT… --other TEXT…

One process generates from the same prompts (pieces of the texts) with the same model,
alternately alone and with the datastore attached, always the same number of tokens. TEXT are
held-out texts of STORE's kind: one sequence and eight at once, greedily, and sampled at temperature
1. --code takes another datastore with held-out texts of its kind, --other texts of a kind that
STORE does not hold. Each ratio divides a run by the mean of the runs alone before and after it;
reported are the median over all repetitions, its standard error (by a bootstrap) and the quartiles.
Last, the server's engine generates for eight clients at once, with drafts and without.

The model runs where `--device` says, on a GPU if there is one; the script was never run on a GPU.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import knnlm
from knnlm.apps.engine.jobs import Completion, Overrides
from knnlm.apps.engine.metrics import Metrics
from knnlm.apps.engine.sampling import SamplingOptions
from knnlm.apps.engine.worker import Worker
from knnlm.index.report import describe_index
from knnlm.provenance import write_results

RESULTS = Path(__file__).parent / "results" / "generation.json"
CLIENTS = 8
PIECES, PIECE_STRIDE = 4, 1000  # of each text, and tokens from one to the next


class Prompts:
    """Pieces of texts, in rotation: their beginnings, then pieces from further on."""

    def __init__(self, lm: knnlm.LanguageModel, texts: list[str], length: int) -> None:
        documents = [
            lm.encode(["".join(document.blocks())])[0].tolist()
            for document in knnlm.read_documents(*texts)
        ]
        pieces = [
            tokens[start : start + length - 1]
            for start in range(0, PIECES * PIECE_STRIDE, PIECE_STRIDE)
            for tokens in documents
        ]
        self._prompts = [[lm.start_token, *own] for own in pieces if len(own) == length - 1]

    def batches(self, size: int) -> Iterator[list[list[int]]]:
        """Yield batches of prompts without end; a batch may hold a prompt twice."""
        prompts = itertools.cycle(self._prompts)
        while True:
            yield list(itertools.islice(prompts, size))


class Generation:
    """Measures a model with one datastore against the model alone."""

    def __init__(self, lm: knnlm.LanguageModel, store: Path, arguments: argparse.Namespace) -> None:
        self.lm, self.store, self.arguments = lm, knnlm.Datastore(store), arguments

    def seconds_per_step(self, batch: list[list[int]], **options: Any) -> float:
        """Return the time per new token of each sequence."""
        inputs = torch.tensor(batch, device=self.lm.device)
        count = self.arguments.new_tokens
        torch.manual_seed(0)
        started = time.perf_counter()
        output = self.lm.model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            min_new_tokens=count,
            max_new_tokens=count,
            pad_token_id=self.lm.start_token,
            **options,
        )
        output = output.cpu()
        seconds = time.perf_counter() - started
        assert output.shape[1] == inputs.shape[1] + count
        return seconds / int(count)

    def ways(self) -> dict[str, tuple[dict[str, Any], bool]]:
        """Return the mixtures to measure: fixed weights, and learned ones where they are tuned."""
        ways = {}
        for k in self.arguments.k:
            ways[f"k {k}"] = {"k": k}
        if self.store.is_learned:
            ways["learned"] = {}
        return {
            f"{name}, {'with' if drafts else 'no'} drafts": (given, drafts)
            for name, given in ways.items()
            for drafts in (False, True)
        }

    def measure(
        self, name: str, prompts: Prompts, size: int = 1, **options: Any
    ) -> list[dict[str, Any]]:
        """Measure every way on one set of prompts, and print it."""
        options = {"do_sample": False} | options
        batches = prompts.batches(size)
        ways = self.ways()
        runs: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
        for repetition in range(self.arguments.repetitions + 1):
            batch = next(batches)
            before = self.seconds_per_step(batch, **options)
            for way, (given, drafts) in ways.items():
                with knnlm.attach(self.lm.model, self.store, **given) as attachment:
                    loop = {"custom_generate": attachment.with_drafts} if drafts else {}
                    attached = self.seconds_per_step(batch, **options, **loop)
                after = self.seconds_per_step(batch, **options)
                if repetition > 0:  # the first compiles and reads the index into memory
                    runs[way].append(((before + after) / 2, attached))
                before = after
        return [self._report(name, way, size, pairs) for way, pairs in runs.items()]

    def _report(
        self, name: str, way: str, size: int, pairs: list[tuple[float, float]]
    ) -> dict[str, Any]:
        ratios = [attached / alone for alone, attached in pairs]
        low, _, high = statistics.quantiles(ratios, n=4)
        one = {
            "prompts": name,
            "way": way,
            "entries": len(self.store),
            "batch": size,
            "ratio": statistics.median(ratios),
            "ratio_error": error_of_median(ratios),
            "quartiles": [low, high],
            "alone_milliseconds": statistics.median(alone for alone, _ in pairs) * 1e3,
            "attached_milliseconds": statistics.median(own for _, own in pairs) * 1e3,
        }
        print(
            f"{name}, batch {size}, {way}: {one['alone_milliseconds']:.2f} ms a token alone, "
            f"{one['attached_milliseconds']:.2f} attached: {one['ratio']:.3f}× "
            f"± {one['ratio_error']:.3f} ({low:.3f}–{high:.3f})",
            flush=True,
        )
        return one

    def serve(self, name: str, prompts: Prompts) -> dict[str, Any]:
        """Measure the tokens a second of eight clients of the server's engine."""
        model = knnlm.KNNLM(self.lm, self.store)
        batches = prompts.batches(CLIENTS)
        rates: dict[bool, list[float]] = {False: [], True: []}
        workers = {drafts: Worker(model, Metrics(), drafts) for drafts in rates}
        for repetition in range(self.arguments.repetitions + 1):
            batch = next(batches)
            for drafts, worker in workers.items():
                rate = self._tokens_per_second(worker, batch)
                if repetition > 0:
                    rates[drafts].append(rate)
        for worker in workers.values():
            worker.close()
        gains = [with_ / without for without, with_ in zip(*rates.values(), strict=True)]
        one = {
            "prompts": name,
            "clients": CLIENTS,
            "tokens_per_second": {
                "no drafts": statistics.median(rates[False]),
                "with drafts": statistics.median(rates[True]),
            },
            "gain": statistics.median(gains),
            "gain_error": error_of_median(gains),
        }
        print(
            f"{name}, {CLIENTS} clients: {statistics.median(rates[False]):.1f} tokens/s without "
            f"drafts, {statistics.median(rates[True]):.1f} with: {one['gain']:.3f}× "
            f"± {one['gain_error']:.3f}",
            flush=True,
        )
        return one

    def _tokens_per_second(self, worker: Worker, batch: list[list[int]]) -> float:
        """Return how fast prompts of different lengths are read and continued together."""
        count = self.arguments.new_tokens
        grown = 0

        def post(event: Any) -> None:
            nonlocal grown
            grown += len(getattr(event, "tokens", ()))

        for number, prompt in enumerate(batch):
            worker.begin(
                Completion(
                    post,
                    Overrides(),
                    prompt[: len(prompt) - 3 * number],
                    1,
                    max_tokens=count,
                    sampling=SamplingOptions(temperature=0.0),
                )
            )
        started = time.perf_counter()
        while worker.jobs:
            worker.turn()
        return grown / (time.perf_counter() - started)


def error_of_median(ratios: list[float]) -> float:
    """Return the standard error of the median, by a seeded bootstrap."""
    drawn = np.random.default_rng(0).choice(ratios, size=(2000, len(ratios)))
    return float(np.median(drawn, axis=1).std(ddof=1))


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store", type=Path)
    parser.add_argument("text", nargs="+")
    parser.add_argument("--code", nargs="+", default=[], help="a datastore and held-out texts")
    parser.add_argument("--other", nargs="+", default=[], help="texts of another kind")
    parser.add_argument("--k", type=int, nargs="+", default=[1024])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


def main() -> None:
    """Measure, print and write `benchmarks/results/generation.json`."""
    arguments = parse_arguments()
    lm = knnlm.Datastore(arguments.store).load_model(device=arguments.device)
    own = Generation(lm, arguments.store, arguments)
    held_out = Prompts(lm, arguments.text, arguments.prompt_tokens)
    measured = own.measure("held-out", held_out)
    measured += own.measure("held-out, sampled", held_out, do_sample=True, top_k=0)
    served = []
    if arguments.other:
        other = Prompts(lm, arguments.other, arguments.prompt_tokens)
        measured += own.measure("another kind of text", other)
    if arguments.code:
        code = Generation(lm, Path(arguments.code[0]), arguments)
        of_code = Prompts(lm, arguments.code[1:], arguments.prompt_tokens)
        measured += code.measure("code", of_code)
        served.append(code.serve("code", of_code))
    measured += own.measure("held-out", held_out, size=8)
    served.append(own.serve("held-out", held_out))
    write_results(
        arguments.results,
        {
            "device": str(lm.device),
            "index": describe_index(own.store.catalog),
            "prompt_tokens": arguments.prompt_tokens,
            "new_tokens": arguments.new_tokens,
            "measured": measured,
            "served": served,
        },
    )


if __name__ == "__main__":
    main()
