"""A Hugging Face causal language model and its tokenizer: token ids to keys and log-probabilities.

Knows transformers, tokens and tensors. Knows no datastore, no neighbor, no mixture.
"""

import hashlib
import importlib.util
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars
from jaxtyping import Int32
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    modeling_gguf_pytorch_utils,
)
from transformers.utils import logging as transformers_logging

from knnlm.choices import Key, ModelDtype, parse_choice
from knnlm.errors import (
    InvalidArgumentError,
    KNNLMError,
    ModelNotFoundError,
    UnsupportedModelError,
    missing_dependency,
)
from knnlm.model.chat import ChatTemplate
from knnlm.model.device import parse_device
from knnlm.model.encoding import Encoder
from knnlm.model.keyed_model import KeyedModel, check_decoder_only
from knnlm.model.token_text import TokenTexts

_PROBE_TEXT = "The 1st café’s naïve “kNN-LM” — 3.14 ≈ π,\r\n\tif x != [0, 1]: 日本語 🙂  <s> end"


class LanguageModel(KeyedModel):
    """A HF decoder-only causal LM and its tokenizer: token ids to keys and log-probabilities.

    key: see `KeyedModel`. name (hub id, folder or file) and revision: where the model came from; by
    default taken from the model.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        key: str = "ffn_input",
        name: str | None = None,
        revision: str | None = None,
    ) -> None:
        super().__init__(model, key=key, name=name)
        self.tokenizer = tokenizer
        self.revision: str | None = revision or getattr(self.model.config, "_commit_hash", None)
        self.start_token: int = self._find_start_token()
        """BOS, or EOS if there is no BOS: the context of a document's first token."""

    @classmethod
    def load(
        cls,
        name: str | Path,
        *,
        key: str = "ffn_input",
        dtype: str = "auto",
        device: str = "auto",
        revision: str | None = None,
    ) -> "LanguageModel":
        """Load a model and its tokenizer.

        `name` is a hub id, a local folder or a .gguf file, `revision` a branch, tag or commit on
        the hub; a path becomes absolute in the attribute `name`. `dtype` is auto, float32, bfloat16
        or float16, where auto is float32 on the CPU and the checkpoint's own elsewhere. `device` is
        auto, cpu, cuda, cuda:N or mps, where auto is cuda if there is one, else cpu.
        """
        parse_choice(Key, "key", key)
        target = parse_device(device)
        precision = _parse_dtype(dtype, target)
        with _explaining_failures("model", name):
            source, options = _locate(name)
        options |= {"revision": revision, "trust_remote_code": False}
        with _without_progress_bars():
            with _explaining_failures("model", name):
                config = AutoConfig.from_pretrained(source, **options)
            check_decoder_only(config, str(name))
            with _explaining_failures("tokenizer of", name):
                tokenizer = AutoTokenizer.from_pretrained(source, **options)
            with _explaining_failures("model", name):
                model, report = AutoModelForCausalLM.from_pretrained(
                    source, dtype=precision, output_loading_info=True, **options
                )
        if report["missing_keys"]:
            raise UnsupportedModelError(
                f"model {str(name)!r} must be the checkpoint of a causal language model, but lacks "
                f"weights such as {min(report['missing_keys'])}; choose one with an LM head"
            )
        if "gguf_file" in options:
            # The weights are dequantized; leftover quantization settings would only prevent saving.
            model.hf_quantizer = None
            del model.config.quantization_config
        if getattr(model, "hf_quantizer", None) is None:
            model = model.to(target)
        named = str(Path(source, options["gguf_file"])) if "gguf_file" in options else source
        return cls(model.eval(), tokenizer, key=key, name=named, revision=revision)

    def save(self, folder: str | Path) -> None:
        """Save model and tokenizer to a folder that `load` reads back, bit for bit."""
        folder = Path(folder)
        if folder.exists() and not folder.is_dir():
            raise InvalidArgumentError(
                f"folder={str(folder)!r} must not be a file; choose a folder's name"
            )
        with _without_progress_bars():
            self.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)

    @cached_property
    def encoder(self) -> Encoder:
        """Turns texts into tokens; a copy of it serves another thread."""
        return Encoder(self.tokenizer, self.end_tokens)

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """Turns conversations into tokens; a copy of it serves another thread."""
        return ChatTemplate(self.encoder)

    @cached_property
    def token_texts(self) -> TokenTexts:
        """The text of each token in its context."""
        return TokenTexts(self.tokenizer)

    def encode(
        self, texts: list[str], *, control_tokens: bool = False
    ) -> list[Int32[np.ndarray, " tokens"]]:
        """Tokenize a batch of texts, adding no special tokens.

        control_tokens: whether `</s>` and the like in a text are control tokens instead of text.
        """
        if not texts:
            return []
        tokenized = self.encoder.encode(texts, control_tokens)
        token_lists = [np.array(tokens, dtype=np.int32) for tokens in tokenized]
        largest = max((int(tokens.max()) for tokens in token_lists if len(tokens)), default=0)
        self._check_token(largest)
        return token_lists

    def decode(
        self, tokens: Sequence[int] | np.ndarray | Tensor, before: Sequence[int] = ()
    ) -> str:
        """Return the text of `tokens` unchanged, special tokens and spaces included.

        before: tokens whose text they continue; the space between them belongs to the result.
        """
        ids = tokens.tolist() if isinstance(tokens, np.ndarray | Tensor) else list(tokens)
        return self.token_texts.decode(ids, before)

    @property
    def end_tokens(self) -> frozenset[int]:
        """The tokens that end a text: the generation config's and the tokenizer's."""
        ends = self.model.generation_config.eos_token_id
        configured = ends if isinstance(ends, list) else [ends]
        return frozenset({*configured, self.tokenizer.eos_token_id} - {None})

    @cached_property
    def tokenizer_fingerprint(self) -> str:
        """SHA-256 over the vocabulary, the start token and the tokens of a fixed text."""
        vocabulary = sorted(self.tokenizer.get_vocab().items())
        probe_tokens = self.encode([_PROBE_TEXT], control_tokens=True)[0].tolist()
        described = json.dumps([vocabulary, self.start_token, probe_tokens])
        return hashlib.sha256(described.encode()).hexdigest()

    def _find_start_token(self) -> int:
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                self._check_token(token)
                return int(token)
        raise UnsupportedModelError(
            f"the tokenizer of {self.name!r} must have a BOS or an EOS token to begin documents "
            "with, but has neither; set tokenizer.eos_token"
        )

    def _check_token(self, token: int) -> None:
        if token >= self.vocab_size:
            raise UnsupportedModelError(
                f"the tokenizer of {self.name!r} must stay within the model's vocabulary of "
                f"{self.vocab_size} tokens, but gave the token {token}; use the model's own "
                "tokenizer, or resize the model's token embeddings"
            )


