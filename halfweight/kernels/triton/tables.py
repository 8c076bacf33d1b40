"""Which kernel and which tile for a product: a table measured on each GPU architecture.

An entry says what was fastest for one shape and batch. A product takes the entries of the smallest
batch that covers its own, and among them the nearest shape. The shipped table holds the
architectures that were measured, and a default for the others; `halfweight bench kernels --tune`
measures the GPU at hand and writes its table to the cache folder, where it comes first.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from math import log
from pathlib import Path
from typing import Literal

from halfweight.cache_folder import cache_folder, write_whole

Kernel = Literal["gemv", "matmul", "two_int8", "int8", "dequantize"]
DEFAULT = "default"
COMMON_SHAPE = (28672, 4096)
"""[N, K] of a weight of common size: a layer of an 8B model."""
REASONS: dict[Kernel, str] = {
    "gemv": "reading the weight is the limit: x stays in registers, rows stream past",
    "matmul": "16-bit tensor cores, bytes converted in registers",
    "two_int8": "int8 tensor cores, x in two int8 parts: nothing to convert",
    "dequantize": "arithmetic is the limit: blocks of the weight to 16 bits, then the vendor's",
}
"""Why a kernel is taken for exact products."""


@dataclass(frozen=True)
class Config:
    """One way to compute a product.

    tokens and rows are the tile (for gemv: rows a step); split is the number of parts of K.
    stages: blocks in flight; 1 for gemv means in registers, more in shared memory.
    per_processor: programs a multiprocessor is given, gemv only. max_registers of a thread: fewer
    than the compiler would take, so that more programs share a multiprocessor; NVIDIA only.
    """

    kernel: Kernel
    tokens: int = 16
    rows: int = 64
    split: int = 1
    warps: int = 4
    stages: int = 3
    per_processor: int = 4
    max_registers: int | None = None


@dataclass(frozen=True)
class Entry:
    """`config` was fastest for x [tokens, in_features] and a weight [out_features, in_features]."""

    tokens: int
    out_features: int
    in_features: int
    config: Config

    def distance(self, out_features: int, in_features: int) -> float:
        """How far another weight's shape is, in factors."""
        return abs(log(self.out_features / out_features)) + abs(log(self.in_features / in_features))


@dataclass(frozen=True)
class Table:
    """Entries for exact products (16-bit activations) and for int8 activations."""

    exact: tuple[Entry, ...]
    int8: tuple[Entry, ...]

    def find(self, tokens: int, shape: tuple[int, int], *, int8: bool = False) -> Config:
        """The configuration for `tokens` rows of x and a weight of `shape` [N, K]."""
        entries = self.int8 if int8 else self.exact
        covering = [e.tokens for e in entries if e.tokens >= tokens]
        batch = min(covering) if covering else max(e.tokens for e in entries)
        candidates = (e for e in entries if e.tokens == batch)
        return min(candidates, key=lambda e: e.distance(*shape)).config


def table_from_json(document: dict[str, list[dict[str, object]]]) -> Table:
    """A table from `{"exact": [entry, ...], "int8": [...]}`."""
    return Table(_entries(document["exact"]), _entries(document["int8"]))


def table_to_json(table: Table) -> dict[str, list[dict[str, object]]]:
    """The inverse of `table_from_json`."""
    return {
        "exact": [asdict(entry) for entry in table.exact],
        "int8": [asdict(entry) for entry in table.int8],
    }


def _entries(rows: Iterable[dict[str, object]]) -> tuple[Entry, ...]:
    return tuple(Entry(**{**row, "config": Config(**row["config"])}) for row in rows)  # type: ignore[arg-type]


def measured_table_path(architecture: str) -> Path:
    """Where `--tune` keeps the table of an architecture such as 'sm_90'."""
    return cache_folder() / f"kernels-{architecture}.json"


@cache
def table_for(architecture: str) -> Table:
    """The table of an architecture: measured here, else shipped, else the default."""
    measured = measured_table_path(architecture)
    if measured.is_file():
        return table_from_json(json.loads(measured.read_text()))
    shipped = json.loads(Path(__file__).with_name("tables.json").read_text())
    return table_from_json(shipped.get(architecture, shipped[DEFAULT]))


@lru_cache(maxsize=4096)
def best_config(
    architecture: str, tokens: int, shape: tuple[int, int], int8: bool = False
) -> Config:
    """`Table.find` of an architecture's table, remembered: it is asked at every launch."""
    return table_for(architecture).find(tokens, shape, int8=int8)


def kernels_by_tokens(architecture: str) -> list[tuple[int, Kernel]]:
    """For a weight of common size: from how many tokens on which kernel is taken."""
    batches = sorted({entry.tokens for entry in table_for(architecture).exact})
    found: list[tuple[int, Kernel]] = []
    for first, tokens in zip([1, *(batch + 1 for batch in batches)], batches, strict=False):
        kernel = best_config(architecture, tokens, COMMON_SHAPE).kernel
        if not found or kernel != found[-1][1]:
            found.append((first, kernel))
    return found


def write_table(architecture: str, table: Table) -> Path:
    """Keep a measured table; later products of this process use it too. Returns its path."""
    path = measured_table_path(architecture)
    write_whole(path, (json.dumps(table_to_json(table), indent=1) + "\n").encode())
    table_for.cache_clear()
    best_config.cache_clear()
    return path
