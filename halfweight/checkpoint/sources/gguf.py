"""A .gguf file as a source: its blocks decoded to 16 or 32 bits, its names those of transformers.

gguf-py decodes the blocks; transformers knows each architecture's names and the layouts that
llama.cpp permutes. Both are used as they stand: a model is built on the meta device to learn the
names, then tensors are decoded one at a time as the conversion asks for them.

Q8_0 is symmetric INT8 in groups of 32: those matrices are not decoded but kept bit for bit, in the
order of rows that transformers gives them. A split model is read from all its files.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfweight.checkpoint.gguf_header import TORCH_DTYPES, decoded_dtype, gguf_files
from halfweight.checkpoint.sources.matrices import Held, Int8Rows
from halfweight.checkpoint.sources.q8_0 import unpack_q8_0
from halfweight.checkpoint.sources.source import publishable
from halfweight.errors import CheckpointError, HalfweightError, UsageError
from halfweight.quantization.scheme import Q8_0_SCHEME, TensorInfo

log = logging.getLogger("halfweight")

DECODE_WEIGHTS = 16_000_000
"""Weights decoded at a time: gguf-py makes several float32 copies."""
_parsing = Lock()
"""Of gguf-py's functions while they are ours."""
ALWAYS_TIED = ("falcon", "bloom")
"""Architectures that transformers ties whatever the file holds."""


