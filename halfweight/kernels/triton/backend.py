"""Triton backend: portable to GPUs of compute capability 7.5 and up, and to AMD's.

Which kernel computes a product depends on the batch, by a measured table (see tables.py):

    decode           gemv        x in registers, whole rows of W stream past
    to about 1,000   matmul      16-bit tensor cores, bytes converted in registers
                     two_int8    int8 tensor cores, x split into two int8 parts; as exact
    prefill          dequantize  a block of W to 16 bits at a time, then the vendor's product
    opt-in           int8        int8 tensor cores, x rounded to int8 per token and block

The device code is in gemv.py and tiled.py; this file chooses, allocates and
launches. Products of a split K leave float32 partial sums that a second kernel adds in order: no
atomics, same bits always.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from halfweight.kernels.operations import Backend, TokenRange
from halfweight.kernels.triton.launch import device_info, launch
from halfweight.kernels.triton.tables import REASONS, Config, best_config, kernels_by_tokens

MIN_CAPABILITY = (7, 5)
BLOCK_K = 128
SEGMENT = 16
"""Weights one thread of the GEMV loads at once."""
MAX_GEMV_TOKENS = 8
MAX_GEMV_SEGMENTS = 4
"""Segments of x a thread of the GEMV keeps in registers, 8 registers each, over all tokens."""
MAX_GEMV_WARPS = 16
ADD_BLOCK = 512
ROUND_VALUES = 2048
MAX_TILE_TOKENS = 256
WORKSPACE_BYTES = 32 << 20
"""16-bit weights that exist at a time during prefill: a block that stays in the L2 cache."""
WHOLE_TILES = 256
"""Rows of such a block: a multiple, as the vendor's products of other sizes are far slower."""


@dataclass(frozen=True)
class _Product:
    """Operands of one product, with x as rows [M, K] of unit stride."""

    x: Tensor
    packed: Tensor
    scales: Tensor
    exponents: Tensor | None
    bias: Tensor | None
    y: Tensor

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """M, N, K, G."""
        (out_features, in_features), num_groups = self.packed.shape, self.scales.shape[1]
        return self.x.shape[0], out_features, in_features, in_features // num_groups

    @property
    def scale_stride(self) -> int:
        """Elements between the scales of two rows; 0 for one scale a tensor."""
        return self.scales.stride(0) if self.scales.shape[0] > 1 else 0

    @property
    def block_k(self) -> int:
        """Depth of a tile: never wider than a group, unless a row is one group."""
        group_size = self.sizes[3]
        if self.scales.shape[1] == 1:
            return BLOCK_K
        return min(BLOCK_K, group_size & -group_size)

    @property
    def options(self) -> dict[str, bool]:
        """Compile-time switches every product kernel takes."""
        return {
            "HAS_EXPONENTS": self.exponents is not None,
            "HAS_BIAS": self.bias is not None,
        }


