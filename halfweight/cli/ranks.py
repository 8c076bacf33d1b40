"""`--tensor-parallel` and `--devices`: how many ranks run a model, and where."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from halfweight.errors import UsageError

TensorParallel = Annotated[
    int | None,
    typer.Option(min=1, help="Processes that run the model together, a GPU each."),
]
Devices = Annotated[
    str | None, typer.Option(help="Theirs, one each: cuda:0,cuda:1 [default: the first GPUs].")
]


def rank_options(
    tensor_parallel: int | None, devices: str | None, device: str | None
) -> dict[str, Any]:
    """Options of Engine. Without any said, as many ranks as torchrun has started, or one.

    Raises UsageError for --devices beside --device.
    """
    from halfweight.engine.parallel.outside import Place

    if devices is not None and device is not None:
        raise UsageError("--device and --devices", hint="give one of them")
    places = None if devices is None else [name.strip() for name in devices.split(",")]
    place = Place.found()
    count = tensor_parallel or (len(places) if places else place.ranks if place else 1)
    if count == 1 and places:
        raise UsageError(f"one rank with --devices {devices}", hint="give --device")
    return {"tensor_parallel": count, "devices": places}


def follow_if_told() -> None:
    """In a process that torchrun has started as a rank other than 0: be that rank, and leave."""
    from halfweight.engine.parallel import outside

    place = outside.Place.found()
    if place is not None and place.rank > 0:
        outside.follow(place)
