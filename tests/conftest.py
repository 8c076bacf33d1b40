"""Where there is no GPU, Triton kernels run by their interpreter; set before triton's import."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

pytest_plugins = ["model_folders"]


def pytest_addoption(parser):
    parser.addoption("--soak", type=int, default=300, help="requests of tests/serve/test_soak.py")
