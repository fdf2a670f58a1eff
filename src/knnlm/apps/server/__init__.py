"""The completions server: OpenAI's protocol in front of a kNN-LM."""
