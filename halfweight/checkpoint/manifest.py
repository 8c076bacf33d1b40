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


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an output folder. Raises CheckpointError if it is none."""
    return read_json(folder / MANIFEST_NAME, Manifest)


def file_sha256(path: Path) -> str:
    """sha256 of a file as hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
