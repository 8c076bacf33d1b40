"""The numerics: what INT8 in groups is, what it stores, and the fast pass that makes it.

In: float weights [N, K] and a Recipe. Out: packed bytes, scales, and the error. Nothing here knows
of files, models or devices. First file: numerics.py, the definition that all else is tested
against; scheme.py says what is stored and how many bytes it takes, without torch.

May import: errors.
"""
