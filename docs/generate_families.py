"""Write docs/families.md: what works with each family of transformers, tried on tiny random models.

python docs/generate_families.py (three minutes). Each model is made from a configuration, so
nothing is downloaded; texts are longer than its sliding windows and chunks of attention.
"""

import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import knnlm
from knnlm.apps.engine.jobs import Completion, Failed, Grown, Overrides
from knnlm.apps.engine.metrics import Metrics
from knnlm.apps.engine.sampling import SamplingOptions
from knnlm.apps.engine.worker import Worker
from knnlm.model.decoding import Decoder

PAGE = Path(__file__).with_name("families.md")
TEXT = (
    "The nearest neighbors of a hidden state are the places where the model has felt like this "
    "before. What followed there is a guess at what follows here; the closer the place, the "
    "heavier its vote.\n"
)
NEW = 8  # tokens to generate
MIXED: dict[str, Any] = {"k": 4, "lmbda": 0.5, "temperature": 10.0}

# Under the names that most configurations share; a configuration takes those that it has.
SIZES: dict[str, object] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "moe_intermediate_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "num_experts", "num_local_experts"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_experts_per_tok", "index_n_heads"), 2),
    **dict.fromkeys(("head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "index_head_dim"), 16),
    **dict.fromkeys(("mamba_n_heads", "mamba_d_head", "mamba_d_state"), 8),
    **dict.fromkeys(("sliding_window", "attention_chunk_size"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 256),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **{"n_routed_experts": 4, "index_topk": 64, "mamba_expand": 2, "initializer_range": 0.2},
}
TOKENS = {"vocab_size": 384, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
_HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
_CONVOLUTION = {"layer_types": ["conv", "full_attention"]}
_SLIDING = {"layer_types": ["sliding_attention", "full_attention"]}
_PER_LAYER = {"vocab_size_per_layer_input": 384, "hidden_size_per_layer_input": 8}
_LATENT = {"num_key_value_heads": 4}
_DECODER = {"is_decoder": True}
_MASKED = """
    bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert
    roberta roberta-prelayernorm roformer xlm-roberta xlm-roberta-xl
"""
_LATENTS = """
    axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 dots3_note_text glm4_moe_lite glm_moe_dsa hy_v4
    minicpm3 youtu
"""
OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(_MASKED.split(), _DECODER),
    **dict.fromkeys(_LATENTS.split(), _LATENT),
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), _HYBRID),
    **dict.fromkeys(("bailing_hybrid", "kimi_linear"), _HYBRID | _LATENT),
    **dict.fromkeys(("lfm2", "lfm2_moe", "lfm3"), _CONVOLUTION),
    "codegen": {"rotary_dim": 4},
    "gptj": {"rotary_dim": 4},
    "bamba": {"attn_layer_indices": [1]},
    "falcon_h1": {"mamba_d_ssm": 64},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "dots1": {"n_shared_experts": 1},
    "gemma3n_text": _SLIDING | _PER_LAYER | {"num_kv_shared_layers": 0, "laurel_rank": 8},
    "gemma4_text": _SLIDING | _PER_LAYER | {"num_kv_shared_layers": 0, "global_head_dim": 8},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "llama4_text": {"intermediate_size_mlp": 64, "num_experts_per_tok": 1},
    "longcat_flash": _LATENT | {"zero_expert_num": 2, "ffn_hidden_size": 64, "num_layers": 2},
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2, "n_groups": 1, "state_size": 8},
    "recurrent_gemma": {
        "block_types": ["recurrent", "attention"],
        "lru_width": 32,
        "attention_window_size": 16,
    },
    "roc_bert": _DECODER
    | {"pronunciation_embed_dim": 8, "pronunciation_vocab_size": 16}
    | {"shape_embed_dim": 8, "shape_vocab_size": 16},
    "xmod": _DECODER | {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}
LONG_ROPE: dict[str, Any] = {
    "original_max_position_embeddings": 33,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [1.0, 4.0, 7.0, 10.0],
        "original_max_position_embeddings": 33,
        "factor": 6.4,
    },
}
VARIANTS = {"llama, LongRoPE": ("llama", LONG_ROPE), "phi3, LongRoPE": ("phi3", LONG_ROPE)}


