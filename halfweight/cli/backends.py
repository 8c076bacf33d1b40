"""`halfweight backends`: which kernels can run here, which are taken, and why not the others."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from halfweight.cli import app
from halfweight.cli.output import print_json, stdout


@app.command()
def backends(
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the kernel backends, where each can run, and which kernel how many tokens take there."""
    import torch
    from rich.table import Table

    from halfweight.kernels.operations import BACKENDS, backend

    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    devices = ["cpu", *(["cuda"] if gpus else [])]
    reasons: dict[str, dict[str, Any]] = {
        name: {device: backend(name).unavailable(torch.device(device)) for device in devices}
        for name in BACKENDS
    }
    kernels = {gpu: _kernels(gpu) for gpu in gpus}
    if json_output:
        print_json({**reasons, "kernels": kernels})
        return
    table = Table("backend", *devices)
    for name, by_device in reasons.items():
        table.add_row(name, *(reason or "yes" for reason in by_device.values()))
    stdout.print(table)
    for gpu, found in kernels.items():
        table = Table("backend", "tokens from", "kernel", "why", title=_title(gpu))
        for row in found:
            table.add_row(row["backend"], str(row["first"]), row["kernel"], row["reason"])
        stdout.print(table)


def _kernels(gpu: str) -> list[dict[str, Any]]:
    """A row a range of tokens, of every backend that runs on a GPU; `chosen` marks the default."""
    import torch

    from halfweight.kernels.operations import BACKENDS, backend, choose_backend

    device = torch.device(gpu)
    chosen = choose_backend(device)
    return [
        {"backend": name, "chosen": name == chosen, **asdict(found)}
        for name in BACKENDS
        if backend(name).unavailable(device) is None
        for found in backend(name).ranges(device)
    ]


def _title(gpu: str) -> str:
    import torch

    from halfweight.kernels.operations import choose_backend

    device = torch.device(gpu)
    return f"{gpu}, {torch.cuda.get_device_name(device)}: {choose_backend(device)} is chosen"
