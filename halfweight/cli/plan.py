"""`halfweight plan`: what a model needs of each device before anything is loaded, and what fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from halfweight.cli import app
from halfweight.cli.output import print_json, size, stderr, stdout
from halfweight.cli.stages import plan_on_devices
from halfweight.errors import DoesNotFitError, UsageError
from halfweight.quantization.scheme import Recipe, Scheme

if TYPE_CHECKING:
    from halfweight.memory.cards import Gpus
    from halfweight.memory.costs import Conversion, Loading, Serving
    from halfweight.memory.devices import Device
    from halfweight.memory.measurements import Record
    from halfweight.memory.plan import Footprint, Model, Plan
    from halfweight.memory.vllm_run import VllmRun
    from halfweight.memory.what_fits import Cell
    from halfweight.memory.workload import DeviceKind, Workload

MODEL_HELP = "A folder, a .gguf file, a Hub id, a config.json, or a preset such as llama-3-8b."
STYLES = {"fits": "green", "tight": "yellow", "does not fit": "red"}


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    gpus: Annotated[
        str | None,
        typer.Option(help="4x24GB, 2xh100, rtx-4090 (default: the GPU here, else this machine)."),
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens a sequence, prompt and answer.")] = 4096,
    batch: Annotated[int, typer.Option(help="Sequences at once.")] = 1,
    kv_dtype: Annotated[
        Literal["16bit", "int8"], typer.Option(help="Numbers of the KV cache.")
    ] = "16bit",
    group_size: Annotated[
        str | None, typer.Option(help="32, 64, 128, 256 or row (default: 128, see `quantize`).")
    ] = None,
    scale: Annotated[str, typer.Option(help="Scale format: see `quantize`.")] = "grid8",
    keep: Annotated[list[str] | None, typer.Option(help="Glob kept in 16 bits; repeat.")] = None,
    tensor_parallel: Annotated[
        int | None, typer.Option(help="GPUs that share one model (default: all).")
    ] = None,
    runtime: Annotated[
        Literal["halfweight", "transformers-tp", "vllm"] | None,
        typer.Option(help="Who runs it (default: halfweight where it can, else vllm)."),
    ] = None,
    plugin: Annotated[
        bool, typer.Option("--plugin", help="vLLM has halfweight's plug-in: nothing is kept.")
    ] = False,
    budget: Annotated[
        str | None, typer.Option(help="Memory to use of a device, as 22GiB, instead of all.")
    ] = None,
    reserve: Annotated[str | None, typer.Option(help="Memory to leave on each, as 2GiB.")] = None,
    solve: Annotated[
        Literal["batch", "context", "gpus", "group-size"] | None,
        typer.Option(help="Find the largest (of GPUs the smallest) that fits."),
    ] = None,
    price: Annotated[float | None, typer.Option(min=0, help="Of a GPU for an hour.")] = None,
    read_bandwidth: Annotated[
        str | None,
        typer.Option(help="Of the disk a second, as 3GB; 'measure' reads the model's files."),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write a page with sliders; needs no network.")
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Write a picture.")] = None,
    devices: Annotated[
        str | None,
        typer.Option(help="Of this machine, one after the other: cuda:0,cpu, or auto."),
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """Say what a model needs of each device and whether it fits (exit 0) or not (exit 3).

    Reads headers or a config only; FP16 stands beside INT8.
    """
    from halfweight.memory.commands import commands
    from halfweight.memory.named_model import planned_model
    from halfweight.memory.plan import on_ranks
    from halfweight.memory.plan import plan as make_plan
    from halfweight.memory.vllm_run import model_for_vllm, vllm_run

    asked = group_size or "128"
    size_or_row: Any = int(asked) if asked.isdigit() else asked
    scheme, kept = Scheme(size_or_row, scale), tuple(keep or ())
    recipe = Recipe(scheme, kept, group_size is not None, tensor_parallel or 1)
    found = planned_model(model, recipe)
    if solve == "gpus" and tensor_parallel:
        raise UsageError("--solve gpus beside --tensor-parallel", hint="give one of them")
    if devices is not None:
        if gpus or tensor_parallel:
            raise UsageError(
                "--devices beside --gpus or --tensor-parallel", hint="give one of them"
            )
        plan_on_devices(found, devices, context, batch, kv_dtype, json_output)
        return 0
    target = _target(gpus, budget, reserve)
    ranks = tensor_parallel or target.gpus.count
    if ranks > target.gpus.count:
        raise UsageError(
            f"--tensor-parallel {ranks} with {target.gpus.count} GPUs",
            hint=f"give --gpus {ranks}x{target.gpus.name}",
        )
    records = _records(target, found)
    work = _workload(context, batch, kv_dtype, ranks, runtime, target, records)
    if solve == "gpus":
        work = replace(work, ranks=1)
    elif runtime is None:
        work = on_ranks(found, work, ranks)
    if work.runtime == "vllm" and not plugin:
        found = model_for_vllm(found)
    made = make_plan(found, work, target.budget)
    answer = replace(
        _answer(made, target.gpus, read_bandwidth, price, model),
        records=records,
        plugin=plugin,
        commands=commands(model, made, target.gpus.num_bytes, plugin=plugin),
        vllm=vllm_run(made, model, target.gpus, plugin),
    )
    if solve is not None:
        answer = _solved(answer, solve)
    _write(answer, html, png)
    if json_output:
        print_json(_document(answer))
    else:
        _print(answer)
    return DoesNotFitError.exit_code if _fails(answer) else 0


@dataclass(frozen=True)
class _Target:
    """What the model is to run on: `budget` bytes of each device."""

    gpus: Gpus
    kind: DeviceKind
    budget: int
    here: Device | None


@dataclass(frozen=True)
class _Answer:
    """A plan and all that is printed with it."""

    name: str
    """Of the model, as it was given."""
    plan: Plan
    gpus: Gpus
    loading: Loading
    conversion: Conversion | None
    serving: Serving | None
    solution: dict[str, Any] | None = None
    cells: Sequence[Cell] = ()
    records: Sequence[Record] = ()
    plugin: bool = False
    commands: Sequence[str] = ()
    """That make the file and run it, if it fits."""
    vllm: VllmRun | None = None

    @property
    def calibration(self) -> dict[str, Any] | None:
        """How many measurements the plan uses, and how far earlier plans were off."""
        if not self.records:
            return None
        errors = [abs(record.error) for record in self.records]
        return {
            "measurements": len(errors),
            "mean_absolute_error": sum(errors) / len(errors),
            "worst_error": max(errors),
        }


def _target(gpus: str | None, budget: str | None, reserve: str | None) -> _Target:
    from halfweight.memory.cards import Gpus, check_capability, parse_bytes, parse_gpus
    from halfweight.memory.devices import local_device

    here = None if gpus else local_device()
    if here is not None:
        check_capability(here.name, here.capability)
    kind: DeviceKind = here.kind if here else "cuda"
    found = Gpus(1, here.name, here.free_bytes) if here else parse_gpus(gpus or "")
    num_bytes = parse_bytes(budget) if budget else found.num_bytes
    left = num_bytes - (parse_bytes(reserve) if reserve else 0)
    if left <= 0:
        raise UsageError(
            f"--reserve {reserve} leaves nothing of {size(num_bytes)}", hint="reserve less"
        )
    return _Target(found, kind, left, here)


def _records(target: _Target, model: Model) -> list[Record]:
    """What was measured of this model on the very device that it is planned for."""
    from halfweight.memory.measurements import key_of, records_for, records_path

    if target.here is None or not records_path().exists():
        return []
    return records_for(key_of(target.here, model.architecture))


def _workload(
    context: int,
    batch: int,
    kv_dtype: Any,
    ranks: int,
    runtime: Any,
    target: _Target,
    records: Sequence[Record],
) -> Workload:
    from halfweight.memory.measurements import calibrated_overhead
    from halfweight.memory.workload import Workload

    return Workload(
        context,
        batch,
        kv_dtype,
        ranks,
        runtime or "halfweight",
        target.kind,
        calibrated_overhead(records, target.kind) if records else None,
    )


def _answer(
    made: Plan, gpus: Gpus, read_bandwidth: str | None, price: float | None, model: str
) -> _Answer:
    from halfweight.memory import costs

    rate = _read_rate(read_bandwidth, model)
    convertible = made.model.recipe is not None
    on_gpu = made.workload.device == "cuda" and made.budget is not None
    return _Answer(
        model,
        made,
        gpus,
        costs.loading(made.model, rate),
        costs.conversion(made.model, rate) if convertible else None,
        costs.serving(made.model, made.workload, made.budget or 0, price) if on_gpu else None,
    )


def _read_rate(text: str | None, model: str) -> float | None:
    from halfweight.memory.cards import parse_bytes
    from halfweight.memory.costs import read_rate

    if text is None:
        return None
    if text != "measure":
        return float(parse_bytes(text.removesuffix("/s")))
    path = Path(model).expanduser()
    return read_rate(sorted(path.glob("*.safetensors")) if path.is_dir() else [])


def _solved(answer: _Answer, quantity: Any) -> _Answer:
    from halfweight.memory import what_fits

    made = answer.plan
    assert made.budget is not None
    values = {
        weights: what_fits.solve(made.model, made.workload, made.budget, quantity, weights)
        for weights in ("16bit", "int8")
        if quantity != "group-size" or weights == "int8"
    }
    cells = list(
        what_fits.grid(made.model, made.workload, *what_fits.grid_axes(made.model, made.workload))
    )
    solution = {"quantity": quantity, **{k: values.get(k) for k in ("16bit", "int8")}}
    return replace(answer, solution=solution, cells=cells)


def _write(answer: _Answer, html: Path | None, png: Path | None) -> None:
    if html is not None:
        from halfweight.memory.plan_page import render

        html.write_text(render(answer.plan, answer.gpus, answer.name, plugin=answer.plugin))
    if png is not None:
        from halfweight.memory.plan_figure import draw

        draw(answer.plan, answer.gpus, png)
    for path in (html, png):
        if path is not None:
            stderr.print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)


def _fails(answer: _Answer) -> bool:
    if answer.solution is not None:
        return answer.solution["int8"] is None
    return answer.plan.verdict == "does not fit"


def _document(answer: _Answer) -> dict[str, Any]:
    from halfweight.memory.plan_document import document

    found = document(
        answer.plan,
        answer.gpus,
        answer.loading,
        conversion=answer.conversion,
        serving=answer.serving,
        solution=answer.solution,
        cells=answer.cells,
        calibration=answer.calibration,
    )
    fits = answer.plan.verdict != "does not fit"
    found["commands"] = list(answer.commands) if fits else []
    return found | {"vllm": asdict(answer.vllm) if answer.vllm else None}


def _print(answer: _Answer) -> None:
    _print_parts(answer.plan)
    _print_verdict(answer)
    if answer.solution is not None:
        _print_solution(answer)
    _print_costs(answer)
    if answer.vllm is not None:
        _print_vllm(answer.vllm)


def _print_parts(made: Plan) -> None:
    from rich.table import Table

    a, work = made.model.architecture, made.workload
    per = f"on each of {work.ranks} GPUs ({work.runtime})" if work.ranks > 1 else "on one device"
    stdout.print(
        f"[bold]{a.name}[/]: {a.num_parameters:,} parameters; batch {work.batch} of "
        f"{work.context:,} tokens, {per}"
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    split = ("INT8 divided", "on every") if work.ranks > 1 else ()
    for column in ("FP16 GB", "GiB", "INT8 GB", "GiB", *split):
        table.add_column(column, justify="right")
    both = [{part.name: part for part in found.parts} for found in (made.sixteen_bit, made.int8)]
    for name in dict.fromkeys([*both[1], *both[0]]):
        parts = [column.get(name) for column in both]
        cells = [text for part in parts for text in _units(part.num_bytes if part else None)]
        if split and parts[1]:
            cells += [_units(n)[0] for n in (parts[1].sharded, parts[1].replicated)]
        table.add_row(name, *cells)
    for name, get in _TOTALS.items():
        sums = (text for f in (made.sixteen_bit, made.int8) for text in _units(get(f)))
        table.add_row(f"[bold]{name}[/]", *sums)
    stdout.print(table)


_TOTALS: dict[str, Callable[[Footprint], int]] = {
    "allocated": lambda found: found.allocated,
    "with context etc.: low": lambda found: found.total.low,
    "likely": lambda found: found.total.likely,
    "high": lambda found: found.total.high,
}


def _units(num_bytes: int | None) -> tuple[str, str]:
    """GB and GiB, as columns."""
    if num_bytes is None:
        return "", ""
    return f"{num_bytes / 1e9:.3f}", f"{num_bytes / (1 << 30):.3f}"


def _print_verdict(answer: _Answer) -> None:
    from halfweight.memory.plan import sizes_in_words
    from halfweight.memory.what_fits import advice, notes

    made, gpus = answer.plan, answer.gpus
    assert made.budget is not None
    where = f"{gpus.count} x {gpus.name}" if gpus.count > 1 else gpus.name
    stdout.print(f"{where}: {size(made.budget)} to use on each")
    for name, verdict in (("FP16", made.sixteen_bit_verdict), ("INT8", made.verdict)):
        assert verdict is not None
        stdout.print(f"{name} [{STYLES[verdict]}]{verdict}[/]")
    for line in notes(made):
        stdout.print(line, highlight=False)
    for line in advice(made):
        stdout.print(f"  {line}")
    if (past := answer.calibration) is not None:
        stdout.print(
            f"measured here {past['measurements']} times: earlier plans were off by "
            f"{past['mean_absolute_error']:.1%}, at worst {past['worst_error']:.1%}"
        )
    sizes = f"tensor-parallel sizes: {sizes_in_words(made.model)}"
    stdout.print(sizes, highlight=False, soft_wrap=True)
    if made.verdict != "does not fit":
        _print_commands(answer)


def _print_commands(answer: _Answer) -> None:
    from halfweight.memory.commands import source_words

    for line in answer.commands:
        stdout.print(f"run: {line}", markup=False, highlight=False, soft_wrap=True)
    model = answer.plan.model
    words = source_words(answer.name, model.architecture.name) if model.recipe else ""
    if words and answer.commands:
        stdout.print(words, markup=False, highlight=False, soft_wrap=True)


def _print_solution(answer: _Answer) -> None:
    from rich.table import Table

    assert answer.solution is not None
    quantity = answer.solution["quantity"]
    for key, name in (("16bit", "FP16"), ("int8", "INT8")):
        if quantity != "group-size" or key == "int8":
            value = answer.solution[key]
            text = (
                "none fits" if value is None else f"{value}{_limits(answer.plan, quantity, value)}"
            )
            stdout.print(f"{name} {quantity}: {text}", highlight=False)
    contexts = list(dict.fromkeys(cell.context for cell in answer.cells))
    table = Table("batch", *(f"{n:,}" for n in contexts), box=None, title="INT8, likely GB")
    budget = answer.plan.budget or 0
    for batch in dict.fromkeys(cell.batch for cell in answer.cells):
        row = (cell for cell in answer.cells if cell.batch == batch)
        table.add_row(str(batch), *(_cell(cell, budget) for cell in row))
    stdout.print(table)
    stdout.print("green fits, yellow! is tight, red x does not fit", style="dim")


def _limits(made: Plan, quantity: str, value: int) -> str:
    """What a solution stands under: the model's own context, or another runtime."""
    from halfweight.memory.what_fits import by_another_runtime

    if quantity == "context" and value == made.model.architecture.max_context:
        return ", the model's own"
    return by_another_runtime(made.model, made.workload, value) if quantity == "gpus" else ""