@dataclass
class Row:
    """A family's line in the table. Cells say how it works, or `wrong` or `refused`."""

    family: str
    cells: list[str] = field(default_factory=list)
    remark: str = ""

    def render(self) -> str:
        """Return the line."""
        cells = [*self.cells, *["–"] * (len(COLUMNS) - len(self.cells))]
        return f"| {self.family} | {' | '.join(cells)} | {self.remark} |"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE trained on the text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENS["vocab_size"],
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def tiny_model(family: str) -> PreTrainedModel | None:
    """Return a tiny random model of a family; None if these sizes make none."""
    kind, own = VARIANTS.get(family, (family, OWN.get(family, {})))
    try:
        default = AutoConfig.for_model(kind)
        known = {*default.to_dict(), *getattr(default, "attribute_map", {})}
        sizes = {name: size for name, size in SIZES.items() if name in known}
        config = AutoConfig.for_model(kind, **{**sizes, **TOKENS, **own})
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config)
        if sum(parameter.numel() for parameter in empty.parameters()) > 5e6:
            return None
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.eval()(input_ids=torch.tensor([[5, 6, 7]]))
    except Exception:  # a configuration of other parts or sizes
        return None
    model.generation_config.forced_eos_token_id = None
    return model


class Family:
    """A tiny model, a datastore of its own, and what its plain forward pass says."""

    def __init__(self, model: PreTrainedModel, folder: Path) -> None:
        self.lm = lm = knnlm.LanguageModel(model, byte_tokenizer(), name="tiny")
        self.documents = [
            knnlm.Document(str(size), TEXT[:size]) for size in (30, 90, 160, len(TEXT))
        ]
        self.store = knnlm.build(
            folder / "store", lm, self.documents, window=128, context=32, key_dtype="float32"
        )
        self.prompts = [TEXT[:60], TEXT[20:150]]

    def tokens(self, text: str) -> list[int]:
        """Return the tokens of a text after a start token."""
        return [self.lm.start_token, *self.lm.encode([text])[0].tolist()]

    def is_exact(self) -> bool:
        """Compare stored keys, and scores at λ = 0, with one plain pass over each document."""
        stored = torch.cat([block for _, block in self.store.key_blocks(1 << 20)])
        nats, count = 0.0, 0
        for document in self.documents:
            tokens = torch.tensor([self.tokens(str(document.text))])
            with self.lm.capture() as captured, torch.no_grad():
                logits = self.lm.model(input_ids=tokens[:, :-1]).logits
            log_probs = torch.log_softmax(logits[0], dim=-1)
            nats -= float(log_probs.gather(1, tokens[0, 1:, None]).sum())
            count += tokens.shape[1] - 1
            at = next(one for one in self.store.documents() if one.name == document.name)
            keys = captured.keys[0]
            if not torch.allclose(stored[at.start : at.stop], keys, atol=1e-3, rtol=1e-3):
                return False
        report = knnlm.KNNLM(self.lm, self.store, k=4, lmbda=0.0).perplexity(self.documents)
        return abs(report.lm.nats_per_token - nats / count) < 1e-4

    def reread(self, model: knnlm.KNNLM, prompt: str) -> list[int]:
        """Continue a prompt by reading all of it again for every token."""
        tokens = self.tokens(prompt)
        length = len(tokens)
        while len(tokens) < length + NEW:
            tokens.append(int(model.log_probs(torch.tensor([tokens]))[0, -1].argmax()))
            if tokens[-1] in self.lm.end_tokens:
                break
        return tokens[length:]

    def generated(self, model: knnlm.KNNLM) -> Iterator[list[int]]:
        """Continue each prompt by `KNNLM.generate`."""
        for prompt in self.prompts:
            yield model.generate(prompt, max_new_tokens=NEW).tokens

    def attached(self, model: knnlm.KNNLM) -> Iterator[list[int]]:
        """Continue each prompt by the model's own `generate`, with the datastore attached."""
        for prompt in self.prompts:
            tokens = torch.tensor([self.tokens(prompt)])
            with knnlm.attach(self.lm.model, self.store, **MIXED):
                output = self.lm.model.generate(
                    input_ids=tokens,
                    attention_mask=torch.ones_like(tokens),
                    max_new_tokens=NEW,
                    do_sample=False,
                )
            yield output[0, tokens.shape[1] :].tolist()

    def served(self, model: knnlm.KNNLM) -> Iterator[list[int]]:
        """Continue all prompts at once, as the server does; end tokens are added."""
        worker = Worker(model, Metrics())
        events: list[list[Any]] = [[] for _ in self.prompts]
        for prompt, received in zip(self.prompts, events, strict=True):
            worker.begin(
                Completion(
                    received.append,
                    Overrides(),
                    self.tokens(prompt),
                    1,
                    NEW,
                    SamplingOptions(temperature=0.0),
                )
            )
        while worker.jobs:
            worker.turn()
        worker.close()
        for received in events:
            for event in received:
                if isinstance(event, Failed):
                    raise RuntimeError(event.message)
            grown = [event for event in received if isinstance(event, Grown)]
            tokens = [scored.token for event in grown for scored in event.tokens]
            yield tokens if len(tokens) == NEW else [*tokens, *self.lm.end_tokens]


