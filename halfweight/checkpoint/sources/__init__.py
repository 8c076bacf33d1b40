"""What a conversion reads. One file for each form of checkpoint behind one protocol, `Source`.

In: a folder, a file or a Hub id. Out: a Source, of which nothing but headers has been read.
`open_source` is the only place where a name becomes a source; who converts passes it on. First
file: source.py, the protocol.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from halfweight.checkpoint.headers import read_headers, resolve
from halfweight.errors import CheckpointError

if TYPE_CHECKING:
    from halfweight.checkpoint.sources.source import Source


def open_source(model: str | os.PathLike[str]) -> Source:
    """The source that a user calls `model`: a folder of safetensors, a .gguf file or a Hub id.

    Raises CheckpointError where it is missing, broken or quantized already.
    """
    path = resolve(model)
    if path.is_file() and path.suffix == ".gguf":
        from halfweight.checkpoint.sources.gguf import GgufSource

        return GgufSource(path, str(model))
    if path.is_file():
        raise CheckpointError(
            f"{path}: a single file, expected a model folder or a .gguf file",
            hint="quantize needs config.json and the tokenizer beside the weights",
        )
    return _open_folder(path, str(model))


def _open_folder(path: Path, name: str) -> Source:
    """A folder of safetensors, in 16 bits or in a form that is read."""
    from halfweight.checkpoint.sources.folder import FolderSource, require_floats
    from halfweight.checkpoint.sources.others import OthersFolder

    checkpoint = read_headers(path)
    if not checkpoint.config:
        raise CheckpointError(
            f"{path}: no config.json, expected a model folder",
            hint="quantize needs the folder that transformers loads",
        )
    form = checkpoint.form
    if form is None:
        require_floats(checkpoint)
        return FolderSource(checkpoint, name)
    if not form.is_read:
        raise form.refused(path)
    return OthersFolder(checkpoint, name, form)
