"""`halfweight bench ...`: how fast this machine is, measured here and now."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Annotated, Any

import typer

from halfweight.cli import app
from halfweight.cli.output import print_json, stderr, stdout
from halfweight.errors import UsageError

bench = typer.Typer(help="Measure this machine.", no_args_is_help=True)
app.add_typer(bench, name="bench")

SHAPES = ["6144x4096", "28672x4096", "4096x14336"]
BATCHES = [1, 16, 64, 256, 1024]


@bench.command()
def kernels(
    shapes: Annotated[list[str] | None, typer.Option("--shape", help="NxK, may repeat.")] = None,
    batches: Annotated[list[int] | None, typer.Option("--batch", help="May repeat.")] = None,
    tune: Annotated[
        bool, typer.Option(help="Measure every tile and keep the fastest for later runs.")
    ] = False,
    limit_seconds: Annotated[float, typer.Option(help="End tuning after this long.")] = 1800,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Time the products of quantized weights beside torch's 16-bit product."""
    import torch

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    sizes = [_shape(text) for text in shapes or SHAPES]
    if tune:
        _tune(device, [_shape(text) for text in shapes] if shapes else None, limit_seconds)
    rows = _measure(device, sizes, batches or BATCHES)
    if json_output:
        print_json(rows)
        return
    _print(rows)


def _shape(text: str) -> tuple[int, int]:
    sizes = text.split("x")
    if len(sizes) != 2 or not all(size.isdigit() for size in sizes) or int(sizes[1]) % 128:
        raise UsageError(
            f"shape {text!r} is not OUTxIN with IN a multiple of 128", hint="write 4096x14336"
        )
    return int(sizes[0]), int(sizes[1])


def _tune(device: Any, shapes: list[tuple[int, int]] | None, limit_seconds: float) -> None:
    from halfweight.kernels import operations, tune
    from halfweight.kernels.cuda import backend as cuda
    from halfweight.kernels.triton import backend as triton
    from halfweight.kernels.triton import tables
    from halfweight.kernels.triton.launch import device_info

    reason = triton.unavailable(device)
    if reason is not None:
        raise UsageError(
            f"nothing to tune on {device}: the Triton backend {reason}",
            hint="run it where `halfweight backends` lists triton",
        )
    end = time.monotonic() + limit_seconds
    if operations.choose_backend(device) == "sm80":
        ratios = tune.tune_tiles(
            device, shapes or tune.SHAPES, limit_seconds=limit_seconds, progress=stderr.print
        )
        stderr.print(f"wrote {cuda.tune(device.index, ratios)}")
    limit_seconds = end - time.monotonic()
    table = tune.tune(
        device, shapes or tune.SHAPES, limit_seconds=limit_seconds, progress=stderr.print
    )
    path = tables.write_table(device_info(device).architecture, table)
    stderr.print(f"wrote {path}")


def _measure(
    device: Any, shapes: list[tuple[int, int]], batches: list[int]
) -> list[dict[str, Any]]:
    from halfweight.kernels import timing

    rows = []
    for shape in shapes:
        for tokens in batches:
            times = timing.compare(device, shape, tokens)
            rows += [asdict(product) for product in times]
    return rows


def _print(rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    table = Table("weight", "tokens", "product", "us", "GB/s", "of read bandwidth", "x 16-bit")
    for row in rows:
        table.add_row(
            f"{row['out_features']} x {row['in_features']}",
            str(row["tokens"]),
            row["name"],
            f"{row['microseconds']:.1f}",
            f"{row['bytes_per_second'] / 1e9:.0f}",
            f"{row['fraction_of_read_bandwidth']:.0%}",
            f"{row['speedup']:.2f}",
        )
    stdout.print(table)
