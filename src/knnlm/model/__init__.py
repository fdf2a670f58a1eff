"""Hugging Face language models: their keys, their scores, and how text reaches them."""
