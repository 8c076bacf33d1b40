"""Which modules of a model can hold a weight in INT8, and putting it there.

A module takes our stand-in where it computes what ours computes and nobody else looks at its
weight: a Linear, an Embedding (also one that scales its rows), GPT-2's Conv1D, or transformers'
gated experts. All else keeps its 16 bits, with the reason in words. Conversion asks before it
writes and loading asks before it places, of the same code here.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from halfweight.errors import UsageError
from halfweight.model.experts import QuantizedExperts, is_fused
from halfweight.model.modules import PARTS, QuantizedEmbedding, QuantizedLinear, QuantizedWeight
from halfweight.model.packed_weight import Matrix, PackedWeight, Refused, gather
from halfweight.model.weights_read import weights_read
from halfweight.quantization.numerics import QuantizedTensor

DTYPE_HOLDER = "dtype_holder"
"""A parameter without elements, for `model.dtype`; never saved."""


@dataclass(frozen=True)
class Options:
    """What all stand-ins of a model share."""

    backend_name: str
    int8_activations: bool = False


class NoStandIn(Exception):
    """A module that cannot hold a weight in INT8; says why."""


def place(
    model: PreTrainedModel,
    weights: Callable[[], Mapping[str, QuantizedTensor]],
    options: Options,
) -> Refused:
    """Replace every module that holds a PackedWeight by one that holds `weights()`.

    Returns what cannot be placed, by the file's names; then the model is left as it is.
    """
    if refused := unplaceable(model):
        return refused
    arrived = weights()
    held: dict[Matrix, QuantizedWeight] = {}
    tied = {**model.all_tied_weights_keys}
    for name, module, packed in list(_holders(model)):
        if is_fused(module):
            model.set_submodule(name, QuantizedExperts.holding(module, arrived, vars(options)))
            continue
        (matrix,), dtype = packed["weight"].matrices, packed["weight"].dtype
        replacement = stand_in(module, options, dtype)
        twin = held.setdefault(matrix, replacement)
        replacement.hold(gather(arrived, matrix) if twin is replacement else twin.quantized)
        if isinstance(twin, QuantizedEmbedding) and isinstance(replacement, QuantizedLinear):
            replacement.int8_activations = False  # a tied head is exact, as its table is
        model.set_submodule(name, replacement)
    _tie_parts(model, tied)
    _keep_a_dtype(model)
    if any(isinstance(table, QuantizedWeight) for table in _tables(model)):
        model.resize_token_embeddings = partial(refuse_resizing, _tables(model)[0])
    return {}


def _keep_a_dtype(model: PreTrainedModel) -> None:
    """A model whose every weight is in INT8 still says in which dtype it computes."""
    if not any(parameter.is_floating_point() for parameter in model.parameters()):
        dtype = next(m.dtype for m in model.modules() if isinstance(m, QuantizedWeight))
        empty = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
        model.register_parameter(DTYPE_HOLDER, empty)


def _tables(model: PreTrainedModel) -> tuple[nn.Module | None, nn.Module | None]:
    """The embedding and the head, as far as the model says which they are."""
    try:
        return model.get_input_embeddings(), model.get_output_embeddings()
    except NotImplementedError:
        return None, None


def refuse_resizing(
    table: nn.Module | None,
    new_num_tokens: int | None = None,
    pad_to_multiple_of: int | None = None,
    **_: object,
) -> nn.Module | None:
    """In place of a model's `resize_token_embeddings`; transformers would resize one of the two.

    A size that the embedding has is no change, and gives the embedding.
    """
    num_rows = getattr(table, "num_embeddings", None)
    wanted, multiple = new_num_tokens or num_rows, pad_to_multiple_of or 1
    if wanted is None or -(-wanted // multiple) * multiple == num_rows:
        return table
    raise UsageError(
        "embedding or head are in INT8, and rows of INT8 are neither added nor dropped",
        hint="quantize with --keep '*embed*' --keep 'lm_head*': in 16 bits both can be resized",
    )


def unplaceable(model: nn.Module) -> Refused:
    """The packed weights of `model` that no stand-in can hold, with the reason for each."""
    refused: Refused = {}
    read = weights_read(model)
    for name, module, packed in _holders(model):
        try:
            _check_parameters(name, module, packed)
            if not is_fused(module):
                check_module(name, module, read)
        except NoStandIn as reason:
            refused |= {n: str(reason) for weight in packed.values() for n in weight.names}
    return refused


def packed_names(model: nn.Module) -> set[str]:
    """The file's names of all weights in INT8 that are somewhere in `model`."""
    weights = (weight for *_, packed in _holders(model) for weight in packed.values())
    return {name for weight in weights for name in weight.names}


def _holders(model: nn.Module) -> Iterator[tuple[str, nn.Module, dict[str, PackedWeight]]]:
    """Name, module and its packed weights, of every module that has any."""
    for name, module in list(model.named_modules()):
        parameters = module._parameters.items()
        packed = {own: p for own, p in parameters if isinstance(p, PackedWeight)}
        if packed:
            yield name, module, packed


def misshapen(model: nn.Module) -> set[str]:
    """Parameters of `model` that a packed weight of another shape has taken the place of.

    transformers 5.17 does not compare shapes where a quantizer is at work.
    """
    return {
        f"{name}.weight"
        for name, module, packed in _holders(model)
        if "weight" in packed
        and isinstance(module, nn.Linear | nn.Embedding | Conv1D)
        and tuple(packed["weight"].shape) not in (_shape(module), _shape(module)[::-1])
    }


