"""The layouts of others, against their own libraries or their specification written out."""

import numpy as np
from gguf_files import TYPES, gguf

from halfweight.checkpoint.sources.gptq_packing import (
    ordered_g_idx,
    pack_qweight,
    symmetric_qzeros,
    unpack_qweight,
)
from halfweight.checkpoint.sources.q8_0 import pack_q8_0, unpack_q8_0

RANDOM = np.random.default_rng(0)


def test_q8_0_is_what_gguf_py_writes_and_reads():
    weight = RANDOM.normal(size=(5, 96)).astype(np.float32)
    raw = gguf.quantize(weight, TYPES.Q8_0)
    packed, scales = unpack_q8_0(raw)
    q = packed.astype(np.int32) - 128
    values = (q.reshape(5, 3, 32) * scales.astype(np.float32)[:, :, None]).reshape(5, 96)
    assert np.array_equal(values, gguf.dequantize(raw, TYPES.Q8_0))
    assert np.array_equal(pack_q8_0(packed, scales), raw)


def test_gptq_words_hold_four_weights_along_k():
    packed = RANDOM.integers(0, 256, (8, 12), np.uint8)
    expected = np.zeros((3, 8), np.int64)
    for n in range(8):
        for k in range(12):
            expected[k // 4, n] |= int(packed[n, k]) << (8 * (k % 4))
    qweight = pack_qweight(packed)
    assert np.array_equal(qweight.astype(np.int64) & 0xFFFFFFFF, expected)
    assert np.array_equal(unpack_qweight(qweight), packed)


def test_gptq_says_symmetric_and_in_order():
    assert symmetric_qzeros(2, 8).tolist() == [[0x7F7F7F7F] * 2] * 2
    second = symmetric_qzeros(1, 4, "gptq_v2")
    assert second.view(np.uint32).tolist() == [[0x80808080]]
    assert ordered_g_idx(6, 2).tolist() == [0, 0, 1, 1, 2, 2]
