"""Load times: file to device, page cache warm, packages imported and the device awake."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from halfweight.evaluation.speed.process import HostMemory, from_fresh_process
from halfweight.evaluation.speed.rivals import (
    HALFWEIGHT,
    SIXTEEN_BIT,
    Folders,
    open_model,
    synchronize,
)

COMPARED = (SIXTEEN_BIT, HALFWEIGHT)
READ_BYTES = 16 << 20


@dataclass(frozen=True)
class LoadTime:
    """One load by one rival.

    `resident_bytes` is the device's memory after it (of a CPU: the parameters), `peak_device_bytes`
    during it; `peak_host_bytes` the process's own memory beyond what it had before.
    """

    rival: str
    seconds: float
    file_bytes: int
    resident_bytes: int
    peak_device_bytes: int
    peak_host_bytes: int
    peak_host_resident_bytes: int


@dataclass(frozen=True)
class LoadComparison:
    """Medians over the repeats: how much faster, and how much smaller, the INT8 model is."""

    speedup: float
    bytes_change: float
    bytes_per_second: float


def compare(
    folders: Folders,
    device: torch.device,
    *,
    repeats: int = 5,
    deadline: float = math.inf,
    report: Callable[[LoadTime], None] = lambda _: None,
) -> list[LoadTime]:
    """Load each rival `repeats` times in turn, each in a fresh process, told to `report`.

    Stops early at `deadline` of time.monotonic.
    """
    found: list[LoadTime] = []
    for _ in range(repeats):
        for rival in COMPARED:
            job = (load_once, rival, folders, str(device))
            for row in from_fresh_process(*job, deadline=deadline):
                found.append(row)
                report(row)
    return found


def load_once(rival: str, folders: Folders, device_name: str) -> Iterator[LoadTime]:
    """Load once in this process, which should be a fresh one."""
    device = torch.device(device_name)
    folder = folders.source if rival == SIXTEEN_BIT else folders.quantized
    file_bytes = warm_page_cache(folder)
    _wake(device)
    with HostMemory() as host:
        begin = time.perf_counter()
        model = open_model(rival, folders, device)
        synchronize(device)
        seconds = time.perf_counter() - begin
    on_gpu = device.type == "cuda"
    parameters = sum(p.nbytes for p in model.parameters())
    yield LoadTime(
        rival,
        seconds,
        file_bytes,
        torch.cuda.memory_allocated(device) if on_gpu else parameters,
        torch.cuda.max_memory_allocated(device) if on_gpu else parameters,
        host.peak_bytes,
        host.peak_resident_bytes,
    )


def summarize(times: Sequence[LoadTime]) -> LoadComparison:
    """Both rivals' medians against each other; `times` holds both."""
    plain = [t for t in times if t.rival == SIXTEEN_BIT]
    ours = [t for t in times if t.rival == HALFWEIGHT]
    seconds = median(t.seconds for t in ours)
    return LoadComparison(
        speedup=median(t.seconds for t in plain) / seconds,
        bytes_change=ours[0].resident_bytes / plain[0].resident_bytes - 1,
        bytes_per_second=ours[0].file_bytes / seconds,
    )


def warm_page_cache(folder: Path) -> int:
    """Read every weight file once; returns their bytes."""
    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb", buffering=0) as file:
            while block := file.read(READ_BYTES):
                total += len(block)
    return total


def _wake(device: torch.device) -> None:
    """Import what both rivals import, and start the device, outside the timed part."""
    import transformers.models.llama.modeling_llama  # noqa: F401

    import halfweight.model.loading  # noqa: F401

    if device.type == "cuda":
        torch.zeros(1, device=device)
        torch.cuda.reset_peak_memory_stats(device)
    synchronize(device)
