"""What remembering costs an evaluation: the kNN-LM against the LM alone, on the same windows.

    python benchmarks/tax.py STORE TEXT… --max-tokens 8192

STORE is searched with its index; exact search with k 1024 is there to compare perplexities. The LM
alone and the kNN-LM evaluate the same text in turn, repeatedly, in one process; the tax is the
median of the ratios of their times.
"""

import argparse
import statistics
from pathlib import Path

import knnlm
from knnlm.index.exact import ExactIndex
from knnlm.index.policy import describe_index
from knnlm.provenance import write_results

RESULTS = Path(__file__).parent / "results" / "tax.json"


def main() -> None:
    """Measure, print and write `benchmarks/results/tax.json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store", type=Path)
    parser.add_argument("text", nargs="+")
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--k", type=int, default=1024)
    parser.add_argument("--lmbda", type=float, default=0.2)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--repetitions", type=int, default=3)
    arguments = parser.parse_args()

    store = knnlm.Datastore(arguments.store)
    lm = knnlm.LanguageModel.load(
        store.settings.model, key=store.settings.key, dtype=store.settings.model_dtype
    )
    documents = knnlm.read_documents(*arguments.text)
    given = {"k": arguments.k, "temperature": arguments.temperature}
    alone = knnlm.KNNLM(lm, store, lmbda=0.0, **given)
    remembering = knnlm.KNNLM(lm, store, lmbda=arguments.lmbda, **given)
    exact = knnlm.KNNLM(
        lm,
        store,
        k=1024,
        lmbda=arguments.lmbda,
        temperature=arguments.temperature,
        index=ExactIndex(store),
    )

    def evaluate(model: knnlm.KNNLM) -> knnlm.PerplexityReport:
        return model.perplexity(documents, max_tokens=arguments.max_tokens)

    reference = evaluate(exact)
    evaluate(remembering)  # compiles what is compiled at first use
    pairs = [(evaluate(alone), evaluate(remembering)) for _ in range(arguments.repetitions)]
    taxes = [knn.seconds.total / lm_only.seconds.total for lm_only, knn in pairs]
    tax = statistics.median(taxes)
    report = pairs[0][1]
    loss = report.knn.perplexity / reference.knn.perplexity - 1
    print(f"{report.tokens:,} tokens, k {arguments.k}, {len(store):,} entries")
    print(f"LM alone      {statistics.median(p[0].seconds.total for p in pairs):8.2f} s")
    print(
        f"kNN-LM        {statistics.median(p[1].seconds.total for p in pairs):8.2f} s: {tax:.3f}×"
    )
    print(f"exact kNN-LM  {reference.seconds.total:8.2f} s")
    print(
        f"perplexity: LM {report.lm.perplexity:.4f}, kNN-LM {report.knn.perplexity:.4f}, "
        f"exact {reference.knn.perplexity:.4f} ({loss:+.2%})"
    )
    write_results(
        RESULTS,
        {
            "entries": len(store),
            "index": describe_index(store),
            "tax": tax,
            "taxes": taxes,
            "perplexity_over_exact": loss,
            "lm_alone": [lm_only.to_dict() for lm_only, _ in pairs],
            "knn_lm": [knn.to_dict() for _, knn in pairs],
            "exact": reference.to_dict(),
        },
    )


if __name__ == "__main__":
    main()
