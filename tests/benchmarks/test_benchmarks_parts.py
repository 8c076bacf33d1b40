"""The parts that benchmarks/parts.py leaves out are in the kernel."""

import parts
import pytest
import torch
from tiles import H100

from halfweight.kernels.cuda import backend
from halfweight.kernels.cuda.tiles import form_on


@pytest.mark.parametrize("name", list(parts.LEFT_OUT))
def test_every_part_is_found(name):
    changes = parts.LEFT_OUT[name]
    for shape in parts.SHAPES:
        choice = (form_on(H100, shape), 128, torch.uint8, torch.float16)
        text = parts.changed(backend.source, changes, *choice)
        assert (text == backend.source(*choice)) == (not changes)
        assert all(new in text for _, new in changes)


def test_what_is_not_found_is_no_measurement():
    with pytest.raises(ValueError, match="is not in the kernel"):
        parts.changed(lambda: "a kernel", (("another", ""),))
