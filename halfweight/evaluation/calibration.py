"""Rounding that makes up for its own errors, in the same format: `quantize --calibrate TEXT`.

Rounding to the nearest value is best for a weight alone, not for a row: the error of one weight can
be answered by the rounding of others whose inputs go up and down with its own. GPTQ does this: with
H = sum of x x^T over the inputs x of a linear, columns are rounded one by one and the error of
each is spread over the columns not yet rounded so that (w - w') H (w - w')^T grows least. Scales
are those already stored, so only packed bytes change, and the result is a function of source, text
and scales: done twice it is the same.

One pass of the text through the model sweeps its layers in order. A layer is brought to float32
when its turn comes, run to collect H of each linear, rounded, run again so that later layers see
the inputs they will really have, and dropped. So memory holds one layer, H of its linears, and
the states of TOKENS tokens. The output head is rounded last, from the final states; where it is
tied to the embedding the bytes serve both, which measures better than rounding for the embedding.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from halfweight.checkpoint.headers import StoredWeight, quantized_modules, read_headers
from halfweight.conversion.convert import Refinement
from halfweight.errors import UsageError
from halfweight.evaluation.comparison import load_model, tokenize
from halfweight.quantization.float_bytes import as_float32
from halfweight.quantization.numerics import OFFSET, QMAX

CONTEXT, NUM_WINDOWS = 1024, 16
DAMPING = 0.01
"""Added to the diagonal of H, as a share of its mean: keeps it invertible, and the fit honest."""
BLOCK_COLUMNS, BLOCK_ROWS = 64, 8192

Progress = Callable[[str, int, int], None]
"""Called with the module rounded, modules done, and modules in all."""


def calibration(source: Path, text: Path, progress: Progress | None = None) -> Refinement:
    """Error-compensating rounding for the quantized form of `source`, on a text.

    Raises UsageError if the text is shorter than one window, CheckpointError if it cannot be read.
    """
    tokens = tokenize(source, text)
    ids = tokens.windows(CONTEXT, NUM_WINDOWS)
    if not len(ids):
        raise UsageError(
            f"{text}: {len(tokens.ids)} tokens, calibration needs {CONTEXT}",
            hint="give a longer text",
        )
    digest = hashlib.sha256(ids.numpy().tobytes()).hexdigest()
    description = {"calibration": {"token_sha256": digest, "num_tokens": ids.numel()}}
    return Refinement(description, lambda folder: _apply(folder, source, ids, progress))


def _apply(folder: Path, source: Path, ids: Tensor, progress: Progress | None) -> dict[str, float]:
    stored = quantized_modules(read_headers(folder))
    model = load_model(source, "cpu", None)
    errors: dict[str, float] = {}

    def write(name: str, weight: Tensor, moment: Tensor) -> Tensor:
        rounded, packed = compensate(weight, moment, _scales(stored[name]))
        _write(stored[name], packed)
        errors[f"{name}.weight"] = float((rounded - weight).double().square().sum())
        if progress is not None:
            progress(name, len(errors), len(stored))
        return rounded

    names = {module: name for name, module in model.named_modules()}
    layers, embedding = _layers(model), model.get_input_embeddings()
    for child in model.base_model.children():
        if child not in (layers, embedding):
            child.float()
    for layer in layers:
        linears = {names[m]: m for m in layer.modules() if isinstance(m, nn.Linear)}
        known = {name: linear for name, linear in linears.items() if name in stored}
        layer.forward = partial(_sweep, layer, layer.forward, known, write)
    embedding.register_forward_hook(lambda _m, _x, states: states.float())
    with torch.inference_mode():
        states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        head = _head_name(model, names, stored)
        if head is not None:
            write(head, model.get_output_embeddings().weight.float(), _moment(states))
    return errors


def _layers(model: Any) -> nn.ModuleList:
    lists = [m for m in model.base_model.children() if isinstance(m, nn.ModuleList)]
    if not lists:
        raise UsageError(
            f"{type(model).__name__} has no list of layers to calibrate one by one",
            hint="quantize it without --calibrate",
        )
    return max(lists, key=len)


def _head_name(
    model: Any, names: dict[nn.Module, str], stored: dict[str, StoredWeight]
) -> str | None:
    """The stored name of the output head: its own, or the embedding's if they are one."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if names.get(head) in stored:
        return names[head]
    tied = head is not None and head.weight.data_ptr() == embedding.weight.data_ptr()
    return names[embedding] if tied and names[embedding] in stored else None


