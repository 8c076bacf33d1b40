"""Where the time of w8a16.cu goes: the kernel with parts left out, and what mma.sync alone reaches.

    python benchmarks/parts.py                            # on a GPU; under 30 seconds

A line a form and product: microseconds of the whole kernel, and without its tensor-core products,
conversions, reads of x from shared memory, copies, barriers. What is left computes nothing
that means anything. `mma.sync` is timed with registers alone, by warps a multiprocessor and
independent sums a warp; and with reads of 16 bytes a lane from shared memory in between.
"""

from __future__ import annotations

import argparse
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from envelope import RESULTS, envelope, write_result
from tiles import SHAPE_LIST, label, weights_of

from halfweight.kernels import timing
from halfweight.kernels.cuda import backend, driver, schedule
from halfweight.kernels.cuda.tiles import Form, Shape, form_on

Changes = tuple[tuple[str, str], ...]

SHAPES = (
    Shape(2, 8, 4, 2, 1, 2),
    Shape(2, 8, 4, 1, 1, 2, blocks=2),
    Shape(2, 8, 4, 2, 1, 2, scaled=True),
    Shape(4, 8, 4, 1, 1, 2, blocks=2, scaled=True),
    Shape(4, 8, 4, 2, 1, 2, scaled=True),
)
LOGIC = "c[0] = __uint_as_float(__float_as_uint(c[0]) ^ a[t][i][0] ^ a[t][i][1] ^ a[t][i][2] ^ "
NO_MMA = (
    (
        "mma(c, a[t][i], x16[2 * i], x16[2 * i + 1]);",
        LOGIC + "a[t][i][3] ^ x16[2 * i] ^ x16[2 * i + 1]);",
    ),
    ("first_mma(c, a[t][i], x16[0], x16[1]);", "c[0] = __uint_as_float(a[t][i][0] ^ x16[0]);"),
)
NO_CONVERSION = (
    ('asm("prmt.b32 %0, %1, %2, %3;" : "=r"(v) : "r"(word), "r"(offsets), "r"(selector));', ""),
    (
        'asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(v), "r"(0x64806480u));',
        "v = word; r = v + selector;",
    ),
    ('asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));', "r = a + b;"),
)
NO_X = (
    (
        "uint4 v = load16(",
        "uint4 v = {(u32)item, (u32)n, 7, 9}; u32 unused = (",
    ),
)
COPY = 'asm volatile("cp.async.cg.shared.global'
NO_COPIES = ((COPY, f"if (from == nullptr) {COPY}"),)
NO_BARRIER = (("__syncthreads();\n        fragments.w", "fragments.w"),)
LEFT_OUT: dict[str, Changes] = {
    "nothing": (),
    "products": NO_MMA,
    "conversion": NO_CONVERSION,
    "reads of x": NO_X,
    "reads of x, conversion": (*NO_X, *NO_CONVERSION),
    "copies": NO_COPIES,
    "barrier": NO_BARRIER,
    "copies, reads of x, conversion": (*NO_COPIES, *NO_X, *NO_CONVERSION),
    "copies, products": (*NO_COPIES, *NO_MMA),
}
RATE = """
extern "C" __global__ void __launch_bounds__(WARPS * 32) rate(float* out) {
    u8* memory = shared_memory();
    u32 from = shared_address(memory) + threadIdx.x * 16;
    float c[SUMS][4];
    u32 a[2][4], b[4] = {threadIdx.x, 3, 5, threadIdx.x + 7};
    for (int i = 0; i < 8; ++i) a[i / 4][i % 4] = 0x3c003c00u + (threadIdx.x << i);
    for (int i = 0; i < SUMS; ++i)
        for (int j = 0; j < 4; ++j) c[i][j] = threadIdx.x;
#pragma unroll 1
    for (int k = 0; k < TIMES; ++k) {
#pragma unroll
        for (int i = 0; i < SUMS; ++i) {
            if (READS && i % 4 == 0) load_words(from + (i % 8) * 512, b);
            mma(c[i], a[i % 2], b[i % 2 * 2], b[i % 2 * 2 + 1]);
        }
    }
    float sum = 0;
    for (int i = 0; i < SUMS; ++i)
        for (int j = 0; j < 4; ++j) sum += c[i][j];
    out[blockIdx.x * WARPS * 32 + threadIdx.x] = sum;
}
"""
TIMES = 2000


