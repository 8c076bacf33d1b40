"""From a model's name to rank 0's runner, with all other ranks behind it."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch

from halfweight.checkpoint.headers import read_headers, resolve
from halfweight.engine.parallel.channel import Kind
from halfweight.engine.parallel.faults import BrokenLinkError
from halfweight.engine.parallel.job import Job, digest, limit_memory, local_store
from halfweight.engine.parallel.link import STEPPING, choose_backend, make_link
from halfweight.engine.parallel.outside import Place, lead
from halfweight.engine.parallel.ranks import STARTING_SECONDS, Ranks
from halfweight.engine.parallel.runner import SharedRunner
from halfweight.engine.runners import make_runner
from halfweight.errors import UsageError
from halfweight.memory.device_memory import indexed, named_device
from halfweight.model.share import check_shareable, described, load_part, own_part

log = logging.getLogger("halfweight")


@dataclass(frozen=True)
class Running:
    """Rank 0's runner and its part of the model."""

    runner: SharedRunner
    model: Any


def start(
    model: str | os.PathLike[str],
    ranks: int,
    devices: Sequence[str] | None,
    loading: dict[str, Any],
    limits: dict[str, Any],
    limit_bytes: int | None = None,
) -> Running:
    """Run a model on so many ranks, by default on as many GPUs, or on the CPU where there is none.

    `loading` are options of `halfweight.load`, `limits` of `make_runner`; no rank gets more than
    `limit_bytes` of its GPU. Raises UsageError, before anything is started, for a model or a number
    that cannot be divided; what a rank raises; and RankError where one is lost.
    """
    name = os.fspath(model)
    folder = resolve(name)
    check_shareable(described(folder), ranks)
    place = Place.found()
    if place is not None and (place.rank, place.ranks) != (0, ranks):
        raise UsageError(
            f"this is rank {place.rank} of {place.ranks}, and {ranks} ranks were asked for",
            hint="ranks other than 0 call `parallel.outside.follow`; start as many as you ask for",
        )
    chosen = [] if place is not None else choose_devices(ranks, devices)
    job = Job(
        str(folder.absolute()) if os.path.exists(name) else name,
        tuple(map(str, chosen)),
        choose_backend(chosen) if chosen else _backend_outside(devices),
        loading=_sendable(loading),
        limits=limits,
        num_threads=max(1, torch.get_num_threads() // ranks),
        limit_bytes=limit_bytes,
        log_level=log.getEffectiveLevel(),
    )
    others, store = lead(ranks) if place is not None else (Ranks.start(ranks), local_store())
    if place is None:
        job = replace(job, port=store.port)
    made = ExitStack()
    try:
        return _lead(job, store, others, loading, made)
    except BaseException as error:
        fault = others.explain(error) if isinstance(error, BrokenLinkError) else None
        others.end()
        with suppress(RuntimeError):  # of a device that is lost
            made.close()
        if fault is not None:
            raise fault from error
        raise


def _backend_outside(devices: Sequence[str] | None) -> str:
    """Of ranks that each take the GPU of their LOCAL_RANK, if there are any."""
    on_cpu = devices is not None and all(device.startswith("cpu") for device in devices)
    return "nccl" if torch.cuda.is_available() and not on_cpu else "gloo"


def _lead(job: Job, store: Any, others: Ranks, loading: dict[str, Any], made: ExitStack) -> Running:
    """Be rank 0 until the runner is made; `made` closes what there is of it."""
    ranks, device = len(others.members) + 1, job.device_of(0)
    others.wait_for(Kind.HELLO, STARTING_SECONDS)
    others.send(Kind.JOB, job.to_bytes())
    limit_memory(job, 0)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    checkpoint = read_headers(resolve(job.model))
    part = own_part(checkpoint, described(checkpoint.root), 0, ranks)
    others.wait_for(Kind.FOUND)
    _compare_files(others, digest(part))
    link = make_link(
        *(store, 0, ranks, device),
        backend=job.backend,
        is_local=job.is_local,
        on_fault=others.on_fault,
    )
    made.callback(link.close)
    model = load_part(checkpoint, 0, ranks, link, **{**loading, "device": device})
    others.wait_for(Kind.LOADED)
    others.send(Kind.GO)
    own = make_runner(model, **job.limits)
    made.callback(own.close)
    others.wait_for(Kind.READY)
    if hasattr(own, "release"):
        raise UsageError(
            f"{type(model).__name__} runs here without pages alone, which ranks cannot share",
            hint="the log (-v) says why not over pages; run it on one device, or in another dtype",
        )
    link.set_timeout(STEPPING)
    return Running(SharedRunner(own, others, link), model)


def choose_devices(ranks: int, devices: Sequence[str] | None) -> list[torch.device]:
    """A device for each rank; raises UsageError where there are too few, or other than so many."""
    if devices is not None:
        found = [indexed(named_device(name)) for name in devices]
        if len(found) != ranks:
            raise UsageError(
                f"{len(found)} devices for {ranks} ranks", hint="name one device for each rank"
            )
        return found
    count = torch.cuda.device_count()
    if count == 0:
        return [torch.device("cpu")] * ranks
    if count < ranks:
        raise UsageError(
            f"{ranks} ranks, and this machine has {count} GPUs",
            hint="name the devices, one for each rank: several may be the same",
        )
    return [torch.device("cuda", i) for i in range(ranks)]


def _sendable(loading: dict[str, Any]) -> dict[str, Any]:
    dtype = loading.get("dtype")
    named = {"dtype": None if dtype is None else str(dtype).removeprefix("torch.")}
    kept = {k: v for k, v in loading.items() if k not in ("device", "progress")}
    return {**kept, **named}


def _compare_files(others: Ranks, expected: str) -> None:
    for member in others.members:
        if member.files != expected:
            raise UsageError(
                f"{member.name} has other files of this model than rank 0",
                hint="copy the model's folder to every machine",
            )
