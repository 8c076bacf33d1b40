"""Which other programs read a file of ours as it is, and what a file for them must keep.

The table is of programs without our plug-in, and says no more than was run or is checked against
the program's own code (docs/interop.md has the proofs):

- vLLM before 0.32 has no embedding in INT8, and later ones find that of some models only. An output
  head is read where its model hands vLLM's layer a quantization config and a name. A tied head is
  the embedding.
- SGLang warns of tensors it does not know and runs on with what is left: garbage. It has no
  embedding in INT8; an INT8 head was not run.
- transformers decompresses linears, heads included, and knows no other module.
- Marlin, vLLM's and SGLang's kernel on all cards but Hopper's, takes rows and columns in multiples
  (vLLM 0.32 pads them, 0.22 refuses), and groups up to 128.
- Experts were run in none of them.
"""

from __future__ import annotations

import fnmatch
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from halfweight.checkpoint.headers import Checkpoint, quantized_modules
from halfweight.checkpoint.shard import some
from halfweight.errors import UsageError
from halfweight.quantization.scheme import Decision, GroupSize, Recipe, Scheme, TensorInfo

EMBEDDINGS = ("*embed_tokens*", "*embeddings*", "*wte", "*wpe", "*embed_in", "*shared")
HEADS = ("lm_head", "*.lm_head", "embed_out")
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linears that vLLM and SGLang join: all of them in INT8, or none."""

VLLM_HEADS = {
    "apertus": "ApertusForCausalLM",
    "exaone4": "Exaone4ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "glm4": "Glm4ForCausalLM",
    "granite": "GraniteForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "stablelm": "StableLmForCausalLM",
}
"""model_type -> vLLM's class, where an untied head may be in INT8, from 0.22 to 0.32."""


@dataclass(frozen=True)
class Reader:
    """A program and what it reads in INT8; None: nothing is asked of that.

    `heads` are the model types whose untied head may be in INT8; a weight's rows and columns must
    be multiples of `rows` and `columns`.
    """

    name: str
    versions: str
    heads: frozenset[str] | None
    group_sizes: tuple[GroupSize, ...] | None
    scale_dtypes: tuple[str, ...] | None
    rows: int = 1
    columns: int = 1


READERS = {
    reader.name: reader
    for reader in (
        Reader(
            "vllm",
            "0.22 and later",
            frozenset(VLLM_HEADS),
            (32, 64, 128, "row"),
            ("BF16", "F16"),
            *(64, 128),
        ),
        Reader(
            "sglang",
            "0.5.23",
            frozenset(),
            (32, 64, 128, "row"),
            ("BF16", "F16"),
            *(64, 128),
        ),
        Reader("transformers", "5.17 and later, with compressed-tensors", None, None, None),
    )
}


@dataclass(frozen=True)
class PackedModule:
    """A weight in INT8: the module's name, its shape [N, K], groups and the scales' dtype."""

    name: str
    shape: tuple[int, int]
    group_size: GroupSize
    scale_dtype: str


def find_readers(names: Iterable[str]) -> tuple[Reader, ...]:
    """The readers called `names`. Raises UsageError for a name that is not known."""
    for name in names:
        if name not in READERS:
            raise UsageError(
                f"no reader is called {name!r}", hint=f"use one of {', '.join(READERS)}"
            )
    return tuple(READERS[name] for name in dict.fromkeys(names))


def check_scheme(readers: Iterable[Reader], scheme: Scheme) -> None:
    """Raise UsageError if a whole file in this scheme could be read by one of them nowhere."""
    for reader in readers:
        if reader.group_sizes is not None and scheme.group_size not in reader.group_sizes:
            raise UsageError(
                f"{reader.name} does not read groups of {scheme.group_size}",
                hint=f"--group-size {' or '.join(map(str, reader.group_sizes))}",
            )
        disk_dtype = scheme.format.disk_dtype
        if reader.scale_dtypes is not None and disk_dtype not in (None, *reader.scale_dtypes):
            raise UsageError(
                f"{reader.name} would round {scheme.scale_format} scales to 16 bits",
                hint="--scale grid8, bfloat16 or float16",
            )


def keep_for(
    readers: Sequence[Reader], config: Mapping[str, Any], decisions: Iterable[Decision]
) -> list[Decision]:
    """The decisions with all kept as it is that one of the readers does not read in INT8."""
    decisions = list(decisions)
    packed = [_of_decision(d) for d in decisions if d.scheme is not None]
    reasons: dict[str, str] = {}
    for reader in readers:
        for name, reason in unread(reader, config, packed).items():
            reasons.setdefault(f"{name}.weight", f"kept: {reader.name} reads {reason}")
    return [
        replace(d, scheme=None, reason=reasons[d.tensor.name]) if d.tensor.name in reasons else d
        for d in decisions
    ]


