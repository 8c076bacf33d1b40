"""Compiles the kernels of a paged step for GPUs that need not be there: test_engine_gpu_inputs.py.

Prints as JSON, for each compute capability given: kernel -> bytes of [shared memory, stack].
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton import compile as compile_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from halfweight.kernels.triton import between_products, paged, pages, parts

SIZES = {"HEADS": 32, "KV_HEADS": 8, "HEAD_SIZE": 128, "PAGE": 64, "SMALLEST": 6e-5, "ASM": True}
DECODE = {"ROWS": 16, "IS_NEW": True, "IS_LONG": False, "num_warps": 4, "num_stages": 3}
DRAFTS = DECODE | {"ROWS": 32, "IS_NEW": False}
TILES = {"ROWS": 128, "IS_NEW": False, "IS_LONG": True, "num_warps": 8, "num_stages": 2}
KERNELS = {
    "attend_pages": DECODE | {"HAS_NORM": True},
    "attend_pages int8": DECODE | {"INT8": True},
    "attend_pages merged": DECODE | {"HAS_NORM": True, "MERGED": 8},
    "attend_pages merged int8": DECODE | {"INT8": True, "MERGED": 8},
    "attend_pages drafts": DRAFTS,
    "attend_pages drafts int8": DRAFTS | {"INT8": True},
    "attend_pages tiles": TILES,
    "rotate_into_pages": {"Q_ROWS": 32, "KV_ROWS": 8, "HAS_NORM": True},
    "rotate_into_pages int8": {"Q_ROWS": 32, "KV_ROWS": 8, "INT8": True},
    "merge_parts": {"ROWS": 16, "BLOCK": 32},
    "read_pages int8": {},
    "write_page_table": {"BLOCK": 256},
    "add_norm": {"SIZE": 4096, "BLOCK": 4096, "HAS_DELTA": True, "num_warps": 8},
    "gated_silu": {"SIZE": 14336, "BLOCK": 1024},
}
TYPES = {
    **dict.fromkeys(("B", "T", "N"), "i32"),
    **dict.fromkeys(("scaling", "epsilon"), "fp32"),
    **dict.fromkeys(("cos_table", "sin_table", "parts", "stats"), "*fp32"),
    **dict.fromkeys(("work", "page_table", "tables", "positions", "row_parts"), "*i32"),
    **dict.fromkeys(("sources", "updates", "arrived"), "*i32"),
}


def compiled(kernel, capability, dtype):
    name = kernel.split()[0]
    files = (between_products, pages, paged, parts)
    function = next(getattr(file, name) for file in files if hasattr(file, name))
    options = {"num_warps": 4, "num_stages": 2} | KERNELS[kernel]
    constants = {"INT8": False, "HAS_NORM": False, "MERGED": 0}
    constants |= {"PDL": capability >= 90} | SIZES | options
    absent = ["steps"] if "int8" not in kernel else []
    absent += ["q_norm", "k_norm"] if not constants["HAS_NORM"] else []
    constants = {n: constants.get(n) for n in function.arg_names if n in absent or n in constants}
    types = TYPES | dict.fromkeys(("keys", "values"), "*u8" if "int8" in kernel else f"*{dtype}")
    signature = {
        n: "constexpr" if n in constants else types.get(n, f"*{dtype}") for n in function.arg_names
    }
    places = {name: (i,) for i, name in enumerate(function.arg_names)}
    aligned = [["tt.divisibility", 16]]
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs={places[name]: value for name, value in constants.items()},
        attrs={places[n]: aligned for n, kind in signature.items() if kind.startswith("*")},
    )
    launch = {name: options[name] for name in ("num_warps", "num_stages")}
    return compile_kernel(source, target=GPUTarget("cuda", capability, 32), options=launch)


def stack_bytes(result, folder):
    """Bytes of a thread's stack frame: registers that found no place."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(result.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    shown = subprocess.run([tool, "-res-usage", cubin], check=True, capture_output=True, text=True)
    return int(re.search(r"STACK:(\d+)", shown.stdout + shown.stderr)[1])


if __name__ == "__main__":
    dtype, *capabilities = sys.argv[1:]
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for capability in capabilities:
            results = {kernel: compiled(kernel, int(capability), dtype) for kernel in KERNELS}
            found[capability] = {
                kernel: [result.metadata.shared, stack_bytes(result, Path(folder))]
                for kernel, result in results.items()
            }
    print(json.dumps(found))
