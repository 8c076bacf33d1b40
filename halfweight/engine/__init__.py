"""Runs a model for one request or many.

In: token ids and how to choose the next. Out: new token ids. First file: decoder.py.

May import: errors, quantization, kernels, memory, model.
"""
