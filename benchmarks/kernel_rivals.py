"""The products that benchmarks/kernels.py times beside each other, each with weights of its own.

Peers quantize with their own tools, or are given bytes in the layout that theirs make. Whatever is
made on a GPU is multiplied once and compared with the float64 product of its weights, so that no
wrong call is timed.
"""

from __future__ import annotations

import importlib.util
import runpy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfweight.kernels import operations, timing
from halfweight.quantization.numerics import dequantize

GROUP_SIZE = 128
FLOAT16_BYTES = 2
VENDOR = "float16"
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
CHECKED_TOKENS = 16
MOST_ERROR = 2e-3
"""Relative, of a float16 product to the exact one."""
GROUPS_ROUNDED, ROWS_ROUNDED = 1e-2, 2e-2
"""The same where the exact one is of the weights before a peer rounded them, or its activations."""
UNTUNED = {"shape": "gate_up_70b", "tokens": 2}
"""gemlite brings no tiles for these on Hopper, and would try all for minutes."""

Shape = tuple[int, int]
Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Made:
    """A product with a random weight, and that weight [N, K]: a function, called where checked."""

    product: Product
    weight: Callable[[], Tensor]


@dataclass(frozen=True)
class Rival:
    """`make(shape)` gives the product with a new random weight; `bytes_per_weight` what it reads.

    `skips(shape's name, tokens)` says which products it is not timed at.
    """

    make: Callable[[Shape], Made]
    bytes_per_weight: float
    most_error: float = MOST_ERROR
    skips: Callable[[str, int], bool] = lambda shape, tokens: False


def random_dense(shape: Shape) -> Tensor:
    """A weight in float16."""
    return torch.randn(shape, device=DEVICE, dtype=torch.float16)


@dataclass(frozen=True)
class Groups:
    """A weight whose bytes are q + 128, in groups of 128: uint8 [N, K], float16 [N, K/128]."""

    bytes: Tensor
    scales: Tensor

    def dense(self) -> Tensor:
        """Float32 [N, K], exact."""
        by_group = self.bytes.unflatten(1, (-1, GROUP_SIZE)).float() - 128
        return (by_group * self.scales[:, :, None].float()).flatten(1)


