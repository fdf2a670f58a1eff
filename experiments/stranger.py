"""Domain adaptation of an LM that has read nothing but the first collection.

    python experiments/stranger.py --model smollm2 --work /tmp/experiments

Khandelwal et al. 2020, Table 4: an LM trained on Wikipedia alone is given a datastore of Books.
Pretrained models have read the web, and no text here may be new to them (domain_adaptation.py). So
a small LM is trained here, on the first collection alone, with the tokenizer of --model.
"""

import random
import sys
from collections.abc import Sequence
from dataclasses import asdict

import torch
from domain_adaptation import PAPER, adapt, draw, named_domains
from experiment import Experiment, digest_of
from texts import Domain
from training import Recipe, kept_model, train
from transformers import AutoModelForCausalLM, LlamaConfig

from knnlm.language_model import LanguageModel

SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
}
PASSES = 4
TRAINING = Recipe(batch=2, learning_rate=1e-3, warm_up=50, weight_decay=0.1)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, then measure each collection with each datastore."""
    experiment = Experiment(__doc__, argv)
    domains = named_domains(experiment)
    lm = trained_model(experiment, domains[0])
    parameters = sum(parameter.numel() for parameter in lm.model.parameters())
    results = adapt(experiment, domains, lm)
    experiment.write(
        "stranger",
        {
            "paper": PAPER,
            "trained_on": domains[0].name,
            "parameters": parameters,
            "passes": PASSES,
            "training": asdict(TRAINING),
            **results,
        },
    )
    with experiment.picture("stranger") as [panel]:
        draw(panel, domains, results["measured"])


def trained_model(experiment: Experiment, domain: Domain) -> LanguageModel:
    """Return a small model trained on a collection alone, kept in --work."""
    windows = experiment.windows(domain.train, domain.entries or sys.maxsize)
    other = experiment.lm
    config = LlamaConfig(
        **SHAPE,
        vocab_size=other.model.config.vocab_size,
        max_position_embeddings=experiment.built.window,
        bos_token_id=other.model.config.bos_token_id,
        eos_token_id=other.model.config.eos_token_id,
    )

    def make() -> LanguageModel:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).to(other.device)
        lm = LanguageModel(model, other.tokenizer)
        shuffle = random.Random(0)
        order = [w for _ in range(PASSES) for w in shuffle.sample(windows, len(windows))]
        train(lm, order, TRAINING, experiment.progress)
        return lm

    inputs = [window.tokens.tolist() for window in windows]
    return kept_model(
        experiment,
        digest_of("stranger", other.tokenizer_fingerprint, inputs, SHAPE, PASSES, asdict(TRAINING)),
        make,
    )


if __name__ == "__main__":
    main()
