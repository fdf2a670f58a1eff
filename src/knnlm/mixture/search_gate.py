"""The search gate: whether a search can be expected to matter, from the language model alone.

He et al. 2021 (adaptive retrieval). Where neighbors change little, they need not be searched for.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from knnlm.errors import DatastoreCorruptError
from knnlm.mixture.lm_summary import LMSummary
from knnlm.rules import check_share

SHARES = 101
"""Of how many shares of the searches, from 0 to 1, a gate knows the least gain."""

_LARGEST_FEATURE = 5.0  # in standard deviations


@dataclass(frozen=True, slots=True, eq=False)
class SearchGate:
    """Expects how many nats a search gains, from the key, and from entropy and maximum of p_LM.

    mean, scale: of entropy, log max p_LM and the key's coordinates in the text that it was fitted
    to. hidden, bias: of units that see entropy and maximum. output: the weights of the units and
    the key's coordinates. least_gains: the expected gains below which the searches of 0 %, 1 %, …,
    100 % of that text's tokens lie.
    """

    mean: Float[Tensor, " feature"]
    scale: Float[Tensor, " feature"]
    hidden: Float[Tensor, "2 unit"]
    bias: Float[Tensor, " unit"]
    output: Float[Tensor, " input"]
    least_gains: Float[Tensor, " share"]

    def __call__(self, lm: LMSummary, keys: Float[Tensor, "query dim"]) -> Float[Tensor, " query"]:
        """Return the expected gain of each query's search, in nats up to a constant; on the CPU."""
        return self.inputs(lm, keys) @ self.output

    def inputs(
        self, lm: LMSummary, keys: Float[Tensor, "query dim"]
    ) -> Float[Tensor, "query input"]:
        """Return what the gate's output is linear in: its units, then the key's coordinates."""
        features = (search_features(lm, keys) - self.mean) / self.scale
        features = features.clamp(-_LARGEST_FEATURE, _LARGEST_FEATURE)
        units = torch.tanh(features[:, :2] @ self.hidden + self.bias)
        return torch.cat([units, features[:, 2:]], dim=1)

    def least_gain(self, share: float) -> float:
        """Return the expected gain below which about this share of searches lies; −∞ for 0.

        Raises InvalidArgumentError for a share outside [0, 1].
        """
        place = check_share("share", share) * (SHARES - 1)
        if place == 0:
            return -torch.inf
        low = min(int(place), SHARES - 2)
        below, above = self.least_gains[low : low + 2].double().tolist()
        return float(below + (place - low) * (above - below))

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "SearchGate":
        """Return the gate of stored tensors; raises KeyError and DatastoreCorruptError."""
        gate = cls(**{name: tensors[name] for name in cls.__dataclass_fields__})
        units, inputs = len(gate.bias), len(gate.output)
        shapes = (gate.mean.shape, gate.scale.shape, gate.hidden.shape, gate.least_gains.shape)
        needed = ((inputs - units + 2,), (inputs - units + 2,), (2, units), (SHARES,))
        if shapes != needed:
            raise DatastoreCorruptError(
                "a stored search gate must have tensors whose shapes fit together, got "
                f"{', '.join(str(tuple(shape)) for shape in shapes)}: tune the datastore again"
            )
        return gate


def search_features(
    lm: LMSummary, keys: Float[Tensor, "query dim"]
) -> Float[Tensor, "query feature"]:
    """Return what a search gate sees of each query, on the CPU."""
    summary = torch.stack([lm.entropy, lm.log_prob], dim=1)
    return torch.cat([summary.detach().float().cpu(), keys.detach().float().cpu()], dim=1)
