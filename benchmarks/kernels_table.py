"""Write what was measured on an H200 into docs/kernels.md, between markers, where it was measured.

    python benchmarks/kernels_table.py

A part whose results are not in benchmarks/results/ stays as the page has it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import kernels
from envelope import RESULTS
from readme_tables import INT8, SIXTEEN_BIT, between, results

PAGE = Path(__file__).parent.parent / "docs" / "kernels.md"
PRODUCTS, DECODING, CONTEXT = "kernels_h200", "generate_h200", "generate_h200_context"
OURS, PORTABLE, TRITON = "halfweight cuda", "halfweight sm80", "halfweight triton"
MARLIN = "Marlin g128"
SAME_KIND = (MARLIN, "Machete g128", "humming g128")
"""Peers whose products are ours: 16-bit activations, a scale for 128 weights."""
AHEAD = 1.01
"""Peers are called ahead from here on; less is the clock's."""
PORTABLE_TOKENS = range(2, 257)

Rows = list[dict[str, Any]]

INTRODUCTION = """\
One {device}, which reads {rate:.2f} TB/s (`benchmarks/results/{name}.json`, measured as above).
*{ours}* is what this card takes; *{portable}* is the kernel of
[Ampere, Ada and Blackwell](#ampere-ada-blackwell), from {most} tokens on blocks of 16-bit weights
and the vendor's product; *{triton}* is what all others take. Of the peers
({versions}) Marlin and Machete are vLLM's kernels for files like ours; they
and humming have 16-bit activations, groups of 128 and float16 scales. gemlite rounds activations to
int8, with one scale a row and a token; it brings no tiles for products left empty here.
"""
AHEAD_OF = """
How many times as fast as a peer of the same kind *{ours}* is, in the geometric mean of the shapes:

{ratios}

{ahead}"""
PORTABLE_TEXT = """\
Triton's tiles are not taken from any number of tokens on. In the geometric mean of {shapes} this
kernel reaches {ratios} of their speed at {tokens} tokens of an H200
(`benchmarks/results/{name}.json`), where they use wgmma, which the cards that take this kernel have
not.

**What ran where.** It ran on an H200, restricted to these instructions, all versions within 2e-3 of
the exact product; no Ampere, Ada or Blackwell card has run it. The present version passes every GPU
test (odd shapes, poisoned outputs, all scale formats); its speed over the vendor's float16 product
is the row *{portable}* [of the tables](#on-an-h200). Over Marlin, which was written for Ampere, it
has {over} times the speed at {tokens} tokens, in the same mean."""
DECODE_TEXT = """\
One {device}, Llama-3-8B's shapes, {old} tokens before and {new} made, in the last column {long} and
{long_new} (`benchmarks/results/{decoding}.json`, `benchmarks/results/{context}.json`). A step reads
each weight and each cached token once; the share is of what a plain read reaches, {rate:.2f} TB/s.

{table}"""


def page() -> str:
    """The page with what the results say."""
    text = PAGE.read_text()
    for name, needed, part in PARTS:
        if all(is_there(result) for result in needed):
            text = between(text, name, part())
    return text


def is_there(name: str) -> bool:
    """Whether a result is."""
    return (RESULTS / f"{name}.json").exists()


def products() -> str:
    """All rivals on the H200, and who is ahead of whom."""
    found = results(PRODUCTS)
    rows: Rows = found["results"]
    peers = [name for name in SAME_KIND if name in {row["kernel"] for row in rows}]
    packages = {"vLLM": "vllm", "humming": "humming-kernels", "gemlite": "gemlite"}
    known = found["versions"]
    versions = [
        f"{name} {known[package]}" for name, package in packages.items() if package in known
    ]
    text = INTRODUCTION.format(
        device=found["device"],
        rate=found["ceiling"]["read_bytes_per_second"] / 1e12,
        name=PRODUCTS,
        ours=OURS,
        portable=PORTABLE,
        triton=TRITON,
        most=PORTABLE_TOKENS.stop,
        versions=", ".join(versions),
    )
    text += kernels.markdown(rows) + "\n"
    return text + AHEAD_OF.format(ours=OURS, ratios=ratio_table(rows, peers), ahead=ahead(rows))