def _gemv(p: _Product, config: Config) -> None:
    tokens, out_features, in_features, group_size = p.sizes
    segments = _power_of_two(in_features) // SEGMENT
    padded_tokens = _power_of_two(tokens)
    least_warps = padded_tokens * segments // (32 * MAX_GEMV_SEGMENTS)
    programs = device_info(p.x.device).num_processors * config.per_processor
    launch(
        "gemv",
        (min(programs, -(-out_features // config.rows)), 1),
        tokens,
        (
            *(p.x, p.packed.view(torch.int32), p.scales, p.exponents, p.bias, p.y),
            *(out_features, in_features, group_size),
            *(p.x.stride(0), p.packed.stride(0), p.scale_stride),
        ),
        TOKENS=padded_tokens,
        ROWS=config.rows,
        SEGMENTS=segments,
        STAGES=config.stages,
        ASM=device_info(p.x.device).is_nvidia,
        num_warps=max(config.warps, least_warps),
        **_register_limit(p, config),
        **p.options,
    )


def _register_limit(p: _Product, config: Config) -> dict[str, int]:
    if config.max_registers is None or not device_info(p.x.device).is_nvidia:
        return {}
    return {"maxnreg": config.max_registers}


def _matmul(p: _Product, config: Config) -> None:
    is_nvidia = device_info(p.x.device).is_nvidia
    _tiled("matmul", (p.x, p.x.stride(0)), p, config, ASM=is_nvidia)


def _two_int8(p: _Product, config: Config) -> None:
    _tiled("matmul_int8", _round_activations(p, 2), p, config, PARTS=2)


def _int8(p: _Product, config: Config) -> None:
    _tiled("matmul_int8", _round_activations(p, 1), p, config, PARTS=1)


def _tiled(
    kernel: str, activations: tuple[Any, ...], p: _Product, config: Config, **meta: Any
) -> None:
    """A product by tiles; where K is split, partial sums and the kernel that adds them."""
    tokens, out_features, in_features, group_size = p.sizes
    split = min(config.split, -(-in_features // p.block_k))
    partials = p.y.new_empty((split, *p.y.shape), dtype=torch.float32) if split > 1 else None
    tiles = -(-tokens // config.tokens) * -(-out_features // config.rows)
    launch(
        kernel,
        (tiles, split),
        tokens,
        (
            *(*activations, p.packed, p.scales, p.exponents, p.bias, p.y, partials),
            *(out_features, in_features, p.packed.stride(0), p.scale_stride),
        ),
        GROUP_BLOCKS=0 if p.scales.shape[1] == 1 else group_size // p.block_k,
        SPLIT=split,
        BLOCK_M=config.tokens,
        BLOCK_N=config.rows,
        BLOCK_K=p.block_k,
        num_warps=config.warps,
        num_stages=config.stages,
        **_register_limit(p, config),
        **p.options,
        **meta,
    )
    if partials is not None:
        _add_partials(p, partials)


def _add_partials(p: _Product, partials: Tensor) -> None:
    split, tokens, out_features = partials.shape
    launch(
        "add_partials",
        (-(-out_features // ADD_BLOCK), tokens),
        tokens,
        (partials, p.exponents, p.bias, p.y, out_features),
        SPLIT=split,
        BLOCK=ADD_BLOCK,
        **p.options,
    )


def _round_activations(p: _Product, parts: int) -> tuple[Tensor, Tensor, int]:
    rounded, steps = round_activations(p.x, parts, p.block_k)
    return rounded, steps, steps.stride(0)


def round_activations(
    x: Tensor,
    parts: int,
    block_k: int,
    tile_tokens: int = MAX_TILE_TOKENS,
    with_ratios: bool = False,
) -> tuple[Tensor, Tensor]:
    """int8 [parts, M, K] and float32 steps [blocks of K, padded M], with ratios [2, .., ..].

    M is padded to whole tiles; the ratios are what hopper_int8.cu takes, before the steps.
    """
    tokens, in_features = x.shape
    blocks = -(-in_features // block_k)
    padded = -(-tokens // tile_tokens) * tile_tokens
    rounded = x.new_empty((parts, tokens, in_features), dtype=torch.int8)
    steps = x.new_empty((*(2,) * with_ratios, blocks, padded), dtype=torch.float32)
    most = _power_of_two(blocks)
    together = most if with_ratios else min(ROUND_VALUES // block_k, most)
    launch(
        "round_activations",
        (tokens, -(-blocks // together)),
        tokens,
        (x, x.stride(0), rounded, steps, padded, in_features),
        PARTS=parts,
        WITH_RATIOS=with_ratios,
        BLOCKS=together,
        BLOCK_K=block_k,
        num_warps=min(32, max(4, together * block_k // ROUND_VALUES)),
    )
    return rounded, steps


def _dequantize(p: _Product, config: Config) -> None:
    """Blocks of W in x's dtype, each gone through the vendor's product before the next."""
    _, out_features, in_features, _ = p.sizes
    step = WORKSPACE_BYTES // (in_features * p.x.element_size())
    step = max(16, step // WHOLE_TILES * WHOLE_TILES)
    block = p.x.new_empty((min(step, out_features), in_features))
    with _sums_in_float32():
        for begin in range(0, out_features, step):
            rows = slice(begin, begin + step)
            part = block[: min(step, out_features - begin)]
            _gather(
                *(None, p.packed[rows], p.scales if p.scale_stride == 0 else p.scales[rows]),
                *(None if p.exponents is None else p.exponents[rows], part),
            )
            y = p.y[:, rows]
            if p.bias is None:
                torch.mm(p.x, part.T, out=y)
            else:
                torch.addmm(p.bias[rows], p.x, part.T, out=y)


@contextmanager
def _sums_in_float32() -> Iterator[None]:
    """The vendor's products add the parts of a split K in float32, not in 16 bits, meanwhile."""
    settings: Any = torch.backends.cuda.matmul
    names = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")
    before = [getattr(settings, name) for name in names]
    for name in names:
        setattr(settings, name, False)
    try:
        yield
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(settings, name, value)


def _gather(
    ids: Tensor | None, packed: Tensor, scales: Tensor, exponents: Tensor | None, out: Tensor
) -> None:
    """out [num_rows, K]: dequantized rows `ids`, or the first num_rows."""
    out_features, in_features = packed.shape
    block = min(1024, _power_of_two(in_features))
    launch(
        "gather",
        (out.shape[0], -(-in_features // block)),
        out.shape[0],
        (
            *(out, ids, packed, scales, exponents),
            *(out_features, in_features, in_features // scales.shape[1]),
            *(packed.stride(0), scales.stride(0) if scales.shape[0] > 1 else 0),
        ),
        BLOCK_K=block,
        HAS_EXPONENTS=exponents is not None,
        HAS_IDS=ids is not None,
    )


KERNELS: dict[str, Callable[[_Product, Config], None]] = {
    "gemv": _gemv,
    "matmul": _matmul,
    "two_int8": _two_int8,
    "int8": _int8,
    "dequantize": _dequantize,
}
"""Config.kernel -> what computes y of a product."""


GROUP_MULTIPLES = {"gemv": SEGMENT, "matmul": 16, "two_int8": 32, "int8": 32, "dequantize": 1}
"""What must divide a group: a GEMV's segment, the least depth of a tensor core's product."""


def _power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def product(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    exponents: Tensor | None,
    bias: Tensor | None,
    choose: Callable[[int, tuple[int, int]], Config],
) -> Tensor:
    """x [..., K] times the dequantized weights, by the configuration `choose(M, (N, K))`."""
    out_features, in_features = packed.shape
    rows = x.reshape(-1, in_features)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    y = x.new_empty((rows.shape[0], out_features))
    if y.numel() > 0:
        config = choose(rows.shape[0], (out_features, in_features))
        others = (Config("matmul"), Config("dequantize"))
        config = next(c for c in (config, *others) if _takes_operands(c, rows, packed, scales))
        bias = None if bias is None else bias.to(x.dtype).contiguous()
        exponents = None if exponents is None else exponents.contiguous()
        parts = (_unit_stride(packed), _unit_stride(scales), exponents, bias)
        KERNELS[config.kernel](_Product(rows, *parts, y), config)
    return y.reshape(*x.shape[:-1], out_features)


def _takes_operands(config: Config, x: Tensor, packed: Tensor, scales: Tensor) -> bool:
    """Whether a kernel computes this product; dequantize computes any.

    The GEMV begins to read weights before the kernel before it has ended, so they must not be
    copies made here.
    """
    if not takes(config, x.dtype, *x.shape) or not takes_groups(config, packed, scales):
        return False
    aligned = packed.data_ptr() % SEGMENT == 0 and packed.stride(0) % SEGMENT == 0
    return config.kernel != "gemv" or (aligned and packed.stride(1) == 1 == scales.stride(1))


def takes_groups(config: Config, packed: Tensor, scales: Tensor) -> bool:
    """Whether a kernel finds one scale for all that it multiplies at once."""
    num_groups = scales.shape[1]
    return num_groups == 1 or packed.shape[1] // num_groups % GROUP_MULTIPLES[config.kernel] == 0


def _unit_stride(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def linear(
    x: Tensor, packed: Tensor, scales: Tensor, exponents: Tensor | None, bias: Tensor | None
) -> Tensor:
    """x [..., K] times the dequantized weights [N, K], in x's dtype, float32 accumulation."""

    def choose(tokens: int, shape: tuple[int, int]) -> Config:
        return best_config(device_info(x.device).architecture, tokens, shape)

    return product(x, packed, scales, exponents, bias, choose)


def takes(config: Config, dtype: torch.dtype, tokens: int, in_features: int) -> bool:
    """Whether a kernel computes a product of these sizes."""
    if config.kernel == "gemv":
        segments = _power_of_two(tokens) * _power_of_two(in_features) // SEGMENT
        fits = segments <= 32 * MAX_GEMV_WARPS * MAX_GEMV_SEGMENTS
        return fits and tokens <= MAX_GEMV_TOKENS and dtype != torch.float32
    return config.kernel != "two_int8" or dtype != torch.float32


def linear_int8(
    x: Tensor, packed: Tensor, scales: Tensor, exponents: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Like `linear`, with x rounded to int8 per token and block of K: opt-in, not exact."""

    def choose(tokens: int, shape: tuple[int, int]) -> Config:
        return best_config(device_info(x.device).architecture, tokens, shape, int8=True)

    return product(x, packed, scales, exponents, bias, choose)


def embedding(
    ids: Tensor, packed: Tensor, scales: Tensor, exponents: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Dequantized rows `ids` [...] as [..., K] in `dtype`; NaN for an id outside the table."""
    out = packed.new_empty((ids.numel(), packed.shape[1]), dtype=dtype)
    if out.numel() > 0:
        rows = ids.reshape(-1).contiguous()
        _gather(rows, _unit_stride(packed), _unit_stride(scales), exponents, out)
    return out.reshape(*ids.shape, packed.shape[1])


def unavailable(device: torch.device) -> str | None:
    """Why this backend cannot run on `device`, or None."""
    if device.type != "cuda":
        return "needs a GPU"
    if find_spec("triton") is None:
        return "needs the package triton"
    if torch.version.hip is None:
        found = torch.cuda.get_device_capability(device)
        if found < MIN_CAPABILITY:
            need = ".".join(map(str, MIN_CAPABILITY))
            return f"needs compute capability {need}, this GPU has {found[0]}.{found[1]}"
    return None


def ranges(device: torch.device) -> list[TokenRange]:
    """What the table of this GPU's architecture says of a weight of common size."""
    found = kernels_by_tokens(device_info(device).architecture)
    return [TokenRange(first, kernel, REASONS[kernel]) for first, kernel in found]


BACKEND = Backend("triton", unavailable, linear, embedding, linear_int8, ranges=ranges)