def try_family(family: str, model: PreTrainedModel, folder: Path) -> Row:
    """Try everything with one family."""
    row = Row(family)
    try:
        tried = Family(model, folder)
    except knnlm.KNNLMError as error:
        row.cells.append("refused")
        row.remark = str(error).removeprefix("model 'tiny' ")
        return row
    lm = tried.lm
    row.cells.append("exact" if tried.is_exact() else "wrong")
    row.cells.append("together" if lm.batch_rules.batches else "alone")
    row.cells.append("with cache" if lm.cache_rules.cache else "read again")
    mixed = knnlm.KNNLM(lm, tried.store, **MIXED)
    expected = [tried.reread(mixed, prompt) for prompt in tried.prompts]
    with lm.capture() as captured:
        shares = Decoder(lm, captured).shares_batches(128)
    batched = "in a batch" if shares else "one by one"
    ways: list[tuple[str, Callable[[knnlm.KNNLM], Iterator[list[int]]]]] = [
        ("exact", tried.generated),
        (batched, tried.served),
        ("exact", tried.attached),
    ]
    for works, way in ways:
        try:
            row.cells.append(works if list(way(mixed)) == expected else "wrong")
        except knnlm.KNNLMError as error:
            row.cells.append("refused")
            row.remark = str(error)
        except Exception as error:
            row.cells.append("fails")
            row.remark = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:100]}"
    if lm.batch_rules.frequency_limit is not None:
        row.remark = (
            "texts beyond the original positions are read apart from shorter ones; `attach` may "
            "need `use_cache=False` to pass them"
        )
    row.remark = REMARKS.get(family, row.remark)
    return row


REMARKS = {
    "blenderbot": "transformers' `generate` obeys the configuration, which bans repeated n-grams",
}
COLUMNS = ("build, `eval`", "batches", "continued", "`generate`", "`serve`", "`attach`")
HEAD = f"""\
# Model families

<!-- Written by docs/generate_families.py; a test tries some of them again. -->

Each family that `AutoModelForCausalLM` of transformers {{version}} makes from a configuration,
tried on a tiny random model: of {{tried}}, **{{works}} work everywhere**. When a model is opened, a
few passes over nine tokens show what a position depends on; it is then read in a way that is right.

- build, `eval`: keys, and scores at λ = 0, are those of a plain pass over a document alone.
- batches: whether documents are read together, padded on the right, or each one alone.
- continued: whether a new token is read after what the cache holds, or with all of the text.
- `generate`, `serve`, `attach`: greedy continuations at λ = 0.5 are those of reading all of the
  text again for every token. The server lets completions grow in one batch, or one by one.

| family | {" | ".join(COLUMNS)} | remark |
|---|{"---|" * len(COLUMNS)}---|
"""


def render(rows: Sequence[Row], untried: Sequence[str]) -> str:
    """Return the page."""
    bad = ("wrong", "fails", "refused")
    works = sum(not any(cell in bad for cell in row.cells) for row in rows)
    head = HEAD.format(version=transformers.__version__, works=works, tried=len(rows))
    names = ", ".join(untried)
    lines = "\n".join(row.render() for row in rows)
    return f"{head}{lines}\n\nNot tried, because these sizes make no model of them: {names}.\n"


def main(families: Sequence[str] = ()) -> None:
    """Try all families and write the page; try the given ones and print their lines."""
    rows, untried = [], []
    for family in families or sorted([*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VARIANTS]):
        model = tiny_model(family)
        if model is None:
            untried.append(family)
            continue
        with tempfile.TemporaryDirectory() as folder:
            rows.append(try_family(family, model, Path(folder)))
        sys.stdout.write(f"{rows[-1].render()}\n")
        sys.stdout.flush()
    if not families:
        PAGE.write_text(render(rows, untried), encoding="utf-8")


if __name__ == "__main__":
    os.nice(10)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    logging.disable(logging.ERROR)
    torch.set_num_threads(1)
    main(sys.argv[1:])
