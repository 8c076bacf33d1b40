"""Kernels of kernels/cuda and kernels/hopper on the CPU, by emulated_gpu.hpp; products for them."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

EMULATOR = Path(__file__).with_suffix(".hpp")

needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs CUDA's compiler")


def compiled(text, kept_from, entry, changes, folder):
    """`run` of a kernel's text: from ptx.cuh's first words to `kept_from` the emulator, at its end
    `entry`; then the changes (old, new).
    """
    begin, end = text.index("// Instructions that"), text.index(kept_from)
    text = text[:begin] + EMULATOR.read_text() + text[end:] + entry
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path = folder / "kernel.cpp"
    path.write_text(text)
    command = ["g++", "-O1", "-std=c++17", "-w", "-shared", "-fPIC", "-o"]
    subprocess.run([*command, path.with_suffix(".so"), path], check=True)
    return ctypes.CDLL(str(path.with_suffix(".so"))).run


def operands(sizes, group_size, scales_dtype, dtype):
    """x, packed, scales, exponents, bias, and the product in float64."""
    tokens, rows, columns = sizes
    x = torch.randn(tokens, columns).to(dtype)
    packed = torch.randint(0, 256, (rows, columns), dtype=torch.uint8)
    num_groups = columns // group_size
    exponents = None
    if scales_dtype == torch.uint8:
        scales = torch.randint(1, 256, (rows, num_groups), dtype=torch.uint8)
        exponents = torch.randint(-14, -10, (rows,), dtype=torch.int8)
        factors = torch.ldexp(scales.double(), exponents.double()[:, None])
    else:
        scales = (torch.rand(rows, num_groups) / 64).to(scales_dtype)
        factors = scales.double()
    bias = torch.randn(rows).to(dtype)
    weight = (packed.double() - 128) * factors.repeat_interleave(group_size, 1)
    return x, packed, scales, exponents, bias, x.double() @ weight.T + bias.double()


def error(y, expected):
    """Relative, of all numbers together."""
    return ((y.double() - expected).norm() / expected.norm()).item()
