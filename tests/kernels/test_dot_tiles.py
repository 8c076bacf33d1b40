"""The tiles where there is no AVX-512: code for other CPUs, and the same products on AVX2."""

import os
import subprocess
import sys
from pathlib import Path

import llvmlite.binding as llvm
import numba
import pytest
from numba import types

from halfweight.kernels.cpu.dot_tiles import float_tile

TESTS = Path(__file__).parent


def assembly(tile, num_arguments, triple, cpu):
    """A tile's code for another CPU, from the LLVM that Numba makes of it here."""
    names = ", ".join(f"a{i}" for i in range(num_arguments))
    scope = {"tile": tile}
    exec(f"def call({names}):\n    tile({names})", scope)
    compiled = numba.cfunc(types.void(*[types.int64] * num_arguments))(scope["call"])
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    module = llvm.parse_assembly(compiled.inspect_llvm())
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, opt=3)
    module.triple, module.data_layout = triple, str(machine.target_data)
    return machine.emit_assembly(module)


@pytest.mark.parametrize(
    ("triple", "cpu", "multiply_add", "wanted", "unwanted"),
    [
        ("x86_64-unknown-linux-gnu", "haswell", "vfmadd", "%ymm", "%zmm"),
        ("x86_64-unknown-linux-gnu", "skylake-avx512", "vfmadd", "%zmm", "fmaf"),
        ("aarch64-unknown-linux-gnu", "neoverse-n1", "fmla", ".4s", "fmaf"),
    ],
)
@pytest.mark.parametrize("tokens", [1, 4])
def test_the_float_tile_becomes_vectors_of_each_cpu(
    tokens, triple, cpu, multiply_add, wanted, unwanted
):
    try:
        llvm.initialize_all_targets()
        llvm.Target.from_triple(triple)
    except RuntimeError:
        pytest.skip(f"this llvmlite does not write code for {triple}")
    code = assembly(float_tile(tokens), 8, triple, cpu)
    products = [line for line in code.splitlines() if multiply_add in line]
    assert len(products) >= 4 * tokens
    assert any(wanted in line for line in products)
    assert unwanted not in code


def test_products_are_right_on_avx2():
    """The backend's own tests on a CPU without AVX-512 and VNNI, in a process of its own."""
    if "avx2" not in llvm.get_host_cpu_features() or not llvm.get_host_cpu_features()["avx2"]:
        pytest.skip("needs a CPU with AVX2")
    environment = os.environ | {
        "NUMBA_CPU_NAME": "haswell",
        "NUMBA_CPU_FEATURES": "+avx,+avx2,+fma,+f16c",
    }
    wanted = "(test_odd_shapes and 896) or (test_scale_formats and (32 or 128))"
    command = [sys.executable, "-m", "pytest", "-q", str(TESTS / "test_kernels_cpu.py")]
    command += ["-k", wanted, "-p", "no:cacheprovider"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
