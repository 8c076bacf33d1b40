"""One .gguf file of Q8_0 that llama.cpp runs.

Q8_0 is groups of 32: a float16 scale, then 32 signed bytes. A group of ours becomes several of the
same scale; no int8 value changes. Header and metadata are written by the gguf package; data goes
in by parts of MAX_SHARD_BYTES, so that a kill costs no more than in a conversion. Norms and biases
are float32, matrices that are not in INT8 stay in 16 bits, as llama.cpp's own converter has them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfweight import __version__
from halfweight.checkpoint import layout
from halfweight.checkpoint.json_files import is_plain_name
from halfweight.checkpoint.shard import broken
from halfweight.checkpoint.sources.int8_folder import Int8Folder
from halfweight.checkpoint.sources.q8_0 import BLOCK_BYTES, GROUP_SIZE, pack_q8_0
from halfweight.conversion.exports.form import Form, float16_rounding, rounding_notes
from halfweight.conversion.exports.gguf_parameters import (
    INSTEAD,
    Parameters,
    add_parameters,
    notes,
    read_parameters,
    rope_factors,
)
from halfweight.conversion.exports.gguf_vocabulary import (
    Vocabulary,
    add_vocabulary,
    read_vocabulary,
)
from halfweight.conversion.exports.source import ExportSource, bytes_of_rows, dequantized
from halfweight.conversion.parts import Advance, Part
from halfweight.conversion.shard_writer import write_tensors
from halfweight.errors import CheckpointError, UsageError
from halfweight.quantization.float_bytes import as_bytes, as_float32
from halfweight.quantization.scheme import DTYPE_BYTES, TensorInfo

Q8_0 = "Q8_0"
ALIGNMENT = 32
"""Of each tensor in a file, by GGUF's default."""
NOT_WEIGHTS = (".rotary_emb.inv_freq",)
"""Endings of tensors that are computed from the config."""


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of the file: `name` and `kind` in GGUF, `shape` as torch has it, row-major.

    `source` is a tensor of the folder, or "" where `values` are all there is. `num_heads` is not 0
    where rows are permuted for rotary pairs that are neighbours. `offset` is added to all values.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    source: str = ""
    num_heads: int = 0
    offset: float = 0.0
    values: NDArray[np.float32] | None = None

    @property
    def row_bytes(self) -> int:
        """Bytes of a row, or of a value where there is one dimension."""
        columns = prod(self.shape[1:])
        if self.kind == Q8_0:
            return columns // GROUP_SIZE * BLOCK_BYTES
        return columns * DTYPE_BYTES[self.kind]

    @property
    def info(self) -> TensorInfo:
        """Its bytes, as what is written block by block."""
        return TensorInfo(self.name, "U8", (self.shape[0] * self.row_bytes,))


class GgufTensors(ExportSource):
    """The tensors of a file as a Source of bytes."""

    def __init__(self, folder: Int8Folder, tensors: tuple[GgufTensor, ...]) -> None:
        super().__init__(folder, tuple(tensor.info for tensor in tensors))
        self._by_name = {tensor.name: tensor for tensor in tensors}

    def read(self, tensor: TensorInfo, begin: int, end: int) -> NDArray[np.uint8]:
        """Bytes [begin, end) of a tensor."""
        found = self._by_name[tensor.name]
        return bytes_of_rows(partial(self._rows, found), found.row_bytes, begin, end)

    def _rows(self, tensor: GgufTensor, first: int, last: int) -> NDArray[np.uint8]:
        """Bytes of rows [first, last) of the file's order."""
        if tensor.values is not None:
            return as_bytes(tensor.values[first:last], tensor.kind)
        order = rows_of_heads(tensor.shape[0], tensor.num_heads)[first:last]
        low, high = int(order.min()), int(order.max()) + 1
        if tensor.kind == Q8_0:
            return self._blocks(tensor, order, low, high)
        columns = prod(tensor.shape[1:])
        values = self._values(tensor.source, low * columns, high * columns)
        rows = values.reshape(-1, columns)[order - low] + np.float32(tensor.offset)
        return as_bytes(rows, tensor.kind)

    def _values(self, source: str, begin: int, end: int) -> NDArray[np.float32]:
        stored = self.folder.plain.get(source)
        if stored is None:
            return dequantized(self.folder, source.removesuffix(".weight"), begin, end)
        size = DTYPE_BYTES[stored.info.dtype]
        return as_float32(self.folder.read(source, begin * size, end * size), stored.info.dtype)

    def _blocks(
        self, tensor: GgufTensor, order: NDArray[np.int64], low: int, high: int
    ) -> NDArray[np.uint8]:
        """Rows of Q8_0; a group of ours is several of 32."""
        module, columns = tensor.source.removesuffix(".weight"), tensor.shape[1]
        packed = self.folder.packed(module, low * columns, high * columns).reshape(-1, columns)
        scales = self.folder.scales(module)[order].astype(np.float16)
        repeats = self.folder.weights[module].group_size // GROUP_SIZE
        return pack_q8_0(packed[order - low], np.repeat(scales, repeats, axis=1))