def changed(source: Any, changes: Changes, *choice: Any) -> str:
    """A kernel's text with parts left out; raises ValueError where a part is not found."""
    text: str = source(*choice)
    for old, new in changes:
        if old not in text:
            raise ValueError(f"{old!r} is not in the kernel")
        text = text.replace(old, new)
    return text


def timed(form: Form, shape: str, tokens: int, changes: Changes) -> dict[str, Any]:
    """Microseconds of a form's best plan, so changed."""
    device = torch.device("cuda", 0)
    rows, columns = SHAPE_LIST[shape]
    weights = weights_of((rows, columns), device).quantized
    plans = schedule.plans(form, tokens, rows, columns, driver.card_of(0))
    plan = min(plans, key=schedule.preference)
    x = torch.randn(tokens, columns, device=device, dtype=torch.float16)
    y = torch.empty(tokens, rows, device=device, dtype=torch.float16)
    backend._kernel.cache_clear()
    backend._start.cache_clear()
    with mock.patch.object(backend, "source", partial(changed, backend.source, changes)):
        calls = [
            partial(backend.launch, x, w.packed, w.scales, w.exponents, None, y, plan)
            for w in weights
        ]
        us = timing.interleaved({"it": timing.Round(calls, device)}, repeats=5)["it"]
    return {"plan": label(plan), "microseconds": round(us, 2)}


def rate(warps: int, sums: int, reads: bool) -> dict[str, Any]:
    """Multiply-adds a clock and multiprocessor, at the clock that the device says it has."""
    card = driver.card_of(0)
    sizes = {"WARPS": warps, "SUMS": sums, "READS": int(reads), "TIMES": TIMES, "BF16": 0}
    defines = "".join(f"#define {name} {value}\n" for name, value in sizes.items())
    text = defines + (Path(backend.__file__).parent / "ptx.cuh").read_text() + RATE
    major, minor = torch.cuda.get_device_capability(0)
    kernel = driver.load(text, f"sm_{major}{minor}", b"rate", 65536, 0)
    out = torch.empty(card.multiprocessors * warps * 32, device="cuda")
    stream = torch.cuda.current_stream().cuda_stream
    start = driver.prepare(kernel, (card.multiprocessors, warps * 32, 65536), stream, 0)
    pointer = torch.tensor([out.data_ptr()], dtype=torch.int64)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for event in (begin, begin, end):
        event.record()
        driver.launch(start, pointer.data_ptr())
    torch.cuda.synchronize()
    us = 1000 * begin.elapsed_time(end)
    per_clock = 2048 * warps * sums * TIMES / (us * card.mhz)
    return {"warps": warps, "sums": sums, "reads": reads, "products_per_clock": round(per_clock)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="gate_up", choices=SHAPE_LIST)
    parser.add_argument("--batches", nargs="+", type=int, default=[128])
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    device = torch.device("cuda", 0)
    facts = envelope(device, {"read_bytes_per_second": timing.read_bandwidth(device)})
    rows: list[dict[str, Any]] = []
    for warps, sums, reads in product((4, 8, 16), (4, 8, 16), (False, True)):
        rows.append(rate(warps, sums, reads))
        print(rows[-1], flush=True)
    for tokens, shape, (name, changes) in product(options.batches, SHAPES, LEFT_OUT.items()):
        form = form_on(driver.card_of(0), shape)
        if form.stages < 2:
            continue
        found = timed(form, options.shape, tokens, changes)
        rows.append({"shape": options.shape, "tokens": tokens, "left_out": name, **found})
        print(rows[-1], flush=True)
        write_result("parts", facts, rows, out=options.out)


if __name__ == "__main__":
    main()
