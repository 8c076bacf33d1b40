"""Numba kernels for CPUs. backend.py is the entry; few_tokens.py and many_tokens.py multiply."""
