"""A plan for vLLM: the file that vLLM reads, and the two commands that make and serve it."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace

from halfweight.checkpoint.readers import READERS, check_scheme, unread_of, with_kept
from halfweight.memory.cards import Gpus
from halfweight.memory.commands import ranks_option
from halfweight.memory.plan import Model, Plan
from halfweight.memory.presets import PRESETS

VLLM = READERS["vllm"]
OUT = "OUT"
MOST_OF_A_GPU = 0.95
"""vLLM's share of a card that a process may use whole: it counts of all that the card has."""


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
    return VllmRun(_commands(plan, name, gpus, plugin), unread)


def _commands(plan: Plan, name: str, gpus: Gpus, plugin: bool) -> list[str]:
    recipe = plan.model.recipe
    if recipe is None:
        return [_serve(plan, shlex.quote(name), gpus)]
    scheme = recipe.scheme
    words = ["halfweight quantize", "MODEL" if name in PRESETS else shlex.quote(name), OUT]
    words += [] if plugin else [f"--for {VLLM.name}"]
    words += [] if scheme.group_size == 128 else [f"--group-size {scheme.group_size}"]
    words += [] if scheme.scale_format == "grid8" else [f"--scale {scheme.scale_format}"]
    words += [f"--keep {shlex.quote(glob)}" for glob in recipe.keep if "*" in glob]
    return [" ".join(words) + ranks_option(plan.model), _serve(plan, OUT, gpus)]


def _serve(plan: Plan, folder: str, gpus: Gpus) -> str:
    work = plan.workload
    share = MOST_OF_A_GPU * (plan.budget or gpus.num_bytes) / gpus.num_bytes
    words = [
        f"vllm serve {folder}",
        f"--tensor-parallel-size {work.ranks}",
        f"--max-model-len {work.context}",
        f"--max-num-seqs {work.batch}",
        f"--gpu-memory-utilization {int(100 * share) / 100:.2f}",
    ]
    return " ".join([*words, *(["--kv-cache-dtype fp8"] if work.kv_dtype == "int8" else [])])
