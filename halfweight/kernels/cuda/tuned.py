"""How far the model of tiles.py is off on a card of this machine, form by form, as measured there.

`halfweight bench kernels --tune` measures and keeps it in the cache folder, by architecture and
multiprocessors; without such a file the estimates stand as they are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch

from halfweight.cache_folder import cache_folder, write_whole
from halfweight.kernels.cuda.driver import num_multiprocessors
from halfweight.kernels.cuda.tiles import SHAPES, Shape


def path_of(device: int) -> Path:
    """Where a device's ratios are kept."""
    major, minor = torch.cuda.get_device_capability(device)
    return cache_folder() / f"tiles-sm_{major}{minor}-{num_multiprocessors(device)}.json"


@cache
def ratios_of(device: int) -> Mapping[Shape, float]:
    """Measured times as multiples of estimates; empty where nothing was measured."""
    path = path_of(device)
    if not path.is_file():
        return {}
    found = json.loads(path.read_text())
    return {shape: found[shape.name] for shape in SHAPES if shape.name in found}


def keep(device: int, ratios: Mapping[Shape, float]) -> Path:
    """Write ratios for later runs, and use them in this one from the next choice on."""
    path = path_of(device)
    named = {shape.name: round(ratio, 3) for shape, ratio in ratios.items()}
    write_whole(path, (json.dumps(named, indent=1) + "\n").encode())
    ratios_of.cache_clear()
    return path
