"""Where tensors are computed: the devices that an argument may name."""

import torch

from knnlm.errors import InvalidArgumentError


def parse_device(device: str) -> torch.device:
    """Return the device of a name: auto (cuda if there is one, else cpu), cpu, cuda, cuda:N, mps.

    Raises InvalidArgumentError for another name, and for a device that this machine lacks.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        parsed = torch.device(device)
    except (RuntimeError, ValueError):  # ValueError: no UTF-8
        parsed = torch.device("meta")
    available = {
        "cpu": 1,
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
    }
    if parsed.type not in available:
        raise InvalidArgumentError(f"device={device!r} must be auto, cpu, cuda, cuda:N or mps")
    if (parsed.index or 0) >= available[parsed.type]:
        raise InvalidArgumentError(
            f"device={device!r} must exist, but this machine has {available[parsed.type]} "
            f"of the kind {parsed.type}; use device='auto'"
        )
    return parsed
