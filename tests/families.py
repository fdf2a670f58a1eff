"""One tiny random model of every family that the toolkit is tested on."""

from collections.abc import Callable

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

VOCAB_SIZE = 384

# Sizes under the names that most families share; a family's own names follow in the table.
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}

CONFIGS: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("LlamaConfig", {}),
    "gpt2": ("GPT2Config", {"n_inner": 64}),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "opt": ("OPTConfig", {"ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.2}),
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
    "gemma3": (
        "Gemma3TextConfig",
        {"sliding_window": 64, "query_pre_attn_scalar": 8, "head_dim": 8},
    ),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "phi3": ("Phi3Config", {}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "falcon": ("FalconConfig", {}),
    "bloom": ("BloomConfig", {"max_position_embeddings": None}),
    "mamba": ("MambaConfig", {"state_size": 4, "max_position_embeddings": None}),
    "olmo2": ("Olmo2Config", {}),
    "gemma2": ("Gemma2Config", {"sliding_window": 64, "query_pre_attn_scalar": 8, "head_dim": 8}),
    "phi": ("PhiConfig", {}),
    "falcon_two_norms": (
        "FalconConfig",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 2},
    ),
    "opt_post_norm": (
        "OPTConfig",
        {
            "ffn_dim": 64,
            "word_embed_proj_dim": 16,
            "do_layer_norm_before": False,
            "init_std": 0.2,
        },
    ),
    "gptj": ("GPTJConfig", {"n_inner": 64, "rotary_dim": 4}),
    "stablelm": ("StableLmConfig", {}),
    "cohere": ("CohereConfig", {}),
}


def _builder(config_name: str, own: dict[str, object]) -> Callable[[], PreTrainedModel]:
    def build() -> PreTrainedModel:
        torch.manual_seed(0)
        config = getattr(transformers, config_name)(**{**SIZES, **own})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        # Norms start as ones and zeros, and one could not be told from another.
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
        return model

    return build


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    family: _builder(*config) for family, config in CONFIGS.items()
}
