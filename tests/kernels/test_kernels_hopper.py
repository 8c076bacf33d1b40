"""The choice of tiles for Hopper: pure arithmetic, tested everywhere."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from threading import Barrier
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from halfweight.kernels.cuda import backend as sm80
from halfweight.kernels.cuda import driver
from halfweight.kernels.cuda.card import Card
from halfweight.kernels.cuda.tiles import SHAPES as SM80_SHAPES
from halfweight.kernels.cuda.tiles import form_on
from halfweight.kernels.hopper import backend as cuda
from halfweight.kernels.hopper import gemv
from halfweight.kernels.hopper.backend import source
from halfweight.kernels.hopper.tiles import (
    INT8,
    LARGE,
    SMALL,
    Config,
    Int8,
    Large,
    Small,
    candidates,
    choose,
    choose_int8,
    plans,
)

SHARED_BYTES = 227 * 1024
H100 = Card(132, 232448, 233472, 50 << 20, 3_352_000, 1980, 1300)
H200 = replace(H100, memory_bytes_per_us=4_916_000)
SHAPES = [
    (57344, 8192),
    (6144, 4096),
    (28672, 4096),
    (4096, 14336),
    (128256, 4096),
    (576, 576),
    (48, 1536),
]


@pytest.mark.parametrize("config", [*SMALL, *LARGE, *INT8], ids=str)
def test_a_block_fits_a_multiprocessor(config: Config) -> None:
    assert config.shared_bytes <= SHARED_BYTES
    assert max(config.rows, config.tokens) <= 256  # a box of a bulk copy


@pytest.mark.parametrize("tokens", [1, 8, 9, 32, 33, 64, 65, 128, 129, 1000, 4096])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_a_plan_covers_every_tile_once(tokens: int, rows: int, columns: int) -> None:
    for config in (*candidates(tokens, columns, 64), *INT8):
        for p in plans(config, tokens, rows, columns, H100):
            tiles = p.tiles_m * p.tiles_n
            assert p.tiles_m * config.tokens >= tokens
            assert p.tiles_n * p.rows * config.cluster >= rows
            assert p.k_blocks * config.k_bytes >= columns
            assert 1 <= p.num_workers <= H100.multiprocessors // (config.cluster * config.split)
            assert p.rows <= config.rows
            shared = tiles - p.whole_waves * p.num_workers
            assert shared < p.num_workers  # the rest is less than a wave, or nothing
            assert shared <= 0 or shared * p.k_blocks >= p.num_workers  # no worker without a part


@pytest.mark.parametrize("tokens", range(1, 65))
def test_the_small_kernel_has_one_tile_of_tokens(tokens: int) -> None:
    """It knows no other: a second one would not be written."""
    found = candidates(tokens, 4096, 128)
    assert {c.tokens for c in found} == {next(n for n in (8, 16, 32, 64) if n >= tokens)}
    assert all(isinstance(c, Small) for c in found) or tokens > 32
    for config in found:
        assert {p.tiles_m for p in plans(config, tokens, 777, 4096, H100)} == {1}


def test_tiles_cut_evenly_end_at_the_borders_of_workers() -> None:
    sharing = [c for c in LARGE if c.shares_tiles and (c.cluster, c.split) == (1, 1)]
    assert sharing
    for config in sharing:
        found = [p for p in plans(config, 64, 6144, 4096, H100) if p.rows == config.rows]
        tiles = found[0].tiles_m * found[0].tiles_n
        assert tiles < H100.multiprocessors / 2
        last = found[-1]
        assert last.whole_waves == 0
        assert last.num_workers == H100.multiprocessors // tiles * tiles


def test_a_last_wave_of_fewer_blocks_reads_no_slower_than_they_multiply() -> None:
    """All share the memory; a fourth of them have more, and multiplying is what takes long."""
    form = next(c for c in SMALL if (c.tokens, c.rows) == (8, 128))
    two_waves = next(p for p in plans(form, 8, 165 * 128, 4096, H100) if p.whole_waves == 2)
    full_us = 132 * 128 * form.k_bytes / H100.read_bytes_per_us
    assert full_us > form.block_us > full_us / 4
    stages = 4096 // form.k_bytes
    expected = stages * (full_us + form.block_us) + 2 * form.tile_us
    assert two_waves.microseconds == pytest.approx(expected)


def test_a_tile_that_a_cluster_splits_has_a_cluster_of_its_own() -> None:
    found = [p for c in LARGE if c.split > 1 for p in plans(c, 128, 6144, 4096, H100)]
    assert found
    for p in found:
        assert p.whole_waves == 1
        assert p.num_workers == p.tiles_m * p.tiles_n
        assert p.k_blocks >= p.config.split


def test_tiles_of_fewer_rows_fill_whole_waves() -> None:
    """gate_up of Llama-3-8B for 64 tokens: 128 tiles of 224 rows for 132 multiprocessors."""
    form = next(c for c in LARGE if (c.tokens, c.warpgroups) == (64, 4))
    fewer, all_rows = plans(form, 64, 28672, 4096, H100)
    assert (fewer.rows, fewer.tiles_n) == (224, 128)
    assert (all_rows.rows, all_rows.tiles_n) == (256, 112)
    assert fewer.whole_waves == all_rows.whole_waves == 1


def test_int8_activations_choose_among_their_own() -> None:
    assert choose_int8(2048, 28672, 4096, H100).config in INT8


@pytest.mark.parametrize(("tokens", "groups"), [(511, 4), (1, 4), (600, 8)])
def test_few_tokens_or_small_groups_are_exact_with_int8_activations(monkeypatch, tokens, groups):
    """Rounding them would be slower."""
    x = torch.zeros(tokens, 512, dtype=torch.float16)
    packed, scales = (torch.zeros(64, n, dtype=torch.uint8) for n in (512, groups))
    exponents = torch.zeros(64, dtype=torch.int8)
    monkeypatch.setattr(cuda, "linear", lambda *operands: "exact")
    assert cuda.linear_int8(x, packed, scales, exponents, None) == "exact"
    many = torch.zeros(512, 512, dtype=torch.float16)
    assert cuda.takes_int8(many, packed, packed[:, :4], exponents)


@pytest.mark.parametrize("config", INT8, ids=str)
def test_activations_are_rounded_for_the_tile_that_takes_them(config: Int8) -> None:
    x = torch.randn(3, 1000).half()
    rounded, steps = cuda.rounded_for(config, x)
    assert rounded.dtype == torch.int8
    assert rounded.shape == x.shape
    assert steps.shape == (2, -(-1000 // config.k_bytes), config.tokens)
    values = rounded * steps[1, :, :3].T.repeat_interleave(config.k_bytes, dim=1)[:, :1000]
    assert (values - x).norm() < 0.012 * x.norm()


@pytest.mark.parametrize("config", INT8, ids=str)
def test_sums_of_int8_products_are_exact_as_floats(config: Int8) -> None:
    """hopper_int8.cu reads them as floats: from 0 to 2^24 their bits are a straight line."""
    base, most = config.chain << 21, config.chain * 128 * 128 * 127
    ends = np.array([base - most, base, base + most], np.int32)
    assert ends.min() >= 0
    assert ends.max() < 2**24
    assert np.array_equal(ends.view(np.float32).astype(np.float64) * 2.0**149, ends)


def test_tiles_are_not_shared_by_four_warpgroups() -> None:
    """They have no registers to spare for another's sums."""
    found = [p for c in LARGE if c.warpgroups == 4 for p in plans(c, 100, 6144, 4096, H100)]
    assert found
    assert all(p.tiles_m * p.tiles_n <= p.whole_waves * p.num_workers for p in found)


