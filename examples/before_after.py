"""A matrix-vector product with 16-bit weights and its INT8 sibling, as plainly as Triton allows.

    python examples/before_after.py

Both read one row of the weight a program. The second reads half the bytes: that is the whole gain,
and on any GPU the product of one token with a large weight takes the time of reading the weight.
halfweight's own kernels (halfweight/kernels/triton/tiled.py) do the same with more of the weight
on its way at a time.
"""

import torch
import triton
import triton.language as tl

from halfweight.quantization import numerics
from halfweight.quantization.scheme import Scheme


@triton.jit
def before(x, weight, y, K, BLOCK: tl.constexpr):
    """y[n] = sum over k of x[k] weight[n, k]: two bytes read for each weight."""
    row = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        w = tl.load(weight + row * K + k, mask=k < K, other=0).to(tl.float32)
        total += tl.load(x + k, mask=k < K, other=0).to(tl.float32) * w
    tl.store(y + row, tl.sum(total))


@triton.jit
def after(x, packed, codes, exponents, y, K, GROUP, BLOCK: tl.constexpr):
    """The same from INT8: one byte for each weight, one for each group, one for each row."""
    row = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        q = tl.load(packed + row * K + k, mask=k < K, other=128).to(tl.float32) - 128
        code = tl.load(codes + row * (K // GROUP) + k // GROUP, mask=k < K, other=0)
        w = q * code.to(tl.float32)
        total += tl.load(x + k, mask=k < K, other=0).to(tl.float32) * w
    scale = tl.exp2(tl.load(exponents + row).to(tl.float32))
    tl.store(y + row, tl.sum(total) * scale)


def products(x, weight, scheme=Scheme()):  # noqa: B008
    """(y of the 16-bit weight, y of its INT8 form, the bytes each weight takes)."""
    int8 = numerics.quantize(weight, scheme)
    out_features, in_features = weight.shape
    y_before, y_after = (x.new_empty(out_features) for _ in range(2))
    before[(out_features,)](x, weight, y_before, in_features, BLOCK=1024)
    after[(out_features,)](
        *(x, int8.packed, int8.scales, int8.exponents, y_after),
        *(in_features, int8.group_size),
        BLOCK=1024,
    )
    return (y_before, weight.nbytes), (y_after, int8.num_bytes)


def main():
    if not torch.cuda.is_available():
        raise SystemExit("this example needs a GPU; TRITON_INTERPRET=1 runs its test without one")
    torch.manual_seed(0)
    weight = torch.randn(4096, 4096, device="cuda", dtype=torch.float16) / 64
    x = torch.randn(4096, device="cuda", dtype=torch.float16)
    (y_before, bytes_before), (y_after, bytes_after) = products(x, weight)
    difference = (y_after - y_before).norm() / y_before.norm()
    print(f"bytes of the weight: {bytes_before:,} before, {bytes_after:,} after")
    print(f"relative difference of the results: {difference:.4f}")


if __name__ == "__main__":
    main()