class GgufSource:
    """A .gguf file. Weights are given in the dtype that gguf_header.decoded_dtype says."""

    def __init__(self, path: Path, name: str) -> None:
        self.name = name
        self.path = path
        self._held: Held[NDArray[np.uint8]] = Held()
        self._files = gguf_files(path)
        self._parse = cache(_reader)
        with _named(path), _parsed_by(self._parse):
            self._open()

    def read(self, tensor: TensorInfo, begin: int, end: int) -> NDArray[np.uint8]:
        """Bytes [begin, end) of a tensor, decoded."""
        return self._held.get(tensor.name, lambda: self._decode(tensor))[begin:end]

    def read_int8(self, tensor: TensorInfo, begin: int, end: int) -> Int8Rows:
        """Rows [begin, end) of a matrix in Q8_0."""
        blocks = self._stored[tensor.name].data[self._orders[tensor.name][begin:end]]
        packed, scales = unpack_q8_0(blocks)
        return Int8Rows(packed, scales.astype(np.float32)).sound(tensor.name)

    def fingerprint(self) -> dict[str, Any]:
        """Name and size of each file, and the hash of all that precedes its weights."""
        return {
            "shards": [
                {
                    "name": path.name,
                    "bytes": path.stat().st_size,
                    "header_sha256": _head_sha256(path, reader.data_offset),
                }
                for path, reader in zip(self._files, self._readers, strict=True)
            ]
        }

    def state(self) -> list[Any]:
        """Size and modification time of each file."""
        found = [(path.name, path.stat()) for path in self._files]
        return [[name, status.st_size, status.st_mtime_ns] for name, status in found]

    def write_companions(self, folder: Path) -> None:
        """Write the tokenizer and generation config that the file holds."""
        from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig

        with _named(self.path), _parsed_by(self._parse):
            tokenizer = AutoTokenizer.from_pretrained(
                self.path.parent, gguf_file=self._files[0].name, trust_remote_code=False
            )
            tokenizer.save_pretrained(folder)
            config = PreTrainedConfig.from_dict(dict(self.config))
            GenerationConfig.from_model_config(config).save_pretrained(folder)

    def _open(self) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.modeling_gguf_pytorch_utils import (
            TENSOR_PROCESSORS,
            TensorProcessor,
            get_gguf_hf_weights_map,
        )

        self._readers = [self._parse(os.path.realpath(path)) for path in self._files]
        self._all = [tensor for reader in self._readers for tensor in reader.tensors]
        field = self._readers[0].get_field("general.architecture")
        architecture = field.contents() if field else ""
        self._dtype = decoded_dtype(
            architecture, {t.tensor_type.name for t in self._all if _is_2d(t)}
        )
        config = AutoConfig.from_pretrained(self.path.parent, gguf_file=self._files[0].name)
        config.dtype = TORCH_DTYPES[self._dtype]
        if architecture not in ALWAYS_TIED:  # transformers has looked at the first file alone
            config.tie_word_embeddings = all(t.name != "output.weight" for t in self._all)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        config.architectures = [type(model).__name__]
        self.config: dict[str, Any] = publishable(config.to_diff_dict())
        self._processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(
            config=config.to_dict()
        )
        names = get_gguf_hf_weights_map(model, self._processor)
        shapes = {n: tuple(t.shape) for n, t in model.state_dict(keep_vars=True).items()}
        self._stored = {names[t.name]: t for t in self._all if t.name in names}
        self._orders = dict(self._row_orders())
        self.tensors = tuple(self._info(name, shapes) for name in self._stored)
        self.stored_bytes = sum(int(t.n_bytes) for t in self._stored.values())
        self._log()

    def _row_orders(self) -> Iterator[tuple[str, NDArray[np.int64]]]:
        """Name and order of rows of every matrix in Q8_0, which transformers at most reorders.

        What it does else to one (other shapes, other values) is done to decoded values.
        """
        for name, stored in self._stored.items():
            if stored.tensor_type.name != "Q8_0" or not _is_2d(stored):
                continue
            rows = np.arange(stored.data.shape[0])
            marked = np.stack([rows, rows + 0.25], axis=1)
            try:
                done = self._processor.process(weights=marked.copy(), name=stored.name).weights
                order = np.asarray(done)[:, 0].astype(np.int64)
                if np.array_equal(done, marked[order]):
                    yield name, order
            except Exception:  # a layout of its own, for which two columns are too few
                continue

    def _log(self) -> None:
        decoded = [t for name, t in self._stored.items() if name not in self._orders]
        kinds = ", ".join(sorted({tensor.tensor_type.name for tensor in decoded}))
        if self._orders:
            log.info("%s: %d tensors in Q8_0 kept bit for bit", self.path, len(self._orders))
        if kinds:
            log.warning("%s: decoded from %s to %s", self.path, kinds, self._dtype)

    def _info(self, name: str, shapes: dict[str, tuple[int, ...]]) -> TensorInfo:
        stored = self._stored[name]
        num_elements = int(np.prod(stored.shape))
        if name not in shapes or int(np.prod(shapes[name])) != num_elements:
            raise CheckpointError(
                f"{self.path}: tensor {stored.name} {stored.shape.tolist()[::-1]} is not one "
                f"tensor of the model, expected {name} {list(shapes.get(name, ()))}",
                hint="quantize the safetensors of this model instead",
            )
        int8 = Q8_0_SCHEME if name in self._orders else None
        return TensorInfo(name, self._dtype, shapes[name], int8)

    def _decode(self, tensor: TensorInfo) -> NDArray[np.uint8]:
        with _named(self.path):
            return self._decoded(tensor)

    def _decoded(self, tensor: TensorInfo) -> NDArray[np.uint8]:
        import torch
        from gguf import dequantize

        stored = self._stored[tensor.name]
        shape = tuple(stored.shape.tolist()[::-1])
        weights = np.empty(shape, np.float32)
        rows = max(1, DECODE_WEIGHTS * shape[0] // weights.size)
        for start in range(0, shape[0], rows):
            part = stored.data[start : start + rows]
            weights[start : start + rows] = dequantize(part, stored.tensor_type)
        weights = self._processor.process(weights=weights, name=stored.name).weights
        values = torch.from_numpy(np.ascontiguousarray(weights))
        decoded = values.to(getattr(torch, TORCH_DTYPES[self._dtype]))
        return decoded.reshape(-1).view(torch.uint8).numpy()


def _reader(path: str) -> Any:
    from gguf.gguf_reader import GGUFReader

    return GGUFReader(path)


@contextmanager
def _parsed_by(parse: Callable[[str], Any]) -> Iterator[None]:
    """transformers takes a file from `parse`, and a table of names once for all modules.

    It would parse a vocabulary, which takes seconds, for the config and for the tokenizer again.
    """
    import gguf

    shared = {
        "GGUFReader": lambda path, *_: parse(os.path.realpath(path)),
        "get_tensor_name_map": cache(gguf.get_tensor_name_map),
    }
    with _parsing:
        own = {name: getattr(gguf, name) for name in shared}
        vars(gguf).update(shared)
        try:
            yield
        finally:
            vars(gguf).update(own)


def _head_sha256(path: Path, num_bytes: int) -> str:
    with open(path, "rb") as file:
        return hashlib.sha256(file.read(num_bytes)).hexdigest()


def _is_2d(tensor: Any) -> bool:
    return len(tensor.shape) == 2


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Any failure of the libraries that read GGUF, as one error that names the file."""
    try:
        yield
    except HalfweightError:
        raise
    except ImportError as error:
        raise UsageError(
            f"{path}: reading GGUF needs a package that is not here ({error})",
            hint="pip install 'halfweight[gguf]'",
        ) from error
    except Exception as error:
        raise CheckpointError(
            f"{path}: cannot be read as GGUF ({type(error).__name__}: {_first_line(error)})",
            hint="download it again, or quantize the safetensors of this model instead",
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
