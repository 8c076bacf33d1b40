"""The quantized operations, their registration with torch, and the choice of a backend.

A backend is one file of this folder that defines `BACKEND`, and one entry in BACKENDS. It is
chosen when a model is loaded or moved to a device of another type (`choose_backend`), logged with
the reason, and then named in every call: nothing falls back inside a forward. `linear` has a
gradient to x and bias, one for all backends (gradient.py); the weight is frozen.

Shapes: x [..., K], packed uint8 [N, K] (q + 128), scales [N, K/G] (uint8 grid8 codes or a float
dtype), exponents int8 [N] for grid8 else None, bias [N], y [..., N] in x's dtype.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from halfweight.errors import UsageError
from halfweight.kernels.gradient import input_gradient

log = logging.getLogger("halfweight")

LinearFunction = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], Tensor]
EmbeddingFunction = Callable[[Tensor, Tensor, Tensor, Tensor | None, torch.dtype], Tensor]


@dataclass(frozen=True)
class TokenRange:
    """The kernel that products of `first` tokens and more take, up to the next range, and why."""

    first: int
    kernel: str
    reason: str


@dataclass(frozen=True)
class Backend:
    """One implementation of the quantized operations.

    `unavailable(device)` returns why this backend cannot run there, or None if it can.
    `linear_int8` is the opt-in product with activations rounded to int8, None where there is none.
    `is_invariant` where a row's product is the same to the bit whatever rows it comes with.
    `ranges(device)` says which kernel how many tokens take, for a weight of common size; empty
    where one kernel takes all.
    `prepare(device, group_size, dtype)` begins to compile what products with weights of such groups
    and activations of `dtype` may need, and returns at once.
    """

    name: str
    unavailable: Callable[[torch.device], str | None]
    linear: LinearFunction
    embedding: EmbeddingFunction
    linear_int8: LinearFunction | None = None
    is_invariant: bool = False
    ranges: Callable[[torch.device], Sequence[TokenRange]] = lambda device: ()
    prepare: Callable[[torch.device, int, torch.dtype], None] = lambda device, size, dtype: None


BACKENDS = {
    "cuda": "halfweight.kernels.hopper.backend",
    "sm80": "halfweight.kernels.cuda.backend",
    "triton": "halfweight.kernels.triton.backend",
    "triton-invariant": "halfweight.kernels.triton.invariant",
    "cpu": "halfweight.kernels.cpu.backend",
    "reference": "halfweight.kernels.reference",
}
"""Backend name -> module, fastest first: the order in which `choose_backend` asks them."""


@cache
def backend(name: str) -> Backend:
    """The backend called `name`. Raises UsageError for an unknown name."""
    if name not in BACKENDS:
        raise UsageError(f"backend {name!r} is not known", hint=f"use one of {', '.join(BACKENDS)}")
    found: Backend = importlib.import_module(BACKENDS[name]).BACKEND
    return found


def choose_backend(device: torch.device | str, name: str | None = None) -> str:
    """The name of the fastest backend that runs on `device`, or `name` after checking it can.

    Raises UsageError if the named backend cannot run there.
    """
    device = torch.device(device)
    if name is not None:
        reason = backend(name).unavailable(device)
        if reason is not None:
            raise _cannot_run(name, device, reason)
        return name
    skipped: list[str] = []
    for candidate in BACKENDS:
        reason = backend(candidate).unavailable(device)
        if reason is None:
            log.info("backend %s on %s%s", candidate, device, "".join(skipped))
            return candidate
        skipped.append(f"; not {candidate}: {reason}")
    raise UsageError(f"no backend runs on {device}{''.join(skipped)}")


@cache
def backend_on(device: torch.device, requested: str | None) -> str:
    """The backend of a model that was moved to `device`: the requested one where it runs there.

    Asked by every module of the model, answered and logged once.
    """
    if requested is not None and _unavailable(requested, device) is None:
        return requested
    return choose_backend(device)


def _check_devices(backend_name: str, x: Tensor, weight: Tensor) -> None:
    """Raise UsageError, before a kernel follows an address, if this call's tensors lie elsewhere.

    Part of every call, so what a backend says of a device is asked once.
    """
    device = weight.device
    if x.device != device:
        raise UsageError(
            f"the input lies on {x.device}, the weight on {device}",
            hint="bring both to one device: model.to(...), or input_ids.to(model.device)",
        )
    _check_runs(backend_name, device)


def _check_runs(backend_name: str, device: torch.device) -> None:
    reason = _unavailable(backend_name, device)
    if reason is not None:
        raise _cannot_run(backend_name, device, reason)


@cache
def _unavailable(backend_name: str, device: torch.device) -> str | None:
    """Why the backend cannot run there, or None; Triton's interpreter, never chosen, can."""
    if os.environ.get("TRITON_INTERPRET") == "1" and "triton" in backend_name:
        return None
    return backend(backend_name).unavailable(device)