def cost_bytes(before: Iterable[Decision], after: Iterable[Decision]) -> int:
    """Bytes of data that a checkpoint has more of by what is kept."""
    return sum(d.disk_bytes for d in after) - sum(d.disk_bytes for d in before)


def unread(
    reader: Reader, config: Mapping[str, Any], packed: Iterable[PackedModule]
) -> dict[str, str]:
    """Module name -> why `reader` does not read it in INT8, as "reads no ..."."""
    packed = list(packed)
    found = {m.name: why for m in packed if (why := _obstacle(reader, config, m)) is not None}
    if reader.rows == reader.columns == 1:
        return found
    for names in _fused({module.name for module in packed}):
        why = next((found[name] for name in names if name in found), None)
        if why is not None:
            found |= dict.fromkeys(names - found.keys(), why)
    return found


def _obstacle(reader: Reader, config: Mapping[str, Any], module: PackedModule) -> str | None:
    if _matches(module.name, HEADS):
        if reader.heads is not None and _model_type(config) not in reader.heads:
            return f"no output head of {_model_type(config)} in INT8"
    elif _matches(module.name, EMBEDDINGS):
        return "no embedding in INT8"
    if ".experts." in module.name:
        return "no experts in INT8, as far as was run"
    if reader.group_sizes is not None and module.group_size not in reader.group_sizes:
        return f"no groups of {module.group_size}"
    if reader.scale_dtypes is not None and module.scale_dtype not in reader.scale_dtypes:
        return f"no {module.scale_dtype} scales without rounding them"
    rows, columns = module.shape
    if rows % reader.rows or columns % reader.columns:
        return f"no {rows} x {columns}, only multiples of {reader.rows} x {reader.columns}"
    return None


def problems(reader: Reader, checkpoint: Checkpoint) -> tuple[str, ...]:
    """One line for each reason why `reader` does not read a folder; none where it does."""
    modules = quantized_modules(checkpoint)
    packed = [
        PackedModule(name, w.shape, "row" if w.group_size == w.shape[1] else w.group_size, dtype)
        for name, w in modules.items()
        for dtype in (w.scale.info.dtype,)
    ]
    return tuple(_lines(reader, unread(reader, checkpoint.config, packed)))


def unread_of(
    reader: Reader, config: Mapping[str, Any], decisions: Iterable[Decision]
) -> tuple[str, ...]:
    """One line for each reason why `reader` does not read the file that these decisions make."""
    packed = [_of_decision(d) for d in decisions if d.scheme is not None]
    return tuple(_lines(reader, unread(reader, config, packed)))


def _lines(reader: Reader, reasons: Mapping[str, str]) -> Iterator[str]:
    by_reason: dict[str, list[str]] = defaultdict(list)
    for name, reason in reasons.items():
        by_reason[reason].append(name)
    for reason, names in by_reason.items():
        yield f"{some(names)}: {reader.name} reads {reason}"


def _of_decision(decision: Decision) -> PackedModule:
    assert decision.scheme is not None
    tensor: TensorInfo = decision.tensor
    name, (rows, columns) = tensor.name.removesuffix(".weight"), tensor.shape
    dtype = decision.scheme.format.disk_dtype or "BF16"
    return PackedModule(name, (rows, columns), decision.scheme.group_size, dtype)


def _fused(names: set[str]) -> Iterator[set[str]]:
    for name in sorted(names):
        parent, _, own = name.rpartition(".")
        for roles in FUSED:
            if own == roles[0]:
                yield {f"{parent}.{role}" for role in roles} & names


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _model_type(config: Mapping[str, Any]) -> str:
    return str(config.get("model_type", "an unnamed model"))


def with_kept(
    recipe: Recipe,
    readers: Sequence[Reader],
    config: Mapping[str, Any],
    tensors: Iterable[TensorInfo],
    kept: Mapping[str, str],
) -> dict[str, str]:
    """`kept` and what `readers` do not read of the file that `recipe` makes, with the reasons."""
    asked = [d for d in recipe.decide_all(tensors) if d.tensor.name not in kept]
    more = {
        after.tensor.name: after.reason
        for before, after in zip(asked, keep_for(readers, config, asked), strict=True)
        if before.scheme is not None and after.scheme is None
    }
    return {**kept, **more}
