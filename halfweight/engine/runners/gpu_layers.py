"""The layers of a Llama-like model on a GPU, but for attention, which the caller brings.

A layer is four products and what is between them (between_products.py): projections that share
their input are one product, whose weights lie one behind the other in memory (`stack`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from halfweight.kernels.triton.launch import launch
from halfweight.memory.engine_memory import power_of_two
from halfweight.model.llama_like import layer_linears
from halfweight.model.modules import QuantizedEmbedding, QuantizedLinear, stack
from halfweight.model.stage import leaves

COLUMNS = 1024
"""Of the gated activation, to a program."""


Product = Callable[[Tensor], Tensor]
"""A linear's: x [T, K] -> y [T, N]."""


@dataclass(frozen=True)
class Layer:
    """The parts of a layer as a step uses them; norms of heads where the model has them."""

    index: int
    input_norm: Tensor
    qkv: Product
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Product
    post_norm: Tensor
    gate_up: Product
    down: Product


Attend = Callable[[Layer, Tensor], Tensor]
"""Attention of a layer: qkv [T, (heads + 2 kv_heads) head_size] -> [T, heads head_size]."""


class Layers:
    """All layers of a model, its embedding and its head."""

    def __init__(
        self,
        model: PreTrainedModel,
        vendors: Callable[[Product], Product] = lambda product: product,
    ) -> None:
        """Stacks the projections: each weight that did not lie beside its neighbour is copied.

        `vendors` makes of the product of a head in 16 bits, which is the vendor's, what is called.
        """
        body = model.model
        with torch.inference_mode(False):
            self._layers = [_layer(i, layer) for i, layer in enumerate(body.layers)]
        self._embedding = _direct(model.get_input_embeddings())
        head = model.get_output_embeddings()
        product = _direct(head)
        self._head = product if isinstance(head, QuantizedLinear) else vendors(product)
        self.leaves = leaves(model)
        """Whether states go on to another stage, in place of logits."""
        self._final_norm: Tensor = body.norm.weight.detach()
        self.epsilon = float(body.norm.variance_epsilon)

    def hidden(self, ids: Tensor, attend: Attend) -> tuple[Tensor, Tensor]:
        """Hidden states [T, H] of token ids [T] before the last sum: the two that are added."""
        hidden = self._embedding(ids).view(len(ids), -1)
        delta = None
        for layer in self._layers:
            normed = self._norm(hidden, delta, layer.input_norm)
            delta = layer.o(attend(layer, layer.qkv(normed)))
            normed = self._norm(hidden, delta, layer.post_norm)
            delta = layer.down(_gated(layer.gate_up(normed)))
        assert delta is not None
        return hidden, delta

    def logits(self, hidden: Tensor, delta: Tensor) -> Tensor:
        """Logits [rows, V] in the model's dtype of what `hidden` gives; adds in place.

        Of a stage whose states leave it these, [rows, H].
        """
        if self.leaves:
            return hidden + delta
        return self._head(self._norm(hidden, delta, self._final_norm))

    def _norm(self, hidden: Tensor, delta: Tensor | None, weight: Tensor) -> Tensor:
        """The norm of hidden + delta, which becomes hidden."""
        tokens, size = hidden.shape
        out = torch.empty_like(hidden)
        launch(
            "add_norm",
            (tokens, 1),
            tokens,
            (hidden, delta, weight, out, self.epsilon),
            SIZE=size,
            BLOCK=power_of_two(size),
            HAS_DELTA=delta is not None,
            num_warps=8,
        )
        return out


def _layer(index: int, layer: Any) -> Layer:
    q, k, v, o, gate, up, down = layer_linears(layer)
    attention = layer.self_attn
    return Layer(
        index,
        layer.input_layernorm.weight.detach(),
        stack([q, k, v]).direct(),
        *(attention.q_norm.weight.detach() if hasattr(attention, "q_norm") else None,),
        *(attention.k_norm.weight.detach() if hasattr(attention, "k_norm") else None,),
        o.direct(),
        layer.post_attention_layernorm.weight.detach(),
        stack([gate, up]).direct(),
        down.direct(),
    )


def _direct(module: nn.Module) -> Product:
    """What an embedding or a head computes; one kept in 16 bits is called as it is."""
    if isinstance(module, (QuantizedEmbedding, QuantizedLinear)):
        return module.direct()
    return module


def _gated(gate_up: Tensor) -> Tensor:
    """silu(gate) up of [T, 2 I]."""
    tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(tokens, size)
    grid = (-(-size // COLUMNS), tokens)
    launch("gated_silu", grid, tokens, (gate_up, out), SIZE=size, BLOCK=COLUMNS)
    return out
