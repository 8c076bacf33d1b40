"""The commands that run what a plan is about. No torch here."""

from __future__ import annotations

import shlex
from dataclasses import replace

from halfweight.checkpoint.readers import READERS, with_kept
from halfweight.memory.plan import Model, Plan
from halfweight.memory.presets import PRESETS

SOURCE, OUT = "MODEL", "OUT"
"""Where the weights are that a preset or a config.json only describes, and a folder to make."""
MOST_OF_A_GPU = 0.95
"""vLLM's share of a card that a process may use whole: it counts of all that the card has."""


def commands(name: str, found: Plan, gpu_bytes: int, *, plugin: bool = False) -> list[str]:
    """From the model's name as it was given to a server.

    `gpu_bytes` is what one GPU has; with `plugin` vLLM has ours, and reads the smallest file. A
    model that is planned by a recipe is not quantized yet. Empty for transformers' own tensor
    parallelism, which no command of ours starts.
    """
    work = found.workload
    if work.runtime == "transformers-tp":
        return []
    folder = shlex.quote(name) if found.model.recipe is None else OUT
    is_vllm = work.runtime == "vllm"
    serve = _vllm_serve(found, folder, gpu_bytes) if is_vllm else _serve(found, folder)
    if found.model.recipe is None:
        return [serve]
    return [quantize_command(name, found.model, for_vllm=is_vllm and not plugin), serve]


def quantize_command(name: str, model: Model, *, for_vllm: bool) -> str:
    """What makes the file that was planned; of a model with a recipe."""
    options = _options(model, "vllm" if for_vllm else None)
    return f"halfweight quantize {source_of(name)} {OUT}{options}"


def gpu_share(budget: int | None, gpu_bytes: int) -> str:
    """What vLLM is to be told of a GPU's memory."""
    share = MOST_OF_A_GPU * (budget or gpu_bytes) / gpu_bytes
    return f"{int(100 * share) / 100:.2f}"


def source_of(name: str) -> str:
    """What `quantize` is to be given of a model that was planned by this name."""
    is_described = name in PRESETS or name.endswith(".json")
    return SOURCE if is_described else shlex.quote(name)


def source_words(name: str, whose: str) -> str:
    """What SOURCE stands for; nothing where it is not in the command."""
    return f"{SOURCE}: the folder or Hub id of {whose} in 16 bits" * (source_of(name) == SOURCE)


def _options(model: Model, reader: str | None) -> str:
    """What `quantize` is to be told to make the file that was planned, for `reader` if any."""
    assert model.recipe is not None
    scheme = model.recipe.scheme
    keep = model.recipe.keep if reader is None else _kept_beside(model, reader)
    words = [f"--for {reader}"] if reader else []
    is_default = scheme.group_size == 128 and not model.recipe.requantize
    words += [] if is_default else [f"--group-size {scheme.group_size}"]
    words += [] if scheme.scale_format == "grid8" else [f"--scale {scheme.scale_format}"]
    words += [f"--keep {shlex.quote(glob)}" for glob in keep]
    if model.decisions != model.for_ranks(1).decisions:
        words.append(f"--tensor-parallel {model.recipe.tensor_parallel}")
    return "".join(f" {word}" for word in words)


def _kept_beside(model: Model, reader: str) -> list[str]:
    """What is kept for another reason than that `--for` keeps it."""
    assert model.recipe is not None
    names = {tensor.name for tensor in model.architecture.tensors}
    globs = tuple(glob for glob in model.recipe.keep if glob not in names)
    a, bare = model.architecture, replace(model.recipe, keep=globs)
    own = with_kept(bare, (READERS[reader],), {"model_type": a.kind}, a.tensors, {})
    return [glob for glob in model.recipe.keep if glob not in own]


def _serve(found: Plan, folder: str) -> str:
    work = found.workload
    words = [f"halfweight serve {folder}"]
    words += [f"--max-context {work.context}", f"--max-sequences {work.batch}"]
    words += [f"--tensor-parallel {work.ranks}"] if work.ranks > 1 else []
    words += ["--kv-cache int8"] if work.kv_dtype == "int8" else []
    return " ".join(words)


def _vllm_serve(found: Plan, folder: str, gpu_bytes: int) -> str:
    work = found.workload
    words = [
        f"vllm serve {folder}",
        f"--tensor-parallel-size {work.ranks}",
        f"--max-model-len {work.context}",
        f"--max-num-seqs {work.batch}",
        f"--gpu-memory-utilization {gpu_share(found.budget, gpu_bytes)}",
    ]
    return " ".join([*words, *(["--kv-cache-dtype fp8"] if work.kv_dtype == "int8" else [])])
