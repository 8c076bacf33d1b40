"""Where halfweight keeps what it has measured or compiled on this machine."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`halfweight` under XDG_CACHE_HOME, else under ~/.cache; it may not be there yet."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "halfweight"


def write_whole(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all, and its folder; raises OSError where that cannot be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}")
    try:
        beside.write_bytes(content)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
