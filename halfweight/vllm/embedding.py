"""Embeddings in INT8, and output heads that share their bytes.

A tied model stores the embedding only. vLLM ties in one of two ways: `lm_head = embed_tokens`,
whose method then multiplies too, or `lm_head.tie_weights(embed_tokens)` (layers.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    GroupQuantScaleParameter,
    PackedvLLMParameter,
)

from halfweight.vllm import weights
from halfweight.vllm.kernel import hold_loaded

PACK_FACTOR = 4
"""Weights in one int32."""


class PackedEmbedding(QuantizeMethodBase):  # type: ignore[misc]
    """A table [vocabulary, K] in INT8: rows are gathered, and multiplied with as a tied head."""

    def __init__(self, group_size: int | None) -> None:
        """`group_size` weights of a row share a scale; None: all of a row."""
        self.group_size = group_size
        self.dtype = torch.bfloat16

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Room for this shard's rows; scales in float32, as `weights` says."""
        self.dtype = params_dtype
        num_rows, columns = sum(output_partition_sizes), input_size_per_partition
        groups = columns // self.group_size if self.group_size else 1
        loader = extra_weight_attrs["weight_loader"]
        packed = torch.empty(num_rows, columns // PACK_FACTOR, dtype=torch.int32)
        layer.register_parameter(
            weights.PACKED,
            PackedvLLMParameter(
                data=packed,
                input_dim=1,
                output_dim=0,
                packed_dim=1,
                packed_factor=PACK_FACTOR,
                weight_loader=loader,
            ),
        )
        layer.register_parameter(
            weights.SCALE,
            GroupQuantScaleParameter(
                data=torch.empty(num_rows, groups, dtype=torch.float32),
                input_dim=1,
                output_dim=0,
                weight_loader=loader,
            ),
        )
        record = torch.empty(2, dtype=torch.int64)
        layer.register_parameter(
            "weight_shape", BasevLLMParameter(data=record, weight_loader=loader)
        )

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Take the loaded weight."""
        hold_loaded(layer, layer.weight_packed, layer.weight_scale)

    def embedding(self, layer: nn.Module, input_: Tensor) -> Tensor:
        """Rows of the table, ids [...] -> [..., K]."""
        return weights.rows(layer, input_, self.dtype)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., K] -> logits [..., rows of this shard]."""
        return weights.product(layer, x, bias)


class TiedHead(QuantizeMethodBase):  # type: ignore[misc]
    """The method of an output head without a weight, which multiplies with an embedding's."""

    def __init__(self, embedding: nn.Module) -> None:
        self._embedding = embedding

    def create_weights(self, layer: nn.Module, *_: Any, **__: Any) -> None:
        """Nothing: the embedding has the weight."""

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., K] -> logits [..., rows of this shard]."""
        return weights.product(self._embedding, x, bias)
