"""GPUs by name and the memory each offers; `4x24GB`, `2xh100` and the like, parsed."""

from __future__ import annotations

import re
from dataclasses import dataclass

from halfweight.errors import UsageError

GIB = 1 << 30
CARDS = {
    "rtx-3060": 12,
    "rtx-3090": 24,
    "rtx-4070": 12,
    "rtx-4080": 16,
    "rtx-4090": 24,
    "rtx-5090": 32,
    "t4": 16,
    "l4": 24,
    "a10": 24,
    "a40": 48,
    "a6000": 48,
    "l40s": 48,
    "a100-40gb": 40,
    "a100-80gb": 80,
    "h100": 80,
    "h200": 141,
    "b200": 180,
}
"""GB as the maker writes them."""
TOO_OLD = {"p100": 6.0, "p40": 6.1, "v100": 7.0, "v100-16gb": 7.0, "v100-32gb": 7.0, "titan-v": 7.0}
"""Cards of a compute capability below LEAST_CAPABILITY."""
LEAST_CAPABILITY = 7.5
"""What the kernels need, here and in vLLM's for this format."""
OFFERED = 23.5 / 24
"""Of a card's nominal GiB, what a process gets: about 23.5 GiB of a '24 GB' card."""
BINARY_UP_TO = 96
"""Cards up to this size are sold in GiB called GB; larger ones (141 GB) in 10^9 bytes."""
UNITS = {"gb": 10**9, "gib": GIB, "mb": 10**6, "mib": 1 << 20}


@dataclass(frozen=True)
class Gpus:
    """`count` equal GPUs of `num_bytes` each, as a process can have them."""

    count: int
    name: str
    num_bytes: int


def parse_gpus(text: str) -> Gpus:
    """`4x24GB`, `rtx-4090`, `2xh100`, `1x22.5GiB`; 1 if no count.

    Raises UsageError for what is neither a card nor a size.
    """
    match = re.fullmatch(r"(?:(\d+)\s*x\s*)?(.+)", text.strip().lower())
    count, name = (int(match[1] or 1), match[2]) if match else (0, text)
    if count < 1:
        raise UsageError(f"{text!r} has no GPU", hint="write --gpus 4x24GB or 2xh100")
    if name in TOO_OLD:
        raise _too_old(name, TOO_OLD[name])
    if name in CARDS:
        return Gpus(count, name, _offered(CARDS[name]))
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*gb", name)
    num_bytes = _offered(float(size[1])) if size else parse_bytes(name)
    return Gpus(count, name.replace("gb", "GB").replace("gib", "GiB"), num_bytes)


def check_capability(name: str, capability: float | None) -> None:
    """Raise UsageError for a GPU that the kernels do not run on."""
    if capability is not None and capability < LEAST_CAPABILITY:
        raise _too_old(name, capability)


def _too_old(name: str, capability: float) -> UsageError:
    return UsageError(
        f"{name}: compute capability {capability}, the INT8 kernels need {LEAST_CAPABILITY}",
        hint="plan for a newer card: T4 and RTX 20 are the oldest that do",
    )


def parse_bytes(text: str) -> int:
    """`22GiB`, `500 MB`: bytes. Raises UsageError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]+)", text.strip().lower())
    if not match or match[2] not in UNITS:
        raise UsageError(
            f"{text!r} is no size and no card",
            hint=f"write 24GB, 22.5GiB, or one of {', '.join(CARDS)}",
        )
    return int(float(match[1]) * UNITS[match[2]])


def _offered(nominal: float) -> int:
    unit = GIB if nominal <= BINARY_UP_TO else 10**9
    return int(nominal * unit * OFFERED)