def _cell(cell: Cell, budget: int) -> str:
    text = f"{cell.total.likely / 1e9:.1f}"
    if cell.total.high <= budget:
        return f"[green]{text}[/]"
    return f"[yellow]{text}![/]" if cell.total.likely <= budget else f"[red]{text}x[/]"


def _print_costs(answer: _Answer) -> None:
    loaded, converted = answer.loading, answer.conversion
    before, after = _time(loaded.sixteen_bit_seconds), _time(loaded.int8_seconds)
    stdout.print(
        f"load: FP16 {size(loaded.sixteen_bit_bytes)}{before}, INT8 {size(loaded.int8_bytes)}"
        f"{after}; host staging {size(loaded.staging_bytes)}"
    )
    if converted is not None:
        stdout.print(
            f"convert: RAM {size(converted.ram_bytes)}, disk {size(converted.disk_bytes)} in "
            f"{converted.num_files} files{_time(converted.seconds)}"
        )
    if (s := answer.serving) is not None:
        stdout.print(f"serve: FP16 {_gpus(s.sixteen_bit_gpus, s.price)}, {_int8_cost(s)}")


def _print_vllm(found: VllmRun) -> None:
    for reason in found.unread:
        line = f"vLLM needs halfweight's plug-in for this file: {reason}"
        stdout.print(line, markup=False, highlight=False, soft_wrap=True)


def _gpus(count: int | None, price: float | None) -> str:
    if count is None:
        return "fits no number of these GPUs"
    cost = f" ({count * price:.2f} an hour)" if price is not None else ""
    return f"{count} GPU{'s' if count > 1 else ''}{cost}"


def _int8_cost(found: Serving) -> str:
    text = f"INT8 {_gpus(found.int8_gpus, found.price)}"
    if found.relative_cost is not None:
        text += f"; a token costs {found.relative_cost:.2f} x FP16 (GPUs x bytes read)"
    return text


def _time(seconds: float | None) -> str:
    return "" if seconds is None else f" in {seconds:.1f} s"