def ratio_table(rows: Rows, peers: list[str]) -> str:
    """A line a peer: how many times as fast ours is, by tokens."""
    tokens = sorted({row["tokens"] for row in rows})
    lines = ["| | " + " | ".join(f"M={m}" for m in tokens) + " |", "|---" * (len(tokens) + 1) + "|"]
    for peer in peers:
        cells = (f"{mean:.2f}" if mean else "" for mean in means(rows, OURS, peer, tokens))
        lines.append(f"| {peer} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def means(rows: Rows, mine: str, other: str, tokens: list[int]) -> Iterator[float | None]:
    """Speed over another kernel in the mean of the shapes, for each number of tokens."""
    speeds = speed_by(rows)
    for number in tokens:
        both = [
            found[mine] / found[other]
            for (_, m), found in speeds.items()
            if m == number and mine in found and other in found
        ]
        yield geometric_mean(both) if both else None


def speed_by(rows: Rows) -> dict[tuple[str, int], dict[str, float]]:
    """(shape, tokens) -> kernel -> speed over float16, of those that ran."""
    found: dict[tuple[str, int], dict[str, float]] = {}
    for row in rows:
        speeds = found.setdefault((row["shape"], row["tokens"]), {})
        if "error" not in row:
            speeds[row["kernel"]] = row["speedup_over_float16"]
    return found


def ahead(rows: Rows) -> str:
    """Every product in which a peer of the same kind is faster, or that there is none."""
    lines: dict[tuple[str, str], list[str]] = {}
    for (shape, tokens), speeds in speed_by(rows).items():
        for peer in SAME_KIND:
            if speeds.get(peer, 0.0) > AHEAD * speeds[OURS]:
                cell = f"{tokens} ({speeds[peer]:.2f})"
                lines.setdefault((peer, shape), []).append(cell)
    if not lines:
        return f"None of them is ahead by more than {AHEAD - 1:.0%} in any product."
    told = (f"{peer} at `{shape}` for {', '.join(cells)}" for (peer, shape), cells in lines.items())
    return f"Ahead by more than {AHEAD - 1:.0%}, by tokens: " + "; ".join(told) + "."


def portable() -> str:
    """w8a16.cu beside Triton's tiles, in one run."""
    rows: Rows = results(PRODUCTS)["results"]
    tokens = sorted({row["tokens"] for row in rows} & set(PORTABLE_TOKENS))
    shapes = [f"`{shape}`" for shape in dict.fromkeys(row["shape"] for row in rows)]
    ratios = [f"{mean:.2f}" for mean in means(rows, PORTABLE, TRITON, tokens) if mean]
    return PORTABLE_TEXT.format(
        shapes=listed(shapes),
        ratios=listed(ratios),
        tokens=listed(list(map(str, tokens))),
        name=PRODUCTS,
        portable=PORTABLE,
        over=listed([f"{mean:.2f}" for mean in means(rows, PORTABLE, MARLIN, tokens) if mean]),
    )


def listed(words: list[str]) -> str:
    """'a, b and c'."""
    return f"{', '.join(words[:-1])} and {words[-1]}" if words[1:] else words[0]


def decoding() -> str:
    """Steps by batch, and of 16 sequences with a long context."""
    short, long = results(DECODING), results(CONTEXT)
    columns = [("batch", short, batch) for batch in short["results"]["workload"]["batch_sizes"]]
    columns += [("long", long, batch) for batch in long["results"]["workload"]["batch_sizes"]]
    prompt = long["results"]["workload"]["prompt_tokens"]
    heads = [f"{m} x {prompt:,}" if name == "long" else str(m) for name, _, m in columns]
    lines = ["| at once | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for kind, show in (("tokens/s", rate_cell), ("share of the read", share_cell)):
        for rival, name in ((SIXTEEN_BIT, "16 bit"), (INT8, "INT8")):
            cells = [show(fastest(result, rival, batch)) for _, result, batch in columns]
            if any(cells):
                lines.append(f"| {name}, {kind} | " + " | ".join(cells) + " |")
    first, second = short["results"]["workload"], long["results"]["workload"]
    return DECODE_TEXT.format(
        device=short["device"],
        rate=short["ceiling"]["read_bytes_per_second"] / 1e12,
        old=first["prompt_tokens"],
        new=first["new_tokens"],
        long=f"{prompt:,}",
        long_new=second["new_tokens"],
        decoding=DECODING,
        context=CONTEXT,
        table="\n".join(lines),
    )


def fastest(result: dict[str, Any], rival: str, batch: int) -> dict[str, Any] | None:
    """The row of a rival's fastest step, if it was timed."""
    found = [
        row
        for row in result["results"]["rows"]
        if row["rival"] == rival and row.get("batch_size") == batch
    ]
    return max(found, key=lambda row: row["tokens_per_second"], default=None)


def rate_cell(row: dict[str, Any] | None) -> str:
    """Tokens a second."""
    return f"{row['tokens_per_second']:,.0f}" if row else ""


def share_cell(row: dict[str, Any] | None) -> str:
    """Of the measured read bandwidth."""
    return f"{row['fraction_of_read_bandwidth']:.0%}" if row else ""


PARTS: tuple[tuple[str, tuple[str, ...], Callable[[], str]], ...] = (
    ("w8a16 on an H200", (PRODUCTS,), portable),
    ("products on an H200", (PRODUCTS,), products),
    ("steps on an H200", (DECODING, CONTEXT), decoding),
)
"""Marker -> the results it needs, what then stands there."""


if __name__ == "__main__":
    PAGE.write_text(page())