def _parse_dtype(dtype: str, device: torch.device) -> torch.dtype | str:
    if parse_choice(ModelDtype, "dtype", dtype) is not ModelDtype.auto:
        named: torch.dtype = getattr(torch, dtype)
        return named
    return torch.float32 if device.type == "cpu" else "auto"


def _locate(name: str | Path) -> tuple[str, dict[str, Any]]:
    """Return transformers' arguments for a model: its folder or hub id, and its file if GGUF."""
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        for package in ("gguf", "accelerate"):
            if importlib.util.find_spec(package) is None:
                raise missing_dependency(package, ".gguf models", "gguf")
        if not path.is_file():
            raise ModelNotFoundError(
                f"model {str(name)!r} must be an existing .gguf file; check the path"
            )
        return str(path.parent.absolute()), {"gguf_file": path.name}
    is_path = isinstance(name, Path) or str(name).startswith((".", "/", "~")) or path.exists()
    if is_path and not (path / "config.json").is_file():
        raise ModelNotFoundError(
            f"model {str(name)!r} must be a folder with config.json, weights and tokenizer, but "
            f"{'has no config.json' if path.is_dir() else 'is no folder'}; check the path, or give "
            "a Hugging Face hub id"
        )
    return str(path.absolute()) if is_path else str(name), {}


@contextmanager
def _explaining_failures(part: str, name: str | Path) -> Iterator[None]:
    """Turn any error that transformers raises while loading into one line."""
    try:
        yield
    except (KNNLMError, MemoryError):
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0].rstrip(" .:") or type(error).__name__
        if isinstance(error, ValueError) and part == "model":
            raise UnsupportedModelError(
                f"model {str(name)!r} must be a causal language model that transformers knows, "
                f"without remote code, but it says: {reason}; choose another model"
            ) from error
        raise ModelNotFoundError(
            f"{part} {str(name)!r} cannot be loaded: {reason}; give a Hugging Face hub id, a "
            "folder with config.json, weights and tokenizer, or a .gguf file"
        ) from error


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Hide the progress bars for reading and writing weights, but not those for downloads."""
    were_enabled = transformers_logging.is_progress_bar_enabled()
    downloads_show = not are_progress_bars_disabled()
    gguf_tqdm = modeling_gguf_pytorch_utils.tqdm
    transformers_logging.disable_progress_bar()
    if downloads_show:
        enable_progress_bars()
    modeling_gguf_pytorch_utils.tqdm = lambda tensors, **_: tensors
    try:
        yield
    finally:
        modeling_gguf_pytorch_utils.tqdm = gguf_tqdm
        if were_enabled:
            transformers_logging.enable_progress_bar()
