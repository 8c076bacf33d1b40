"""Numba kernels for CPUs. backend.py is the entry.

decode_products.py and prefill_products.py multiply; batch_step.py is a whole step of a model.
"""