def _sweep(
    layer: nn.Module,
    forward: Callable[..., Any],
    linears: dict[str, nn.Linear],
    write: Callable[[str, Tensor, Tensor], Tensor],
    states: Tensor,
    *arguments: Any,
    **options: Any,
) -> Any:
    """A layer's forward that first rounds its linears to the inputs they get."""
    layer.float()
    moments: dict[str, Tensor] = {}

    def collect(name: str, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        moments[name] = moments.get(name, 0) + _moment(inputs[0])

    hooks = [m.register_forward_pre_hook(partial(collect, n)) for n, m in linears.items()]
    forward(states, *arguments, **options)
    for hook in hooks:
        hook.remove()
    for name, linear in linears.items():
        if name in moments:
            linear.weight = nn.Parameter(write(name, linear.weight, moments[name]), False)
    result = forward(states, *arguments, **options)
    layer.to("meta")
    return result


def _moment(inputs: Tensor) -> Tensor:
    """Sum of x x^T [K, K] over inputs [..., K]."""
    rows = inputs.reshape(-1, inputs.shape[-1]).float()
    return rows.T @ rows


def compensate(weight: Tensor, moment: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Round a weight [N, K] on the grid of scales [N, K/G] so that its outputs change least.

    `moment` [K, K] is the sum of x x^T over inputs. Returns the rounded weight, float32, and its
    packed bytes, uint8 (both [N, K]). Columns with the largest inputs are rounded first.
    """
    order = torch.argsort(moment.diagonal(), descending=True, stable=True)
    factor = _factor(moment[order][:, order].double())
    by_column = scales.repeat_interleave(weight.shape[1] // scales.shape[1], dim=1)
    rounded, packed = torch.empty_like(weight), torch.empty(weight.shape, dtype=torch.uint8)
    for begin in range(0, weight.shape[0], BLOCK_ROWS):
        rows = slice(begin, begin + BLOCK_ROWS)
        steps = by_column[rows][:, order]
        q = _round_columns(weight[rows][:, order].clone(), steps, factor)
        rounded[rows, order] = q * steps
        packed[rows, order] = (q + OFFSET).to(torch.uint8)
    return rounded, packed


def _factor(moment: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped H; the identity where H is zero."""
    damping = DAMPING * moment.diagonal().mean()
    damped = moment + torch.eye(len(moment), dtype=moment.dtype) * (damping or 1.0)
    factor: Tensor = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    return factor.float()


def _round_columns(weight: Tensor, steps: Tensor, factor: Tensor) -> Tensor:
    """q [R, K]; `weight` [R, K] is used up: what is left of it is what could not be answered."""
    q = torch.empty_like(weight)
    for begin in range(0, weight.shape[1], BLOCK_COLUMNS):
        end = min(begin + BLOCK_COLUMNS, weight.shape[1])
        errors = torch.empty(weight.shape[0], end - begin)
        for column in range(begin, end):
            step = steps[:, column]
            q[:, column] = (weight[:, column] / step).round().clamp(-QMAX, QMAX)
            error = (weight[:, column] - q[:, column] * step) / factor[column, column]
            weight[:, column:end] -= error.unsqueeze(1) * factor[column, column:end]
            errors[:, column - begin] = error
        weight[:, end:] -= errors @ factor[begin:end, end:]
    return q


def _scales(weight: StoredWeight) -> Tensor:
    """Scales float32 [N, K/G] of a stored weight."""
    tensor = weight.scale
    raw = np.fromfile(tensor.shard, np.uint8, tensor.info.num_bytes, offset=tensor.begin)
    return torch.from_numpy(as_float32(raw, tensor.info.dtype).reshape(tensor.info.shape).copy())


def _write(weight: StoredWeight, packed: Tensor) -> None:
    """Overwrite the packed bytes of a stored weight."""
    with open(weight.packed.shard, "r+b") as file:
        file.seek(weight.packed.begin)
        file.write(packed.contiguous().numpy().data)
        file.flush()
        os.fsync(file.fileno())