def random_groups(shape: Shape) -> Groups:
    """Of the size of a trained layer's."""
    values = torch.randint(1, 256, shape, device=DEVICE, dtype=torch.uint8)
    scales = torch.rand((shape[0], shape[1] // GROUP_SIZE), device=DEVICE) * 1e-3 + 1e-4
    return Groups(values, scales.half())


def vendor(shape: Shape) -> Made:
    """The 16-bit product of torch."""
    weight = random_dense(shape)
    return Made(lambda x: torch.nn.functional.linear(x, weight), lambda: weight)


def ours(backend: str, int8: bool = False) -> Callable[[Shape], Made]:
    """A backend of the package."""
    found = operations.backend(backend)
    function = found.linear_int8 if int8 else found.linear
    assert function is not None

    def make(shape: Shape) -> Made:
        weight = timing.random_weight(shape, DEVICE, GROUP_SIZE)
        parts = (weight.packed, weight.scales, weight.exponents)
        return Made(lambda x: function(x, *parts, None), lambda: dequantize(weight))

    return make


@cache
def vllm_operations() -> Any:
    """vLLM's kernels as torch operations: its library alone, without what `import vllm` starts."""
    torch.ops.load_library(_vllm_folder() / "_C.abi3.so")
    return torch.ops._C


@cache
def uint8b128() -> int:
    """How vLLM's operations are told of bytes that are q + 128: by its scalar_type.py alone."""
    names = runpy.run_path(str(_vllm_folder() / "scalar_type.py"))
    number: int = names["scalar_types"].uint8b128.id
    return number


def _vllm_folder() -> Path:
    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("No module named 'vllm'")
    return Path(found.origin).parent


def marlin(shape: Shape) -> Made:
    """Marlin of vLLM as its MarlinLinearKernel calls it: `gptq_marlin_repack` on the bytes,
    `marlin_gemm` with sums exchanged in float32 and no atomic adds, vLLM's defaults for these N.
    """
    rows, columns = shape
    groups, run = random_groups(shape), vllm_operations()
    nothing = torch.empty(0, device=DEVICE, dtype=torch.int32)
    words = groups.bytes.view(torch.int32).t().contiguous()  # [K/4, N], as GPTQ's
    weight = run.gptq_marlin_repack(words, nothing, columns, rows, 8, False)
    scales = marlin_scales(groups.scales.t())
    multiprocessors = torch.cuda.get_device_properties(DEVICE).multi_processor_count
    workspace = torch.zeros(multiprocessors, device=DEVICE, dtype=torch.int32)
    fixed = (nothing, nothing, nothing, workspace, uint8b128())

    def product(x: Tensor) -> Tensor:
        sizes = (len(x), rows, columns)
        flags = (True, False, True, False)  # all of K, atomic adds, sums in float32, float zeros
        operands = (x, None, weight, None, scales, None, None)
        result: Tensor = run.marlin_gemm(*operands, *fixed, *sizes, *flags)
        return result

    return Made(product, groups.dense)


def marlin_scales(scales: Tensor) -> Tensor:
    """Scales [K/G, N] in the order of vLLM's `marlin_permute_scales`: each 64, 8 by 8, turned."""
    return scales.reshape(-1, 8, 8).transpose(1, 2).reshape(scales.shape).contiguous()


def machete(shape: Shape) -> Made:
    """Machete of vLLM as its MacheteLinearKernel calls it: `machete_prepack_B`, `machete_mm`."""
    groups, run = random_groups(shape), vllm_operations()
    words = groups.bytes.view(torch.int32).t()  # [K/4, N], the bytes of a row together
    half, number = torch.float16, uint8b128()
    weight = run.machete_prepack_B(words, half, number, half)
    scales = groups.scales.t().contiguous()
    scaling = (None, scales, None, GROUP_SIZE, None, None, None)
    return Made(lambda x: run.machete_mm(x, weight, number, *scaling), groups.dense)


def humming(shape: Shape) -> Made:
    """humming, quantized by its own kernels."""
    from humming.layer import HummingLayer

    config = {"dtype": "int8", "group_size": GROUP_SIZE, "scale_dtype": "float16"}
    layer: Any = HummingLayer(
        shape_n=shape[0], shape_k=shape[1], weight_config=config, torch_dtype=torch.float16
    ).to(DEVICE)
    weight = random_dense(shape)
    layer.load_from_unquantized(weight)
    layer.transform()
    return Made(lambda x: layer(x), lambda: weight)


def gemlite_row(shape: Shape) -> Made:
    """gemlite with a scale a row."""
    from gemlite import helper

    weight = random_dense(shape)
    processor = helper.A16W8_INT8(device=str(DEVICE), dtype=torch.float16)
    return Made(processor.from_weights(weight), lambda: weight)


def gemlite_groups(shape: Shape) -> Made:
    """gemlite with scales for groups."""
    from gemlite import helper

    groups = random_groups(shape)
    scales = groups.scales.reshape(-1, 1)
    parts = (groups.bytes, scales, torch.full_like(scales, 128), 8, GROUP_SIZE)
    processor = helper.A16Wn(device=str(DEVICE), dtype=torch.float16)
    return Made(processor.from_weights(*parts), groups.dense)


def gemlite_int8(shape: Shape) -> Made:
    """gemlite with int8 activations, a scale a row and a token. On Hopper with the tiles that it
    brings for an H100, which it would load of itself only for a card of that name.
    """
    import gemlite
    from gemlite import helper

    if torch.cuda.get_device_capability(DEVICE) == (9, 0):
        tiles = Path(gemlite.__file__).parent / "configs" / "h100.json"
        gemlite.GemLiteLinear.load_config(str(tiles))
    weight = random_dense(shape)
    processor = helper.A8W8_int8_dynamic(device=str(DEVICE), dtype=torch.float16)
    return Made(processor.from_weights(weight), lambda: weight)


def rivals(with_peers: bool) -> dict[str, Rival]:
    """Name -> rival: the vendor, our backends that run here, peers whether installed or not."""
    scales = 1 / GROUP_SIZE
    found = {VENDOR: Rival(vendor, FLOAT16_BYTES)}
    for name in ("cuda", "sm80", "triton", "cpu"):
        if operations.backend(name).unavailable(DEVICE) is not None:
            continue
        found[f"halfweight {name}"] = Rival(ours(name), 1 + scales)
        if operations.backend(name).linear_int8 is not None and name != "sm80":  # triton's
            found[f"halfweight {name} int8"] = Rival(ours(name, True), 1 + scales, ROWS_ROUNDED)
    if with_peers:
        found |= {
            "humming g128": Rival(humming, 1 + 2 * scales, GROUPS_ROUNDED),
            "Marlin g128": Rival(marlin, 1 + 2 * scales),
            "Machete g128": Rival(machete, 1 + 2 * scales),
            "gemlite row": Rival(gemlite_row, 1, ROWS_ROUNDED),
            "gemlite g128": Rival(gemlite_groups, 1 + 4 * scales),
            "gemlite int8 row": Rival(gemlite_int8, 1, ROWS_ROUNDED, _untuned),
        }
    return found


def _untuned(shape: str, tokens: int) -> bool:
    return shape == UNTUNED["shape"] or tokens == UNTUNED["tokens"]


def products(rival: Rival, shape: Shape, copies: int) -> list[Product]:
    """The rival with so many weights, the first of them checked on a GPU."""
    first = rival.make(shape)
    if DEVICE.type == "cuda":
        check(first, shape[1], rival.most_error)
    return [first.product, *(rival.make(shape).product for _ in range(copies - 1))]


def check(made: Made, in_features: int, most_error: float) -> None:
    """Raises ValueError if a small batch is not the float64 product of the weights, rounded."""
    x = torch.randn(CHECKED_TOKENS, in_features, device=DEVICE, dtype=torch.float16)
    exact = x.double() @ made.weight().double().T
    error = float((made.product(x).double() - exact).norm() / exact.norm())
    if not error <= most_error:
        raise ValueError(f"relative error {error:.1e}")
