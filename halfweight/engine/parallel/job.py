"""What all ranks of a job are told, and what they say of themselves."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from importlib.metadata import version
from typing import Any

import torch

from halfweight import __version__
from halfweight.checkpoint.headers import Checkpoint
from halfweight.memory.devices import process_bytes

_dist: Any = torch.distributed
"""torch.distributed, which exports its stores untyped."""
LOCAL = "127.0.0.1"
STARTING = timedelta(seconds=120)
"""In which ranks come to where they meet."""


@dataclass(frozen=True)
class Job:
    """A model, how it is loaded and run, and where the ranks meet."""

    model: str
    devices: tuple[str, ...]
    """One a rank; empty where each rank takes the GPU of its LOCAL_RANK."""
    backend: str
    """"nccl" or "gloo"."""
    port: int = 0
    """Where ranks of this machine meet; 0 where torchrun has made the place."""
    loading: dict[str, Any] = field(default_factory=dict)
    """Options of `halfweight.load`."""
    limits: dict[str, Any] = field(default_factory=dict)
    """Options of `make_runner`."""
    num_threads: int = 1
    limit_bytes: int | None = None
    """Of a GPU's memory, more than which a rank cannot have."""
    log_level: int = 30

    @property
    def is_local(self) -> bool:
        """Whether all ranks are on one machine."""
        return self.port > 0

    def device_of(self, rank: int) -> torch.device:
        """The device of a rank, asked there."""
        if self.devices:
            return torch.device(self.devices[rank])
        if self.backend == "nccl":
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        return torch.device("cpu")

    def loading_options(self) -> dict[str, Any]:
        """Options of `load_part` as torch knows them."""
        dtype = self.loading.get("dtype")
        return {**self.loading, "dtype": getattr(torch, dtype) if dtype else None}

    def to_bytes(self) -> bytes:
        """As it is sent."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_bytes(cls, content: bytes) -> Job:
        """As it was sent."""
        return cls(**json.loads(content))

    def what_was_loaded(self, part: Checkpoint) -> bytes:
        """What a rank tells of the part of the files that it has read."""
        return json.dumps({"bytes": part.num_bytes, "files": digest(part)}).encode()


def digest(part: Checkpoint) -> str:
    """Equal for ranks of equal files: over configuration, names and sizes of files and tensors."""
    tensors = sorted((t.name, t.info.dtype, t.shard.name) for t in part.tensors)
    sizes = sorted((shard.path.name, shard.num_bytes) for shard in part.shards)
    content = json.dumps([part.config, tensors, sizes], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def hello() -> dict[str, Any]:
    """Who and what this rank is."""
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "versions": {
            "halfweight": __version__,
            "torch": torch.__version__,
            "transformers": version("transformers"),
        },
    }


def local_store() -> Any:
    """Where ranks of this machine find each other, at a free port that only they can reach."""
    with socket.create_server((LOCAL, 0)) as server:
        port = server.getsockname()[1]
        number = server.detach()
    return _dist.TCPStore(LOCAL, port, None, True, wait_for_workers=False, master_listen_fd=number)


def open_store(job: Job) -> Any:
    """Where a rank other than 0 finds the others."""
    if job.port:
        return _dist.TCPStore(LOCAL, job.port, None, False, wait_for_workers=False)
    return outside_store()


def outside_store(*, is_first: bool = False) -> Any:
    """The store that torchrun has made, or that rank 0 makes at MASTER_PORT where nobody has."""
    by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    found = _dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        int(os.environ["WORLD_SIZE"]),
        is_first and not by_agent,
        timeout=STARTING,
        wait_for_workers=False,
    )
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return _dist.PrefixStore(f"halfweight/{attempt}", found)


def limit_memory(job: Job, rank: int) -> None:
    """A rank has no more of its GPU than `limit_bytes`, nor than its part of one that is shared."""
    device = job.device_of(rank)
    if device.type != "cuda":
        return
    share = 1 / max(1, job.devices.count(str(device)))
    if job.limit_bytes is not None:
        total = torch.cuda.get_device_properties(device).total_memory
        share = min(share, job.limit_bytes / total)
    torch.cuda.set_per_process_memory_fraction(share, device)


def peak_bytes() -> int:
    """The most that this process has had of its GPU, or of memory where it has none."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return int(torch.cuda.max_memory_reserved())
    return process_bytes("VmHWM")
