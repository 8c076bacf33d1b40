"""`device_map` of transformers, as far as a model in INT8 has one: the name of one device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from halfweight.errors import UsageError
from halfweight.memory.device_memory import DEVICE_HINT, indexed

CHOSEN_FOR_THE_USER = ("auto", "balanced", "balanced_low_0", "sequential")


def one_device(device_map: Any) -> torch.device:
    """The device that all of a map names: None is the CPU, "auto" a GPU where there is one.

    Raises UsageError for a map over several devices or to disk, which torch's hooks between layers
    would have to serve.
    """
    found = set(device_map.values()) if isinstance(device_map, Mapping) else {device_map}
    if len(found) > 1 or "disk" in found:
        raise UsageError(
            f"device_map puts the model on {', '.join(sorted(map(str, found)))}, "
            "expected one device",
            hint="device_map='cuda:0' takes one GPU; `halfweight plan` says what fits on it",
        )
    (name,) = found or {None}
    if name is None:
        return torch.device("cpu")
    if str(name) == "meta":
        raise UsageError("device_map is meta, where nothing is computed", hint=DEVICE_HINT)
    if name in CHOSEN_FOR_THE_USER:
        return indexed("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return indexed(torch.device("cuda", name) if type(name) is int else torch.device(name))
    except (RuntimeError, TypeError) as error:
        raise UsageError(
            f"device_map is {device_map!r}, expected the name of a device",
            hint="'auto', 'cpu', 'cuda', 'cuda:1' or {'': 'cuda:0'}",
        ) from error
