"""The quantized products, one folder for each family of devices, behind one registered operation.

In: x [M, K], packed weights, scales. Out: y [M, N]. A backend is one file and one entry of
BACKENDS, chosen once when a model is loaded; reference.py is slow and right, what all others equal.
First file: operations.py.

    hopper/  CUDA C++ compiled at run time, wgmma    triton/  portable to CUDA 7.5 and up
    cpu/     Numba, with VNNI and AMX where there    reference.py  plain torch

May import: errors, cache_folder, quantization.
"""
