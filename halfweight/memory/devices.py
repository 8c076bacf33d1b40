"""The devices of this machine, learned without torch: names, drivers and memory."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from halfweight.memory.workload import MIB, DeviceKind


@dataclass(frozen=True)
class Device:
    """One device: `free_bytes` is what a new process can take of it now.

    `capability` is a GPU's compute capability, where its driver tells.
    """

    kind: DeviceKind
    name: str
    driver: str
    total_bytes: int
    free_bytes: int
    capability: float | None = None


def local_device() -> Device:
    """The first NVIDIA GPU, else the processor and its memory."""
    return _nvidia() or processor_device()


def _nvidia() -> Device | None:
    if shutil.which("nvidia-smi") is None:
        return None
    query = "--query-gpu=name,driver_version,memory.total,memory.free,compute_cap"
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        return None
    return parse_nvidia(lines[0])


def parse_nvidia(line: str) -> Device:
    """`NVIDIA H100, 580.1, 81559, 81000, 9.0`, as nvidia-smi prints it; memory in MiB."""
    name, driver, total, free, *rest = (field.strip() for field in line.split(","))
    capability = float(rest[0]) if rest and rest[0].replace(".", "").isdigit() else None
    return Device("cuda", name, driver, int(total) * MIB, int(free) * MIB, capability)


def processor_device() -> Device:
    """The processor and its memory."""
    memory = _sizes(Path("/proc/meminfo"))
    page = os.sysconf("SC_PAGE_SIZE")
    total = memory.get("MemTotal", os.sysconf("SC_PHYS_PAGES") * page)
    return Device("cpu", processor(), platform.release(), total, memory.get("MemAvailable", total))


def processor() -> str:
    """The processor's model, as the system names it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def process_bytes(field: str) -> int:
    """A size that the kernel keeps of this process, as VmHWM; 0 where there is no /proc."""
    return _sizes(Path("/proc/self/status")).get(field, 0)


def _sizes(path: Path) -> dict[str, int]:
    if not path.exists():
        return {}
    lines = [line.split() for line in path.read_text().splitlines()]
    return {f[0].rstrip(":"): int(f[1]) * 1024 for f in lines if f[2:] == ["kB"]}
