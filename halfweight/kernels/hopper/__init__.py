"""CUDA C++ for Hopper. backend.py launches, tiles.py chooses; the .cu files multiply."""
