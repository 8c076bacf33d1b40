"""Staging buffers: what was sent is what arrives, however soon a buffer is filled again."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from halfweight.engine.transfer import Staging


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_numbers_arrive_though_buffers_are_filled_again(device):
    staging = Staging(torch.device(device), torch.int64)
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 1 << 40, (2, size)) for size in (3, 1 << 20, 1 << 20, 5, 1 << 21, 0)]
    sent = [staging.send(array.copy()) for array in arrays]
    for tensor, array in zip(sent, arrays, strict=True):
        assert tensor.device.type == device
        assert np.array_equal(tensor.cpu().numpy(), array)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_parts_arrive_each_in_its_place(device):
    staging = Staging(torch.device(device), torch.int32)
    table = torch.zeros(3, 1 << 17, dtype=torch.int32, device=device)
    expected = np.zeros(table.shape, np.int32)
    rng = np.random.default_rng(1)
    for sizes in [(3,), (1 << 16, 5), (0, 1 << 17, 1), (7, 7, 7)]:
        array = rng.integers(0, 1 << 31, sum(sizes), dtype=np.int32)
        staging.scatter(array.copy(), [table[i, :size] for i, size in enumerate(sizes)])
        for i, part in enumerate(np.split(array, np.cumsum(sizes)[:-1])):
            expected[i, : len(part)] = part
    assert np.array_equal(table.cpu().numpy(), expected)
