"""Staging buffers: what was sent is what arrives, however soon a buffer is filled again."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from halfweight.engine.transfer import Staging


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_numbers_arrive_though_buffers_are_filled_again(device):
    staging = Staging(torch.device(device))
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 1 << 40, (2, size)) for size in (3, 1 << 20, 1 << 20, 5, 1 << 21, 0)]
    sent = [staging.send(array.copy()) for array in arrays]
    for tensor, array in zip(sent, arrays, strict=True):
        assert tensor.device.type == device
        assert np.array_equal(tensor.cpu().numpy(), array)
