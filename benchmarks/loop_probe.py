"""Throwaway: variants of w8a16.cu's loop, mma.sync and L2 rates, clocks inside of the kernel.

    PYTHONPATH=.:benchmarks python benchmarks/loop_probe.py [seconds]
"""

from __future__ import annotations

import ctypes
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tiles import SHAPE_LIST, weights_of

from halfweight.kernels import timing
from halfweight.kernels.cuda import backend, driver, schedule
from halfweight.kernels.cuda.tiles import Shape, form_on

BEGIN = time.monotonic()
LIMIT = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0
DEVICE = torch.device("cuda", 0)
HERE = Path(__file__).parent
CUDA = Path(backend.__file__).parent
F16 = torch.float16


def left() -> float:
    return LIMIT - (time.monotonic() - BEGIN)


def say(*what: object) -> None:
    print(*what, flush=True)


# ---------------------------------------------------------------- rates of mma.sync and of L2

CLOCKS = """
__device__ __forceinline__ u32 clk() { u32 v; asm volatile("mov.u32 %0, %%clock;" : "=r"(v) :: "memory"); return v; }
__device__ __forceinline__ u64 nanos() { u64 v; asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(v) :: "memory"); return v; }
"""
RATE = """
extern "C" __global__ void __launch_bounds__(WARPS * 32) rate(u32* out) {
    u8* memory = shared_memory();
    u32 from = shared_address(memory) + threadIdx.x * 16;
    float c[16][4], total[16][4];
    u32 a[2][4], b[8][2];
    u32 seed = threadIdx.x * 2654435761u + 12345;
    auto word = [&]() { seed = seed * 1664525 + 1013904223; u32 v = (seed >> 8) ^ seed;
        return RANDOM ? (v & 0x83ff83ffu) | (0x38003800u + (v >> 3 & 0x04000400u)) : 0x3c003c00u; };
    for (int i = 0; i < 8; ++i) a[i / 4][i % 4] = word();
    for (int i = 0; i < 16; ++i) b[i / 2][i % 2] = word();
    for (int i = 0; i < 64; ++i) c[i / 4][i % 4] = total[i / 4][i % 4] = threadIdx.x;
    __syncthreads();
    u64 ns = nanos(); u32 t = clk();
#pragma unroll 1
    for (int k = 0; k < TIMES; ++k) {
#pragma unroll
        for (int i = 0; i < BODY; ++i) {
            if (READS && i % 4 == 0) { u32 v[4]; load_words(from + (i % 8) * 512, v);
                b[i / 2 % 8][0] = v[0], b[i / 2 % 8][1] = v[1], b[i / 2 % 8 + 1][0] = v[2], b[i / 2 % 8 + 1][1] = v[3]; }
            if (PROMOTE && i % 128 < 16) first_mma(c[i % 16], a[i % 2], b[i / 2 % 8][0], b[i / 2 % 8][1]);
            else mma(c[i % 16], a[i % 2], b[i / 2 % 8][0], b[i / 2 % 8][1]);
            if (PROMOTE && i % 128 >= 112)
                for (int j = 0; j < 4; ++j) total[i % 16][j] += 1.5f * c[i % 16][j];
        }
        if (BARRIER) __syncthreads();
    }
    t = clk() - t; ns = nanos() - ns;
    float sum = 0;
    for (int i = 0; i < 64; ++i) sum += c[i / 4][i % 4] + total[i / 4][i % 4];
    u32* mine = out + (blockIdx.x * WARPS * 32 + threadIdx.x) * 3;
    mine[0] = t, mine[1] = (u32)ns, mine[2] = __float_as_uint(sum);
}
"""
READ = """
extern "C" __global__ void __launch_bounds__(256) rate(u32* out, const u8* x, const u8* w) {
    u8* memory = shared_memory();
    u32 ring = shared_address(memory);
    constexpr int STAGE = (X_LINES + W_LINES) * 256;
    int line = threadIdx.x / 16, chunk = threadIdx.x % 16 * 16;
    __syncthreads();
    u64 ns = nanos(); u32 t = clk();
#pragma unroll 1
    for (int k = 0; k < TIMES; ++k) {
        u32 to = ring + k % 4 * STAGE + line * 256 + chunk;
        const u8* from = x + (u64)line * 8192 + k % 32 * 256 + chunk;
#pragma unroll
        for (int j = 0; j < X_LINES / 16; ++j) copy16(to + j * 4096, from + j * 16 * 8192, true);
        to += X_LINES * 256;
        from = w + ((u64)blockIdx.x * TIMES + k) * (W_LINES * 256) + line * 256 + chunk;
#pragma unroll
        for (int j = 0; j < W_LINES / 16; ++j) copy16(to + j * 4096, from + j * 4096, true);
        end_copy_group();
        wait_for_copies<3>();
        __syncthreads();
    }
    wait_for_copies<0>();
    t = clk() - t; ns = nanos() - ns;
    u32* mine = out + (blockIdx.x * 256 + threadIdx.x) * 3;
    mine[0] = t, mine[1] = (u32)ns, mine[2] = memory[threadIdx.x];
}
"""


