"""`halfweight export`: from an INT8 checkpoint to one of another program."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from halfweight.cli import app
from halfweight.cli.output import (
    bytes_bar,
    print_json,
    show_parts,
    size,
    stderr,
    stdout,
    stop_on_ctrl_c,
)

if TYPE_CHECKING:
    from halfweight.conversion.export import ExportReport


@app.command()
def export(
    model: Annotated[
        str,
        typer.Argument(metavar="DIR", help="A folder made by `halfweight quantize`, or a Hub id."),
    ],
    out: Annotated[Path, typer.Argument(help="The folder to make.")],
    to: Annotated[
        str, typer.Option(help="The form: dequantized (transformers), gptq, or gguf-q8_0.")
    ],
    jobs: Annotated[int | None, typer.Option(min=1, help="Threads (default: all cores).")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an OUT that is not empty.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write INT8 weights for another program. Killed, the same command goes on where it was."""
    from halfweight.conversion import export as exporting

    with stop_on_ctrl_c() as stop, bytes_bar() as bar:
        report = exporting.export(
            model,
            out,
            to,  # type: ignore[arg-type]  # export checks it
            jobs=jobs,
            overwrite=overwrite,
            progress=show_parts(bar, "planning"),
            stop=stop,
        )
    if json_output:
        print_json({**asdict(report), "out": str(report.out)})
    else:
        _print_report(report)


def _print_report(report: ExportReport) -> None:
    for note in report.notes:
        stderr.print(note, markup=False, highlight=False, soft_wrap=True)
    stdout.print(
        f"{report.num_int8} weights as they are in int8, {report.num_dequantized} dequantized, "
        f"{report.num_kept} tensors kept"
    )
    stdout.print(f"from {size(report.source_bytes)} to {size(report.disk_bytes)}")
    stdout.print(f"wrote {report.out}", markup=False, highlight=False, soft_wrap=True)
