"""The commands that run what a plan is about. No torch here."""

from __future__ import annotations

from halfweight.memory.plan import Model, Plan


def commands(name: str, found: Plan) -> list[str]:
    """From the model's name as it was given to a server; OUT is a folder to make.

    A model that is planned by a recipe is not quantized yet. Empty for transformers' own tensor
    parallelism, which no command of ours starts.
    """
    work = found.workload
    if work.runtime == "transformers-tp":
        return []
    if work.runtime == "vllm":
        serve = f"vllm serve OUT --max-model-len {work.context} --max-num-seqs {work.batch}"
        options = f" --tensor-parallel-size {work.ranks}" if work.ranks > 1 else ""
        kept = f"--keep '*embed*' --keep 'lm_head*'{ranks_option(found.model)}"
        made = [f"halfweight quantize {name} OUT {kept}"]
        return [*made, serve + options] if found.model.recipe else [serve.replace("OUT", name)]
    is_made = found.model.recipe is None
    serve = f"halfweight serve {name if is_made else 'OUT'}"
    options = f" --max-context {work.context} --max-sequences {work.batch}"
    options += f" --tensor-parallel {work.ranks}" if work.ranks > 1 else ""
    options += " --kv-cache int8" if work.kv_dtype == "int8" else ""
    quantize = f"halfweight quantize {name} OUT{ranks_option(found.model)}"
    return [*([] if is_made else [quantize]), serve + options]


def ranks_option(model: Model) -> str:
    """What `quantize` is to be told of ranks, where that makes another file."""
    if model.recipe is None or model.decisions == model.for_ranks(1).decisions:
        return ""
    return f" --tensor-parallel {model.recipe.tensor_parallel}"