def _shape(module: nn.Module) -> tuple[int, int]:
    """[N, K] of a Linear, Embedding or Conv1D."""
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    if isinstance(module, Conv1D):
        return module.nf, module.nx
    assert isinstance(module, nn.Linear)
    return module.out_features, module.in_features


def _check_parameters(name: str, module: nn.Module, packed: Mapping[str, PackedWeight]) -> None:
    """Raise NoStandIn unless what is packed is the weight of one module, or all its experts."""
    kind = type(module).__name__
    if is_fused(module):
        if len(packed) != len(dict(module.named_parameters(recurse=False))):
            raise NoStandIn(f"not all weights of {name} are")
    elif set(packed) != {"weight"}:
        raise NoStandIn(f"{name} is a {kind}, no Linear and no Embedding")
    elif isinstance(module, Conv1D) != packed["weight"].turned:
        raise NoStandIn(f"{name} is a {kind} of another orientation")


def check_module(name: str, module: nn.Module, read: Mapping[int, str]) -> None:
    """Raise NoStandIn unless ours computes what `module` computes and `read` does not hold it."""
    if id(module) in read:
        raise NoStandIn(f"{read[id(module)]} computes with the weight of {name} itself")
    kind = type(module)
    if isinstance(module, nn.Linear | Conv1D):
        plain = nn.Linear if isinstance(module, nn.Linear) else Conv1D
        if kind.forward is plain.forward or (plain is nn.Linear and _same_on_a_trial(module)):
            return
    elif isinstance(module, nn.Embedding):
        if module.max_norm is None and _is_scaled_lookup(module):
            return
    else:
        raise NoStandIn(f"{name} is a {kind.__name__}, no Linear and no Embedding")
    raise NoStandIn(f"{name} is a {kind.__name__}, which computes something of its own")


def stand_in(module: nn.Module, options: Options, dtype: torch.dtype) -> QuantizedWeight:
    """A quantized module without a weight in place of a Linear, Conv1D or Embedding."""
    shape, backend = _shape(module), options.backend_name
    if isinstance(module, nn.Embedding):
        return QuantizedEmbedding(shape, backend, dtype, _embed_scale(module, dtype))
    assert isinstance(module, nn.Linear | Conv1D)
    return QuantizedLinear(shape, backend, module.bias, options.int8_activations, dtype)


def _embed_scale(module: nn.Embedding, dtype: torch.dtype) -> float | None:
    """What the module multiplies rows by, as it rounds it: a buffer is in the model's dtype."""
    if type(module).forward is nn.Embedding.forward:
        return None
    scale = _scale_of(module)
    if isinstance(getattr(module, "embed_scale", None), torch.Tensor):
        return float(torch.tensor(scale, dtype=dtype, device="cpu"))
    return scale


def _scale_of(module: nn.Embedding) -> float:
    scale = getattr(module, "scalar_embed_scale", getattr(module, "embed_scale", 1.0))
    return float(scale)


def _is_scaled_lookup(module: nn.Embedding) -> bool:
    """Whether the module gives its rows times `embed_scale`: tried on three rows."""
    forward = type(module).forward
    if forward is nn.Embedding.forward:
        return True
    if len(inspect.signature(forward).parameters) != 2:
        return False
    trial = copy.copy(module)
    rows = torch.linspace(-1, 1, 3 * module.embedding_dim, device="cpu").view(3, -1)
    trial._parameters = {"weight": nn.Parameter(rows)}
    trial.padding_idx = None
    try:
        scale = _scale_of(module)
        trial._buffers = {name: torch.tensor(scale, device="cpu") for name in module._buffers}
        found = trial(torch.arange(3, device="cpu"))
    except Exception:
        return False
    return found.shape == rows.shape and bool(torch.allclose(found, rows * scale))


def _same_on_a_trial(module: nn.Module) -> bool:
    """Whether a module of a class of its own gives x W^T + b: tried on three rows of W."""
    trial = copy.copy(module)
    weight = torch.linspace(-1, 1, 15, device="cpu").view(3, 5)
    trial._parameters = {"weight": nn.Parameter(weight), "bias": None}
    if module.bias is not None:
        trial._parameters["bias"] = nn.Parameter(torch.linspace(1, 2, 3, device="cpu"))
    x = torch.linspace(-2, 3, 10, device="cpu").view(2, 5)
    try:
        found = trial(x)
    except Exception:
        return False
    expected = nn.functional.linear(x, weight, trial._parameters["bias"])
    return isinstance(found, torch.Tensor) and bool(torch.allclose(found, expected))


def _tie_parts(model: PreTrainedModel, tied: Mapping[str, str]) -> None:
    """Ties of weights become ties of what our modules hold in their place.

    `tie_weights()` works them out again, from the `_tied_weights_keys` of every model in the model.
    """
    model.all_tied_weights_keys = ties = dict(_ties_of_parts(model, tied))
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and module._tied_weights_keys:
            prefix = f"{name}." if name else ""
            module._tied_weights_keys = {
                target.removeprefix(prefix): source.removeprefix(prefix)
                for target, source in ties.items()
                if target.startswith(prefix) and source.startswith(prefix)
            }


def _ties_of_parts(model: PreTrainedModel, tied: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Ties of weights as ties of what our modules hold in their place."""
    for target, source in tied.items():
        owners = [name.removesuffix(".weight") for name in (target, source)]
        packed = [isinstance(_module_or_none(model, o), QuantizedWeight) for o in owners]
        if not any(packed):
            yield target, source
        elif all(packed):
            source_module = model.get_submodule(owners[1])
            held = [part for part in PARTS if getattr(source_module, part) is not None]
            yield from ((f"{owners[0]}.{part}", f"{owners[1]}.{part}") for part in held)


def _module_or_none(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None
