"""`halfweight bench load` and `bench generate`: whole models, 16 bits beside INT8."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halfweight.cli.bench import bench
from halfweight.cli.output import print_json, size, stderr, stdout

if TYPE_CHECKING:
    from halfweight.evaluation.speed.rivals import Folders

Source = Annotated[str, typer.Argument(help="The 16-bit model: a folder or Hub id.")]
Quantized = Annotated[str, typer.Argument(help="What `halfweight quantize` made of it.")]
Limit = Annotated[float, typer.Option(help="End after about this long.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@bench.command()
def load(
    source: Source,
    quantized: Quantized,
    repeats: Annotated[int, typer.Option(min=1, help="Loads of each.")] = 3,
    limit_seconds: Limit = 1800,
    json_output: Json = False,
) -> None:
    """Time loading from a warm page cache, each time in a fresh process."""
    from halfweight.evaluation.speed import load as speed

    def report(row: speed.LoadTime) -> None:
        stderr.print(f"{row.rival}: {row.seconds:.2f} s, {size(row.resident_bytes)}")

    rows = speed.compare(
        _folders(source, quantized),
        _device(),
        repeats=repeats,
        deadline=time.monotonic() + limit_seconds,
        report=report,
    )
    comparison = speed.summarize(rows)
    if json_output:
        print_json({"runs": [asdict(row) for row in rows], "comparison": asdict(comparison)})
        return
    stdout.print(
        f"{comparison.speedup:.2f} x as fast, {comparison.bytes_change:+.2%} bytes, "
        f"{comparison.bytes_per_second / 1e9:.2f} GB/s"
    )


@bench.command()
def generate(
    source: Source,
    quantized: Quantized,
    batches: Annotated[list[int] | None, typer.Option("--batch", help="May repeat.")] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 128,
    new_tokens: Annotated[int, typer.Option(min=2)] = 256,
    long_prompt_tokens: Annotated[
        int, typer.Option(min=1, help="Of the prompt whose first token is timed.")
    ] = 2048,
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Also compile the 16-bit step (minutes).")
    ] = True,
    limit_seconds: Limit = 1800,
    json_output: Json = False,
) -> None:
    """Time decoding and the first token: by the engine, beside the 16-bit model at its quickest."""
    from halfweight.evaluation.speed import generate as speed
    from halfweight.evaluation.speed.rivals import HALFWEIGHT, SIXTEEN_BIT
    from halfweight.evaluation.speed.static_decoder import Step

    device = _device()
    steps: tuple[Step, ...] = ("eager",)
    if device.type == "cuda":
        steps = ("graph", "compiled") if compiled else ("graph",)
    workload = speed.Workload(
        tuple(batches or (1, 16, 64)),
        prompt_tokens,
        new_tokens,
        long_prompt_tokens,
        steps=steps,
    )
    rows = speed.compare(
        (SIXTEEN_BIT, HALFWEIGHT),
        _folders(source, quantized),
        device,
        workload,
        deadline=time.monotonic() + limit_seconds,
        report=lambda rival, row: stderr.print(f"{rival}: {_line(row)}"),
    )
    speedups = speed.speedups(rows)
    if json_output:
        found = [asdict(speedup) for speedup in speedups]
        print_json({"rows": [asdict(row) for row in rows], "speedups": found})
        return
    for speedup in speedups:
        for batch, ratio in speedup.decode.items():
            stdout.print(f"{speedup.rival}, batch {batch}: {ratio:.2f} x the 16-bit tokens/s")


def _line(row: Any) -> str:
    from halfweight.evaluation.speed.generate import FirstTokenTime

    if isinstance(row, str):
        return row
    if isinstance(row, FirstTokenTime):
        return f"first token after {row.prompt_tokens}: {row.milliseconds:.1f} ms"
    return (
        f"batch {row.batch_size}, {row.step} step: {row.tokens_per_second:.1f} tokens/s, "
        f"{row.fraction_of_read_bandwidth:.0%} of read bandwidth"
    )


def _folders(source: str, quantized: str) -> Folders:
    from halfweight.checkpoint.headers import resolve
    from halfweight.evaluation.speed.rivals import Folders

    return Folders(Path(resolve(source)), Path(resolve(quantized)))


def _device() -> Any:
    import torch

    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
