"""Triton kernels for any GPU that Triton runs on. backend.py is the entry, launch.py launches."""
