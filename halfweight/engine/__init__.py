"""Runs a model: token ids in, token ids out, for one request or many.

First file: decoder.py.

May import: errors, quantization, kernels, memory, model.
"""
