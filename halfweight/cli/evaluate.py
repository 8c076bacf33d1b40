"""`halfweight evaluate`: what a quantized model loses on a text, and its scores on tasks."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from halfweight.cli import app
from halfweight.cli.output import print_json, size, stderr, stdout
from halfweight.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from halfweight.evaluation.comparison import Job, Progress
    from halfweight.evaluation.scoring import Comparison, Estimate, Evaluation

Dtype = Literal["float32", "bfloat16", "float16"]


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="A model folder, a .gguf file or a Hub id.")],
    text: Annotated[Path | None, typer.Option(help="A file of plain text.")] = None,
    tasks: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Tasks of lm-evaluation-harness, joined by commas."),
    ] = None,
    reference: Annotated[
        str | None, typer.Option(metavar="SRC", help="The model it was quantized from.")
    ] = None,
    context: Annotated[int, typer.Option(min=2, help="Tokens a window.")] = 1024,
    stride: Annotated[
        int | None, typer.Option(min=1, help="Tokens between windows (default: the context).")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=2, help="Use this many tokens of the text (default: all).")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows run at once.")] = 1,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="Of activations (default: the model's, as it generates)."),
    ] = None,
    work: Annotated[
        Path | None, typer.Option(help="Keep the files of the run here, to use them again.")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples before a question (default: the task's).")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions of each task.")] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="A folder of task files of your own.")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure perplexity on --text, with --reference divergence; or score --tasks.

    Measuring on a text can be run again when it was interrupted.
    """
    import torch

    from halfweight.evaluation import comparison

    if (text is None) == (tasks is None):
        raise UsageError(
            "evaluate needs either --text or --tasks", hint="halfweight evaluate --help"
        )
    if tasks is not None:
        if reference is not None:
            raise UsageError("--reference is for --text", hint="score SRC by a run of its own")
        options = {"num_fewshot": num_fewshot, "limit": limit, "include_path": include_path}
        _score_tasks(model, tasks, json_output, {**options, "device": device, "dtype": dtype})
        return
    assert text is not None
    with evaluation_bar() as progress:
        found = comparison.evaluate(
            model,
            text=text,
            reference=reference,
            context=context,
            stride=stride,
            tokens=tokens,
            batch_size=batch_size,
            device=device,
            dtype=getattr(torch, dtype) if dtype else None,
            work=work,
            ready=_announce,
            progress=progress,
        )
    if json_output:
        print_json(asdict(found))
    else:
        print_evaluation(found)


def _score_tasks(model: str, tasks: str, json_output: bool, options: dict[str, Any]) -> None:
    from halfweight.evaluation.tasks import run_tasks

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    scores = run_tasks(model, names, **options)
    if json_output:
        print_json([asdict(score) for score in scores])
        return
    from rich.table import Table

    table = Table("task", "metric", "value", "", "questions", box=None)
    for score in scores:
        metric = score.metric if score.filter == "none" else f"{score.metric} ({score.filter})"
        error = "" if score.error is None else f"± {score.error:.4f}"
        table.add_row(score.task, metric, f"{score.value:.4f}", error, str(score.num_samples))
    stdout.print(table)


@contextmanager
def evaluation_bar() -> Iterator[Progress]:
    """A bar of tokens for the reference and one for the model, on a terminal only."""
    from rich import progress
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    with progress.Progress(
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("tokens"),
        progress.TimeRemainingColumn(),
        console=stderr,
        transient=True,
        disable=not stderr.is_terminal,
    ) as bar:
        tasks: dict[str, progress.TaskID] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done)

        yield show


def _announce(job: Job) -> None:
    line = f"{job.sample.num_scored} tokens in {len(job.sample.windows)} windows"
    if job.states_bytes:
        line += f"; the reference's states take {size(job.states_bytes)} in {job.folder}"
    stderr.print(line, markup=False, highlight=False, soft_wrap=True)


def print_evaluation(found: Evaluation) -> None:
    """The figures as a table of what, value and error."""
    from rich.table import Table

    table = Table(f"{found.num_tokens} tokens", "", "", box=None)
    for row in _rows(found):
        table.add_row(*row)
    stdout.print(table)


def _rows(found: Evaluation) -> Iterator[tuple[str, ...]]:
    yield "perplexity", *_figures(found.perplexity, "{:.4f}")
    compared = found.comparison
    if compared is not None:
        yield from _comparison_rows(compared)


def _comparison_rows(compared: Comparison) -> Iterator[tuple[str, ...]]:
    yield "of the reference", *_figures(compared.reference_perplexity, "{:.4f}")
    yield "change (paired)", *_figures(compared.perplexity_change, "{:+.3%}", "{:.3%}")
    yield "KL mean, nats", *_figures(compared.kl_mean, "{:.6f}")
    for name in ("median", "99", "999", "max"):
        label = {"99": "99 %", "999": "99.9 %"}.get(name, name)
        yield f"KL {label}", f"{getattr(compared, f'kl_{name}'):.6f}"
    yield "same top token", *_figures(compared.top_agreement, "{:.2%}")
    yield "RMS of p(right) change", f"{compared.probability_rms:.3%}"


def _figures(estimate: Estimate, form: str, error_form: str | None = None) -> tuple[Any, Any]:
    return form.format(estimate.value), "± " + (error_form or form).format(estimate.error)
