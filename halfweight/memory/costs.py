"""What converting, loading and serving a model take besides device memory. No torch here.

Nothing is invented: rates are given by the caller or measured on the machine (`read_rate`), and
what a benchmark of this project measured is named with it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from halfweight.checkpoint.layout import lay_out
from halfweight.errors import UsageError
from halfweight.memory.plan import Model, footprint, on_ranks
from halfweight.memory.what_fits import solve
from halfweight.memory.workload import MIB, Weights, Workload

CONVERTER_PROCESS_BYTES = 436_000_000
"""Most resident memory of a conversion of 8.2 GB, two threads: benchmarks/results/convert.json."""
CONVERTER_BLOCK_BYTES = 1_000_000
"""As in shard_writer.py; a test keeps them equal."""
CONVERTED_BYTES_PER_SECOND = 1.2e9
"""BF16 that one core turns into INT8: docs/decisions.md."""
STAGING_BYTES = 128 * MIB
"""Host memory while loading to a GPU, as in weight_reader.py; a test keeps them equal."""
READ_SAMPLE_BYTES = 1 << 30


@dataclass(frozen=True)
class Conversion:
    """What `halfweight quantize` takes. `seconds` is None without a bandwidth."""

    source_bytes: int
    disk_bytes: int
    num_files: int
    ram_bytes: int
    seconds: float | None


@dataclass(frozen=True)
class Loading:
    """Reading the files once; seconds are None without a bandwidth."""

    sixteen_bit_bytes: int
    int8_bytes: int
    staging_bytes: int
    sixteen_bit_seconds: float | None
    int8_seconds: float | None


@dataclass(frozen=True)
class Serving:
    """The fewest GPUs that hold the workload, and the bytes each reads for one token a sequence.

    A decode step takes as long as its reading, so cost is GPUs x bytes. None where none fit.
    """

    sixteen_bit_gpus: int | None
    int8_gpus: int | None
    sixteen_bit_step_bytes: int | None
    int8_step_bytes: int | None
    price: float | None

    @property
    def relative_cost(self) -> float | None:
        """GPUs x time of INT8 over those of 16 bits; None where either does not fit."""
        values = (
            self.sixteen_bit_gpus,
            self.int8_gpus,
            self.sixteen_bit_step_bytes,
            self.int8_step_bytes,
        )
        before, after, read_before, read_after = values
        if before is None or after is None or read_before is None or read_after is None:
            return None
        return after * read_after / (before * read_before)


def conversion(
    model: Model, read_rate: float | None = None, cores: int | None = None
) -> Conversion:
    """RAM, disk and time of quantizing `model`, whose source is read and whose output is written
    through one disk of `read_rate` bytes a second.
    """
    assert model.recipe is not None
    cores = cores or os.cpu_count() or 1
    layout = lay_out(model.architecture.tensors, model.recipe)
    disk = sum(shard.num_bytes for shard in layout.shards)
    source = sum(decision.tensor.num_bytes for decision in model.decisions)
    largest = max(
        4 * prod(d.scheme.scales_shape((d.tensor.shape[0], d.tensor.shape[1])))
        for d in model.decisions
        if d.scheme
    )
    ram = CONVERTER_PROCESS_BYTES + 2 * (cores + 2) * CONVERTER_BLOCK_BYTES + largest
    seconds = None
    if read_rate is not None:
        seconds = max((source + disk) / read_rate, source / (CONVERTED_BYTES_PER_SECOND * cores))
    return Conversion(source, disk, len(layout.shards), ram, seconds)


def loading(model: Model, read_rate: float | None = None) -> Loading:
    """Bytes and time of loading either form."""
    before, after = model.sixteen_bit_bytes, model.disk_bytes
    times = [num_bytes / read_rate if read_rate else None for num_bytes in (before, after)]
    return Loading(before, after, STAGING_BYTES, *times)


def serving(model: Model, workload: Workload, budget: int, price: float | None = None) -> Serving:
    """GPUs of `budget` bytes needed for the workload in 16 bits and in INT8; `price` a GPU-hour."""
    kinds: tuple[Weights, Weights] = ("16bit", "int8")
    gpus = [solve(model, workload, budget, "gpus", weights) for weights in kinds]
    read = [
        None if count is None else step_bytes(model, on_ranks(model, workload, count), weights)
        for count, weights in zip(gpus, kinds, strict=True)
    ]
    return Serving(gpus[0], gpus[1], read[0], read[1], price)


def step_bytes(model: Model, workload: Workload, weights: Weights) -> int:
    """Bytes a rank reads for one token of every sequence: weights and the whole cache.

    An embedding that is not the head as well is gathered, not read. Of a mixture of experts all
    count, as in a large batch.
    """
    found = footprint(model, workload, weights)
    names = [tensor.name for tensor in model.architecture.tensors]
    tied = not any(name.endswith("lm_head.weight") for name in names)
    if tied:
        return found.weight_bytes + found.kv_bytes
    table = tuple(d for d in model.decisions if "embed_tokens" in d.tensor.name)
    alone = replace(model, decisions=table)
    return found.weight_bytes - footprint(alone, workload, weights).weight_bytes + found.kv_bytes


def read_rate(files: Sequence[Path]) -> float:
    """Bytes a second of reading up to a GiB of these files from the disk, not the page cache."""
    if not files:
        raise UsageError(
            "no file of the model is here to measure reading with",
            hint="give a rate, as --read-bandwidth 3GB",
        )
    done, begin = 0, time.perf_counter()
    for path in files:
        with open(path, "rb", buffering=0) as file:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while done < READ_SAMPLE_BYTES and (block := file.read(16 << 20)):
                done += len(block)
    return done / (time.perf_counter() - begin)
