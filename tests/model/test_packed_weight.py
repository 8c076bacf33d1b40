"""Rows of packed matrices through the operations of a loader: equal to the same on values."""

import numpy as np
import pytest
import torch
from torch import nn

from halfweight.checkpoint.sources.turned import turned_names, turned_source
from halfweight.model.packed_weight import PackedWeight, gather, upper_and_lower, whole
from halfweight.model.placement import NoStandIn, check_module
from halfweight.model.weights_read import weights_read
from halfweight.quantization.numerics import dequantize, quantize
from halfweight.quantization.scheme import Scheme, TensorInfo

torch.manual_seed(0)
WEIGHTS = {name: quantize(torch.randn(8, 32), Scheme(32)) for name in "abcd"}
VALUES = {name: dequantize(weight) for name, weight in WEIGHTS.items()}


def packed(name, refused=None):
    return whole(name, (8, 32), torch.bfloat16, refused=refused)


def values(weight):
    found = [dequantize(gather(WEIGHTS, matrix)) for matrix in weight.matrices]
    return found[0] if weight.dim() == 2 else torch.stack(found)


OPERATIONS = {
    "chunk": lambda w: torch.chunk(w["a"], 2)[1],
    "split": lambda w: torch.split(w["a"], [3, 5])[1],
    "slice": lambda w: w["a"][2:7],
    "cat": lambda w: torch.cat([w["a"], w["b"]]),
    "cut what was joined": lambda w: torch.cat([w["a"], w["b"]])[4:12],
    "experts": lambda w: torch.cat(
        [torch.stack([w["a"], w["b"]]), torch.stack([w["c"], w["d"]])], dim=1
    ),
    "one expert": lambda w: torch.stack([w["a"], w["b"]])[1],
    "experts apart": lambda w: torch.chunk(torch.stack([w["a"], w["b"]]), 2)[0].squeeze(0),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_rows_go_where_values_would(name):
    found = OPERATIONS[name]({n: packed(n) for n in WEIGHTS})
    expected = OPERATIONS[name](VALUES)
    assert isinstance(found, PackedWeight)
    assert found.shape == expected.shape
    assert torch.equal(values(found), expected)


def test_what_is_split_and_joined_again_is_the_matrix_itself():
    again = torch.cat(torch.chunk(packed("a"), 4))
    assert gather(WEIGHTS, again.matrices[0]) is WEIGHTS["a"]


def test_halves_of_a_stack_of_gate_and_up():
    both = torch.cat([packed("a"), packed("b")]).matrices[0]
    halves = [gather(WEIGHTS, half) for half in upper_and_lower(both)]
    assert halves[0] is WEIGHTS["a"]
    assert halves[1] is WEIGHTS["b"]


def test_joined_scales_off_the_grid_are_floats():
    other = quantize(torch.randn(8, 32), Scheme(32, "float32"))
    matrix = torch.cat([packed("a"), packed("e")]).matrices[0]
    found = gather(WEIGHTS | {"e": other}, matrix)
    assert found.exponents is None
    assert torch.equal(dequantize(found), torch.cat([VALUES["a"], dequantize(other)]))


@pytest.mark.parametrize(
    "operation",
    [
        lambda w: w.t(),
        lambda w: w * 2,
        lambda w: w[:, 3:],
        lambda w: torch.cat([w, torch.zeros(8, 32)]),
        lambda w: w.reshape(4, 64),
    ],
)
def test_what_needs_values_is_refused_and_noted(operation):
    refused = {}
    with pytest.raises(NotImplementedError, match="of a weight in INT8"):
        operation(packed("a", refused))
    assert list(refused) == ["a"]


class _Neighbour(nn.Module):
    def __init__(self, slow):
        super().__init__()
        self.asked, self.trained, self.branch, self.read = (nn.Linear(5, 3) for _ in range(4))
        self.slow = slow

    def forward(self, x):
        x = x.to(self.asked.weight.dtype)
        if self.training and x is not None:
            x = x @ self.trained.weight.T
        if self.slow > 1:
            x = x @ self.branch.weight.T
        for block in [self]:
            x = x @ block.read.weight.T
        return x


def test_only_weights_whose_values_are_used_are_read():
    model = _Neighbour(slow=1)
    assert set(weights_read(model)) == {id(model.read)}
    model = _Neighbour(slow=2)
    assert set(weights_read(model)) == {id(model.read), id(model.branch)}


class _Same(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T + self.bias


class _Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class _Shifted(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids + 1)


def test_a_class_of_its_own_must_compute_the_same():
    check_module("same", _Same(5, 3), {})
    for other in (_Doubled(5, 3), _Shifted(5, 3), nn.Embedding(5, 3, max_norm=1.0)):
        with pytest.raises(NoStandIn, match="computes something of its own"):
            check_module("other", other, {})
    with pytest.raises(NoStandIn, match="no Linear and no Embedding"):
        check_module("other", nn.Conv2d(5, 3, 1), {})


class _Source:
    name, path, config, stored_bytes = "source", None, {}, 96

    def __init__(self, arrays):
        self._arrays = arrays
        self.tensors = tuple(TensorInfo(n, "F32", a.shape) for n, a in arrays.items())

    def read(self, tensor, begin, end):
        return self._arrays[tensor.name].reshape(-1).view(np.uint8)[begin:end]


def test_a_turned_source_reads_the_transposed_matrix():
    arrays = {n: np.arange(12, dtype=np.float32).reshape(3, 4) for n in ("a", "b")}
    source = _Source(arrays)
    assert turned_source(source, ()) is source
    turned = turned_source(source, ["b"])
    assert turned_names(turned) == {"b"}
    assert [t.shape for t in turned.tensors] == [(3, 4), (4, 3)]
    for tensor, expected in zip(turned.tensors, (arrays["a"], arrays["b"].T), strict=True):
        found = [turned.read(tensor, i, i + 8) for i in range(0, 48, 8)]
        assert np.array_equal(np.concatenate(found).view(np.float32), expected.reshape(-1))
