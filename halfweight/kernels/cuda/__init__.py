"""CUDA C++ for NVIDIA GPUs from compute capability 8.0 on, and what Hopper shares with it."""
