"""The memory analysis of INT8 weights as a page, every figure computed when it is written.

    python benchmarks/memory_analysis.py

Writes docs/memory-analysis.md; a test compares the file with what this would write.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from halfweight.memory import what_fits
from halfweight.memory.architecture import architecture
from halfweight.memory.cards import parse_gpus
from halfweight.memory.costs import loading, serving
from halfweight.memory.plan import Model, footprint, on_ranks
from halfweight.memory.presets import preset
from halfweight.memory.workload import GIB, Workload
from halfweight.quantization.scheme import GROUP_SIZES, Recipe, Scheme

PAGE = Path(__file__).parent.parent / "docs" / "memory-analysis.md"
GROUP = 128
FORMATS = {4: "float32", 2: "bfloat16", 1: "grid8"}
"""Bytes a group -> the scale format."""
NAMES = {"llama-3-8b": ("Llama-3-8B", 8 * 10**9), "llama-3-70b": ("Llama-3-70B", 70 * 10**9)}
LINEARS = ("*embed_tokens*", "lm_head*")
CARDS = ("24GB", "a100-40gb", "48GB", "h100", "h200")


def model(name: str, scale_format: str = "grid8", keep: tuple[str, ...] = ()) -> Model:
    """A preset as it would be quantized."""
    found = architecture(preset(name), name)
    return Model.from_recipe(found, Recipe(Scheme(GROUP, scale_format), keep))


def table(head: Sequence[str], rows: Iterable[Sequence[object]], other: str = "---:") -> str:
    """A Markdown table; `other` aligns all but the first column, numbers to the right."""
    align = ["---", *[other] * (len(head) - 1)]
    lines = [head, align, *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def gb(num_bytes: float, digits: int = 3) -> str:
    """'16.061 GB (14.958 GiB)'."""
    return f"{num_bytes / 1e9:.{digits}f} GB ({num_bytes / GIB:.{digits}f} GiB)"


def reduction(after: float, before: float) -> str:
    """'49.61 %'."""
    return f"{100 * (1 - after / before):.2f} %"


def baseline() -> str:
    """Parameters x 2 bytes."""
    rows = []
    for name, (title, nominal) in NAMES.items():
        found = model(name)
        real = found.architecture.num_parameters
        rows.append((f"{title}, nominal", f"{nominal:,}", gb(2 * nominal)))
        rows.append((f"{title}, real", f"{real:,}", gb(found.sixteen_bit_bytes)))
    return table(("model", "parameters", "FP16"), rows)


def nominal_totals() -> str:
    """The textbook sum, with the scale's bytes carried through."""
    rows = []
    for title, params in NAMES.values():
        for num_bytes in FORMATS:
            scales = params // GROUP * num_bytes
            total = params + scales
            rows.append(
                (
                    title,
                    num_bytes,
                    f"{params / 1e9:.1f} GB",
                    f"{scales / 1e9:.4f} GB",
                    gb(total),
                    reduction(total, 2 * params),
                )
            )
    head = ("model", "bytes a scale", "weights", "scales", "INT8 total", "reduction")
    return table(head, rows)


def real_totals(keep: tuple[str, ...]) -> str:
    """The same of the real architectures, tensor by tensor."""
    rows = []
    for name, (title, _) in NAMES.items():
        for num_bytes, scale_format in FORMATS.items():
            found = model(name, scale_format, keep)
            parts = footprint(found, Workload(), "int8")
            rows.append(
                (
                    title,
                    num_bytes,
                    f"{parts.bytes_of('int8 data'):,}",
                    f"{parts.bytes_of('scales'):,}",
                    f"{parts.bytes_of('16-bit weights'):,}",
                    gb(found.resident_bytes),
                    reduction(found.resident_bytes, found.sixteen_bit_bytes),
                )
            )
    head = ("model", "bytes a scale", "INT8 bytes", "scales", "16-bit rest", "total", "reduction")
    return table(head, rows)


def overhead() -> str:
    """Scales beside data, by group size."""
    head = ("group size", *(f"scale of {n} byte{'s' * (n > 1)}" for n in FORMATS))
    rows = [
        (size, *(f"{100 * n / size:.3f} % (-{50 - 50 * n / size:.2f} %)" for n in FORMATS))
        for size in GROUP_SIZES
    ]
    return table(head, rows)


