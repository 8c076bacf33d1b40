"""Compiles the decode step's kernels for GPUs that need not be there; run by test_gpu_step.py.

Prints as JSON, for each compute capability given (75, 90): kernel -> bytes of shared memory.
"""

import json
import sys

from triton import compile as compile_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from halfweight.kernels.triton import between_products

HEADS = {"HEADS": 32, "KV_HEADS": 8, "HEAD_SIZE": 128, "ROWS": 16, "BLOCK": 64, "SMALLEST": 6e-5}
CONSTANTS = {
    "add_norm": {"SIZE": 4096, "BLOCK": 4096, "HAS_DELTA": True},
    "gated_silu": {"SIZE": 14336, "BLOCK": 1024},
    "merge_splits": {"HEAD_SIZE": 128, "SPLITS": 66, "ROWS": 128},
    "rotate_into_cache": {
        **{name: HEADS[name] for name in ("HEADS", "KV_HEADS", "HEAD_SIZE")},
        **{"Q_ROWS": 32, "KV_ROWS": 8, "HAS_NORM": True},
    },
    "attend": {**HEADS, "SPLITS": 6, "HAS_NORM": True, "INT8": False},
    "attend int8": {**HEADS, "SPLITS": 1, "HAS_NORM": False, "INT8": True},
}
FLOAT32 = ("cos_table", "sin_table", "partials", "stats")
INT32 = ("slot_at", "starts")
NUMBERS = {
    "B": "i32",
    "T": "i32",
    "begin": "i32",
    "max_length": "i32",
    "scaling": "fp32",
    "epsilon": "fp32",
}


def type_of(name, constants):
    if name in constants:
        return "constexpr"
    if name in NUMBERS:
        return NUMBERS[name]
    if name in FLOAT32:
        return "*fp32"
    if name in INT32:
        return "*i32"
    return "*i8" if name in ("keys", "values") and constants.get("INT8") else "*fp16"


def shared_bytes(kernel, capability):
    function = getattr(between_products, kernel.split()[0])
    constants = {**CONSTANTS[kernel], "PDL": capability >= 90}
    absent = ("key_scales", "value_scales") if not constants.get("INT8") else ()
    absent += ("q_norm", "k_norm") if not constants.get("HAS_NORM") else ()
    constants |= dict.fromkeys(n for n in absent if n in function.arg_names)
    signature = {name: type_of(name, constants) for name in function.arg_names}
    values = {(function.arg_names.index(name),): value for name, value in constants.items()}
    options = {"num_warps": 8 if kernel == "add_norm" else 4, "num_stages": 2}
    source = ASTSource(fn=function, signature=signature, constexprs=values)
    compiled = compile_kernel(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert compiled.asm["cubin"]
    return compiled.metadata.shared


if __name__ == "__main__":
    found = {c: {k: shared_bytes(k, int(c)) for k in CONSTANTS} for c in sys.argv[1:]}
    print(json.dumps(found))