def test_small_batches_use_the_small_kernel_where_its_boxes_fit() -> None:
    assert isinstance(choose(4, 4096, 4096, 128, H100).config, Small)
    assert isinstance(choose(4, 4096, 4096, 32, H100).config, Large)  # groups of 32
    assert isinstance(choose(4, 576, 576, 64, H100).config, Large)  # 576 = 4.5 * 128
    assert isinstance(choose(64, 4096, 4096, 128, H100).config, Small)
    assert isinstance(choose(65, 4096, 4096, 128, H100).config, Large)


def test_an_uneven_last_wave_is_shared_only_where_that_is_faster() -> None:
    nearly_full = choose(1024, 4096, 14336, 128, H100)  # 128 tiles for 132 blocks
    assert nearly_full.whole_waves * nearly_full.num_workers >= 64
    mostly_empty = choose(256, 4096, 14336, 128, H100)  # 32 tiles
    assert mostly_empty.whole_waves == 0


def test_machine_code_is_compiled_once_for_a_compiler_and_a_text(tmp_path, monkeypatch) -> None:
    compiled = []
    nvrtc = SimpleNamespace(nvrtcVersion=lambda: (0, 13, 0))
    monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(nvrtc=nvrtc))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(driver, "compile_cubin", lambda text, _: compiled.append(text) or b"code")
    for text in ("one", "one", "two"):
        assert driver.cubin(text, "sm_90a") == b"code"
    nvrtc.nvrtcVersion = lambda: (0, 13, 1)
    driver.cubin("one", "sm_90a")
    assert compiled == ["one", "two", "one"]
    assert all(p.suffix == ".cubin" for p in (tmp_path / "halfweight" / "cuda").iterdir())


