"""`halfweight backends`: which kernels can run here, and why the others cannot."""

from __future__ import annotations

from typing import Annotated

import typer

from halfweight.cli import app
from halfweight.cli.output import print_json, stdout


@app.command()
def backends(
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the kernel backends, and on which device of this machine each can run."""
    import torch
    from rich.table import Table

    from halfweight.kernels.operations import BACKENDS, backend

    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    reasons = {
        name: {device: backend(name).unavailable(torch.device(device)) for device in devices}
        for name in BACKENDS
    }
    if json_output:
        print_json(reasons)
        return
    table = Table("backend", *devices)
    for name, by_device in reasons.items():
        table.add_row(name, *(reason or "yes" for reason in by_device.values()))
    stdout.print(table)
