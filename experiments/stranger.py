"""Domain adaptation of an LM that has read only the first collection.

    python experiments/stranger.py --model knnlm-demo/smollm2-135m --work /tmp/knn-lm

Khandelwal et al. 2020, Table 4: an LM trained on Wikipedia alone is given a datastore of Books.
Pretrained models have read the web, so perhaps no text here is new to them (domain_adaptation.py).
A small LM and its tokenizer are therefore trained on the first collection alone; --model only
determines the length of its windows.
"""

import random
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict

import torch
from domain_adaptation import PAPER, adapt, draw, named_domains
from experiment import Experiment, digest_of
from texts import Domain
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from training import Recipe, kept_model, train
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from knnlm.model.language_model import LanguageModel
from knnlm.text.documents import Document

VOCABULARY = 4096
START = "<|start|>"
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
}
PASSES = 2
TRAINING = Recipe(batch=2, learning_rate=1e-3, warm_up=50, weight_decay=0.1)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, then measure each collection with each datastore."""
    experiment = Experiment(__doc__, argv, valid_tokens=8192, test_tokens=8192)
    domains = named_domains(experiment)
    lm = trained_model(experiment, domains[0])
    results = adapt(experiment, domains, lm)
    experiment.write(
        "stranger",
        {
            "paper": PAPER,
            "trained_on": domains[0].name,
            "parameters": sum(parameter.numel() for parameter in lm.model.parameters()),
            "vocabulary": lm.vocab_size,
            "passes": PASSES,
            "training": asdict(TRAINING),
            **results,
        },
    )
    with experiment.picture("stranger") as [panel]:
        draw(panel, domains, results["measured"])


def trained_model(experiment: Experiment, domain: Domain) -> LanguageModel:
    """Return a small model trained on one collection alone, cached in --work."""
    documents = experiment.documents(domain.train)

    def make() -> LanguageModel:
        torch.manual_seed(0)
        tokenizer = trained_tokenizer(documents)
        config = LlamaConfig(
            **SHAPE,
            vocab_size=len(tokenizer),
            max_position_embeddings=experiment.built.window,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        model = AutoModelForCausalLM.from_config(config).to(experiment.lm.device)
        lm = LanguageModel(model, tokenizer)
        windows = experiment.windows(domain.train, domain.entries or sys.maxsize, lm=lm)
        shuffle = random.Random(0)
        order = [w for _ in range(PASSES) for w in shuffle.sample(windows, len(windows))]
        train(lm, order, TRAINING, experiment.progress)
        return lm

    read = [document.fingerprint() for document in documents], domain.entries
    made_of = VOCABULARY, SHAPE, asdict(experiment.built), PASSES, asdict(TRAINING)
    return kept_model(experiment, digest_of("stranger", *read, *made_of), make)


def trained_tokenizer(documents: Iterable[Document]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of the documents' text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[START],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = ("".join(document.blocks()) for document in documents)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=START, eos_token=START)


if __name__ == "__main__":
    main()
