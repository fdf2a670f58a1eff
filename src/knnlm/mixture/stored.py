"""What `tune` stores of a mixture beyond the parameters of each datastore, kept with the first."""

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from knnlm.errors import DatastoreCorruptError
from knnlm.mixture.by_distance import BucketedLambda
from knnlm.mixture.continuous_cache import CacheParameters
from knnlm.mixture.gate import LearnedGate
from knnlm.mixture.parameters import Parameters
from knnlm.mixture.search_gate import SearchGate
from knnlm.rules import check_lmbda


@dataclass(frozen=True, slots=True)
class TunedMixture:
    """A continuous cache that suits the text, and the weights that were fitted to it.

    cache, lmbdas: the cache with its λ, and the λ of each datastore that go with it, where weights
    are fixed. by_distance: λ of a single datastore by the nearest distance, with its own k and T.
    gate: chooses the weights of the language model and the datastores; cache_gate: of these and the
    cache. None where the tuning text was too short; a gate also where fixed weights predict better.
    search_gate: says where a search matters.
    """

    cache: CacheParameters
    lmbdas: tuple[float, ...]
    by_distance: BucketedLambda | None = None
    gate: LearnedGate | None = None
    cache_gate: LearnedGate | None = None
    search_gate: SearchGate | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values, for JSON."""
        gates = {"gate": self.gate, "cache_gate": self.cache_gate}
        learned = {name: gate for name, gate in gates.items() if gate is not None}
        parts = {name: gate.state_dict() for name, gate in learned.items()}
        if self.by_distance is not None:
            parts["by_distance"] = asdict(self.by_distance)
        if self.search_gate is not None:
            parts["search_gate"] = asdict(self.search_gate)
        data = save(
            {
                f"{name}.{part}": tensor.contiguous()
                for name, tensors in parts.items()
                for part, tensor in tensors.items()
            }
        )
        return {
            "cache": asdict(self.cache),
            "lmbdas": list(self.lmbdas),
            "gates": {name: gate.to_dict() for name, gate in learned.items()},
            "tensors": base64.b64encode(data).decode("ascii"),
            "sha256": hashlib.sha256(data).hexdigest(),
        }

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> "TunedMixture":
        """Undo `to_dict`; raises DatastoreCorruptError."""
        try:
            data = base64.b64decode(stored["tensors"])
            if hashlib.sha256(data).hexdigest() != stored["sha256"]:
                raise ValueError("its contents differ from their checksum")
            parts: dict[str, dict[str, Tensor]] = {}
            for name, tensor in load(data).items():
                owner, _, part = name.partition(".")
                parts.setdefault(owner, {})[part] = tensor
            cache = dict(stored["cache"])
            cache["votes"] = Parameters(**cache["votes"])
            for lmbda in stored["lmbdas"]:
                check_lmbda(lmbda)
            buckets = parts.get("by_distance")
            searches = parts.get("search_gate")
            return cls(
                CacheParameters(**cache),
                tuple(stored["lmbdas"]),
                None if buckets is None else BucketedLambda(**buckets),
                **{
                    name: LearnedGate.from_dict(gate, parts[name])
                    for name, gate in stored["gates"].items()
                },
                search_gate=None if searches is None else SearchGate.from_tensors(searches),
            )
        except (KeyError, TypeError, ValueError, SafetensorError) as error:
            raise DatastoreCorruptError(
                f"the stored mixture cannot be read ({error}): tune the datastore again"
            ) from error