def rate_text(kernel: str, **sizes: int) -> str:
    defines = "".join(f"#define {name} {value}\n" for name, value in {"BF16": 0, **sizes}.items())
    return defines + (CUDA / "ptx.cuh").read_text() + CLOCKS + kernel


RATES = {
    "constant, body 16": dict(BODY=16, RANDOM=0),
    "random, body 16": dict(BODY=16),
    "random, body 128": dict(BODY=128),
    "random, body 512": dict(BODY=512),
    "random, body 1024": dict(BODY=1024),
    "128, reads": dict(BODY=128, READS=1),
    "128, promoted": dict(BODY=128, PROMOTE=1),
    "128, promoted, reads, barrier": dict(BODY=128, PROMOTE=1, READS=1, BARRIER=1),
    "16 warps, 128, reads, barrier": dict(BODY=128, READS=1, BARRIER=1, WARPS=16),
}
BASE = dict(WARPS=8, READS=0, PROMOTE=0, BARRIER=0, RANDOM=1)
READ_RATES = {
    "x 32 KB a stage from L2": dict(X_LINES=128, W_LINES=0),
    "W 32 KB from memory": dict(X_LINES=0, W_LINES=128),
    "x 32, W 16": dict(X_LINES=128, W_LINES=64),
    "x 32, W 32": dict(X_LINES=96, W_LINES=96),
}


