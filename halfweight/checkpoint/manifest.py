"""The manifest of a folder that halfweight wrote: `halfweight.json`.

It holds the job (source fingerprint, recipe, version), a sha256 of every file, and each quantized
tensor's group size and error. `verify` checks a folder against it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from halfweight.checkpoint.json_files import Manifest, read_json

MANIFEST_NAME = "halfweight.json"
FORMAT_VERSION = 1
HASHED_BYTES = 1 << 20
"""Read at a time."""


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an output folder. Raises CheckpointError if it is none."""
    return read_json(folder / MANIFEST_NAME, Manifest)


def file_sha256(path: Path, begin: int = 0, end: int | None = None) -> str:
    """sha256 as hex of a file, or of its bytes [begin, end)."""
    with open(path, "rb") as file:
        if end is None:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256()
        file.seek(begin)
        while begin < end and (block := file.read(min(HASHED_BYTES, end - begin))):
            digest.update(block)
            begin += len(block)
        return digest.hexdigest()
