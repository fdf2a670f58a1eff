"""Which tokens gain: rare or frequent ones, names and numbers or ordinary words.

    python experiments/rare_and_factual.py --model knnlm-demo/smollm2-135m --work /tmp/knn-lm

Khandelwal et al. 2020, section 6, credit rare patterns such as factual knowledge; Nishida (2025)
finds that rare target tokens gain little. Frequency is counted among the datastore's values.

A token has the kind of the word that contains its first character other than a space. A word is an
"identifier" if it has an underscore, a dot between letters, the bracket of a call or a capital
after a small letter; "capitalized" if its first letter is a capital and it does not begin a
sentence or paragraph; a "number" if it has a digit and no letter; "punctuation" if it has neither.
The first three count as factual. Recipe: k 1024, T 1, λ tuned on validation text.
"""

import re
from collections.abc import Sequence

import torch
from experiment import Experiment
from measuring import frequencies, groups, measure, mixed, papers_recipe, percent, target_neighbors
from torch import Tensor

from knnlm.model.language_model import LanguageModel

FACTUAL = ("number", "identifier", "capitalized")
_IDENTIFIER = re.compile(r"\w_\w|__|[a-z]\.[a-zA-Z]|\w\(|[a-z][A-Z]")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure each group of tokens."""
    experiment = Experiment(__doc__, argv)
    store = experiment.store()
    valid, test = experiment.valid(), experiment.test()
    recipe = papers_recipe(target_neighbors(valid, experiment.voters(store, valid)))
    neighbors = target_neighbors(test, experiment.voters(store, test))
    log_probs = mixed(neighbors, recipe)

    kinds = token_kinds(experiment.lm, test.targets)
    names = sorted(set(kinds))
    of_kind = {name: torch.tensor([kind == name for kind in kinds]) for name in names}
    factual = torch.tensor([kind in FACTUAL for kind in kinds])
    of_kind |= {"all factual": factual, "all others": ~factual}
    found = neighbors.votes.any(dim=1)

    results = {
        "by_frequency": groups(test, log_probs, frequencies(store, test)),
        "by_kind": groups(test, log_probs, of_kind),
        "by_presence": groups(
            test, log_probs, {"among the neighbors": found, "not among them": ~found}
        ),
    }
    for title, of_groups in results.items():
        print(title)
        for name, numbers in of_groups.items():
            print(
                f"   {name:20} {numbers['tokens']:6} tokens  {numbers['lm_perplexity']:10.2f} → "
                f"{numbers['knn_perplexity']:10.2f}  {percent(numbers['change']):>8}, "
                f"{100 * numbers['share_of_gain']:.0f} % of the gain"
            )
    experiment.write(
        "rare_and_factual",
        {"entries": store.rows, "lmbda": recipe.lmbda, "all": measure(test, log_probs), **results},
    )
    with experiment.picture("rare_and_factual", 2) as panels:
        titles = ["occurrences in the datastore", "kind of word"]
        for panel, title, name in zip(panels, titles, ["by_frequency", "by_kind"], strict=True):
            shown = results[name]
            labels = [f"{group} ({shown[group]['tokens']:,})" for group in shown]
            panel.barh(labels, [100 * n["change"] for n in shown.values()], color="#c0392b")
            panel.invert_yaxis()
            panel.axvline(0, color="black", linewidth=0.8)
            panel.set_title(f"{title} (tokens)", fontsize=10)
            panel.set_xlabel("change of perplexity, %")


def token_kinds(lm: LanguageModel, tokens: Tensor) -> list[str]:
    """Return the kind of word that each token of a text belongs to."""
    pieces = [lm.decode([token]) for token in tokens.tolist()]
    text = "".join(pieces)
    kinds = ["space"] * (len(text) + 1)
    before = ""
    for word in re.finditer(r"\S+", text):
        begins = (
            not before
            or before[-1] in ".!?:"
            or text[max(0, word.start() - 2) : word.start()] == "\n\n"
        )
        kinds[word.start() : word.end()] = [_kind(word.group(), begins)] * len(word.group())
        before = word.group()
    of_tokens, start = [], 0
    for piece in pieces:
        first = start + len(piece) - len(piece.lstrip())
        of_tokens.append("space" if not piece.strip() else kinds[first])
        start += len(piece)
    return of_tokens


def _kind(word: str, begins_sentence: bool) -> str:
    letters = [character for character in word if character.isalpha()]
    if not letters:
        return "number" if any(map(str.isdigit, word)) else "punctuation"
    if _IDENTIFIER.search(word):
        return "identifier"
    if letters[0].isupper() and not begins_sentence:
        return "capitalized"
    return "other word"


if __name__ == "__main__":
    main()
