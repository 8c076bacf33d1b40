"""What a model needs of each device before anything is loaded. No torch here.

The arithmetic follows how the engine runs: weights, pages of KV cache for exactly the tokens asked
for (the last page of a sequence whole, and a page that is nobody's), and what a runner allocates
for its steps: tables, the largest step's activations, recorded steps, logits
(engine_memory.py, transient.py). Weights and cache are exact, the rest follows from the shapes.
What does not is "context etc.": the driver's context and loaded kernels, a range, ASSUMED_OVERHEAD,
until `halfweight measure` has replaced it by what it saw; and the slack of torch's allocator, which
grows with what comes and goes.

`low` takes the least overhead, `high` the most: a plan fits if `high` does, is tight if only
`likely` does.

Several GPUs run the models of tensor_parallel.py by the same engine, a rank each with sizes of its
own; others run through another engine, which holds scales as the file does: vLLM divides embedding
and head as well and needs no mask; transformers' tensor parallelism leaves both on every rank.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property

from halfweight.errors import UsageError
from halfweight.memory.architecture import Architecture
from halfweight.memory.cache_bytes import (
    kind_of_layer,
    layer_bytes,
    other_layer_bytes,
    page_slots,
)
from halfweight.memory.engine_memory import (
    STEP_TOKENS,
    Limits,
    RunnerKind,
    Sizes,
    cpu_parts,
    gpu_parts,
)
from halfweight.memory.tensor_parallel import (
    KINDS,
    bytes_a_part,
    is_divided,
    is_of_kv_heads,
    own_sizes,
    regrouping,
    why_not,
    without_groups,
)
from halfweight.memory.transient import (
    MULTIPROCESSORS,
    other_engine_parts,
    partial_sums_bytes,
    row_parts,
    workspace_bytes,
)
from halfweight.memory.workload import SLACK_DIVISOR, Range, Runtime, Verdict, Weights, Workload
from halfweight.quantization.scheme import Decision, Recipe


@dataclass(frozen=True)
class Part:
    """Bytes of one component on one rank: its share of what is divided, and what all ranks hold."""

    name: str
    sharded: int
    replicated: int

    @property
    def num_bytes(self) -> int:
        """All of it on one rank."""
        return self.sharded + self.replicated


OWN_STEP_KINDS = ("llama", "mistral", "qwen2", "qwen3")
LEAST_OWN_HEAD, CPU_LANES = 32, 16
"""model_type and head_dim (this or a higher power of two; on a CPU a multiple) of the models that
the engine runs by kernels of its own."""
WEIGHT_PARTS = ("int8 data", "scales", "16-bit weights")
PASSING_PARTS = (
    *("tables", "scratch pages", "step activations", "recorded steps", "logits"),
    "kernel workspace",
)
"""What a runner allocates for its steps."""


@dataclass(frozen=True)
class Footprint:
    """Bytes on one rank, component by component, at the worst moment of generation.

    `process` is what the process takes beside its tensors, `slack` what is likely to lie idle in
    torch's allocator.
    """

    weights: Weights
    parts: tuple[Part, ...]
    process: Range
    slack: int = 0

    def bytes_of(self, *names: str) -> int:
        """Bytes of the parts whose names start with one of `names`."""
        return sum(part.num_bytes for part in self.parts if part.name.startswith(names))

    @property
    def weight_bytes(self) -> int:
        """INT8 data, scales, and what stays in 16 bits."""
        return self.bytes_of(*WEIGHT_PARTS)

    @property
    def kv_bytes(self) -> int:
        """The cache, of all kinds of layers."""
        return self.bytes_of("KV cache")

    @property
    def allocated(self) -> int:
        """The most that tensors hold at once."""
        return sum(part.num_bytes for part in self.parts)

    @property
    def overhead(self) -> Range:
        """The rest, "context etc."; the least without slack."""
        process, slack = self.process, self.slack
        return Range(process.low, process.likely + slack, process.high + slack)

    @property
    def total(self) -> Range:
        """All that the process takes of the device."""
        base, o = self.allocated, self.overhead
        return Range(base + o.low, base + o.likely, base + o.high)

    def judge(self, budget: int) -> Verdict:
        """fits: even the high estimate; tight: only the likely one."""
        if self.total.high <= budget:
            return "fits"
        return "tight" if self.total.likely <= budget else "does not fit"


@dataclass(frozen=True)
class Model:
    """An architecture and what is done with each of its tensors; the recipe where one is chosen."""

    architecture: Architecture
    decisions: tuple[Decision, ...]
    recipe: Recipe | None = None

    @classmethod
    def from_recipe(cls, found: Architecture, recipe: Recipe | None = None) -> Model:
        """The model as `halfweight quantize` would write it."""
        recipe = recipe or Recipe()
        return cls(found, tuple(recipe.decide_all(found.tensors)), recipe)

    def for_ranks(self, ranks: int) -> Model:
        """The same as it would be written for so many ranks; one that is written as it is."""
        if self.recipe is None or self.recipe.tensor_parallel == ranks:
            return self
        return Model.from_recipe(self.architecture, replace(self.recipe, tensor_parallel=ranks))

    @cached_property
    def disk_bytes(self) -> int:
        """Bytes of tensor data in the INT8 checkpoint."""
        return sum(decision.disk_bytes for decision in self.decisions)

    @cached_property
    def resident_bytes(self) -> int:
        """Bytes of all parameters once halfweight has loaded the INT8 checkpoint."""
        return sum(decision.resident_bytes for decision in self.decisions)

    @cached_property
    def sixteen_bit_bytes(self) -> int:
        """Bytes of all parameters in 16 bits."""
        return 2 * self.architecture.num_parameters

    def runner(self, workload: Workload, weights: Weights) -> RunnerKind | None:
        """Which of the engine's runners takes the model; None where another engine runs it.

        Kernels of our own take Llama's layers, if all their linears are in INT8 (on a CPU embedding
        and head too).
        """
        if workload.runtime != "halfweight":
            return None
        a, on_gpu = self.architecture, workload.device == "cuda"
        kept = [d.tensor.name for d in self.decisions if d.scheme is None and _is_matrix(d)]
        if on_gpu:
            kept = [name for name in kept if ".layers." in name]
            heads = a.head_dim >= LEAST_OWN_HEAD and a.head_dim.bit_count() == 1
        else:
            heads = a.head_dim % CPU_LANES == 0
        windows = any(layer.window is not None for layer in a.cache_layers)
        own = weights == "int8" and a.kind in OWN_STEP_KINDS and heads and not (windows or kept)
        if not own:
            return "transformers"
        return "gpu" if on_gpu else "cpu"

    @cached_property
    def _sums(self) -> dict[tuple[Weights, Runtime], WeightSums]:
        return {}

    def weight_sums(self, weights: Weights, runtime: Runtime) -> WeightSums:
        """Bytes of all tensors by part: those that ranks divide, those that each holds, and, of the
        former, those that go with heads of keys and values.
        """
        key = (weights, runtime)
        if key not in self._sums:
            sharded, replicated, kv = [0, 0, 0], [0, 0, 0], [0, 0, 0]
            ours = weights == "int8" and runtime == "halfweight"
            for decision in self.decisions:
                name, parts = decision.tensor.name, _weight_parts(decision, weights, runtime)
                is_divided = _is_sharded(name, runtime)
                whole = (0, bytes_a_part(decision) if ours else 0, 0)
                for i, part in enumerate(parts):
                    sharded[i] += part - whole[i] if is_divided else 0
                    replicated[i] += whole[i] if is_divided else part
                    kv[i] += part if is_divided and is_of_kv_heads(name) else 0
            self._sums[key] = (sharded, replicated, kv)
        return self._sums[key]


WeightSums = tuple[list[int], list[int], list[int]]


def _is_matrix(decision: Decision) -> bool:
    return decision.tensor.name.endswith("weight") and len(decision.tensor.shape) > 1


@dataclass(frozen=True)
class Plan:
    """One workload on devices of `budget` bytes each (None: not known), with both footprints."""

    model: Model
    workload: Workload
    budget: int | None
    sixteen_bit: Footprint
    int8: Footprint

    @property
    def verdict(self) -> Verdict | None:
        """Whether the INT8 model fits; None without a budget."""
        return None if self.budget is None else self.int8.judge(self.budget)

    @property
    def sixteen_bit_verdict(self) -> Verdict | None:
        """Whether the 16-bit model fits; None without a budget."""
        return None if self.budget is None else self.sixteen_bit.judge(self.budget)


def plan(model: Model, workload: Workload, budget: int | None = None) -> Plan:
    """Footprints of both weights on one rank of `workload.ranks`, against `budget` bytes a GPU.

    Raises UsageError for a number of ranks that the model cannot be divided by.
    """
    check_ranks(model, workload.ranks)
    if on_ranks(model, workload, workload.ranks) != workload:
        raise UsageError(
            f"halfweight runs a {model.architecture.kind} on one GPU, found {workload.ranks}",
            hint="--runtime vllm runs the same checkpoint on several",
        )
    both = (footprint(model, workload, weights) for weights in ("16bit", "int8"))
    return Plan(model, workload, budget, *both)


def on_ranks(model: Model, workload: Workload, ranks: int) -> Workload:
    """The same on so many GPUs, by vLLM where halfweight runs the model on one alone."""
    shares = model.architecture.kind in KINDS
    if workload.runtime == "halfweight" and ranks > 1 and not shares:
        return replace(workload, ranks=ranks, runtime="vllm", overhead=None)
    return replace(workload, ranks=ranks)


def footprint(model: Model, workload: Workload, weights: Weights) -> Footprint:
    """Bytes on one rank, at the worst moment of generation."""
    sums = model.weight_sums(weights, workload.runtime)
    holders = min(workload.ranks, model.architecture.kv_heads)
    parts = [
        _part(name, divided, held, kv, workload.ranks, holders)
        for name, divided, held, kv in zip(WEIGHT_PARTS, *sums, strict=True)
    ]
    parts += kv_parts(model, workload, weights)
    passing = passing_parts(model, workload, weights)
    on_allocator = workload.device == "cuda" and workload.runtime == "halfweight"
    return Footprint(
        weights,
        tuple(part for part in (*parts, *passing) if part.num_bytes),
        workload.expected_overhead,
        sum(part.num_bytes for part in passing) // SLACK_DIVISOR if on_allocator else 0,
    )


def passing_parts(model: Model, workload: Workload, weights: Weights) -> list[Part]:
    """PASSING_PARTS of the runner, of the largest step that the workload can have."""
    a, runner = model.architecture, model.runner(workload, weights)
    if runner is not None and workload.ranks > 1:
        a = own_sizes(a, workload.ranks)
    if runner == "gpu":
        limits = Limits(
            *(workload.context, workload.batch, STEP_TOKENS["gpu"], workload.kv_dtype),
            MULTIPROCESSORS,
        )
        sizes = gpu_parts(sizes_of(a, workload.ranks), limits)
        sizes["recorded steps"] += partial_sums_bytes()
    elif runner == "cpu":
        sizes = cpu_parts(sizes_of(a), workload.batch, workload.context)
    elif runner == "transformers":
        sizes = row_parts(a, workload, weights)
    else:
        sizes = other_engine_parts(a, workload)
    if workload.device == "cuda":
        sizes["kernel workspace"] = workspace_bytes(workload, weights)
    return [Part(name, 0, sizes.get(name, 0)) for name in PASSING_PARTS]


def sizes_of(a: Architecture, ranks: int = 1) -> Sizes:
    """What the engine's arithmetic needs of an architecture, of several ranks of a rank's own."""
    return Sizes(
        len(a.cache_layers),
        *(a.hidden, a.intermediate, a.heads, a.kv_heads, a.head_dim, a.vocabulary),
        ranks=ranks,
    )


def _part(name: str, divided: int, held: int, kv: int, ranks: int, holders: int) -> Part:
    """`kv` of what is `divided` among ranks has fewer `holders` where these outnumber its heads."""
    if ranks == 1:
        return Part(name, 0, divided + held)
    return Part(name, -(-(divided - kv) // ranks) + -(-kv // holders), held)


def kv_parts(model: Model, workload: Workload, weights: Weights) -> list[Part]:
    """The cache on one rank, by kind of layer; int8 keeps a scale a head and token, vLLM's 8-bit
    cache none.

    The engine's pages hold every layer's tokens, whatever its window. Another engine's sliding
    layers hold a window and stay in 16 bits; where ranks outnumber heads, several hold a layer.
    States of a fixed size are counted whole on every rank.
    """
    a, runner = model.architecture, model.runner(workload, weights)
    states = workload.batch * sum(layer.state_bytes for layer in a.cache_layers)
    bare = (Part("KV cache", 0, 0), Part("KV cache, states", 0, states))
    found = {part.name: part for part in bare}
    for layer, count in Counter(a.cache_layers).items():
        heads = -(-layer.heads // workload.ranks)
        if runner is None:
            num_bytes = other_layer_bytes(layer, heads, workload)
        else:
            own = replace(layer, heads=heads, numbers=layer.numbers // layer.heads * heads)
            num_bytes = layer_bytes(own, workload, runner) * page_slots(workload, runner)
        name = "KV cache" + kind_of_layer(layer)
        before = found.get(name, Part(name, 0, 0))
        divided = workload.ranks > 1 and layer.heads > 1
        found[name] = Part(
            name,
            before.sharded + (count * num_bytes if divided else 0),
            before.replicated + (0 if divided else count * num_bytes),
        )
    return list(found.values())


def _weight_parts(decision: Decision, weights: Weights, runtime: Runtime) -> tuple[int, int, int]:
    """Data, scales, 16-bit rest of one tensor. Other engines hold scales as the file does."""
    tensor = decision.tensor
    if weights == "16bit":
        return 0, 0, 2 * tensor.num_elements
    if decision.scheme is None:
        return 0, 0, tensor.num_bytes
    shape = (tensor.shape[0], tensor.shape[1])
    scheme = decision.scheme
    found = (scheme.resident_bytes if runtime == "halfweight" else scheme.disk_bytes)(shape)
    return found.data, found.scales, 0


def _is_sharded(name: str, runtime: Runtime) -> bool:
    """Linears are divided over ranks, norms and routers never; embedding and head not by
    transformers.
    """
    if runtime == "halfweight":
        return is_divided(name)
    if any(word in name for word in ("embed_tokens", "lm_head")):
        return runtime == "vllm"
    return name.endswith((".weight", ".bias")) and "norm" not in name and ".gate.weight" not in name


def legal_ranks(model: Model, most: int = 64) -> list[int]:
    """Tensor-parallel sizes that divide heads, MLP, vocabulary, and rows into whole groups."""
    a, decisions = model.architecture, model.decisions
    return [ranks for ranks in range(1, most + 1) if why_not(a, decisions, ranks) is None]


def regrouped_ranks(model: Model, most: int = 64) -> list[int]:
    """Further sizes, for which `quantize --tensor-parallel` makes groups."""
    if model.recipe is None:
        return []
    rest = sorted(set(range(1, most + 1)) - set(legal_ranks(model, most)))
    divided = (ranks for ranks in rest if why_not(model.architecture, (), ranks) is None)
    return [ranks for ranks in divided if _why_not(model.for_ranks(ranks), ranks) is None]


def sizes_in_words(model: Model) -> str:
    """Both, for a reader."""
    legal, further = (", ".join(map(str, f(model))) for f in (legal_ranks, regrouped_ranks))
    return legal + (f"; in smaller groups (--tensor-parallel) also {further}" if further else "")


def check_ranks(model: Model, ranks: int) -> None:
    """Raise UsageError naming what `ranks` does not divide."""
    if why := _why_not(model, ranks):
        alone = model.for_ranks(1)
        hint = f"legal tensor-parallel sizes: {sizes_in_words(alone)}"
        hint += regrouping(model.architecture, alone.decisions, ranks)
        raise UsageError(f"{ranks} GPUs {why}", hint=hint)


def _why_not(model: Model, ranks: int) -> str | None:
    found = why_not(model.architecture, model.decisions, ranks)
    return found or without_groups(model.for_ranks(1).decisions, model.decisions, ranks)
