"""What every benchmark result carries: command, commit, machine, versions, and its ceiling."""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "peft",
    "gguf",
    "numba",
    "humming-kernels",
    "gemlite",
    "torchao",
    "vllm",
)


def envelope(device: torch.device, ceiling: dict[str, float]) -> dict[str, Any]:
    """Facts about this run; `ceiling` names the physical limit its figures are compared with."""
    return {
        "command": _command(sys.argv),
        "commit": _commit(),
        "device": device_name(device),
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "ceiling": ceiling,
    }


def write_result(name: str, envelope: dict[str, Any], results: Any, *, out: Path = RESULTS) -> Path:
    """Write `out/name.json`; call it again as results arrive, so that a cut run leaves some."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.json"
    path.write_text(json.dumps({**envelope, "results": results}, indent=1) + "\n")
    return path


def _command(arguments: list[str]) -> str:
    """The command line; of a folder of this machine only its name."""
    names = (Path(each).name if Path(each).is_absolute() else each for each in arguments)
    return shlex.join(["python", *names])


def device_name(device: torch.device) -> str:
    """'NVIDIA H100 80GB HBM3', or the processor's model and its number of cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()}, {torch.get_num_threads()} threads"


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    return done.stdout.strip() or "unknown"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