def largest_batches() -> str:
    """By card, with the same context."""
    rows = []
    work = Workload(4096)
    found = model("llama-3-8b")
    for card in CARDS:
        budget = parse_gpus(card).num_bytes
        before, after = (
            what_fits.solve(found, work, budget, "batch", weights) for weights in ("16bit", "int8")
        )
        ratio = f"{after / before:.2f} x" if before and after else ""
        rows.append((card, gb(budget, 1), before or "none", after or "none", ratio))
    return table(("card", "to use", "FP16 batch", "INT8 batch", "ratio"), rows)


def costs() -> str:
    """GPUs x bytes read, on cards of 24 GB."""
    budget = parse_gpus("24GB").num_bytes
    rows = []
    for name, (title, _) in NAMES.items():
        for batch in (1, 8):
            s = serving(model(name), Workload(8192, batch), budget)
            assert s.relative_cost is not None
            rows.append(
                (
                    title,
                    batch,
                    f"{s.sixteen_bit_gpus} x {gb(s.sixteen_bit_step_bytes or 0, 2)}",
                    f"{s.int8_gpus} x {gb(s.int8_step_bytes or 0, 2)}",
                    f"{s.relative_cost:.2f}",
                )
            )
    head = ("model", "batch", "FP16: GPUs x read a step", "INT8", "cost of a token")
    return table(head, rows)


def on_cards(name: str, cards: Sequence[str], context: int) -> str:
    """One rank's parts in 16 bits and INT8, and the verdicts."""
    rows = []
    for card in cards:
        gpus = parse_gpus(card)
        work = on_ranks(model(name), Workload(context), gpus.count)
        for title, weights in (("FP16", "16bit"), ("INT8", "int8")):
            found = footprint(model(name), work, weights)
            rows.append(
                (
                    f"{card}, {title}",
                    gb(found.weight_bytes, 2),
                    gb(found.kv_bytes, 2),
                    f"{gb(found.total.likely, 2)}, at most {gb(found.total.high, 2)}",
                    gb(gpus.num_bytes, 2),
                    found.judge(gpus.num_bytes),
                )
            )
    head = ("GPUs, weights", "weights", "KV cache", "with all else", "to use", "verdict")
    return table(head, rows)


