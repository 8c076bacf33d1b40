"""vLLM's vocabulary layers, where they know too little to hold INT8.

vLLM lets a layer class be replaced by a subclass of another name's choice. An embedding that its
model built without a quantization config takes that of the engine; a head that is tied to an INT8
embedding multiplies with it.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)

from halfweight.vllm.config import PackedTensorsConfig
from halfweight.vllm.embedding import PackedEmbedding, TiedHead


class PackedVocabParallelEmbedding(VocabParallelEmbedding):  # type: ignore[misc]
    """An embedding that asks the engine for a quantization config its model did not give."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("quant_config") is None and len(args) <= 2:
            config = get_current_vllm_config_or_none()
            if config is not None and isinstance(config.quant_config, PackedTensorsConfig):
                kwargs["quant_config"] = config.quant_config
        super().__init__(*args, **kwargs)


class PackedParallelLMHead(ParallelLMHead):  # type: ignore[misc]
    """A head that can be tied to an INT8 embedding."""

    def tie_weights(self, embed_tokens: VocabParallelEmbedding) -> nn.Module:
        """Share the embedding's weight: its bytes if it is INT8, else as vLLM does."""
        if not isinstance(embed_tokens.quant_method, PackedEmbedding):
            tied: nn.Module = super().tie_weights(embed_tokens)
            return tied
        for name in list(self._parameters):
            if name != "bias":
                delattr(self, name)
        self.quant_method = TiedHead(embed_tokens)
        return self
