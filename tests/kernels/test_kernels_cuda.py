"""w8a16.cu without a GPU: in an emulator, compiled for every architecture; its choice of tiles."""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import emulated_gpu
import pytest
import torch
from emulated_gpu import error, needs_gxx, needs_nvcc, operands

from halfweight.kernels import operations
from halfweight.kernels.cuda import backend, driver
from halfweight.kernels.cuda.card import Card
from halfweight.kernels.cuda.schedule import Plan, plans
from halfweight.kernels.cuda.tiles import (
    SHAPES,
    WAIT_US,
    Form,
    Shape,
    choose,
    form_on,
    forms,
    may_scale,
    run_of,
)

RTX_3090 = Card(82, 101376, 102400, 6 << 20, 936_000, 1695, 512)
RTX_4090 = Card(128, 101376, 102400, 72 << 20, 1_008_000, 2520, 512)
A100 = Card(108, 166912, 167936, 40 << 20, 2_039_000, 1410, 1024)
H200 = Card(132, 232448, 233472, 50 << 20, 4_800_000, 1980, 1300)
CARDS = {"3090": RTX_3090, "4090": RTX_4090, "a100": A100, "h200": H200}
ENTRY = """
static Operands operands;
extern "C" int run(const Operands* o, int blocks, int threads, int bytes, unsigned seed) {
    operands = *o;
    return launch([] { w8a16(operands); }, blocks, threads, bytes, seed);
}
"""


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    """(form, run, scales' dtype, dtype, changes of the text) -> the kernel on the CPU."""

    @cache
    def build(*choice, changes=()):
        folder = tmp_path_factory.mktemp("emulated")
        return emulated_gpu.compiled(
            backend.source(*choice), "// A product as every", ENTRY, changes, folder
        )

    return build


def product(kernel, plan: Plan[Form], x, packed, scales, exponents, bias, seed=0):
    """The emulated product; y, partial sums and shared memory begin as noise or NaN."""
    y = torch.full((x.shape[0], packed.shape[0]), torch.nan, dtype=x.dtype)
    partials = torch.full((plan.num_workers * plan.config.shape.partial_floats,), torch.nan)
    flags = torch.zeros(plan.num_workers, dtype=torch.int32)
    start = driver.Start(None, None, -1, partials, flags)
    problem = driver.problem_of(plan, start, x, scales, exponents, bias, y)
    given = backend.Operands(packed.data_ptr(), x.data_ptr(), problem)
    sizes = (plan.num_workers, plan.config.shape.threads, plan.config.shared_bytes, seed)
    assert kernel(ctypes.byref(given), *sizes) == 0
    assert not flags.any()  # ready for the next product
    return y