def rows_of_heads(num_rows: int, num_heads: int) -> NDArray[np.int64]:
    """The source's row at each row of the file: a head's halves, turn by turn."""
    rows = np.arange(num_rows)
    if not num_heads:
        return rows
    return rows.reshape(num_heads, 2, -1).swapaxes(1, 2).reshape(-1)


def plan(folder: Int8Folder) -> Form:
    """The export of `folder` to GGUF. Raises CheckpointError for what llama.cpp cannot run."""
    parameters = read_parameters(str(folder.path), folder.config)
    tensors = tuple(_tensors(folder, parameters))
    vocab_size = next(t.shape[0] for t in tensors if t.name == "token_embd.weight")
    vocabulary = read_vocabulary(folder.path, vocab_size)
    in_int8 = [t.source.removesuffix(".weight") for t in tensors if t.kind == Q8_0]
    rounding = float16_rounding(folder, in_int8)
    file = f"{_base_name(folder)}-Q8_0.gguf"
    header = _header(folder, parameters, vocabulary, tensors)
    return Form(
        parts=tuple(_parts(file, header, GgufTensors(folder, tensors))),
        shards=(),
        write_beside=folder.write_licences,
        check=lambda out: check(out, tensors),
        num_int8=len(in_int8),
        num_dequantized=len(folder.weights) - len(in_int8),
        num_kept=len(folder.plain),
        rounding=rounding,
        notes=(*rounding_notes(rounding), *notes(parameters)),
    )


def check(out: Path, tensors: tuple[GgufTensor, ...] | None = None) -> None:
    """Read the folder's file as the gguf package does; raise unless it has exactly `tensors`."""
    from gguf import GGUFReader

    files = list(out.glob("*.gguf"))
    if len(files) != 1:
        raise broken(out, f"{len(files)} .gguf files, expected one")
    try:
        reader = GGUFReader(files[0])
    except Exception as error:
        raise broken(files[0], f"cannot be read as GGUF ({type(error).__name__})") from error
    found = {t.name: (t.tensor_type.name, _torch_shape(t)) for t in reader.tensors}
    expected = {t.name: (t.kind, t.shape) for t in tensors or ()}
    if tensors is not None and found != expected:
        differing = sorted(name for name, _ in found.items() ^ expected.items())
        raise broken(files[0], f"tensor {differing[0]} is not as it was to be written")


def _torch_shape(tensor: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in reversed(tensor.shape))


def _tensors(folder: Int8Folder, parameters: Parameters) -> Iterator[GgufTensor]:
    names = _names(parameters)
    shapes: dict[str, tuple[int, ...]] = {
        f"{module}.weight": weight.shape for module, weight in folder.weights.items()
    }
    shapes |= {name: stored.info.shape for name, stored in folder.plain.items()}
    for source, shape in shapes.items():
        if source.endswith(NOT_WEIGHTS):
            continue
        name = names.get_name(source, try_suffixes=(".weight", ".bias"))
        known_bias = source.endswith(parameters.architecture.biases)
        if name is None or (source.endswith(".bias") and not known_bias):
            raise CheckpointError(
                f"{folder.path}: tensor {source} has no place in llama.cpp's "
                f"{parameters.architecture.name}",
                hint=INSTEAD,
            )
        heads = _permuted_heads(source, parameters)
        is_norm = source.endswith("norm.weight")
        offset = parameters.architecture.norm_offset if is_norm else 0.0
        yield GgufTensor(name, _kind(folder, source, shape), shape, source, heads, offset)
    factors = rope_factors(parameters)
    if factors is not None:
        yield GgufTensor("rope_freqs.weight", "F32", factors.shape, values=factors)


