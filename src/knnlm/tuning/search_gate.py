"""Fitting a search gate: which searches gain little can be told from the language model alone."""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from knnlm.mixture.lm_summary import LMSummary
from knnlm.mixture.rows import select
from knnlm.mixture.search_gate import SHARES, SearchGate, search_features

_UNITS = 64
_MOST_NATS = 3.0  # of a single token: rare large gains would rule the fit
_PENALTY = 10.0  # of the units' weights,
_KEY_PENALTY = 1e4  # and of the key's coordinates, of which there may be thousands
_TOKENS_AT_ONCE = 4096


def fit_search_gate(
    lm: LMSummary,
    keys: Float[Tensor, "token dim"],
    gains: Float[Tensor, " token"],
    seed: int = 0,
) -> SearchGate:
    """Fit a gate to the nats that a search gained for each token of a text: log p − log p_LM.

    Ridge regression on random units (of entropy and maximum) and the key, all in standard units.
    Equal numbers and an equal seed give an equal gate.
    """
    generator = torch.Generator().manual_seed(seed)
    scale, mean = torch.std_mean(search_features(lm, keys), dim=0, correction=0)
    hidden = torch.randn(2, _UNITS, generator=generator) * 0.6
    bias = torch.empty(_UNITS).uniform_(-2, 2, generator=generator)
    bias[0], hidden[:, 0] = 2.0, 0.0  # a constant
    count = _UNITS + keys.shape[1]
    gate = SearchGate(
        mean, scale.clamp_min(1e-3), hidden, bias, torch.zeros(count), torch.zeros(SHARES)
    )
    goals = gains.double().clamp(-_MOST_NATS, _MOST_NATS)
    penalty = torch.full((count,), _KEY_PENALTY, dtype=torch.float64)
    penalty[:_UNITS] = _PENALTY
    products, moments = torch.diag(penalty), torch.zeros(count, dtype=torch.float64)
    for start in range(0, len(goals), _TOKENS_AT_ONCE):
        some = slice(start, start + _TOKENS_AT_ONCE)
        inputs = gate.inputs(select(lm, some), keys[some]).double()
        products += inputs.T @ inputs
        moments += inputs.T @ goals[some]
    gate = replace(gate, output=torch.linalg.solve(products, moments).float())
    expected = gate(lm, keys).double().sort().values
    places = torch.linspace(0, len(expected) - 1, SHARES).round().long()
    return replace(gate, least_gains=expected[places].float())
