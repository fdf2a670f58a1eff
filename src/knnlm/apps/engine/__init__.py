"""The batching engine: many completions on one model. Knows no protocol and no network.

A sampling option is in `sampling`, a limit in `limits`, a metric in `metrics`.
"""
