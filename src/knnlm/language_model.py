"""A Hugging Face causal language model and its tokenizer: token ids to keys and log-probabilities.

Knows transformers, tokens and tensors. Knows no datastore, no neighbor, no mixture.
"""

import hashlib
import importlib.util
import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars
from jaxtyping import Float, Float32, Int, Int32
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    modeling_gguf_pytorch_utils,
)
from transformers.utils import logging as transformers_logging

from knnlm.errors import (
    InvalidArgumentError,
    ModelNotFoundError,
    UnsupportedModelError,
    missing_dependency,
)
from knnlm.key_choices import KEY_CHOICES, KeyCapture, capture_keys, check_key, find_key_places

__all__ = ["KEY_CHOICES", "LanguageModel", "Reading"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_WINDOW_NAMES = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")
_PROBE_TEXT = "The 1st café’s naïve “kNN-LM” — 3.14 ≈ π,\r\n\tif x != [0, 1]: 日本語 🙂  <s> end"
_SAMPLE_SIZE = 1024


@dataclass(frozen=True)
class Reading:
    """What one forward pass says about every position: its key, and what may follow it."""

    keys: Float[Tensor, "batch time dim"]
    logits: Float32[Tensor, "batch time vocab"]


class LanguageModel:
    """A HF decoder-only causal LM and its tokenizer: token ids to keys and log-probabilities.

    `key` chooses the hidden state that is the key, one of `KEY_CHOICES`; in models without a
    feed-forward block (Mamba) `ffn_input` becomes `attention_input`, the mixer's input, and the
    attribute `key` has the choice in effect. `name` (hub id, folder or file) and `revision` say
    where the model came from; by default, what the model itself says.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        key: str = "ffn_input",
        name: str | None = None,
        revision: str | None = None,
    ) -> None:
        check_key(key)
        self.model = model
        self.tokenizer = tokenizer
        self.name: str = name or model.name_or_path or type(model).__name__
        self.revision: str | None = revision or getattr(model.config, "_commit_hash", None)
        self.max_window: int | None = _max_window(model.config.get_text_config())
        """How many positions the model can read at once; None where there is no limit."""
        _check_decoder_only(model.config, self.name)
        probe = self._probe()
        with _evaluating(self.model):
            logits = self._causal_logits(probe)
            places = find_key_places(model, probe)
        self.key: str = places.resolve(key)
        """The key choice in effect, one of `KEY_CHOICES`."""
        self._decoder: nn.Module = model.get_decoder()
        self._tap = places.taps[self.key]
        self.dimension: int = self.keys(probe).shape[-1]
        """Of a key; not the same as the hidden size in every model."""
        self.vocab_size: int = logits.shape[-1]
        """The last dimension of the logits, which may exceed the tokenizer's vocabulary."""
        self.start_token: int = self._find_start_token()
        """BOS, or EOS where there is none: the context of a document's first token."""

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
        check_key(key)
        target = _parse_device(device)
        precision = _parse_dtype(dtype, target)
        source, options = _locate(name)
        options |= {"revision": revision, "trust_remote_code": False}
        with _without_progress_bars():
            with _explaining_failures("model", name):
                config = AutoConfig.from_pretrained(source, **options)
            _check_decoder_only(config, str(name))
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
            # The weights are plain now; the marks of quantization would only forbid saving.
            model.hf_quantizer = None
            del model.config.quantization_config
        if getattr(model, "hf_quantizer", None) is None:
            model = model.to(target)
        named = str(Path(source, options["gguf_file"])) if "gguf_file" in options else source
        return cls(model.eval(), tokenizer, key=key, name=named, revision=revision)

    def save(self, folder: Path) -> None:
        """Save model and tokenizer to a folder that `load` reads back, bit for bit."""
        if folder.exists() and not folder.is_dir():
            raise InvalidArgumentError(
                f"folder={str(folder)!r} must not be a file; choose a folder's name"
            )
        with _without_progress_bars():
            self.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)

    @property
    def device(self) -> torch.device:
        """Where tokens go in and keys and logits come out."""
        device: torch.device = self.model.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the weights."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    def encode(self, texts: list[str]) -> list[Int32[np.ndarray, " tokens"]]:
        """Tokenize a batch of texts, adding no special tokens."""
        if not texts:
            return []
        encoding = self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        token_lists = [np.array(tokens, dtype=np.int32) for tokens in encoding["input_ids"]]
        largest = max((int(tokens.max()) for tokens in token_lists if len(tokens)), default=0)
        self._check_token(largest)
        return token_lists

    def decode(self, tokens: Sequence[int] | np.ndarray | Tensor) -> str:
        """Return the text of `tokens` as it was, special tokens and spaces included."""
        ids = tokens.tolist() if isinstance(tokens, np.ndarray | Tensor) else list(tokens)
        text: str = self.tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

    def keys(self, tokens: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time dim"]:
        """Return the key of every position, without running the LM head.

        No mask is needed for rows padded on the right: a causal model's real positions never see
        the padding, whose keys are to be ignored.
        """
        with _evaluating(self.model), self.capture() as captured:
            self._decoder(input_ids=tokens.to(self.device), use_cache=False)
            return captured.keys.to(self.device)

    def keys_and_logits(self, tokens: Int[Tensor, "batch time"]) -> Reading:
        """Return keys and logits of every position from one forward pass; padding as in `keys`."""
        with _evaluating(self.model), self.capture() as captured:
            logits = self.model(input_ids=tokens.to(self.device), use_cache=False).logits
            return Reading(captured.keys.to(self.device), logits.float())

    def capture(self) -> AbstractContextManager[KeyCapture]:
        """Record the keys of any forward passes of `model` inside the `with` block.

        After each pass `.keys` has its (batch, time, dim), also in `generate`, where all but the
        first pass read one new position.
        """
        return capture_keys(self._decoder, self._tap)

    @cached_property
    def weights_fingerprint(self) -> str:
        """SHA-256 over a sample of every weight tensor.

        The same for all precisions that a bfloat16 or float16 checkpoint is loaded in, and for
        float32 and bfloat16 loads of a float32 checkpoint; another for a fine-tuned model.
        """
        digest = hashlib.sha256()
        for name, parameter in self.model.named_parameters():
            if parameter.is_meta:
                raise UnsupportedModelError(
                    f"the weights {name} must be in memory to take the model's fingerprint, but "
                    "are offloaded to disk; load the model without offloading"
                )
            flat = parameter.detach().flatten()
            # An odd stride does not stay in one column of a matrix.
            sample = flat[:: -(-len(flat) // _SAMPLE_SIZE) | 1]
            # Rounded to what all three precisions can hold.
            rounded = sample.to(torch.bfloat16).to(torch.float16).cpu().numpy()
            digest.update(json.dumps([name, list(parameter.shape)]).encode())
            digest.update(rounded.astype("<f2").tobytes())
        return digest.hexdigest()

    @cached_property
    def tokenizer_fingerprint(self) -> str:
        """SHA-256 over the vocabulary, the start token and the tokens of a fixed text."""
        vocabulary = sorted(self.tokenizer.get_vocab().items())
        probe_tokens = self.encode([_PROBE_TEXT])[0].tolist()
        described = json.dumps([vocabulary, self.start_token, probe_tokens])
        return hashlib.sha256(described.encode()).hexdigest()

    def _probe(self) -> Int[Tensor, "2 time"]:
        """Return two rows of a few tokens that differ in the last one."""
        vocab_size: int = self.model.config.get_text_config().vocab_size
        tokens = torch.arange(min(8, self.max_window or 8)).repeat(2, 1)
        tokens[1, -1] += 1
        return (tokens % vocab_size).to(self.device)

    def _causal_logits(self, probe: Int[Tensor, "2 time"]) -> Float[Tensor, "2 time vocab"]:
        """Return the logits of the probe, having checked that they depend on the past only."""
        logits: Tensor | None = getattr(self.model(input_ids=probe), "logits", None)
        if logits is None or logits.dim() != 3:
            raise UnsupportedModelError(
                f"model {self.name!r} must have a language-modeling head, but is a "
                f"{type(self.model).__name__}; load it with AutoModelForCausalLM"
            )
        one, other = logits[:, :-1].float()
        tolerance = 4 * torch.finfo(logits.dtype).eps * float(one.abs().max())
        if float((one - other).abs().max()) > tolerance:
            raise UnsupportedModelError(
                f"model {self.name!r} must be a causal language model, but a position's logits "
                "depend on later tokens, as in masked language models; choose a decoder-only model"
            )
        return logits

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


def _check_decoder_only(config: Any, name: str) -> None:
    if config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"model {name!r} must be a decoder-only language model, but is an encoder-decoder "
            f"({config.model_type}); choose a causal language model"
        )


def _max_window(config: Any) -> int | None:
    if getattr(config, "alibi", False):
        return None
    limits = (getattr(config, name, None) for name in _WINDOW_NAMES)
    return next((limit for limit in limits if isinstance(limit, int) and limit > 0), None)


def _parse_device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        parsed = torch.device(device)
    except RuntimeError:
        parsed = torch.device("meta")
    available = {
        "cpu": 1,
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
    }
    if parsed.type not in available:
        raise InvalidArgumentError(f"device={device!r} must be auto, cpu, cuda, cuda:N or mps")
    if (parsed.index or 0) >= available[parsed.type]:
        raise InvalidArgumentError(
            f"device={device!r} must exist, but this machine has {available[parsed.type]} "
            f"of the kind {parsed.type}; use device='auto'"
        )
    return parsed


def _parse_dtype(dtype: str, device: torch.device) -> torch.dtype | str:
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    if dtype not in _DTYPES:
        raise InvalidArgumentError(f"dtype={dtype!r} must be auto, {', '.join(_DTYPES)}")
    return _DTYPES[dtype]


def _locate(name: str | Path) -> tuple[str, dict[str, Any]]:
    """Return what transformers calls the model: a folder or hub id, and the file in it if GGUF."""
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
    """Turn whatever transformers raises while loading into one line."""
    try:
        yield
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
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Run without dropout and without gradients, and leave the model's mode as it was."""
    training = model.training
    if training:
        model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        if training:
            model.train()


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Silence the bars for reading and writing weights; downloads still show theirs."""
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
