"""vLLM's reading of compressed-tensors, with INT8 embeddings and scales of any float dtype.

vLLM matches layers with the targets of `config.json` by name. Many of its models build their
embedding without one; the names below are then tried.
"""

from __future__ import annotations

from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationType
from torch import Tensor, nn
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
    CompressedTensorsScheme,
    CompressedTensorsWNA16,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)

from halfweight.vllm.embedding import PackedEmbedding
from halfweight.vllm.kernel import HalfweightLinearKernel

EMBEDDING_NAMES = tuple(
    f"{parent}.{name}"
    for parent, name in (
        ("model", "embed_tokens"),
        ("transformer", "wte"),
        ("transformer", "word_embeddings"),
        ("model", "tok_embeddings"),
        ("gpt_neox", "embed_in"),
        ("backbone", "embeddings"),
        ("model.decoder", "embed_tokens"),
    )
)
"""What transformers calls the embedding where vLLM's model does not say."""


class PackedTensorsConfig(CompressedTensorsConfig):  # type: ignore[misc]
    """compressed-tensors where embeddings may be INT8 too."""

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """How `layer` holds its weight: vLLM's answer, but for INT8 embeddings and linears."""
        if isinstance(layer, VocabParallelEmbedding) and not isinstance(layer, ParallelLMHead):
            embedding = self._packed_embedding(layer, prefix)
            if embedding is not None:
                return embedding
        method = super().get_quant_method(layer, prefix)
        if isinstance(getattr(layer, "scheme", None), CompressedTensorsWNA16):
            layer.scheme = ExactScales(layer.scheme)
        return method

    def _packed_embedding(self, layer: nn.Module, prefix: str) -> PackedEmbedding | None:
        for name in (prefix,) if prefix else EMBEDDING_NAMES:
            found = self.get_scheme_dict(layer, name)
            args = found.get("weights") if found else None
            if args is not None and _is_symmetric_int8(args):
                return PackedEmbedding(args.group_size)
        return None


def _is_symmetric_int8(args: QuantizationArgs) -> bool:
    return bool(
        args.num_bits == 8
        and args.type == QuantizationType.INT
        and args.symmetric
        and not args.dynamic
        and args.strategy in ("group", "channel")
    )


class ExactScales(CompressedTensorsScheme):  # type: ignore[misc]
    """vLLM's scheme, whose scales are loaded as float32 where our kernel is to take them.

    vLLM itself loads them in the model's dtype, which rounds those of a float32 or float16 file.
    """

    def __init__(self, scheme: CompressedTensorsWNA16) -> None:
        self._scheme = scheme

    @classmethod
    def get_min_capability(cls) -> int:
        """As vLLM's."""
        return int(CompressedTensorsWNA16.get_min_capability())

    def create_weights(self, layer: nn.Module, **kwargs: Any) -> None:
        """vLLM's parameters, the scales in float32 for our kernel."""
        self._scheme.create_weights(layer=layer, **kwargs)
        if isinstance(self._scheme.kernel, HalfweightLinearKernel):
            layer.weight_scale.data = layer.weight_scale.data.to(torch.float32)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """What the chosen kernel makes of them."""
        self._scheme.process_weights_after_loading(layer)

    def apply_weights(self, layer: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
        """The chosen kernel's product."""
        y: Tensor = self._scheme.apply_weights(layer, x, bias)
        return y
