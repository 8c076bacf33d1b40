"""A plan for vLLM: the file that vLLM reads, and the two commands that make and serve it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from halfweight.checkpoint.readers import READERS, check_scheme, unread_of, with_kept
from halfweight.memory.cards import Gpus
from halfweight.memory.commands import commands
from halfweight.memory.plan import Model, Plan

VLLM = READERS["vllm"]


@dataclass(frozen=True)
class VllmRun:
    """The commands that run a plan with vLLM, and why vLLM alone would not read the file."""

    commands: list[str]
    unread: list[str]


def model_for_vllm(model: Model) -> Model:
    """The model as `quantize --for vllm` writes it; one that is quantized already as it is.

    Raises UsageError for a recipe that vLLM reads nothing of.
    """
    if model.recipe is None:
        return model
    check_scheme((VLLM,), model.recipe.scheme)
    a = model.architecture
    kept = with_kept(model.recipe, (VLLM,), {"model_type": a.kind}, a.tensors, {})
    recipe = replace(model.recipe, keep=(*model.recipe.keep, *kept))
    return Model.from_recipe(a, recipe)


def vllm_run(plan: Plan, name: str, gpus: Gpus, plugin: bool) -> VllmRun | None:
    """How to run a plan of the model called `name`; None where another engine is planned for.

    `plugin`: vLLM has ours, and reads the smallest file.
    """
    if plan.workload.runtime != "vllm":
        return None
    kind, decisions = plan.model.architecture.kind, plan.model.decisions
    unread = [] if plugin else list(unread_of(VLLM, {"model_type": kind}, decisions))
    return VllmRun(commands(name, plan, gpus.num_bytes, plugin=plugin), unread)
