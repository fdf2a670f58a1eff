"""Nearest-neighbor language models: a memory for any Hugging Face causal language model."""