def tokens_that_fit(name: str, card: str) -> str:
    """Tokens of cache beside the weights, with all else taken as so many GiB a GPU."""
    gpus = parse_gpus(card)
    short, long = (on_ranks(model(name), Workload(n), gpus.count) for n in (4096, 8192))
    parts = [footprint(model(name), short, weights) for weights in ("16bit", "int8")]
    more = footprint(model(name), long, "int8").kv_bytes - parts[1].kv_bytes
    rows = []
    for rest in (1, 2, 3):
        room = [gpus.num_bytes - rest * GIB - found.weight_bytes for found in parts]
        tokens = [left * 4096 // more for left in room]
        rows.append((f"{rest} GiB", *(f"{n:,}" if n > 0 else "none" for n in tokens)))
    return table(("all else", "FP16 tokens", "INT8 tokens"), rows)


def quoted() -> str:
    """Commonly quoted figures, the true ones, and why."""
    eight, seventy = (nominal for _, nominal in NAMES.values())
    scale, large = eight // GROUP * 4, seventy // GROUP * 4
    loaded = loading(model("llama-3-8b"))
    ratio = loaded.sixteen_bit_bytes / loaded.int8_bytes
    rows = [
        (
            "scales of 8B: (8e9 / 128) x 4 bytes = 0.06 GB",
            f"{scale / 1e9:.2f} GB",
            f"0.0625 is {eight // GROUP / 1e6:.1f} million scales, the factor 4 left out; it is "
            "right for one byte a scale",
        ),
        (
            "scales of 70B: 0.55 GB",
            f"{large / 1e9:.2f} GB",
            "the same factor 4",
        ),
        (
            "INT8 total 8.06 GB and 70.55 GB",
            f"{(eight + scale) / 1e9:.2f} GB and {(seventy + large) / 1e9:.2f} GB",
            "with 4-byte scales; with one byte a scale the quoted totals hold",
        ),
        (
            "reduction 49.6 % with 4-byte scales",
            reduction(eight + scale, 2 * eight),
            "1 - (1 + 4/128) / 2; 49.6 % takes one-byte scales and embedding and head in INT8",
        ),
        (
            "scale overhead 3.1 %, beside 0.06 of 8.0 GB",
            f"{100 * 4 / GROUP:.3f} %",
            "the percentage is right and contradicts the sum next to it (0.78 %)",
        ),
        (
            "8B and 70B parameters",
            f"{model('llama-3-8b').architecture.num_parameters:,} and "
            f"{model('llama-3-70b').architecture.num_parameters:,}",
            "the names are rounded",
        ),
        (
            "load time halves by GPU memory bandwidth",
            f"{ratio:.2f} x fewer bytes",
            "loading is bound by disk, page cache and bus, hardly ever by the GPU's memory",
        ),
        (
            "batch doubles",
            "depends on the card: see below",
            "what is left after the weights grows, by far more than twice on a card that the FP16 "
            "model fills and hardly at all on a large one",
        ),
        (
            "INT8 makes 8B fit a 24 GB card",
            "FP16 fits too",
            "INT8 makes room for about twice the cache",
        ),
        (
            "70B needs 4 x 48 GB in FP16",
            f"{serving_gpus('48GB')} x 48 GB",
            "true for the weights and a small cache; 4 x 24 GB holds INT8 alone",
        ),
    ]
    return table(("often quoted", "in truth", "why"), rows, other="---")


def serving_gpus(card: str) -> int | None:
    """GPUs of a kind that the 70B needs in 16 bits."""
    work = Workload(8192)
    return serving(model("llama-3-70b"), work, parse_gpus(card).num_bytes).sixteen_bit_gpus


def page() -> str:
    """The whole document."""
    return f"""# What INT8 weights do to memory

Written by `python benchmarks/memory_analysis.py` from the planner; do not edit. GB is 10^9 bytes,
GiB 2^30. Nominal counts are 8e9 and 70e9; real ones are those of the published architectures.

## FP16

Memory = parameters x 2 bytes.

{baseline()}

## INT8, groups of {GROUP}: the textbook sum

Memory = parameters + parameters / {GROUP} x bytes of a scale.

{nominal_totals()}

## INT8: the real architectures

All linears, the embedding and the head in INT8; norms stay in 16 bits. One-byte scales (`grid8`)
also keep one exponent a row.

{real_totals(())}

Linears only, embedding and head in 16 bits:

{real_totals(LINEARS)}

So -49.6 % takes both: one-byte scales, and the embedding and head in INT8.

## What scales cost

Scales beside the INT8 data, and the reduction against FP16 that is left.

{overhead()}

## Commonly quoted figures

{quoted()}

## What it changes in practice

Loading reads {loading(model("llama-3-8b")).int8_bytes:,} bytes of files instead of \
{loading(model("llama-3-8b")).sixteen_bit_bytes:,} (Llama-3-8B; two-byte scales on disk).

The largest batch of Llama-3-8B at 4,096 tokens a sequence:

{largest_batches()}

What a token costs: the fewest cards of 24 GB that hold 8,192 tokens a sequence, times the bytes
each reads for one step (relative to FP16).

{costs()}

## Llama-3-70B on 4 x 24 GB

8,192 tokens, one sequence, bytes on each GPU. \
Several GPUs run the checkpoint by vLLM: scales as on disk, two bytes each.

{on_cards("llama-3-70b", ("4x24GB", "4x48GB", "8x24GB"), 8192)}

Tokens of cache, of all sequences together, that 4 x 24 GB hold beside the weights, with all else
taken as 1, 2 or 3 GiB on each:

{tokens_that_fit("llama-3-70b", "4x24GB")}

## Llama-3-8B on one 24 GB card

8,192 tokens, one sequence.

{on_cards("llama-3-8b", ("1x24GB", "1x16GB", "1x12GB"), 8192)}

Tokens of cache beside the weights, with all else taken as 1, 2 or 3 GiB:

{tokens_that_fit("llama-3-8b", "24GB")}
"""


if __name__ == "__main__":
    PAGE.write_text(page())
