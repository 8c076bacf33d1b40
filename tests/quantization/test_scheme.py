"""Byte arithmetic, against hand-computed figures and the tensors of numerics."""

import pytest
import torch
from llama_sizes import LLAMA_8B, LLAMA_70B, llama_tensors

from halfweight.errors import UsageError
from halfweight.quantization.numerics import quantize
from halfweight.quantization.scheme import Recipe, Scheme, TensorInfo


@pytest.mark.parametrize(
    ("dims", "params", "table"),
    [
        (LLAMA_8B, 8_030_261_248, {"grid8": 8.095, "bfloat16": 8.156, "float32": 8.281}),
        (LLAMA_70B, 70_553_706_496, {"grid8": 71.113, "bfloat16": 71.657, "float32": 72.760}),
    ],
)
def test_llama_3_takes_the_bytes_of_the_design_table(dims, params, table):
    tensors = list(llama_tensors(*dims))
    assert sum(t.num_elements for t in tensors) == params
    for scale_format, gigabytes in table.items():
        decisions = Recipe(Scheme(scale_format=scale_format)).decide_all(tensors)
        assert round(sum(d.resident_bytes for d in decisions) / 1e9, 3) == gigabytes
    resident = sum(d.resident_bytes for d in Recipe().decide_all(tensors))
    assert f"{1 - resident / (2 * params):.2%}" == "49.60%"


@pytest.mark.parametrize("group_size", [32, 64, 128, 256, "row"])
@pytest.mark.parametrize("scale_format", ["grid8", "bfloat16", "float16", "float32"])
def test_resident_bytes_are_the_bytes_of_the_tensors(group_size, scale_format):
    scheme = Scheme(group_size, scale_format)
    tensor = quantize(torch.randn(6, 512), scheme)
    assert scheme.resident_bytes((6, 512)).total == tensor.num_bytes


def test_a_group_size_that_does_not_divide_falls_back_to_one_that_does():
    assert Scheme(128).for_in_features(576) == Scheme(64)
    assert Scheme(256).for_in_features(4096) == Scheme(256)
    assert Scheme(64).for_in_features(4128) == Scheme(32)
    assert Scheme(128).for_in_features(100) is None
    assert Scheme("row").for_in_features(100) == Scheme("row")


def test_decisions_say_why():
    recipe = Recipe(keep=("*embed*",))
    reasons = {
        TensorInfo("model.norm.weight", "BF16", (8,)): "not a weight matrix",
        TensorInfo("model.embed_tokens.weight", "BF16", (8, 128)): "kept by '*embed*'",
        TensorInfo("h.mlp.gate.weight", "BF16", (8, 128)): "kept by '*.gate.weight'",
        TensorInfo("h.q.weight", "I8", (8, 128)): "I8 is not a floating point type",
        TensorInfo("h.q.weight", "F16", (8, 100)): "no group size divides in_features 100",
    }
    for tensor, reason in reasons.items():
        decision = recipe.decide(tensor)
        assert (decision.scheme, decision.reason) == (None, reason)
        assert decision.resident_bytes == tensor.num_bytes
    fallback = recipe.decide(TensorInfo("h.q.weight", "F16", (8, 576)))
    assert fallback.scheme == Scheme(64)
    assert fallback.reason == "group size 64: 128 does not divide 576"


@pytest.mark.parametrize(
    "arguments",
    [{"group_size": 0}, {"group_size": "colour"}, {"scale_format": "int4"},
     {"scale_choice": "best"}, {"group_size": "tensor"}],
)  # fmt: skip
def test_impossible_schemes_are_refused_with_a_remedy(arguments):
    with pytest.raises(UsageError) as caught:
        Scheme(**arguments)
    assert caught.value.hint


def test_a_recipe_makes_groups_that_kernels_are_fast_with():
    assert Scheme(100).scales_shape((2, 400)) == (2, 4), "somebody else's"
    with pytest.raises(UsageError, match="group size 100 is not supported") as caught:
        Recipe(Scheme(100))
    assert caught.value.hint == "use one of 32, 64, 128, 256, row, tensor"


@pytest.mark.parametrize(
    ("columns", "ranks", "group", "part"),
    [
        (4096, 8, 128, "512"),
        (8960, 2, 128, "4480"),
        (8960, 4, 64, "2240"),
        (8960, 8, 32, "1120"),
        (8960, 16, None, "560"),
        (8960, 3, None, "2986.67"),
    ],
)
def test_groups_are_whole_in_what_each_rank_has(columns, ranks, group, part):
    recipe = Recipe(tensor_parallel=ranks)
    for name in ("model.layers.0.mlp.down_proj.weight", "experts.3.w2.weight", "x.o_proj.weight"):
        found = recipe.decide(TensorInfo(name, "BF16", (64, columns)))
        assert (found.scheme.group_size if found.scheme else None) == group
        if group != 128:
            assert f"divide {part}, the columns that each rank has"[7:] in found.reason
    whole = recipe.decide(TensorInfo("model.layers.0.mlp.up_proj.weight", "BF16", (64, 8960)))
    assert whole.scheme == Scheme(128)
    rows = Recipe(Scheme("row"), tensor_parallel=8)
    assert rows.decide(TensorInfo("x.o_proj.weight", "BF16", (64, 896))).scheme == Scheme("row")
