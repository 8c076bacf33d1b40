"""What was predicted and measured on this machine, kept for the next plan. No torch here.

A record is keyed by device, driver, torch, version of this package and architecture. The part that
cannot be computed (context, loaded kernels) is what a measurement adds: its total less what was
predicted to be allocated and the allocator's predicted slack. Each measurement also halves, thirds,
... what is left of the assumed uncertainty on both sides.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

from halfweight.cache_folder import cache_folder, write_whole
from halfweight.checkpoint.json_files import read_json
from halfweight.errors import CheckpointError
from halfweight.memory.architecture import Architecture
from halfweight.memory.devices import Device
from halfweight.memory.workload import ASSUMED_OVERHEAD, DeviceKind, Range

MOST_RECORDS = 500
"""The oldest go."""


@dataclass(frozen=True)
class Key:
    """What a measurement holds for."""

    device: str
    driver: str
    torch: str
    halfweight: str
    architecture: str


@dataclass(frozen=True)
class Record:
    """One measurement: bytes predicted and found, by component, and in all.

    `allocated` and `slack` are the plan's for the same workload.
    """

    key: Key
    workload: dict[str, int | str]
    predicted: dict[str, int]
    measured: dict[str, int]
    allocated: int
    slack: int
    predicted_total: int
    measured_total: int

    @property
    def error(self) -> float:
        """Predicted over measured total, less 1."""
        return self.predicted_total / self.measured_total - 1

    @property
    def process(self) -> int:
        """What the process took beside all that the plan counts."""
        return self.measured_total - self.allocated - self.slack


def key_of(device: Device, a: Architecture) -> Key:
    """The key of this machine's device, as installed now, for an architecture."""
    from halfweight import __version__

    sizes = f"{len(a.cache_layers)} x {a.hidden}/{a.intermediate}"
    heads = f"{a.heads}/{a.kv_heads} x {a.head_dim}, {a.vocabulary}"
    return Key(device.name, device.driver, _version("torch"), __version__, f"{sizes}, {heads}")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def records_path() -> Path:
    """Where the records of this user's machine are."""
    return cache_folder() / "memory.json"


def read_records() -> list[Record]:
    """All records; none where there is no file or one of another form."""
    path = records_path()
    if not path.is_file():
        return []
    try:
        found = read_json(path).get("records", [])
        return [Record(**{**row, "key": Key(**row["key"])}) for row in found]
    except (CheckpointError, TypeError, KeyError):
        return []


def add_record(record: Record) -> Path:
    """Keep a record; of the same key and workload only the newest stays. Returns the file."""
    same = (record.key, record.workload)
    kept = [r for r in read_records() if (r.key, r.workload) != same][1 - MOST_RECORDS :]
    path = records_path()
    document = {"records": [asdict(r) for r in (*kept, record)]}
    write_whole(path, (json.dumps(document, indent=1) + "\n").encode())
    return path


def records_for(key: Key) -> list[Record]:
    """What was measured of this very device, software and architecture."""
    return [record for record in read_records() if record.key == key]


def calibrated_overhead(records: Sequence[Record], device: DeviceKind) -> Range:
    """What the process took in the records; the assumption without any."""
    assumed = ASSUMED_OVERHEAD[device]
    if not records:
        return assumed
    found = [record.process for record in records]
    share, likely = len(found) + 1, int(median(found))
    return Range(
        max(0, min(found) - (assumed.likely - assumed.low) // share),
        likely,
        max(found) + (assumed.high - assumed.likely) // share,
    )
