"""How fast whole models are: INT8 by halfweight beside 16 bits by transformers, on this machine.

Every rival runs in a fresh process, so that neither allocator caches nor compiled code of one
serve another. `Folders` names the two checkpoints of one model; a rival is a way to open it.
"""

from __future__ import annotations

import math
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")
SIXTEEN_BIT = "transformers 16-bit"
HALFWEIGHT = "halfweight"
HALFWEIGHT_INT8 = "halfweight int8 activations"
TORCHAO = "torchao int8 weight-only"
LONGEST_WAIT_SECONDS = 3600.0
GOODBYE_SECONDS = 10.0


@dataclass(frozen=True)
class Folders:
    """One model twice: the 16-bit checkpoint and what `halfweight quantize` made of it."""

    source: Path
    quantized: Path


def from_fresh_process(
    rows: Callable[..., Iterator[T]], *arguments: Any, deadline: float = math.inf
) -> Iterator[T]:
    """What the generator `rows(*arguments)` yields, run in a new python process; all must pickle.

    Raises RuntimeError with the line of its error if it fails, and ends it without a word at
    `deadline` of time.monotonic.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_send_rows, args=(theirs, rows, arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        while ours.poll(min(max(0.0, deadline - time.monotonic()), LONGEST_WAIT_SECONDS)):
            row = _receive(ours)
            if row is None:
                process.join(GOODBYE_SECONDS)
                return
            yield row
    finally:
        process.kill()
        process.join()


def _send_rows(
    connection: Connection, rows: Callable[..., Iterator[Any]], arguments: tuple[Any, ...]
) -> None:
    try:
        for row in rows(*arguments):
            connection.send(row)
        connection.send(None)
    except Exception as error:
        connection.send(RuntimeError(f"{type(error).__name__}: {error}".splitlines()[0][:300]))
        raise


def _receive(connection: Connection) -> Any:
    try:
        row = connection.recv()
    except EOFError:
        raise RuntimeError("the process ended without a result (killed for memory?)") from None
    if isinstance(row, Exception):
        raise row
    return row


def open_model(rival: str, folders: Folders, device: torch.device) -> Any:
    """The model as `rival` loads it, on `device`, ready for inference."""
    opened = RIVALS[rival](folders, device)
    return opened.eval().requires_grad_(False)


def _sixteen_bit(folders: Folders, device: torch.device) -> Any:
    from transformers import AutoModelForCausalLM

    dtype = activation_dtype(device)
    return AutoModelForCausalLM.from_pretrained(
        folders.source, dtype=dtype, device_map={"": device}
    )


def _halfweight(folders: Folders, device: torch.device, activations: Any = "exact") -> Any:
    from halfweight.hf import load

    dtype = activation_dtype(device)
    return load(folders.quantized, device=device, dtype=dtype, activations=activations)


def _torchao(folders: Folders, device: torch.device) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = _sixteen_bit(folders, device)
    quantize_(model, Int8WeightOnlyConfig())
    return model


RIVALS: dict[str, Callable[[Folders, torch.device], Any]] = {
    SIXTEEN_BIT: _sixteen_bit,
    HALFWEIGHT: _halfweight,
    HALFWEIGHT_INT8: lambda folders, device: _halfweight(folders, device, "int8"),
    TORCHAO: _torchao,
}


def activation_dtype(device: torch.device) -> torch.dtype:
    """float16 on a GPU; bfloat16 on a CPU."""
    return torch.float16 if device.type == "cuda" else torch.bfloat16


def synchronize(device: torch.device) -> None:
    """Wait for the device; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class HostMemory:
    """Peak of this process's own memory (anonymous pages, not the page cache's) inside a block.

    `peak_bytes` counts from the block's start, sampled every few milliseconds;
    `peak_resident_bytes` is the kernel's high-water mark of the process, mapped files included.
    """

    def __enter__(self) -> HostMemory:
        self._begin = self._peak = _status_bytes("RssAnon")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.peak_bytes = self._peak - self._begin
        self.peak_resident_bytes = _status_bytes("VmHWM")

    def _sample(self) -> None:
        while not self._stop.is_set():
            self._peak = max(self._peak, _status_bytes("RssAnon"))
            time.sleep(0.005)


def _status_bytes(field: str) -> int:
    """A size that the kernel keeps of this process; 0 where there is no /proc."""
    with suppress(OSError), open("/proc/self/status") as file:
        for line in file:
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    return 0
