"""Kernels on disk: taken from the cache, and compiled anew when their sources change."""

import ast
from pathlib import Path

import pytest
from numba import types
from numba.core import config

from halfweight.kernels.cpu import decode_products, threads


class Product(threads.CFunction):
    """A small one, so that it compiles in no time."""

    signature = types.int64(types.int64)


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """Whether a fresh process with these sources would find the kernel in the cache."""
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path))

    def find(digest):
        monkeypatch.setattr(threads, "sources_digest", lambda: digest)
        compiled = Product(decode_products.step_block.py_func).compiled
        assert compiled.ctypes(192) == 64
        return compiled.cache_hits == 1

    return find


def test_a_kernel_is_compiled_once_for_the_same_sources(cached):
    assert [cached(digest) for digest in "aabab"] == [False, True, False, True, True]


def test_every_module_that_kernels_are_made_of_counts():
    folder = Path(threads.__file__).parent
    made_of: set[str] = set()
    to_read = {"attention_products", "batch_step", "decode_products"}
    to_read |= {"prefill_products"}
    while to_read:
        name = to_read.pop()
        made_of.add(name)
        for node in ast.walk(ast.parse((folder / f"{name}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("halfweight."):
                to_read |= {node.module.rsplit(".", 1)[1]} - made_of
    assert made_of == set(threads.SOURCES)
