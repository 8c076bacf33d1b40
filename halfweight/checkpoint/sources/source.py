"""What a conversion reads: tensors as bytes in row-major order, a config, companion files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from halfweight.quantization.scheme import TensorInfo

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from halfweight.checkpoint.sources.matrices import Int8Rows

CODE_KEYS = ("auto_map", "trust_remote_code", "custom_pipelines")
"""Keys by which a checkpoint asks for its own Python to be run: never copied."""


class Source(Protocol):
    """A checkpoint to convert: `name` is what the user called it, `path` where it lies.

    `stored_bytes` are those of its tensors where it lies, before anything is decoded. `read` may be
    called from several threads.
    """

    name: str
    path: Path
    config: dict[str, Any]
    tensors: tuple[TensorInfo, ...]
    stored_bytes: int

    def read(self, tensor: TensorInfo, begin: int, end: int) -> NDArray[np.uint8]:
        """Bytes [begin, end) of a tensor, in the dtype that `tensors` states."""
        ...

    def read_int8(self, tensor: TensorInfo, begin: int, end: int) -> Int8Rows:
        """Rows [begin, end) of a weight that is INT8 in the source, as `tensor.int8` says."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """What identifies the source without reading its weights; goes into the manifest."""
        ...

    def state(self) -> list[Any]:
        """Sizes and times of the source's files: equal while nobody changes them."""
        ...

    def write_companions(self, folder: Path) -> None:
        """Write tokenizer and generation files into `folder`."""
        ...


def is_tied(config: dict[str, Any]) -> bool:
    """Whether config.json says that head and embedding are one weight."""
    parts = (config, config.get("text_config") or {})
    return any(part.get("tie_word_embeddings") is True for part in parts)


def publishable(config: dict[str, Any]) -> dict[str, Any]:
    """A config without private keys (paths of some machine) or those that ask to run code."""
    return {
        key: value
        for key, value in config.items()
        if key not in CODE_KEYS and not key.startswith("_")
    }