def _cannot_run(name: str, device: torch.device, reason: str) -> UsageError:
    return UsageError(
        f"backend {name!r} cannot run on {device}: {reason}",
        hint="run `halfweight backends` to see which can",
    )


def linear_function(
    backend_name: str, device: torch.device, int8_activations: bool = False
) -> LinearFunction:
    """What `linear` calls there. A caller whose tensors all lie on `device` saves torch's layers.

    Raises UsageError if the backend cannot run there, or has no such product.
    """
    _check_runs(backend_name, device)
    chosen = backend(backend_name)
    function = chosen.linear_int8 if int8_activations else chosen.linear
    if function is None:
        raise UsageError(
            f"backend {backend_name!r} has no int8 activations",
            hint="load the model without activations='int8'",
        )
    return function


def embedding_function(backend_name: str, device: torch.device) -> EmbeddingFunction:
    """What `embedding` calls there, as `linear_function`."""
    _check_runs(backend_name, device)
    return backend(backend_name).embedding


@torch.library.custom_op("halfweight::linear", mutates_args=())
def linear(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    exponents: Tensor | None,
    bias: Tensor | None,
    backend_name: str,
    int8_activations: bool = False,
) -> Tensor:
    """y = x dequantize(packed, scales, exponents)^T + bias, float32 accumulation.

    With `int8_activations` each group of x is rounded to int8 first (opt-in, not exact).
    """
    _check_devices(backend_name, x, packed)
    function = linear_function(backend_name, packed.device, int8_activations)
    return function(x, packed, scales, exponents, bias)


@linear.register_fake
def _linear_fake(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    exponents: Tensor | None,
    bias: Tensor | None,
    backend_name: str,
    int8_activations: bool = False,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


@torch.library.custom_op("halfweight::linear_input_gradient", mutates_args=())
def linear_input_gradient(
    dy: Tensor, packed: Tensor, scales: Tensor, exponents: Tensor | None
) -> Tensor:
    """dx [..., K] = dy [..., N] dequantize(packed, scales, exponents), for every backend."""
    return input_gradient(dy, packed, scales, exponents)


@linear_input_gradient.register_fake
def _linear_input_gradient_fake(
    dy: Tensor, packed: Tensor, scales: Tensor, exponents: Tensor | None
) -> Tensor:
    return dy.new_empty((*dy.shape[:-1], packed.shape[1]))


def _keep_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, packed, scales, exponents, bias, *_ = inputs
    ctx.save_for_backward(packed, scales, exponents)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _linear_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """To x and to the bias. Of rounded activations the gradient is that of exact ones."""
    dx = dbias = None
    if ctx.needs_input_grad[0]:
        dx = torch.ops.halfweight.linear_input_gradient(dy, *ctx.saved_tensors)
    if ctx.needs_input_grad[4]:
        dbias = dy.reshape(-1, dy.shape[-1]).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return dx, None, None, None, dbias, None, None


linear.register_autograd(_linear_gradients, setup_context=_keep_weight)


@torch.library.custom_op("halfweight::embedding", mutates_args=())
def embedding(
    ids: Tensor,
    packed: Tensor,
    scales: Tensor,
    exponents: Tensor | None,
    dtype: torch.dtype,
    backend_name: str,
) -> Tensor:
    """Rows `ids` [...] of the dequantized table [N, K] as [..., K] in `dtype`."""
    _check_devices(backend_name, ids, packed)
    return backend(backend_name).embedding(ids, packed, scales, exponents, dtype)


@embedding.register_fake
def _embedding_fake(
    ids: Tensor,
    packed: Tensor,
    scales: Tensor,
    exponents: Tensor | None,
    dtype: torch.dtype,
    backend_name: str,
) -> Tensor:
    return packed.new_empty((*ids.shape, packed.shape[1]), dtype=dtype)
