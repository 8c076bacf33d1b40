"""A transformers model whose weights are INT8: built, loaded, and handed to a device.

In: a folder that `quantize` wrote, or any transformers model. Out: a PreTrainedModel whose linears,
embedding and head are ours. First file: loading.py (`load`), then modules.py. loadability.py asks
transformers, without memory, whether a checkpoint fits its model: conversion decides by it.

May import: errors, quantization, checkpoint, kernels, memory.
"""
