"""What a conversion reads. One file for each form of checkpoint behind one protocol, `Source`.

In: a folder, a file or a Hub id. Out: a Source, of which nothing but headers has been read.
`open_source` is the only place where a name becomes a source; who converts passes it on. First
file: source.py, the protocol.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from halfweight.checkpoint.headers import resolve
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
    from halfweight.checkpoint.sources.folder import FolderSource

    return FolderSource(path, str(model))
