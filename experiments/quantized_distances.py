"""Quantized against exact distances: the cost of product quantization.

    python experiments/quantized_distances.py --model knnlm-demo/smollm2-135m --work /tmp/knn-lm

Khandelwal et al. 2020, sections 2 and 4: FAISS finds the neighbors in an inverted file of 64-byte
codes; development perplexity is 16.5 with the distances of the codes, 16.06 with distances
recomputed from the keys. Here 1,024 lists of which 32 are searched, k 1024, T 1, λ tuned for each.
"""

from collections.abc import Sequence

import faiss
import numpy as np
import torch
from experiment import Experiment, digest_of
from measuring import HeldOut, measure, mixed, papers_recipe, percent, target_neighbors
from torch import Tensor

from knnlm.datastore.datastore import Datastore
from knnlm.mixture.interpolation import Voters, neighbor_log_weights

PAPER = {"LM": 17.96, "PQ, its distances": 16.5, "PQ, exact distances": 16.06}
LISTS, PROBES, CODE_BYTES = 1024, 32, 64
_AT_ONCE = 64


def main(argv: Sequence[str] | None = None) -> None:
    """Measure three kinds of search."""
    experiment = Experiment(__doc__, argv, valid_tokens=8192, test_tokens=8192)
    store = experiment.store()
    valid, test = experiment.valid(), experiment.test()
    exact, test_exact = experiment.voters(store, valid), experiment.voters(store, test)
    k = exact.tokens.shape[1]
    pq, recomputed = quantized(experiment, store, valid, k)
    test_pq, test_recomputed = quantized(experiment, store, test, k)

    measured = {}
    for name, of_valid, of_test in [
        ("exact search", exact, test_exact),
        ("PQ, exact distances", recomputed, test_recomputed),
        ("PQ, its distances", pq, test_pq),
    ]:
        recipe = papers_recipe(target_neighbors(valid, of_valid))
        numbers = measure(test, mixed(target_neighbors(test, of_test), recipe))
        votes = neighbor_log_weights(of_test.squared_distances, 1.0).exp()
        entropy = float(torch.special.entr(votes).sum(dim=1).mean())
        measured[name] = {"lmbda": recipe.lmbda, "vote_entropy": entropy, **numbers}
        print(f"{name:20} {numbers['perplexity']:.4f}  {percent(numbers['change'])}")
    ratio = test_pq.squared_distances[:, 0] / test_recomputed.squared_distances[:, 0].clamp_min(1)
    experiment.write(
        "quantized_distances",
        {
            "paper": PAPER,
            "entries": store.rows,
            "lm_perplexity": measure(test, test.lm_log_probs)["perplexity"],
            "median_ratio_of_nearest_distances": float(ratio.median()),
            "measured": measured,
        },
    )
    with experiment.picture("quantized_distances") as [panel]:
        changes = [100 * numbers["change"] for numbers in measured.values()]
        panel.barh(list(measured), changes, color="#c0392b", label="here (test)")
        shown = [name for name in PAPER if name in measured]
        of_paper = [100 * (PAPER[name] / PAPER["LM"] - 1) for name in shown]
        panel.plot(of_paper, shown, "D", color="#1b4f72", label="the paper (development)")
        panel.invert_yaxis()
        panel.set_xlabel("change of perplexity, %")


def quantized(
    experiment: Experiment, store: Datastore, held_out: HeldOut, k: int
) -> tuple[Voters, Voters]:
    """Return the neighbors that FAISS finds, with its distances and sorted by exact distances."""

    def search() -> dict[str, Tensor]:
        path = experiment.work / f"{store.path.stem}.faiss"
        if not path.exists():
            faiss.write_index(train(store), str(path))
        index = faiss.read_index(str(path))
        faiss.extract_index_ivf(index).nprobe = PROBES
        found, rows = map(torch.from_numpy, index.search(held_out.keys.numpy(), k))
        keys = torch.cat([keys for _, keys in store.key_blocks(1 << 16)])
        exact = torch.cat(
            [
                (keys[near.clamp_min(0)].float() - queries[:, None]).square().sum(dim=2)
                for queries, near in zip(
                    torch.split(held_out.keys, _AT_ONCE), torch.split(rows, _AT_ONCE), strict=True
                )
            ]
        )
        absent = rows < 0
        return {
            "rows": rows,
            "found": found.masked_fill(absent, torch.inf),
            "exact": exact.masked_fill(absent, torch.inf),
        }

    kept = experiment.kept(digest_of("PQ", store.path.name, held_out.digest, k), search)
    tokens = store.values[kept["rows"].clamp_min(0)].masked_fill(kept["rows"] < 0, -1)
    exact, order = kept["exact"].sort(dim=1)
    return Voters(kept["found"], tokens), Voters(exact, tokens.gather(1, order))


def train(store: Datastore) -> faiss.Index:
    """Return FAISS's inverted file of codes, trained on a sample of the keys."""
    keys = [keys.float().numpy() for _, keys in store.key_blocks(1 << 16)]
    dimension = store.settings.dimension
    lists = min(LISTS, max(1, store.rows // 64))
    index = faiss.index_factory(dimension, f"IVF{lists},PQ{codes(dimension)}")
    sample = np.concatenate([block[:: max(1, store.rows // 65_536)] for block in keys])
    index.train(sample)
    for block in keys:
        index.add(block)
    return index


def codes(dimension: int) -> int:
    """Return the bytes of a code: the largest divisor of the dimension up to 64."""
    return max(size for size in range(1, CODE_BYTES + 1) if dimension % size == 0)


if __name__ == "__main__":
    main()
