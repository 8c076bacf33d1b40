"""A .gguf file as a source: its blocks decoded to 16 or 32 bits, its names those of transformers.

gguf-py decodes the blocks; transformers knows each architecture's names and the layouts that
llama.cpp permutes. Both are used as they stand: a model is built on the meta device to learn the
names, then tensors are decoded one at a time as the conversion asks for them.
"""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfweight.checkpoint.gguf_header import TORCH_DTYPES, decoded_dtype, refuse_split
from halfweight.checkpoint.sources.matrices import Int8Rows
from halfweight.checkpoint.sources.source import publishable
from halfweight.errors import CheckpointError, HalfweightError, UsageError
from halfweight.quantization.scheme import TensorInfo

log = logging.getLogger("halfweight")

DECODE_WEIGHTS = 16_000_000
"""Weights decoded at a time: gguf-py makes several float32 copies."""
CACHED_TENSORS = 2
"""Blocks of two neighbouring tensors can be asked for at the same time."""


class GgufSource:
    """A .gguf file. Weights are given in the dtype that gguf_header.decoded_dtype says."""

    def __init__(self, path: Path, name: str) -> None:
        self.name = name
        self.path = path
        self._lock = Lock()
        self._decoded: OrderedDict[str, NDArray[np.uint8]] = OrderedDict()
        refuse_split(path)
        with _named(path):
            self._open()

    def read(self, tensor: TensorInfo, begin: int, end: int) -> NDArray[np.uint8]:
        """Bytes [begin, end) of a tensor, decoded."""
        with self._lock:
            if tensor.name not in self._decoded:
                with _named(self.path):
                    self._decoded[tensor.name] = self._decode(tensor)
                while len(self._decoded) > CACHED_TENSORS:
                    self._decoded.popitem(last=False)
            return self._decoded[tensor.name][begin:end]

    def read_int8(self, tensor: TensorInfo, begin: int, end: int) -> Int8Rows:
        """Never asked for: no weight is in INT8."""
        raise NotImplementedError(tensor.name)

    def fingerprint(self) -> dict[str, Any]:
        """Name and size of the file, and the hash of all that precedes the weights."""
        with open(self.path, "rb") as file:
            head = hashlib.sha256(file.read(self._reader.data_offset)).hexdigest()
        size = self.path.stat().st_size
        return {"shards": [{"name": self.path.name, "bytes": size, "header_sha256": head}]}

    def state(self) -> list[Any]:
        """Size and modification time of the file."""
        status = self.path.stat()
        return [[self.path.name, status.st_size, status.st_mtime_ns]]

    def write_companions(self, folder: Path) -> None:
        """Write the tokenizer and generation config that the file holds."""
        from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig

        with _named(self.path):
            tokenizer = AutoTokenizer.from_pretrained(
                self.path.parent, gguf_file=self.path.name, trust_remote_code=False
            )
            tokenizer.save_pretrained(folder)
            config = PreTrainedConfig.from_dict(dict(self.config))
            GenerationConfig.from_model_config(config).save_pretrained(folder)

    def _open(self) -> None:
        import torch
        from gguf import GGUFReader
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.modeling_gguf_pytorch_utils import (
            TENSOR_PROCESSORS,
            TensorProcessor,
            get_gguf_hf_weights_map,
        )

        self._reader = GGUFReader(self.path)
        field = self._reader.get_field("general.architecture")
        architecture = field.contents() if field else ""
        kinds = {t.tensor_type.name for t in self._reader.tensors if _is_2d(t)}
        self._dtype = decoded_dtype(architecture, kinds)
        config = AutoConfig.from_pretrained(self.path.parent, gguf_file=self.path.name)
        config.dtype = TORCH_DTYPES[self._dtype]
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        config.architectures = [type(model).__name__]
        self.config: dict[str, Any] = publishable(config.to_diff_dict())
        self._processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(
            config=config.to_dict()
        )
        names = get_gguf_hf_weights_map(model, self._processor)
        shapes = {n: tuple(t.shape) for n, t in model.state_dict(keep_vars=True).items()}
        self._stored = {names[t.name]: t for t in self._reader.tensors if t.name in names}
        self.tensors = tuple(self._info(name, shapes) for name in self._stored)
        self.stored_bytes = sum(int(t.n_bytes) for t in self._stored.values())
        log.warning("%s: decoded from %s to %s", self.path, self._kinds(), self._dtype)

    def _kinds(self) -> str:
        return ", ".join(sorted({t.tensor_type.name for t in self._reader.tensors}))

    def _info(self, name: str, shapes: dict[str, tuple[int, ...]]) -> TensorInfo:
        stored = self._stored[name]
        num_elements = int(np.prod(stored.shape))
        if name not in shapes or int(np.prod(shapes[name])) != num_elements:
            raise CheckpointError(
                f"{self.path}: tensor {stored.name} {stored.shape.tolist()[::-1]} is not one "
                f"tensor of the model, expected {name} {list(shapes.get(name, ()))}",
                hint="quantize the safetensors of this model instead",
            )
        return TensorInfo(name, self._dtype, shapes[name])

    def _decode(self, tensor: TensorInfo) -> NDArray[np.uint8]:
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
