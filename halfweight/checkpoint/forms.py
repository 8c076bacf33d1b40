"""Which quantized form is this checkpoint in? Told by its config and the names of its tensors.

Others' files are recognised before anything is read of them, and by one rule for every command:
`load`, `inspect`, `quantize` and `plan` run, read or refuse a form by the same name. One with a
reader is read by `quantize`; compressed-tensors' 8-bit form is our own, and is no form here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfweight.errors import CheckpointError
from halfweight.quantization.scheme import TensorInfo

ORIGINAL = "quantize the 16-bit model that it was made from instead"
DEQUANTIZE = f"load it with transformers, model.dequantize(), save_pretrained(); or {ORIGINAL}"
REMEDIES = {
    "MLX": f"`mlx_lm.convert --hf-path THIS --dequantize` writes 16 bits; or {ORIGINAL}",
    "bitsandbytes": DEQUANTIZE,
    "HQQ": DEQUANTIZE,
}
"""First word of a form's name -> what to do where it is not read; else ORIGINAL."""
METHODS = {
    "aqlm": "AQLM",
    "auto-round": "AutoRound",
    "awq": "AWQ",
    "bitnet": "BitNet",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "eetq": "EETQ",
    "exl2": "EXL2",
    "exl3": "EXL3",
    "fbgemm_fp8": "FP8 (fbgemm)",
    "fouroversix": "FourOverSix",
    "fp8": "FP8",
    "fp_quant": "FP-Quant",
    "gemma": "Gemma QAT",
    "gptq": "GPTQ",
    "higgs": "HIGGS",
    "hqq": "HQQ",
    "intel/auto-round": "AutoRound",
    "metal": "Metal",
    "modelopt": "ModelOpt",
    "mxfp4": "MXFP4",
    "mxfp8": "MXFP8",
    "nvfp4": "NVFP4",
    "quanto": "quanto",
    "quark": "Quark",
    "sinq": "SINQ",
    "spqr": "SpQR",
    "torchao": "torchao",
    "vptq": "VPTQ",
}
"""`quant_method` -> the name that the field uses."""
AN = ("A", "E", "FP", "HQQ", "ML", "MX", "NV")
"""How names begin that 'an' stands before."""
BITS_KEYS = ("bits", "w_bit", "num_bits", "nbits", "weight_bits")
MARKS = (
    ("EXL3", ("trellis",)),
    ("EXL2", ("q_weight", "q_scale")),
    ("GPTQ", ("qweight", "g_idx")),
    ("AWQ", ("qweight", "qzeros")),
    ("HQQ", ("W_q",)),
    ("bitsandbytes 8-bit", ("SCB",)),
    ("MXFP4", ("gate_up_proj_blocks", "gate_up_proj_scales")),
    ("bitsandbytes 4-bit", ("weight.absmax",)),
    ("MLX", ("scales", "biases")),
    ("AQLM", ("codes", "codebooks")),
    ("torchao", ("_weight_qdata",)),
    ("NVFP4", ("weight_packed", "weight_global_scale")),
    ("quanto", ("weight._data",)),
)
"""Form -> ends of the names of tensors that one module has, all of them."""


READERS = {"GPTQ 8-bit": "gptq"}
"""Form -> the module of checkpoint.sources by which `quantize` reads it."""


@dataclass(frozen=True)
class Form:
    """A quantized form of others."""

    name: str

    @property
    def reader(self) -> str | None:
        """The module of checkpoint.sources that reads it."""
        return READERS.get(self.name)

    @property
    def is_read(self) -> bool:
        """Whether `quantize` makes a folder of ours of it."""
        return self.reader is not None

    @property
    def described(self) -> str:
        """'a GPTQ 4-bit checkpoint', 'an AWQ 4-bit checkpoint'."""
        return f"{'an' if self.name.startswith(AN) else 'a'} {self.name} checkpoint"

    def remedy(self, where: Path | str) -> str:
        """What to do with it, as it is not run as it lies."""
        if self.is_read:
            return f"`halfweight quantize {where} OUT` reads it and writes INT8"
        return REMEDIES.get(self.name.partition(" ")[0], ORIGINAL)

    def refused(self, where: Path | str) -> CheckpointError:
        """The error of who cannot run it."""
        cannot = "is not run as it lies" if self.is_read else "halfweight does not read"
        return CheckpointError(
            f"{where}: this is {self.described}, which {cannot}", hint=self.remedy(where)
        )


def form_of(config: Mapping[str, Any], tensors: Iterable[TensorInfo]) -> Form | None:
    """The form of a checkpoint, or None where its weights are 16-bit or in our own form."""
    by_name = {tensor.name: tensor for tensor in tensors}
    declared = config.get("quantization_config") or config.get("compression_config")
    declared = declared if isinstance(declared, dict) else {}
    method = declared.get("quant_method")
    if method == "compressed-tensors" or (
        method is None and _ends(by_name, ("weight_packed", "weight_scale"))
    ):
        return _compressed_tensors(declared, by_name)
    if isinstance(config.get("quantization"), dict) or (declared and _ends(by_name, ("biases",))):
        return Form(_with_bits("MLX", config.get("quantization") or declared))
    if method is None:
        return _by_tensors(by_name)
    return _by_method(str(method), declared, by_name)


