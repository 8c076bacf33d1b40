"""compressed-tensors W8A16 that others wrote, in groups of any size: run as it lies."""

import json

import pytest
import torch
from others import write_compressed_tensors
from tiny import make_llama, tensors_of
from transformers import AutoModelForCausalLM

import halfweight
from halfweight.checkpoint.inspection import inspect
from halfweight.conversion.verification import verify
from halfweight.engine.engine import Engine
from halfweight.engine.request import Sampling
from halfweight.memory.named_model import planned_model
from halfweight.quantization.numerics import dequantize
from halfweight.quantization.scheme import Recipe, Scheme

IDS = torch.tensor([[1, 5, 9, 200, 31]])


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("others") / "source"
    return make_llama(
        folder, shard_size="1GB", hidden_size=192, intermediate_size=384, dtype=torch.bfloat16
    )


@pytest.fixture(params=[None, 8, 24, 48, 96], scope="module")
def folder(request, source, tmp_path_factory):
    return write_compressed_tensors(source, tmp_path_factory.mktemp("ct") / "out", request.param)


def decompressed(folder):
    """The weights as compressed-tensors itself reads them, in float32."""
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme

    fields = json.loads((folder / "config.json").read_text())["quantization_config"]
    scheme = QuantizationScheme.model_validate(fields["config_groups"]["group_0"])
    tensors = tensors_of(folder)
    for name in [n.removesuffix("_packed") for n in tensors if n.endswith("weight_packed")]:
        parts = {p: tensors[f"{name}{p[6:]}"] for p in ("weight_packed", "weight_shape")}
        parts["weight_scale"] = tensors[f"{name}_scale"].float()
        yield name, PackedQuantizationCompressor.decompress(parts, scheme)["weight"]


def test_every_weight_is_theirs_to_the_bit(folder):
    model = halfweight.load(folder)
    names = dict(decompressed(folder))
    assert len(names) == 14
    least = 0
    for name, theirs in names.items():
        ours = model.get_submodule(name.removesuffix(".weight")).quantized
        assert torch.equal(dequantize(ours), theirs), name
        least = min(least, int(ours.packed.min()) - 128)
    assert least == -128, "a value that halfweight does not write, and must read"


def test_the_engine_generates_as_transformers_does_with_their_weights(folder, source):
    reference = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for name, weight in decompressed(folder):
        reference.get_submodule(name.removesuffix(".weight")).weight.data = weight
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones_like(IDS)
    out = reference.generate(IDS, attention_mask=mask, max_new_tokens=6, **options)
    model = halfweight.load(folder, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, reference(IDS).logits, rtol=1e-4, atol=1e-5)
    with Engine(model, max_context=32, max_sequences=2) as engine:
        greedy = {"sampling": Sampling(), "stop_tokens": ()}
        found = engine.generate(IDS[0].tolist(), max_new_tokens=6, **greedy)
    assert list(found.tokens) == out[0, IDS.shape[1] :].tolist()


def test_plan_and_inspect_count_what_is_loaded_to_the_byte(folder):
    model = halfweight.load(folder)
    loaded = sum({p.data_ptr(): p.nbytes for p in model.parameters()}.values())
    assert planned_model(str(folder)).resident_bytes == loaded
    assert inspect(folder).resident_bytes == loaded


def test_what_was_loaded_is_saved_and_verified(folder, tmp_path):
    model = halfweight.load(folder)
    model.save_pretrained(tmp_path / "saved")
    before, after = tensors_of(folder), tensors_of(tmp_path / "saved")
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert verify(tmp_path / "saved").problems == ()
    again = halfweight.load(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_a_scale_a_row_is_quantized_verified_and_loaded(tmp_path, tied):
    """Rows of 192 and 384: no group size of ours."""
    source = make_llama(tmp_path / "src", tied=tied, hidden_size=192, intermediate_size=384)
    halfweight.quantize(source, tmp_path / "out", Recipe(Scheme("row")))
    assert verify(tmp_path / "out").problems == ()
    model = halfweight.load(tmp_path / "out")
    assert model.lm_head.group_size == 192
    model.save_pretrained(tmp_path / "again")
    assert verify(tmp_path / "again").problems == ()
    loaded = sum({p.data_ptr(): p.nbytes for p in model.parameters()}.values())
    for folder in ("out", "again"):
        assert planned_model(str(tmp_path / folder)).resident_bytes == loaded