def schedules(form, sizes, card):
    """Plans of every kind for five blocks: whole tiles, a shared rest, all tiles shared."""
    few = replace(card, multiprocessors=-(-5 // form.blocks))
    return {plan.whole_waves: plan for plan in plans(form, *sizes, few)}.values()


F16, BF16, F32, GRID8 = torch.float16, torch.bfloat16, torch.float32, torch.uint8
SCALED = Shape(2, 8, 4, 1, 1, 2, blocks=2, scaled=True)
MOST_SUMS = Shape(2, 8, 4, 2, 1, 2)
CASES = [
    # shape, card, (tokens, rows, columns), group size, scales, dtype
    (Shape(2, 1, 1, 1, 8, 1), RTX_3090, (5, 70, 1056), 32, GRID8, F16),
    (Shape(2, 1, 1, 1, 4, 1, blocks=4), A100, (8, 104, 1600), 1600, F16, BF16),
    (Shape(2, 2, 2, 1, 4, 1), RTX_3090, (13, 130, 1152), 128, GRID8, BF16),
    (Shape(1, 4, 2, 1, 4, 1), A100, (31, 90, 1344), 192, F32, F16),
    (Shape(2, 4, 4, 1, 2, 1), RTX_3090, (17, 150, 1056), 32, BF16, F16),
    (MOST_SUMS, H200, (61, 152, 768), 256, GRID8, F16),
    (Shape(2, 8, 2, 2, 2, 1), A100, (200, 90, 576), 64, GRID8, F16),
    (Shape(2, 8, 4, 2, 1, 2), H200, (130, 129, 384), 128, F16, BF16),
    (SCALED, H200, (40, 304, 672), 96 * 7, GRID8, F16),
    (Shape(2, 8, 4, 2, 1, 2, scaled=True), RTX_3090, (130, 129, 384), 64, GRID8, BF16),
]


def most_error(form, dtype):
    """Of rounding y, and where the form scales weights, of rounding these."""
    y = 3e-4 if dtype == F16 else 2.4e-3
    return 1.42 * y if form.shape.scaled else y


@needs_gxx
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[2]}-{c[3]}")
def test_the_product_is_the_exact_one_rounded(emulated, case):
    shape, card, sizes, group_size, scales_dtype, dtype = case
    form = form_on(card, shape)
    *given, expected = operands(sizes, group_size, scales_dtype, dtype)
    kernel = emulated(form, run_of(group_size, given[2].shape[1]), scales_dtype, dtype)
    found = schedules(form, sizes, card)
    assert len(found) > 1
    for seed, plan in enumerate(found):
        y = product(kernel, plan, *given, seed=seed)
        assert y.isfinite().all()
        assert error(y, expected) < most_error(form, dtype)


@needs_gxx
@pytest.mark.parametrize(
    "change",
    [
        ("wait_for_copies<STAGES - 2>();", "wait_for_copies<STAGES - 1>();"),
        ("STAGES - 2>();\n        __syncthreads();", "STAGES - 2>();"),
        ("__syncthreads();\n        store(", "store("),
        ("scales[t][i % 4 / 2]", "scales[t][0]"),
    ],
    ids=["a copy not waited for", "a barrier left out", "results not there", "another row's scale"],
)
def test_the_emulator_sees(emulated, change):
    shape, card, sizes, group_size, scales_dtype, dtype = CASES[2]
    form = form_on(card, shape)
    *given, expected = operands(sizes, group_size, scales_dtype, dtype)
    kernel = emulated(form, 128, scales_dtype, dtype, changes=(change,))
    plan = next(iter(schedules(form, sizes, card)))
    assert not error(product(kernel, plan, *given), expected) < 3e-2


@needs_nvcc
@pytest.mark.parametrize("architecture", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"])
def test_every_architecture_compiles_it(architecture, tmp_path):
    """The forms with most registers, and the one with fewest tokens."""
    card = {"sm_80": A100, "sm_90": H200, "sm_100": H200}.get(architecture, RTX_4090)
    for shape, run, dtype in ((SHAPES[0], 32, BF16), (MOST_SUMS, 128, F16), (SCALED, 64, F16)):
        form = form_on(card, shape)
        if form.stages < 2:
            continue
        used, spilled = compiled(form, run, dtype, architecture, tmp_path)
        assert 0 < used <= 255
        assert spilled <= 64  # of what copies take between stages


def compiled(form, run, dtype, architecture, folder):
    """Registers of a thread and bytes that it spills, from ptxas."""
    path = folder / "kernel.cu"
    path.write_text(backend.source(form, run, GRID8, dtype))
    command = ["nvcc", "-cubin", "-std=c++17", f"-arch={architecture}", "-Xptxas", "-v", "-o"]
    done = subprocess.run(
        [*command, path.with_suffix(".cubin"), path], capture_output=True, text=True, check=True
    )
    (used,) = re.findall(r"Used (\d+) registers", done.stderr)
    (spilled,) = re.findall(r"(\d+) bytes spill stores", done.stderr)
    return int(used), int(spilled)


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
@pytest.mark.parametrize("tokens", [2, 8, 9, 16, 33, 64, 65, 100, 129, 256])
def test_every_card_has_a_form_for_every_number_of_tokens(card, tokens):
    for form in forms(card, tokens, scaled=True):
        assert form.shared_bytes <= card.block_bytes
        assert (form.shared_bytes + 1024) * form.shape.blocks <= card.shared_bytes
        assert form.k_bytes % 128 == 0
        assert form.shape.threads * form.shape.blocks >= 256
    for rows, columns, scaled in ((28672, 4096, False), (6144, 4096, True), (48, 1536, False)):
        plan = choose(card, (tokens, rows, columns), scaled)
        assert scaled or not plan.config.shape.scaled
        assert plan.tiles_m * plan.config.tokens >= tokens
        assert plan.tiles_n * plan.rows >= rows
        assert plan.k_blocks * plan.config.k_bytes >= columns
        assert plan.num_workers <= card.multiprocessors * plan.config.shape.blocks


def test_the_bound_is_the_slowest_part():
    """A card of twice the memory rate takes half the time where memory is what it waits for."""
    form = form_on(RTX_3090, Shape(2, 1, 1, 1, 8, 1))
    slow, fast = (replace(RTX_3090, memory_bytes_per_us=rate) for rate in (1e4, 2e4))
    assert form.stage_us(slow, 82, 32) == pytest.approx(82 * 32 * 512 / 1e4, rel=1e-3)
    assert form.stage_us(fast, 82, 32) == pytest.approx(82 * 32 * 512 / 2e4, rel=1e-3)
    large, endless = form_on(A100, MOST_SUMS), replace(A100, memory_bytes_per_us=1e12)
    faster = replace(endless, mhz=2 * A100.mhz)
    us = [large.stage_us(card, 108, 128) - WAIT_US for card in (endless, faster)]
    assert us[0] == pytest.approx(2 * us[1], rel=1e-3)


def test_a_block_alone_on_its_multiprocessor_is_faster():
    form = form_on(A100, Shape(2, 4, 4, 1, 1, 2, blocks=2))
    endless = replace(A100, memory_bytes_per_us=1e12)
    assert form.stage_us(endless, 108, 128) < 0.7 * form.stage_us(endless, 109, 128)


def test_only_one_byte_scales_of_whole_groups_may_scale_weights():
    assert may_scale(128, is_grid8=True)
    assert not may_scale(32, is_grid8=True)
    assert not may_scale(128, is_grid8=False)


@pytest.mark.parametrize(
    ("group_size", "num_groups", "run"),
    [
        (32, 9, 32),
        (96, 2, 32),
        (64, 2, 64),
        (192, 3, 64),
        (128, 2, 128),
        (384, 2, 128),
        (37, 1, 128),
    ],
)
def test_scales_are_met_at_whole_groups(group_size, num_groups, run):
    assert run_of(group_size, num_groups) == run


def test_what_it_does_not_take():
    x, packed = torch.zeros(4, 64, dtype=F16), torch.zeros(8, 64, dtype=torch.uint8)
    scales = torch.ones(8, 2, dtype=F16)
    assert backend.takes(x, packed, scales, None)
    assert backend.takes(x, packed, scales[:, :1], None)
    assert not backend.takes(x.float(), packed, scales, None)
    assert not backend.takes(x[:1], packed, scales, None)  # the GEMV
    assert not backend.takes(x, packed, torch.ones(8, 4, dtype=F16), None)  # groups of 16
    assert not backend.takes(x, packed, scales[:1], None)  # one scale a tensor
    assert not backend.takes(x, packed.T.contiguous().T, scales, None)
    assert not backend.takes(torch.zeros(257, 64, dtype=F16), packed, scales, None)
    exponents = torch.zeros(8, dtype=torch.int8)
    assert backend.takes(x, packed, scales.byte(), exponents)
    assert not backend.takes(x, packed, scales.byte(), None)
    assert not backend.takes(x, packed, scales, exponents)


def test_a_launch_is_what_the_plan_says(monkeypatch):
    """The driver replaced by one that notes what it is given."""
    launched = []
    current = [-1]  # as tensors on a CPU say it

    @contextmanager
    def entered(device):
        current.append(device)
        yield
        current.pop()

    def launch_kernel(launch, kernel, where, _):
        (at,) = (ctypes.c_void_p * 1).from_address(where)
        assert current[-1] == -1
        launched.append((launch, kernel, backend.Operands.from_address(at)))
        return (0,)

    names = SimpleNamespace(CUlaunchConfig=SimpleNamespace, cuLaunchKernelEx=launch_kernel)
    monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(driver=names))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", entered)
    (plan, *_) = plans(form_on(A100, SHAPES[0]), 5, 70, 1056, A100)
    *given, _ = operands((5, 70, 1056), 32, GRID8, F16)
    x, packed, scales, exponents, bias = given
    space = torch.empty(1), torch.zeros(1, dtype=torch.int32)
    start = driver.prepare("kernel", (3, 256, 99), 7, -1, space)
    rows, y, bias = driver.operands(x[None], packed, bias)
    problem = driver.problem_of(plan, start, rows, scales, exponents, bias, y)
    held = backend.Operands(packed.data_ptr(), rows.data_ptr(), problem)
    driver.launch(start, ctypes.addressof(held))
    current.append(3)  # another is the current one
    driver.launch(start, ctypes.addressof(held))
    assert current == [-1, 3]
    (config, kernel, found), again = launched
    assert again[:2] == (config, kernel)
    assert kernel == "kernel"
    assert (config.gridDimX, config.blockDimX, config.sharedMemBytes, config.hStream) == (
        3,
        256,
        99,
        7,
    )
    assert found.packed == packed.data_ptr()
    sizes = ("num_tokens", "out_features", "in_features", "group_size", "num_groups")
    assert [getattr(found.problem, name) for name in sizes] == [5, 70, 1056, 32, 33]
    assert found.problem.y == y.data_ptr()
    assert found.problem.steps is None


@pytest.mark.parametrize(
    ("capability", "is_early"), [((8, 0), False), ((8, 9), False), ((9, 0), True), ((12, 0), True)]
)
def test_it_starts_early_where_kernels_can(monkeypatch, capability, is_early):
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(driver, "card_of", lambda _: RTX_4090)
    monkeypatch.setattr(driver, "workspace", lambda *_: None)
    monkeypatch.setattr(driver, "prepare", lambda *_, is_early=False: asked.append(is_early))
    monkeypatch.setattr(backend, "_kernel", lambda *_: None)
    (plan, *_) = plans(form_on(RTX_4090, SHAPES[0]), 5, 70, 1056, RTX_4090)
    backend._start.__wrapped__(plan, 32, GRID8, F16, 0, 0)
    assert asked == [is_early]


@pytest.mark.parametrize(
    ("name", "capability", "reason"),
    [
        ("sm80", (7, 5), "needs compute capability 8.0, this GPU has 7.5"),
        ("cuda", (8, 9), "needs compute capability 9.0, this GPU has 8.9"),
        ("sm80", (12, 0), "needs the package cuda-bindings"),
        ("cuda", (9, 0), "needs the package cuda-bindings"),
    ],
)
def test_what_a_machine_lacks_is_told(monkeypatch, name, capability, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(driver, "find_spec", lambda name: None)
    assert operations.backend(name).unavailable(torch.device("cuda")) == reason
    assert operations.backend(name).unavailable(torch.device("cpu")) == "needs a CUDA device"


def test_without_its_compiler_the_portable_backend_is_taken_and_the_log_says_why(
    monkeypatch, caplog
):
    def no_library():
        raise RuntimeError("Failed to dlopen libnvrtc.so.13")

    nvrtc = SimpleNamespace(nvrtcVersion=no_library)
    monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(nvrtc=nvrtc))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(driver, "find_spec", lambda name: name)
    real = operations.backend
    triton = replace(real("triton"), unavailable=lambda device: None)
    monkeypatch.setattr(
        operations, "backend", lambda name: triton if name == "triton" else real(name)
    )
    driver._compiler_lacks.cache_clear()
    try:
        with caplog.at_level("INFO", logger="halfweight"):
            assert operations.choose_backend("cuda") == "triton"
    finally:
        driver._compiler_lacks.cache_clear()
    assert "not sm80: needs NVRTC, CUDA's run-time compiler: Failed to dlopen" in caplog.text
