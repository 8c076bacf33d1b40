"""`halfweight quantize`, `inspect` and `verify`: from a checkpoint to an INT8 checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Annotated, Any

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
from halfweight.errors import InterruptedConversionError, UsageError, VerificationError
from halfweight.quantization.scheme import GroupSize, Recipe, Scheme

if TYPE_CHECKING:
    from rich.progress import Progress

    from halfweight.checkpoint.inspection import Contents
    from halfweight.conversion.convert import ConversionReport, Refinement

MAX_KL = 0.01
"""Nats; a model that diverges more from its source than this fails --check."""

Readers = Annotated[
    list[str] | None,
    typer.Option("--for", metavar="NAME", help="vllm, sglang or transformers is to read it too."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def quantize(
    source: Annotated[str, typer.Argument(help="A model folder, a .gguf file or a Hub id.")],
    out: Annotated[Path, typer.Argument(help="The folder to make.")],
    keep: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Tensors to keep as they are; may be given repeatedly."),
    ] = None,
    group_size: Annotated[
        str | None,
        typer.Option(
            help="Weights that share a scale: 32, 64, 128, 256 or 'row' (default: 128; what is "
            "INT8 in SRC is kept as it is)."
        ),
    ] = None,
    tensor_parallel: Annotated[
        int,
        typer.Option(min=1, help="GPUs that are to share it: groups may have to be smaller."),
    ] = 1,
    scale: Annotated[
        str, typer.Option(help="Scale format: grid8, bfloat16, float16 or float32.")
    ] = "grid8",
    scale_choice: Annotated[
        str, typer.Option(help="How a scale is chosen: least_squares or absmax.")
    ] = "least_squares",
    jobs: Annotated[int | None, typer.Option(min=1, help="Threads (default: all cores).")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an OUT that is not empty.")] = False,
    calibrate: Annotated[
        Path | None,
        typer.Option(metavar="TEXT", help="Round so that errors cancel on this text; slower."),
    ] = None,
    check: Annotated[
        Path | None, typer.Option(metavar="TEXT", help="Compare with SRC on this text at the end.")
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(
            min=0, help="With --check: the largest mean KL divergence, in nats (default: 0.01)."
        ),
    ] = None,
    readers: Readers = None,
    json_output: Json = False,
) -> None:
    """Quantize a model to INT8. Interrupted or killed, the same command goes on where it was."""
    from halfweight.conversion import convert

    size = _group_size(group_size or "128")
    scheme = Scheme(size, scale, scale_choice)  # type: ignore[arg-type]
    with stop_on_ctrl_c() as stop, bytes_bar() as bar:
        report = convert.quantize(
            source,
            out,
            Recipe(scheme, tuple(keep or ()), group_size is not None, tensor_parallel),
            jobs=jobs,
            overwrite=overwrite,
            progress=show_parts(bar, "reading headers"),
            stop=stop,
            refine=_calibration(source, calibrate, bar, stop) if calibrate else None,
            check=_divergence_check(source, check, max_kl, bar, stop),
            readers=tuple(readers or ()),
        )
    if json_output:
        print_json(_fields(report))
    else:
        _print_report(report, readers or (), tensor_parallel)


@app.command()
def inspect(
    path: Annotated[str, typer.Argument(help="A folder, a .safetensors file or a Hub id.")],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    errors: Annotated[
        bool, typer.Option("--errors", help="Show what quantization did to each weight.")
    ] = False,
    source: Annotated[
        str | None,
        typer.Option(metavar="SRC", help="With --errors: compare with this, to find worst groups."),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="With --errors: write a heat map of layers and modules.")
    ] = None,
    json_output: Json = False,
) -> None:
    """Show what a checkpoint holds, in bytes by kind; reads headers only."""
    from halfweight.checkpoint import inspection

    if errors or source or html:
        from halfweight.checkpoint.headers import resolve
        from halfweight.cli.weight_errors import show_errors

        show_errors(resolve(path), source, html, json_output)
        return
    found = inspection.inspect(path)
    if json_output:
        print_json(_contents_json(found, tensors))
        return
    _print_contents(found)
    if tensors:
        _print_entries(found)


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(help="A folder made by `halfweight quantize`.")],
    readers: Readers = None,
    json_output: Json = False,
) -> None:
    """Check every file's sha256, the structure, the scales, and that the model loads.

    With --for also that another program reads it as it is.
    """
    from dataclasses import asdict

    from halfweight.checkpoint.headers import resolve
    from halfweight.conversion.verification import verify as check

    path = resolve(path)
    with bytes_bar() as bar:
        task = bar.add_task("verifying", total=None)

        def show(name: str, done: int, total: int) -> None:
            bar.update(task, description=name, completed=done, total=total)

        result = check(path, show, tuple(readers or ()))
    if json_output:
        print_json({**asdict(result), "path": str(path)})
    for problem in result.problems if not json_output else ():
        stdout.print(problem, markup=False, highlight=False, soft_wrap=True)
    if result.unread and result.unread == result.problems:
        raise VerificationError(
            f"{path}: not for {' and '.join(readers or ())}, first: {result.unread[0]}",
            hint=f"quantize the source with --for {' --for '.join(readers or ())}",
        )
    if result.problems:
        count = "1 problem" if len(result.problems) == 1 else f"{len(result.problems)} problems"
        raise VerificationError(
            f"{path}: {count}, first: {result.problems[0]}",
            hint="copy or download these files again, or quantize the source again; if they were "
            "changed on purpose, remove halfweight.json and verify what is there",
        )
    for note in result.notes:
        stderr.print(note, markup=False, highlight=False)
    if not json_output:
        what = f"{result.num_files} files, {size(result.num_bytes)}, all as written"
        what = what if result.num_files else "sound, and the model loads"
        what += f"; read by {' and '.join(readers)}" if readers else ""
        stdout.print(f"{path}: {what}", highlight=False, soft_wrap=True)


def _calibration(source: str, text: Path, bar: Progress, stop: Event) -> Refinement:
    from halfweight.checkpoint.headers import resolve
    from halfweight.evaluation.calibration import calibration

    task = bar.add_task("calibrating", total=None)

    def show(module: str, done: int, total: int) -> None:
        _raise_if(stop)
        bar.update(task, description=f"calibrating {module}", completed=done, total=total)

    return calibration(resolve(source), text, show)


def _divergence_check(
    source: str, text: Path | None, max_kl: float | None, bar: Progress, stop: Event
) -> Callable[[Path], None] | None:
    """What --check does at the end; that it can be done is found out now."""
    if text is None:
        if max_kl is not None:
            raise UsageError(
                f"--max-kl {max_kl:g} without --check has nothing to measure",
                hint="give a file of plain text with --check",
            )
        return None
    from halfweight.checkpoint.headers import resolve
    from halfweight.evaluation.comparison import require, tokenize
    from halfweight.evaluation.scoring import sample

    sample(tokenize(resolve(source), text))
    limit = MAX_KL if max_kl is None else max_kl

    def check(folder: Path) -> None:
        task = bar.add_task("checking", total=None)

        def show(what: str, done: int, total: int) -> None:
            _raise_if(stop)
            bar.update(task, description=f"checking: {done} of {total} tokens, {what}")

        found = require(folder, reference=source, text=text, max_kl=limit, progress=show)
        assert found.comparison is not None
        figure = f"{found.comparison.kl_mean.value:.6f} nats on {found.num_tokens} tokens"
        stderr.print(f"KL divergence from the source: {figure}", highlight=False)

    return check


def _raise_if(stop: Event) -> None:
    """Raise InterruptedConversionError after Ctrl-C, where no shard is under way."""
    if stop.is_set():
        raise InterruptedConversionError(
            "interrupted; all shards are kept",
            hint="run the same command again to go on from there",
        )


def _group_size(text: str) -> GroupSize:
    return int(text) if text.isdigit() else text  # type: ignore[return-value]  # Scheme checks it


def _fields(report: ConversionReport) -> dict[str, Any]:
    from dataclasses import asdict

    return {**asdict(report), "out": str(report.out)}


def _print_report(report: ConversionReport, readers: Sequence[str], ranks: int) -> None:
    for note in report.notes:
        stderr.print(note, markup=False, highlight=False, soft_wrap=True)
    stdout.print(f"{report.num_quantized} tensors quantized, {report.num_kept} kept")
    stdout.print(f"source     {size(report.source_bytes)}")
    for what, num_bytes in (("on disk", report.disk_bytes), ("in memory", report.resident_bytes)):
        stdout.print(f"{what:<10} {size(num_bytes)}, {_change(num_bytes, report.source_bytes)}")
    asked_by = [(" and ".join(readers), report.readers_bytes)] if readers else []
    asked_by += [(f"{ranks} GPUs", report.ranks_bytes)] if ranks > 1 else []
    for who, num_bytes in asked_by:
        stdout.print(f"{'':<10} {num_bytes:,} bytes of it for {who}, {size(num_bytes)}")
    stdout.print(f"error      {report.relative_error:.4f} of the weights' norm")
    stdout.print(f"wrote {report.out}", markup=False, highlight=False, soft_wrap=True)


def _change(after: int, before: int) -> str:
    return f"{after / before - 1:+.2%}"


def _contents_json(found: Contents, tensors: bool) -> dict[str, Any]:
    from dataclasses import asdict

    fields = asdict(found)
    del fields["entries"]
    fields |= {
        "path": str(found.path),
        "data_bytes": found.data_bytes,
        "bits_per_weight": found.bits_per_weight,
    }
    if tensors:
        fields["tensors"] = [
            {**asdict(entry), "bits_per_weight": entry.bits_per_weight} for entry in found.entries
        ]
    return fields


def _print_contents(found: Contents) -> None:
    from rich.table import Table

    stdout.print(f"{found.path}", markup=False, highlight=False, soft_wrap=True)
    table = Table("kind", "bytes", "", "share", box=None)
    for kind, num_bytes in found.bytes_by_kind.items():
        share = num_bytes / found.data_bytes if found.data_bytes else 0
        table.add_row(kind, f"{num_bytes:,}", size(num_bytes), f"{share:.2%}")
    table.add_row("all", f"{found.data_bytes:,}", size(found.data_bytes), "")
    stdout.print(table)
    if found.num_params:
        stdout.print(f"{found.num_params:,} parameters, {found.bits_per_weight:.3f} bits each")
    stdout.print(f"safetensors files: {found.num_files}, {size(found.file_bytes)}")
    if found.form is not None:
        line = f"this is {found.form}: {found.remedy}"
        stdout.print(line, markup=False, highlight=False, soft_wrap=True)
    if found.form is None and found.plan is None:
        stdout.print(f"in memory under halfweight: {size(found.resident_bytes)}")
    if found.plan is None:
        _print_readers(found)
        return
    for where, num_bytes in (
        ("on disk", found.plan.disk_bytes),
        ("in memory", found.plan.resident_bytes),
    ):
        change = _change(num_bytes, found.data_bytes)
        stdout.print(f"quantized, {where}: {num_bytes:,} bytes, {size(num_bytes)}, {change}")


def _print_readers(found: Contents) -> None:
    for name, reasons in found.readers.items():
        lines = [f"read by {name}: no, {reason}" for reason in reasons] or [f"read by {name}: yes"]
        for line in lines:
            stdout.print(line, markup=False, highlight=False, soft_wrap=True)


def _print_entries(found: Contents) -> None:
    width = max(len(entry.name) for entry in found.entries)
    for entry in found.entries:
        shape = " x ".join(map(str, entry.shape))
        group = f"group {entry.group_size}" if entry.group_size else ""
        stdout.print(
            f"{entry.name:<{width}}  {entry.kind:<5} {shape:<15} {group:<10} "
            f"{entry.num_bytes:>15,} bytes  {entry.bits_per_weight:6.3f} bits",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
