"""`--tensor-parallel` and `--devices`: how many ranks run a model, or which stages, and where."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from halfweight.cli.output import stderr
from halfweight.cli.stages import device_names
from halfweight.errors import UsageError

TensorParallel = Annotated[
    int | None,
    typer.Option(min=1, help="Processes that run the model together, a GPU each."),
]
Devices = Annotated[
    str | None,
    typer.Option(
        help="Theirs, one each (default: the first GPUs). Without --tensor-parallel they hold the "
        "layers one after the other: cuda:0,cuda:1,cpu, or auto."
    ),
]


def rank_options(
    tensor_parallel: int | None, devices: str | None, device: str | None
) -> dict[str, Any]:
    """Options of Engine. Without any said, as many ranks as torchrun has started, or one.

    Raises UsageError for --devices beside --device, or with a single one.
    """
    from halfweight.engine.parallel.outside import Place

    if devices is not None and device is not None:
        raise UsageError("--device and --devices", hint="give one of them")
    place = Place.found()
    count = tensor_parallel or (place.ranks if place else 1)
    names = device_names(devices)
    if count == 1 and names and len(names) == 1 and names != ["auto"]:
        raise UsageError(f"one device in --devices {devices}", hint="give --device")
    return {"tensor_parallel": count, "devices": names}


def as_many_as_needed(
    model: str, options: dict[str, Any], device: str | None, context: int, kv_cache: Any
) -> dict[str, Any]:
    """`options`, or, where they leave it open and there are several GPUs, the fewest that fit.

    Fit means by the plan: one sequence of `context` tokens beside the weights.
    """
    import torch

    from halfweight.memory.device_memory import available_bytes

    count = torch.cuda.device_count()
    is_said = options["tensor_parallel"] > 1 or options["devices"] or device is not None
    if is_said or count < 2:
        return options
    free = min(available_bytes(f"cuda:{i}") or 0 for i in range(count))
    needed = _fewest(model, count, free, context, kv_cache)
    if needed == 1:
        return options
    stderr.print(f"uses {needed} of {count} GPUs: the plan says that the model needs them")
    return {**options, "tensor_parallel": needed}


def _fewest(model: str, count: int, free: int, context: int, kv_cache: Any) -> int:
    """Of `count` GPUs with so many free bytes each; 1 where no such number runs the model."""
    from halfweight.checkpoint.headers import quantized_modules, read_headers, resolve
    from halfweight.memory.plan import on_ranks
    from halfweight.memory.what_fits import solve
    from halfweight.memory.workload import Range, Workload
    from halfweight.model.share import described

    folder = resolve(model)
    weights: Any = "int8" if quantized_modules(read_headers(folder)) else "16bit"
    planned, alone = described(folder), Range(0, 0, 0)
    work = Workload(context, 1, kv_cache, overhead=alone)  # `free` is beside the context
    found = solve(planned, work, free, "gpus", weights) or 1
    runs_here = on_ranks(planned, work, found).runtime == "halfweight"
    return found if runs_here and found <= count else 1


def follow_if_told() -> None:
    """In a process that torchrun has started as a rank other than 0: be that rank, and leave."""
    from halfweight.engine.parallel import outside

    place = outside.Place.found()
    if place is not None and place.rank > 0:
        outside.follow(place)
