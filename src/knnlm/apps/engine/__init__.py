"""The batching engine: many completions on one model; knows no network protocol."""
