"""What `tune` finds beyond the parameters of each datastore, as it is kept with the first one."""

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save

from knnlm.errors import DatastoreCorruptError
from knnlm.mixture.adaptive import LearnedGate
from knnlm.mixture.continuous_cache import CacheParameters
from knnlm.mixture.parameters import Parameters

_GATES = ("gate", "cache_gate")


@dataclass(frozen=True, slots=True)
class TunedMixture:
    """A continuous cache that suits the text, and gates that choose the weights of each token.

    cache, lmbdas: the cache, with its λ, and each datastore's λ beside it, where weights are fixed.
    gate: of the language model and the datastores, cache_gate: of these and the cache; None where
    the tuning text was too short for one, or fixed weights predict it better.
    """

    cache: CacheParameters
    lmbdas: tuple[float, ...]
    gate: LearnedGate | None = None
    cache_gate: LearnedGate | None = None

    def to_plain(self) -> dict[str, Any]:
        """Return all of it as plain values, for JSON."""
        gates = {name: gate for name in _GATES if (gate := getattr(self, name)) is not None}
        tensors = {
            f"{name}.{part}": tensor.contiguous()
            for name, gate in gates.items()
            for part, tensor in gate.to_tensors().items()
        }
        data = save(tensors)
        return {
            "cache": asdict(self.cache),
            "lmbdas": list(self.lmbdas),
            "gates": {name: gate.describe() for name, gate in gates.items()},
            "tensors": base64.b64encode(data).decode("ascii"),
            "sha256": hashlib.sha256(data).hexdigest(),
        }

    @classmethod
    def from_plain(cls, stored: Mapping[str, Any]) -> "TunedMixture":
        """Undo `to_plain`; raises DatastoreCorruptError."""
        try:
            data = base64.b64decode(stored["tensors"])
            if hashlib.sha256(data).hexdigest() != stored["sha256"]:
                raise ValueError("its contents differ from their checksum")
            tensors = load(data)
            cache = dict(stored["cache"])
            cache["votes"] = Parameters(**cache["votes"])
            gates = {
                name: LearnedGate.from_tensors(
                    {
                        part.removeprefix(f"{name}."): tensor
                        for part, tensor in tensors.items()
                        if part.startswith(f"{name}.")
                    },
                    description,
                )
                for name, description in stored["gates"].items()
            }
            return cls(CacheParameters(**cache), tuple(stored["lmbdas"]), **gates)
        except (KeyError, TypeError, ValueError, SafetensorError) as error:
            raise DatastoreCorruptError(
                f"the stored mixture cannot be read ({error}): tune the datastore again"
            ) from error
