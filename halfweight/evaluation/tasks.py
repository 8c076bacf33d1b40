"""Tasks of lm-evaluation-harness on a model, through the engine: `halfweight evaluate --tasks`."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfweight.errors import HalfweightError, UsageError


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task; `error` is its standard error, None where the harness gives none."""

    task: str
    metric: str
    filter: str
    value: float
    error: float | None
    num_samples: int


def run_tasks(
    model: str,
    tasks: Sequence[str],
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    include_path: Path | None = None,
    **options: Any,
) -> list[TaskScore]:
    """The scores of a folder or Hub id on tasks of the harness.

    `num_fewshot` examples stand before each question (by default what the task says), `limit`
    questions of each task are asked, `include_path` is a folder of task files of your own; options
    are those of HalfweightLM. Raises UsageError without the harness and for a task it does not
    know, HalfweightError where a task's data cannot be had.
    """
    lm_eval = _harness()
    manager = lm_eval.tasks.TaskManager(include_path=include_path and str(include_path))
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    for task in unknown:
        raise UsageError(
            f"task {task!r} is not known to lm-evaluation-harness",
            hint="`lm_eval ls tasks` lists them; --include-path names a folder of your own",
        )
    lm = importlib.import_module("halfweight.evaluation.harness").HalfweightLM(model, **options)
    try:
        found = lm_eval.simple_evaluate(
            model=lm,
            tasks=list(tasks),
            num_fewshot=num_fewshot,
            limit=limit,
            task_manager=manager,
            log_samples=False,
        )
    except OSError as error:
        raise HalfweightError(
            f"the data of {', '.join(tasks)} cannot be had: {str(error).partition(chr(10))[0]}",
            hint="the harness fetches it from the Hub: check the network, or fetch it beforehand",
        ) from error
    finally:
        lm.engine.close()
    return list(_scores(found))


def _harness() -> Any:
    try:
        importlib.import_module("lm_eval.tasks")
        return importlib.import_module("lm_eval")
    except ImportError as error:
        raise UsageError(
            "tasks need lm-evaluation-harness, which is not installed",
            hint="pip install 'halfweight[eval]'",
        ) from error


def _scores(found: Mapping[str, Any]) -> Iterator[TaskScore]:
    """Metrics are keys "name,filter" of a task, their errors "name_stderr,filter"."""
    for task, values in found["results"].items():
        asked = (found.get("n-samples") or {}).get(task, {}).get("effective", 0)
        for key, value in values.items():
            metric, comma, kind = key.partition(",")
            if comma and not metric.endswith("_stderr"):
                error = values.get(f"{metric}_stderr,{kind}")
                known = float(error) if isinstance(error, int | float) else None
                yield TaskScore(task, metric, kind, float(value), known, asked)