def _by_method(
    method: str, declared: Mapping[str, Any], by_name: Mapping[str, TensorInfo]
) -> Form | None:
    name = METHODS.get(method.lower(), method[:40])
    if method == "bitsandbytes":
        bits = 8 if declared.get("load_in_8bit") or _ends(by_name, ("SCB",)) else 4
        return Form(f"{name} {bits}-bit")
    if method in ("gptq", "auto-round", "intel/auto-round") and _ends(by_name, ("qweight",)):
        return _gptq(name, declared, by_name)
    if method == "torchao":
        return _torchao(by_name)
    return Form(_with_bits(name, declared))


def _by_tensors(by_name: Mapping[str, TensorInfo]) -> Form | None:
    """Where no config says how it was quantized: by what only one form has."""
    for name, ends in MARKS:
        if _ends(by_name, ends):
            if name == "GPTQ":
                return _gptq(name, {}, by_name)
            if name == "torchao":
                return _torchao(by_name)
            return Form(name)
    for tensor in by_name.values():
        if tensor.dtype.startswith("F8") and tensor.dtype != "F8_E8M0":
            return Form("FP8")
    return None


def _gptq(name: str, declared: Mapping[str, Any], by_name: Mapping[str, TensorInfo]) -> Form:
    bits = declared.get("bits")
    if not isinstance(bits, int):
        bits = next(_gptq_bits(by_name), None)
    named = f"{name} {bits}-bit" if bits else name
    return Form(named)


def _gptq_bits(by_name: Mapping[str, TensorInfo]) -> Iterator[int]:
    """32 bits a word: K/32 bits words stand for the K columns that g_idx counts."""
    for name, tensor in by_name.items():
        g_idx = by_name.get(f"{name.removesuffix('qweight')}g_idx")
        if name.endswith(".qweight") and g_idx is not None and g_idx.num_elements:
            yield 32 * tensor.shape[0] // g_idx.num_elements


def _torchao(by_name: Mapping[str, TensorInfo]) -> Form:
    data = [t for name, t in by_name.items() if name.endswith("._weight_qdata")]
    dtypes = {tensor.dtype for tensor in data}
    if dtypes == {"I8"}:
        return Form("torchao 8-bit")
    return Form("torchao FP8" if any(d.startswith("F8") for d in dtypes) else "torchao")


def _compressed_tensors(
    declared: Mapping[str, Any], by_name: Mapping[str, TensorInfo]
) -> Form | None:
    """None for what halfweight runs: 8-bit symmetric integers, packed."""
    groups = [g for g in _values(declared.get("config_groups")) if isinstance(g, dict)]
    kinds = {_kind(group, declared.get("format")) for group in groups}
    packed = _ends(by_name, ("weight_packed",))
    if packed and kinds <= {("pack-quantized", "8-bit")}:
        return None
    if kinds == {("int-quantized", "8-bit")} and not packed:
        return Form("compressed-tensors int-quantized 8-bit")
    if kinds == {("float-quantized", "FP8")} and not packed:
        return Form("compressed-tensors FP8")
    if kinds <= {("pack-quantized", "8-bit"), (None, "8-bit")} and not packed:
        return _by_tensors(by_name)
    words = {
        kind if stored in (None, "pack-quantized") else f"{stored} {kind}" for stored, kind in kinds
    }
    return Form(f"compressed-tensors {', '.join(sorted(words)) or 'sparse'}")


def _kind(group: Mapping[str, Any], default: Any) -> tuple[str | None, str]:
    """Format and kind of weights of a config group."""
    weights = group.get("weights") if isinstance(group.get("weights"), dict) else {}
    assert isinstance(weights, dict)
    bits, what = weights.get("num_bits"), weights.get("type")
    if what == "float":
        kind = f"FP{bits}"
    else:
        kind = ("unknown" if bits is None else f"{bits}-bit") + (
            "" if weights.get("symmetric", True) else " asymmetric"
        )
    stored = group.get("format") or default
    if stored == "naive-quantized":
        stored = "float-quantized" if what == "float" else "int-quantized"
    return stored if isinstance(stored, str) else None, kind


def _with_bits(name: str, declared: Any) -> str:
    fields = declared if isinstance(declared, dict) else {}
    bits = next(
        (fields[key] for key in BITS_KEYS if isinstance(fields.get(key), int | float)), None
    )
    return name if bits is None or re.search(r"FP\d", name) else f"{name} {bits}-bit"


def _values(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else ()


def _ends(by_name: Mapping[str, TensorInfo], ends: tuple[str, ...]) -> bool:
    """Whether some module has tensors of all these names."""
    for name in by_name:
        if name.endswith(f".{ends[0]}"):
            module = name.removesuffix(ends[0])
            if all(f"{module}{end}" in by_name for end in ends):
                return True
    return False