def test_all_forms_are_compiled_ahead_once_each_and_beside_each_other(tmp_path, monkeypatch):
    compiled, two = [], Barrier(2, timeout=10)

    def compile_cubin(text, architecture):
        compiled.append((text, architecture))
        if len(compiled) <= 2:
            two.wait()
        return b"code"

    nvrtc = SimpleNamespace(nvrtcVersion=lambda: (0, 13, 0))
    monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(nvrtc=nvrtc))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(driver, "compile_cubin", compile_cubin)
    monkeypatch.setattr(driver, "card_of", lambda index: H100)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    dtype, device = torch.bfloat16, torch.device("cuda", 0)
    needed = [(text, "sm_90a") for text in gemv.common_sources(dtype)]
    needed += [(source(form, 1, dtype), "sm_90a") for form in (*SMALL, *LARGE)]
    fit = [form_on(H100, shape) for shape in SM80_SHAPES]
    needed += [(sm80.source(form, 128, torch.uint8, dtype), "sm_90") for form in fit]
    for backend in (cuda.BACKEND, sm80.BACKEND):
        backend.prepare(device, 128, torch.float32)
        assert compiled == []
    for backend in (cuda.BACKEND, sm80.BACKEND):
        backend.prepare(device, 128, dtype)
    assert [driver.cubin(*text) for text in needed] == [b"code"] * len(needed)
    assert sorted(compiled) == sorted(set(needed))


def test_machine_code_that_cannot_be_kept_is_used_all_the_same(tmp_path, monkeypatch) -> None:
    (tmp_path / "halfweight").touch()  # where a folder should be
    nvrtc = SimpleNamespace(nvrtcVersion=lambda: (0, 13, 0))
    monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(nvrtc=nvrtc))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(driver, "compile_cubin", lambda text, _: b"code")
    assert driver.cubin("one", "sm_90a") == b"code"


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs CUDA's compiler, but no GPU")
@pytest.mark.parametrize("config", [*LARGE, *INT8], ids=str)
def test_products_of_warpgroups_overlap(config: Large, tmp_path) -> None:
    """Where it cannot prove that they may, ptxas waits after each and only notes a number."""
    text = tmp_path / "kernel.cu"
    text.write_text(source(config, 1, torch.float16))
    command = ["nvcc", "-cubin", "-std=c++17", "-gencode=arch=compute_90a,code=sm_90a"]
    command += ["-Xptxas", "-v", "-o", str(tmp_path / "kernel.cubin"), str(text)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Used" in done.stderr
    assert "C75" not in done.stderr, done.stderr