def rate_texts() -> dict[str, str]:
    texts = {}
    for name, sizes in RATES.items():
        texts[name] = rate_text(RATE, **{**BASE, **sizes}, TIMES=40000 // sizes["BODY"])
    for name, sizes in READ_RATES.items():
        texts[name] = rate_text(READ, **sizes, TIMES=64)
    return texts


def rates(architecture: str) -> None:
    multiprocessors = driver.card_of(0).multiprocessors
    stream = torch.cuda.current_stream().cuda_stream
    space = (torch.zeros(1, device=DEVICE), torch.zeros(1, dtype=torch.int32, device=DEVICE))
    x = torch.zeros(128 * 8192, dtype=torch.uint8, device=DEVICE)
    w = torch.zeros(multiprocessors * 64 * 128 * 256, dtype=torch.uint8, device=DEVICE)
    for name, text in rate_texts().items():
        sizes = {**BASE, **RATES.get(name, {}), **READ_RATES.get(name, {})}
        threads = sizes["WARPS"] * 32
        shared = 4 * 256 * (sizes["X_LINES"] + sizes["W_LINES"]) if "X_LINES" in sizes else 65536
        kernel = driver.load(text, architecture, b"rate", shared, 0)
        out = torch.zeros(multiprocessors * threads * 3, dtype=torch.int32, device=DEVICE)
        start = driver.prepare(kernel, (multiprocessors, threads, shared), stream, space)
        pointers = [torch.tensor([t.data_ptr()]) for t in (out, x, w)]
        for _ in range(2):
            driver.launch(start, *(p.data_ptr() for p in pointers[: 3 if "X_LINES" in sizes else 1]))
        torch.cuda.synchronize()
        clocks, ns = out.view(-1, 3)[:, 0].double().mean().item(), out.view(-1, 3)[:, 1].double().mean().item()
        if "X_LINES" in sizes:
            per = f"{64 * shared / 4 / clocks:.1f} bytes"
        else:
            per = f"{2048 * sizes['WARPS'] * (40000 // sizes['BODY']) * sizes['BODY'] / clocks:.0f} products"
        say(f"rate {name:32s} {per} a clock, {1000 * clocks / ns:.0f} MHz, {ns / 1000:.1f} us")


# ---------------------------------------------------------------- variants of the kernel

MEASURE = """
#define MEASURE_ENTRY u32 m_entry = clk(); u64 m_ns = nanos(); u32 m_wait = 0, m_bar = 0, m_stages = 0, m_loop = 0, m_a, m_b, m_seg = 0, m_begin = 0;
#define MEASURE_BEGIN m_begin = clk();
#define MEASURE_SEGMENT m_seg = clk();
#define MEASURE_SEGMENT_END m_loop += clk() - m_seg;
#define MEASURE_WAIT m_a = clk();
#define MEASURE_BARRIER m_b = clk(); m_wait += m_b - m_a;
#define MEASURE_GO m_bar += clk() - m_b;
#define MEASURE_STAGE ++m_stages;
#define MEASURE_END if (threadIdx.x % 32 == 0) { u32* out = (u32*)o.p.steps + (blockIdx.x * (THREADS / 32) + threadIdx.x / 32) * 8; \\
    out[0] = clk() - m_entry; out[1] = m_begin - m_entry; out[2] = m_loop; out[3] = m_stages; out[4] = m_wait; out[5] = m_bar; out[6] = (u32)(nanos() - m_ns); out[7] = 0; }
"""


class Variant:
    def __init__(self, name: str, shape: Shape, file: str = "new", changes: tuple = (), wrong: bool = False, **defines: int) -> None:
        self.name, self.shape, self.file, self.changes, self.defines = name, shape, file, changes, defines
        self.wrong = wrong
        self.form = form_on(driver.card_of(0), shape)

    def text(self, measured: bool = False) -> str:
        parts = [f"#define {k} {v}" for k, v in self.form.defines(128, 0, False).items()]
        parts += [f"#define {k} {v}" for k, v in self.defines.items()]
        parts.append((CUDA / "ptx.cuh").read_text())
        if measured:
            parts.append(CLOCKS + MEASURE)
        parts.append((CUDA / "schedule.cuh").read_text())
        kernel = CUDA / "w8a16.cu" if self.file == "new" else HERE / "w8a16_before.cu"
        text = kernel.read_text()
        for old, new in self.changes:
            assert old in text, old
            text = text.replace(old, new)
        return "\n".join([*parts, text])


S = Shape
SCALED = {"scaled": True}


def variants() -> dict[str, list[Variant]]:
    """By the tokens that they are for."""
    b, da = "before", {"DOUBLE_A": 1}
    many = [
        Variant("before u", S(2, 8, 4, 2, 1, 2), b),
        Variant("before s", S(2, 8, 4, 2, 1, 2, **SCALED), b),
        Variant("u", S(2, 8, 4, 2, 1, 2)),
        Variant("u da", S(2, 8, 4, 2, 1, 2), **da),
        Variant("s da", S(2, 8, 4, 2, 1, 2, **SCALED), **da),
        Variant("s da mid6", S(2, 8, 4, 2, 1, 2, **SCALED), **da, MID=6),
        Variant("s48", S(4, 8, 4, 2, 1, 2, **SCALED)),
        Variant("s48 mid1", S(4, 8, 4, 2, 1, 2, **SCALED), MID=1),
        Variant("s16w", S(2, 8, 8, 2, 1, 2, **SCALED), SPAN_COLUMNS=32),
        Variant("s16w n1", S(2, 8, 8, 2, 1, 2, **SCALED), SPAN_COLUMNS=32, TOKENS_AT_ONCE=1),
        Variant("before s16w", S(2, 8, 8, 2, 1, 2, **SCALED), b),
    ]
    some = [
        Variant("before b2 u", S(2, 8, 4, 1, 1, 2, blocks=2), b),
        Variant("before b2 s", S(2, 8, 4, 1, 1, 2, blocks=2, **SCALED), b),
        Variant("b2 u da", S(2, 8, 4, 1, 1, 2, blocks=2), **da),
        Variant("b2 s da", S(2, 8, 4, 1, 1, 2, blocks=2, **SCALED), **da),
        Variant("s 2-8-8-1", S(2, 8, 8, 1, 1, 2, **SCALED), **da),
        Variant("u 2-8-8-1", S(2, 8, 8, 1, 1, 2), **da),
        Variant("s 4-4-4-2", S(4, 4, 4, 2, 1, 2, **SCALED)),
        Variant("u 4-4-4-2", S(4, 4, 4, 2, 1, 2)),
        Variant("u 2-8-4-1-2-1", S(2, 8, 4, 1, 2, 1), **da, MID=2),
    ]
    loop = "for (int k = s.k_begin; k < s.k_end; ++k)"
    nothing = (("    MEASURE_ENTRY\n", "    MEASURE_ENTRY\n    if (o.p.num_tokens > 0) return;\n"),)
    no_loop = ((loop, loop.replace("s.k_end", "s.k_begin")),)
    alone = (("if (s.k_end < p.k_blocks)", "if (false)"), ("if (s.k_begin > 0) {", "if (false) {"))
    fixed = [
        Variant("empty", S(2, 8, 4, 2, 1, 2), changes=nothing, wrong=True),
        Variant("no loop", S(2, 8, 4, 2, 1, 2), changes=no_loop, wrong=True),
        Variant("no loop or sharing", S(2, 8, 4, 2, 1, 2), changes=(*no_loop, *alone), wrong=True),
        Variant("no sharing", S(2, 8, 4, 2, 1, 2), changes=alone, wrong=True),
        Variant("empty 2-2-4", S(2, 2, 4, 1, 1, 2, blocks=3), b, changes=nothing, wrong=True),
        Variant("no loop 2-2-4", S(2, 2, 4, 1, 1, 2, blocks=3), b, changes=no_loop, wrong=True),
        Variant("no loop or sharing 2-2-4", S(2, 2, 4, 1, 1, 2, blocks=3), b, changes=(*no_loop, *alone), wrong=True),
        Variant("no sharing 2-2-4", S(2, 2, 4, 1, 1, 2, blocks=3), b, changes=alone, wrong=True),
        Variant("empty 2-1-4x4", S(2, 1, 1, 1, 4, 1, blocks=4), b, changes=nothing, wrong=True),
        Variant("no loop 2-1-4x4", S(2, 1, 1, 1, 4, 1, blocks=4), b, changes=no_loop, wrong=True),
        Variant("no loop or sharing 2-1-4x4", S(2, 1, 1, 1, 4, 1, blocks=4), b, changes=(*no_loop, *alone), wrong=True),
        Variant("no sharing 2-1-4x4", S(2, 1, 1, 1, 4, 1, blocks=4), b, changes=alone, wrong=True),
    ]
    no_x = (("        x.copy(stage + BOXES * W_BOX, columns, o.p.in_features, part, parts);\n", ""),)
    no_w = (("        w.copy(stage, columns, o.p.in_features, part, parts);\n", ""),)
    no_barrier = (("                    MEASURE_BARRIER\n                    __syncthreads();\n", ""),)
    lazy = (("                    of_rows.load_raw((k + 1) * KB + column, raw);\n", ""),)
    parts = [
        Variant(f"{name}, {left_out}", shape, changes=changes, wrong=True, **defines)
        for name, shape, defines in (
            ("u da", S(2, 8, 4, 2, 1, 2), da),
            ("s48", S(4, 8, 4, 2, 1, 2, **SCALED), {}),
        )
        for left_out, changes in (
            ("no x", no_x), ("no W", no_w), ("no copies", (*no_x, *no_w)),
            ("nothing from outside", (*no_x, *no_w, *lazy)), ("no barrier", no_barrier),
        )
    ]
    few = [
        Variant("before 2-1-4x4", S(2, 1, 1, 1, 4, 1, blocks=4), b),
        Variant("before 2-4-4 b2", S(2, 4, 4, 1, 1, 2, blocks=2), b),
        Variant("before 2-2-4 b3", S(2, 2, 4, 1, 1, 2, blocks=3), b),
        Variant("before 2-4-2-1-4", S(2, 4, 2, 1, 4, 1), b),
        Variant("u da 2-2-4 b3 n1 mid1", S(2, 2, 4, 1, 1, 2, blocks=3), **da, TOKENS_AT_ONCE=1, MID=1),
        Variant("u da 2-2-4 b3 n1 mid5", S(2, 2, 4, 1, 1, 2, blocks=3), **da, TOKENS_AT_ONCE=1, MID=5),
        Variant("u da 2-2-4 b2 n1 mid5", S(2, 2, 4, 1, 1, 2, blocks=2), **da, TOKENS_AT_ONCE=1, MID=5),
        Variant("u da 2-4-4 b2 mid11", S(2, 4, 4, 1, 1, 2, blocks=2), **da, TOKENS_AT_ONCE=1, MID=11),
        Variant("u da 2-4-4 b2", S(2, 4, 4, 1, 1, 2, blocks=2), **da, MID=2),
        Variant("u da 2-4-2-1-4", S(2, 4, 2, 1, 4, 1), **da, MID=1),
    ]
    return {"many": many, "some": some, "few": few, "fixed": fixed, "parts": parts}


def launch(variant: Variant, plan, weight, x, y, steps=None, measured: bool = False) -> None:
    kernel = KERNELS[variant.name, measured]
    stream = torch.cuda.current_stream().cuda_stream
    space = driver.workspace(0, stream, 132 * 2 * 65536, 132 * 8)
    form = variant.form
    start = driver.prepare(kernel, (plan.num_workers, form.shape.threads, form.shared_bytes), stream, space)
    problem = driver.problem_of(plan, start, x, weight.scales, weight.exponents, None, y, steps)
    given = backend.Operands(weight.packed.data_ptr(), x.data_ptr(), problem)
    driver.launch(start, ctypes.addressof(given))


KERNELS: dict = {}


def exact_of(x, weight):
    factors = torch.ldexp(weight.scales.double(), weight.exponents.double()[:, None])
    dense = (weight.packed.double() - 128) * factors.repeat_interleave(128, 1)
    return x.double() @ dense.T


def product(shape: str, tokens: int, found: list[Variant], repeats: int = 9) -> dict:
    rows, columns = SHAPE_LIST[shape]
    weights = weights_of((rows, columns), DEVICE)
    x = torch.randn(tokens, columns, device=DEVICE, dtype=F16)
    y = torch.empty(tokens, rows, device=DEVICE, dtype=F16)
    exact = exact_of(x, weights.quantized[0])
    rounds, best = {}, {}
    rounds["f16"] = timing.Round([lambda w=w: torch.mm(x, w.T) for w in weights.dense], DEVICE)
    for variant in found:
        for plan in schedule.plans(variant.form, tokens, rows, columns, driver.card_of(0)):
            key = (variant.name, f"{plan.whole_waves}x{plan.num_workers}")
            y.fill_(torch.nan)
            launch(variant, plan, weights.quantized[0], x, y)
            error = float((y.double() - exact).norm() / exact.norm())
            if not variant.wrong and not error < 2e-3:
                say("WRONG", shape, tokens, key, error)
                continue
            calls = [lambda w=w, v=variant, p=plan: launch(v, p, w, x, y) for w in weights.quantized]
            rounds[key] = timing.Round(calls, DEVICE)
            best[key] = (variant, plan)
    times = timing.interleaved(rounds, repeats=repeats)
    vendor = times.pop("f16")
    say(f"{shape} {tokens}: f16 {vendor:.1f} us")
    for name in dict.fromkeys(v.name for v in found):
        line = sorted((us, key[1]) for key, us in times.items() if key[0] == name)
        say(f"   {name:26s}" + "".join(f" {us:6.1f} us {vendor / us:.2f} {plan:7s}" for us, plan in line))
    fastest = {}
    for key, us in times.items():
        if key[0] not in fastest or us < fastest[key[0]][0]:
            fastest[key[0]] = (us, best[key])
    return {name: found for name, (_, found) in fastest.items()}


def clocks(shape: str, tokens: int, fastest: dict, names: list[str]) -> None:
    rows, columns = SHAPE_LIST[shape]
    weights = weights_of((rows, columns), DEVICE).quantized
    x = torch.randn(tokens, columns, device=DEVICE, dtype=F16)
    y = torch.empty(tokens, rows, device=DEVICE, dtype=F16)
    for name in names:
        if name not in fastest or (name, True) not in KERNELS:
            continue
        variant, plan = fastest[name]
        warps = variant.form.shape.warps
        steps = torch.zeros(plan.num_workers * warps * 8, dtype=torch.int32, device=DEVICE)
        for weight in weights[:3] * 2:
            launch(variant, plan, weight, x, y, steps, True)
        torch.cuda.synchronize()
        t = steps.view(-1, 8).double().cpu()
        total, begin, loop, stages, wait, bar, ns, _ = t.mean(0).tolist()
        say(
            f"   clocks {shape} {tokens} {name:14s} total {total:.0f} (most {t[:, 0].max():.0f}), before the loop "
            f"{begin:.0f}, loop {loop:.0f} = {stages:.1f} stages of {loop / stages:.0f}: waits {wait / stages:.0f}, "
            f"barrier {bar / stages:.0f}; {1000 * total / ns:.0f} MHz"
        )


MEASURED = ["u da, no copies", "s48, no copies", "before u", "before s", "u da", "s da", "s48", "s16w", "before b2 u", "b2 s da", "u 2-8-8-1", "before 2-2-4 b3", "before 2-4-4 b2"]


def main() -> None:
    torch.zeros(1, device=DEVICE)
    major, minor = torch.cuda.get_device_capability(0)
    architecture = f"sm_{major}{minor}"
    kinds = variants()
    everything = [v for found in kinds.values() for v in found]
    jobs = {(v.name, False): v.text() for v in everything}
    jobs |= {(v.name, True): v.text(True) for v in everything if v.name in MEASURED}
    texts = rate_texts()

    def compile_one(job):
        try:
            driver.cubin(job[1], architecture)
        except Exception as error:  # told, and left out
            return job[0], str(error)[:300]
        return job[0], None

    with ThreadPoolExecutor(16) as pool:
        done = list(pool.map(compile_one, [*jobs.items(), *texts.items()]))
    for name, error in done:
        if error:
            say("FAILED", name, error)
    failed = {name for name, error in done if error}
    for key, text in jobs.items():
        if key not in failed:
            shared = next(v for v in everything if v.name == key[0]).form.shared_bytes
            KERNELS[key] = driver.load(text, architecture, b"w8a16", shared, 0)
    say(f"compiled in {LIMIT - left():.1f} s")
    alive = {kind: [v for v in found if (v.name, False) in KERNELS] for kind, found in kinds.items()}
    rates(architecture)
    plan = [
        ("gate_up", 128, alive["many"] + alive["some"][:4] + alive["parts"]),
        ("qkv", 128, alive["many"] + alive["some"] + alive["fixed"][:4]),
        ("gate_up", 64, alive["some"]),
        ("qkv", 64, alive["some"] + alive["few"][:1]),
        ("gate_up", 256, alive["many"]),
        ("qkv", 16, alive["few"] + alive["fixed"][4:]),
        ("qkv", 32, alive["few"]),
        ("down", 128, alive["many"]),
        ("qkv", 256, alive["many"]),
        ("down", 256, alive["many"]),
    ]
    for shape, tokens, found in plan:
        if left() < 3:
            say("no time for", shape, tokens)
            continue
        fastest = product(shape, tokens, found)
        clocks(shape, tokens, fastest, MEASURED)
    say(f"{LIMIT - left():.1f} s in all")


if __name__ == "__main__":
    main()
