"""What is registered with vLLM, through the hooks that it has for it.

- the linear kernel, before vLLM's own on CUDA and on a CPU (`--linear-backend` and
  VLLM_DISABLED_KERNELS choose among them as ever);
- the config of `compressed-tensors`, in place of vLLM's, of which it is a subclass;
- the two vocabulary layers;
- a factor of the key under which vLLM keeps compiled models. Without it a model that was compiled
  before the plug-in was there would be taken from the cache, with vLLM's products in it.
"""

from __future__ import annotations

from vllm.envs import environment_variables
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.kernels import linear
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.platforms import PlatformEnum

from halfweight import __version__
from halfweight.vllm.config import PackedTensorsConfig
from halfweight.vllm.kernel import HalfweightLinearKernel
from halfweight.vllm.layers import PackedParallelLMHead, PackedVocabParallelEmbedding

LAYERS = {
    VocabParallelEmbedding: PackedVocabParallelEmbedding,
    ParallelLMHead: PackedParallelLMHead,
}


def install() -> None:
    """Register everything, once."""
    for platform in (PlatformEnum.CUDA, PlatformEnum.CPU):
        kernels = linear._POSSIBLE_KERNELS[platform]
        if HalfweightLinearKernel not in kernels:
            kernels.insert(0, HalfweightLinearKernel)  # register_linear_kernel puts it last
    register_quantization_config("compressed-tensors")(PackedTensorsConfig)
    for layer, ours in LAYERS.items():
        if op_registry_oot.get(layer.__name__) is not ours:
            layer.register_oot(ours)
    environment_variables["HALFWEIGHT_VLLM"] = lambda: __version__
