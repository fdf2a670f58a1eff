"""What `tune` finds beyond the parameters of each datastore, as it is kept with the first one."""

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from knnlm.errors import DatastoreCorruptError
from knnlm.mixture.continuous_cache import CacheParameters
from knnlm.mixture.gate import BucketedLambda, LearnedGate
from knnlm.mixture.parameters import Parameters

_GATES = ("gate", "cache_gate")


@dataclass(frozen=True, slots=True)
class TunedMixture:
    """A continuous cache that suits the text, and gates that choose the weights of each token.

    cache, lmbdas: the cache, with its λ, and each datastore's λ beside it, where weights are fixed.
    by_distance: λ of one datastore by the nearest distance, beside its own k and T. gate: of the
    language model and the datastores, cache_gate: of these and the cache. None where the tuning
    text was too short for one; a gate, too, where fixed weights predict it better.
    """

    cache: CacheParameters
    lmbdas: tuple[float, ...]
    by_distance: BucketedLambda | None = None
    gate: LearnedGate | None = None
    cache_gate: LearnedGate | None = None

    def to_plain(self) -> dict[str, Any]:
        """Return all of it as plain values, for JSON."""
        gates = {name: gate for name in _GATES if (gate := getattr(self, name)) is not None}
        parts: dict[str, BucketedLambda | LearnedGate] = dict(gates)
        if self.by_distance is not None:
            parts["by_distance"] = self.by_distance
        tensors = {
            f"{name}.{part}": tensor.contiguous()
            for name, of_name in parts.items()
            for part, tensor in of_name.to_tensors().items()
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
            parts: dict[str, dict[str, Tensor]] = {}
            for name, tensor in tensors.items():
                of_name, _, part = name.partition(".")
                parts.setdefault(of_name, {})[part] = tensor
            buckets = parts.get("by_distance")
            return cls(
                CacheParameters(**cache),
                tuple(stored["lmbdas"]),
                None if buckets is None else BucketedLambda.from_tensors(buckets),
                **{
                    name: LearnedGate.from_tensors(parts[name], description)
                    for name, description in stored["gates"].items()
                },
            )
        except (KeyError, TypeError, ValueError, SafetensorError) as error:
            raise DatastoreCorruptError(
                f"the stored mixture cannot be read ({error}): tune the datastore again"
            ) from error