def _names(parameters: Parameters) -> Any:
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    by_name = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}
    arch = by_name[parameters.architecture.name]
    return get_tensor_name_map(arch, parameters.values["num_hidden_layers"])


def _permuted_heads(source: str, parameters: Parameters) -> int:
    if not parameters.architecture.turns_heads:
        return 0
    role = source.rpartition(".")[0].rpartition(".")[2]
    return {"q_proj": parameters.num_heads, "k_proj": parameters.num_kv_heads}.get(role, 0)


def _kind(folder: Int8Folder, source: str, shape: tuple[int, ...]) -> str:
    """Q8_0 where a weight is in INT8 and its groups are of 32s; else its own dtype or float32."""
    weight = folder.weights.get(source.removesuffix(".weight"))
    if weight is not None:
        return folder.dtype if weight.group_size % GROUP_SIZE else Q8_0
    return "F32" if len(shape) == 1 else folder.plain[source].info.dtype


def _base_name(folder: Int8Folder) -> str:
    name = folder.base_model.rstrip("/").rpartition("/")[2].removesuffix(".gguf")
    return name if is_plain_name(f"{name}-Q8_0.gguf") and name.strip(".") else "model"


def _header(
    folder: Int8Folder,
    parameters: Parameters,
    vocabulary: Vocabulary,
    tensors: tuple[GgufTensor, ...],
) -> bytes:
    """All of the file that precedes its first tensor, padded."""
    from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFWriter, LlamaFileType

    writer = GGUFWriter(None, parameters.architecture.name)
    writer.add_type("model")
    writer.add_name(_base_name(folder))
    writer.add_quantized_by(f"halfweight {__version__}")
    add_parameters(writer, parameters, len(vocabulary.tokens))
    writer.add_file_type(LlamaFileType.MOSTLY_Q8_0)
    add_vocabulary(writer, vocabulary)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    for tensor in tensors:
        in_bytes = (*tensor.shape[:-1], tensor.info.num_bytes // prod(tensor.shape[:-1]))
        kind = GGMLQuantizationType[tensor.kind]
        nbytes = tensor.info.num_bytes
        writer.add_tensor_info(tensor.name, in_bytes, np.dtype(np.uint8), nbytes, kind)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "header.gguf"
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        data = path.read_bytes()
    return data.ljust(_padded(len(data)), b"\0")


def _parts(file: str, header: bytes, source: GgufTensors) -> Iterator[Part]:
    """The file from its header on, cut between tensors into parts of MAX_SHARD_BYTES or less."""
    cuts: list[dict[TensorInfo, int]] = [{}]
    begins = [0]
    at = len(header)
    for tensor in source.tensors:
        if cuts[-1] and at + tensor.num_bytes - begins[-1] > layout.MAX_SHARD_BYTES:
            cuts.append({})
            begins.append(at)
        cuts[-1][tensor] = at
        at += _padded(tensor.num_bytes)
    ends = [*begins[1:], at]
    for number, (places, begin, end) in enumerate(zip(cuts, begins, ends, strict=True)):
        write = _Write(source, places, header if number == 0 else b"", at)
        size = sum(tensor.num_bytes for tensor in places)
        yield Part(f"{file}.part{number:05}", file, begin, end, size, write)


@dataclass(frozen=True)
class _Write:
    """Writes the tensors of a part to their places in the file of `file_bytes` bytes."""

    source: GgufTensors
    places: dict[TensorInfo, int]
    header: bytes
    file_bytes: int

    def __call__(
        self, path: Path, pool: ThreadPoolExecutor, window: int, advance: Advance
    ) -> dict[str, Any]:
        path.touch()
        with open(path, "r+b") as file:
            write_tensors(
                self.source,
                self.places,
                file.fileno(),
                pool,
                window,
                advance,
                first=self.header,
                num_bytes=self.file_bytes,
            )
        return {}


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def require_gguf(where: Path) -> None:
    """Raise UsageError unless the gguf package is here."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"{where}: writing GGUF needs a package that is not here ({error})",
            hint="pip install 'halfweight[gguf]'",
        ) from error
