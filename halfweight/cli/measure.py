"""`halfweight measure`: a plan beside what really happens, kept for the next plan."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from halfweight.cli import app
from halfweight.cli.output import print_json, size, stderr, stdout
from halfweight.errors import UsageError

if TYPE_CHECKING:
    from halfweight.memory.devices import Device
    from halfweight.memory.measurements import Record
    from halfweight.memory.plan import Model
    from halfweight.memory.workload import Weights, Workload


@app.command()
def measure(
    model: Annotated[str, typer.Argument(help="A folder or Hub id, 16-bit or INT8.")],
    context: Annotated[int, typer.Option(help="Tokens a sequence, prompt and answer.")] = 4096,
    batch: Annotated[int, typer.Option(help="Sequences at once.")] = 1,
    kv_dtype: Annotated[
        Literal["16bit", "int8"], typer.Option(help="Numbers of the KV cache.")
    ] = "16bit",
    device: Annotated[
        Literal["cpu", "cuda"] | None, typer.Option(help="By default a GPU if any.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Even if it cannot fit.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Run a workload in a process of its own and compare its memory with the plan."""
    from halfweight.checkpoint.headers import quantized_modules, read_headers, resolve
    from halfweight.evaluation.memory_run import measure as run
    from halfweight.memory import measurements
    from halfweight.memory.named_model import planned_model
    from halfweight.memory.what_fits import require_fit
    from halfweight.memory.workload import Workload

    folder = resolve(model)
    planned = planned_model(str(folder))
    weights: Weights = "int8" if quantized_modules(read_headers(folder)) else "16bit"
    here = _device(device)
    records = measurements.records_for(measurements.key_of(here, planned.architecture))
    overhead = measurements.calibrated_overhead(records, here.kind)
    work = Workload(
        context, batch, kv_dtype, device=here.kind, overhead=overhead if records else None
    )
    _check_context(planned, work)
    if not force:
        require_fit(planned, work, here.free_bytes, weights=weights)
    found = run(str(folder), planned, work, weights)
    if json_output:
        print_json({**asdict(found), "error": found.error})
    else:
        _print(found, folder)
    path = measurements.add_record(found)
    stderr.print(f"kept in {path} for the next plan here", style="dim")


def _device(wanted: str | None) -> Device:
    from halfweight.memory.devices import local_device, processor_device

    found = local_device()
    if wanted == "cuda" and found.kind != "cuda":
        raise UsageError("no NVIDIA GPU here", hint="use --device cpu")
    return processor_device() if wanted == "cpu" else found


def _check_context(model: Model, work: Workload) -> None:
    most = model.architecture.max_context
    if most is not None and work.context > most:
        raise UsageError(
            f"context {work.context} is more than the model's {most}",
            hint=f"give --context {most} or less",
        )


def _print(found: Record, folder: Path) -> None:
    from rich.table import Table

    stdout.print(f"[bold]{folder.name}[/] on {found.key.device}: {_words(found.workload)}")
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for column in ("predicted", "measured", "difference"):
        table.add_column(column, justify="right", no_wrap=True)
    rows: list[tuple[str, int, int]] = [
        (name, found.predicted[name], found.measured[name]) for name in found.measured
    ]
    for name, before, after in [*rows, ("in all", found.predicted_total, found.measured_total)]:
        table.add_row(name, size(before), _signed(after), f"{(before - after) / 1e6:+.2f} MB")
    stdout.print(table)
    stdout.print(f"the plan was off by {found.error:+.1%} of the total")


def _words(workload: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in workload.items())


def _signed(num_bytes: int) -> str:
    return f"-{size(-num_bytes)}" if num_bytes < 0 else size(num_bytes)
