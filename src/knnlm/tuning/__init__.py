"""Fitting k, temperature, λ and learned weights to held-out text."""
