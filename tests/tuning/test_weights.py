"""The gain of a mixture over the LM, and the λ that give the largest, against slow arithmetic."""

import math

import pytest
import torch

from knnlm.tuning.weights import fit_weights, log_gains, relative_probs


def test_gains_are_those_of_the_mixture() -> None:
    generator = torch.Generator().manual_seed(0)
    lm = torch.rand(20, generator=generator, dtype=torch.float64)
    probs = torch.rand(20, 2, generator=generator, dtype=torch.float64)
    lmbdas = [0.2, 0.5]
    expected = torch.log(0.3 * lm + 0.2 * probs[:, 0] + 0.5 * probs[:, 1]) - lm.log()
    torch.testing.assert_close(log_gains(probs / lm[:, None], lmbdas), expected)
    of_tokens = torch.rand(20, 1, generator=generator, dtype=torch.float64)
    expected = torch.log((1 - of_tokens[:, 0]) * lm + of_tokens[:, 0] * probs[:, 0]) - lm.log()
    torch.testing.assert_close(log_gains(probs[:, :1] / lm[:, None], of_tokens), expected)
    assert log_gains(probs / lm[:, None], 0.0).tolist() == [0.0] * 20


def test_a_component_without_votes_leaves_the_lm_alone() -> None:
    lm = torch.tensor([-1.0, -2.0, -900.0])
    ratios = relative_probs(
        torch.tensor([-0.5, -torch.inf, 0.0]), lm, torch.tensor([True, False, True])
    )
    assert ratios[:2].tolist() == pytest.approx([math.exp(0.5), 1.0])
    assert math.isfinite(float(ratios[2])), "however small p_LM is"


def test_weights_are_the_best_on_a_grid() -> None:
    generator = torch.Generator().manual_seed(1)
    ratios = torch.randn(400, 2, generator=generator, dtype=torch.float64).mul(2).exp()
    found = float(log_gains(ratios, fit_weights(ratios)).mean())
    best = max(
        float(log_gains(ratios, [a / 50, b / 50]).mean()) for a in range(51) for b in range(51 - a)
    )
    assert found > best - 1e-4
