"""Where halfweight keeps what it has measured or compiled on this machine."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """`halfweight` under XDG_CACHE_HOME, else under ~/.cache; it may not be there yet."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "halfweight"


def keep(path: Path, content: bytes) -> None:
    """Write a file of the cache, whole or not at all; nothing where the place cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(content)
        os.replace(file.name, path)
    except OSError:
        return
