"""The table of checkpoint/readers.py against vLLM's own code; the kernel's answers to layers."""

import ast
import inspect
import json
from pathlib import Path

import pytest

vllm = pytest.importorskip("vllm", reason="run by `make test-vllm`")

import torch  # noqa: E402
from tiny import make_llama, tensors_of  # noqa: E402
from vllm.model_executor.kernels.linear import MPLinearLayerConfig  # noqa: E402
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (  # noqa: E402
    CompressedTensorsConfig,
)
from vllm.model_executor.layers.quantization.utils import marlin_utils  # noqa: E402
from vllm.model_executor.parameter import (  # noqa: E402
    GroupQuantScaleParameter,
    PackedvLLMParameter,
)
from vllm.scalar_type import scalar_types  # noqa: E402

import halfweight  # noqa: E402
from halfweight.checkpoint.readers import READERS, VLLM_HEADS  # noqa: E402
from halfweight.kernels import reference  # noqa: E402
from halfweight.quantization.numerics import quantize, scales_float32  # noqa: E402
from halfweight.quantization.scheme import Scheme  # noqa: E402
from halfweight.vllm.kernel import HalfweightLinearKernel, refusal  # noqa: E402

MODELS = Path(inspect.getfile(vllm)).parent / "model_executor" / "models"


def model_file(architecture):
    """The module of vLLM's that has this class, and the class it inherits from."""
    from vllm.model_executor.models.registry import _TEXT_GENERATION_MODELS

    module, name = _TEXT_GENERATION_MODELS[architecture]
    tree = ast.parse((MODELS / f"{module}.py").read_text())
    found = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name)
    return tree, {base.id for base in found.bases if isinstance(base, ast.Name)}


def head_arguments(architecture):
    """Keywords of every call that builds a head in the module of a class or of its base."""
    tree, bases = model_file(architecture)
    calls = [
        {keyword.arg for keyword in node.keywords}
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "ParallelLMHead"
    ]
    return calls or [call for base in bases & {"LlamaForCausalLM"} for call in head_arguments(base)]


@pytest.mark.parametrize("architecture", sorted(VLLM_HEADS.values()))
def test_heads_of_the_table_are_given_a_config_and_a_name(architecture):
    calls = head_arguments(architecture)
    assert calls
    assert all({"quant_config", "prefix"} <= call for call in calls)


def test_groups_are_marlins():
    sizes = {-1 if size == "row" else size for size in READERS["vllm"].group_sizes}
    assert sizes == set(marlin_utils.MARLIN_SUPPORTED_GROUP_SIZES)


def test_shapes_are_marlins():
    reader = READERS["vllm"]
    assert reader.rows == marlin_utils.GPTQ_MARLIN_MIN_THREAD_N
    assert reader.columns == marlin_utils.GPTQ_MARLIN_MIN_THREAD_K


class Layer(torch.nn.Module):
    """Stands for any of vLLM's layers: only names are matched here."""


@pytest.mark.parametrize("tied", [False, True])
def test_vllm_matches_the_names_of_a_file_for_it(tmp_path, tied):
    """Each linear, joined ones too, with the group of its scales; the embedding with none."""
    source = make_llama(
        tmp_path / "source", tied=tied, hidden_size=128, intermediate_size=320, head_dim=64
    )
    halfweight.quantize(source, tmp_path / "int8", readers=("vllm",))
    fields = json.loads((tmp_path / "int8" / "config.json").read_text())["quantization_config"]
    config = CompressedTensorsConfig.from_config(fields)
    config.packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    names = tensors_of(tmp_path / "int8")
    for prefix, parts in {
        "model.layers.0.self_attn.qkv_proj": "self_attn.q_proj",
        "model.layers.0.mlp.gate_up_proj": "mlp.gate_proj",
        "model.layers.1.self_attn.o_proj": "self_attn.o_proj",
    }.items():
        found = config.get_scheme_dict(Layer(), prefix)
        packed = names[f"model.layers.0.{parts}.weight_packed"]
        scales = names[f"model.layers.0.{parts}.weight_scale"]
        assert found["weights"].group_size == 4 * packed.shape[1] // scales.shape[1]
    assert config.get_scheme_dict(Layer(), "model.embed_tokens") is None
    assert (config.get_scheme_dict(Layer(), "lm_head") is None) == tied


def layer_config(**changes):
    fields = {
        "full_weight_shape": (256, 64),
        "partition_weight_shape": (256, 64),
        "weight_type": scalar_types.uint8b128,
        "act_type": torch.bfloat16,
        "group_size": 128,
        "zero_points": False,
    }
    return MPLinearLayerConfig(**(fields | changes))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"weight_type": scalar_types.uint4b8}, "not symmetric INT8"),
        ({"zero_points": True}, "zero points"),
        ({"act_type": torch.float8_e4m3fn}, "activations are"),
        ({"group_size": 48}, "group size 48, not one of"),
        ({"partition_weight_shape": (192, 64)}, "does not divide this shard's 192 columns"),
    ],
)
def test_the_kernel_leaves_to_vllm_what_it_cannot_take(changes, reason):
    can, said = HalfweightLinearKernel.can_implement(layer_config(**changes))
    assert not can
    assert reason in said
    assert HalfweightLinearKernel.can_implement(layer_config()) == (True, None)


def test_activation_order_is_left_to_vllm():
    """As vLLM 0.22 describes a layer; later versions refuse such a file themselves."""
    config = layer_config()
    config.has_g_idx = True
    assert refusal(config) == "weights are in activation order"


def loaded(layout, weight, scales):
    """A layer as vLLM has loaded it: compressed-tensors' [N, K/4], or GPTQ's [K/4, N]."""
    words = weight.view(torch.int32)
    dims = {"input_dim": 1, "output_dim": 0}
    if layout == "gptq":
        words, scales, dims = (
            words.t().contiguous(),
            scales.t().contiguous(),
            {
                "input_dim": 0,
                "output_dim": 1,
            },
        )
    layer = torch.nn.Module()
    loader = {"weight_loader": lambda *_: None}
    layer.weight_packed = PackedvLLMParameter(
        data=words, packed_dim=dims["input_dim"], packed_factor=4, **dims, **loader
    )
    layer.weight_scale = GroupQuantScaleParameter(data=scales, **dims, **loader)
    return layer


@pytest.mark.parametrize("layout", ["compressed-tensors", "gptq"])
@pytest.mark.parametrize("scheme", [Scheme(), Scheme(64, "float16", "absmax"), Scheme("row")])
def test_the_kernel_multiplies_what_vllm_loaded(monkeypatch, layout, scheme):
    """Both layouts of the ecosystem, scales on a grid and off it."""
    monkeypatch.setattr("vllm.model_executor.parameter.get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(
        "vllm.model_executor.parameter.get_tensor_model_parallel_world_size", lambda: 1
    )
    torch.manual_seed(0)
    weight, x = torch.randn(64, 256), torch.randn(3, 256)
    stored = quantize(weight, scheme)
    scales = scales_float32(stored.scales, stored.exponents)
    layer = loaded(layout, stored.packed.clone(), scales)
    kernel = HalfweightLinearKernel(layer_config(), "weight_packed", "weight_scale")
    kernel.process_weights_after_loading(layer)
    expected = reference.linear(x, stored.packed, scales, None, None)
    torch.testing.assert_close(kernel.apply_weights(layer, x), expected, atol=1e-4, rtol=1e-4)
    assert (layer.weight_exponent is None) == (scheme.scale_format != "grid8")
