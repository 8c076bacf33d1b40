"""INT8 weights arrive beside other work: every byte, in the places that a product wants."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny import make_llama

import halfweight
from halfweight.checkpoint.headers import quantized_modules, read_headers
from halfweight.errors import CheckpointError
from halfweight.model import weight_reader, weight_streaming
from halfweight.model.llama_like import SHARED_INPUT
from halfweight.model.modules import QuantizedLinear, stack
from halfweight.model.weight_reader import Tally, map_tensors
from halfweight.model.weight_streaming import arriving, empty_packed, read_weights
from halfweight.quantization.numerics import scales_float32
from halfweight.quantization.scheme import Recipe, Scheme

CPU = torch.device("cpu")
GPU = pytest.param(torch.device("cuda", 0), marks=pytest.mark.gpu)


@pytest.fixture(params=["grid8", "float32"])
def checkpoint(request, tmp_path):
    source = make_llama(tmp_path / "source")
    recipe = Recipe(Scheme(32, scale_format=request.param))
    halfweight.quantize(source, tmp_path / "int8", recipe)
    return read_headers(tmp_path / "int8")


def read(checkpoint, device=CPU, tally=None):
    with ThreadPoolExecutor(1) as pool:
        stored = quantized_modules(checkpoint)
        return read_weights(stored, device, tally or Tally(checkpoint.num_bytes), pool)


@pytest.mark.parametrize("device", [CPU, GPU])
def test_read_weights_are_those_of_the_file(checkpoint, device, monkeypatch):
    monkeypatch.setattr(weight_reader, "CHUNK_BYTES", 1000)
    mapped, found = map_tensors(checkpoint), read(checkpoint, device)
    assert found.keys() == quantized_modules(checkpoint).keys()
    for name, weight in found.items():
        assert weight.packed.device == weight.scales.device == device
        expected = mapped[f"{name}.weight_packed"].view(torch.uint8)
        assert torch.equal(weight.packed.cpu(), expected)
        scales = scales_float32(weight.scales, weight.exponents).cpu()
        assert torch.equal(scales, mapped[f"{name}.weight_scale"].float())


def test_mapped_weights_equal_read_ones(checkpoint):
    stored, mapped = quantized_modules(checkpoint), map_tensors(checkpoint)
    with arriving(stored, mapped, CPU, Tally(0)) as weights:
        found = weights()
    for name, expected in read(checkpoint).items():
        assert found[name].packed.data_ptr() == mapped[f"{name}.weight_packed"].data_ptr()
        for part in ("packed", "scales", "exponents"):
            one, other = getattr(found[name], part), getattr(expected, part)
            assert (one is None and other is None) or torch.equal(one, other)


def test_weights_that_share_their_input_are_one_tensor(checkpoint):
    found = read(checkpoint)
    for layer, (owner, roles) in [
        (layer, pair)
        for layer in range(2)
        for pair in zip(("self_attn", "mlp"), SHARED_INPUT, strict=True)
    ]:
        linears = []
        for role in roles:
            weight = found[f"model.layers.{layer}.{owner}.{role}"]
            linears.append(QuantizedLinear(weight.shape, "reference"))
            linears[-1].hold(weight)
        whole = stack(linears)
        assert whole.weight_packed.data_ptr() == linears[0].weight_packed.data_ptr()
        x = torch.randn(3, whole.in_features)
        parts = [linear(x) for linear in linears]
        torch.testing.assert_close(whole(x), torch.cat(parts, dim=1))


def test_rooms_are_alone_where_one_of_the_product_is_not_packed(checkpoint):
    stored = quantized_modules(checkpoint)
    del stored["model.layers.0.self_attn.k_proj"]
    rooms = empty_packed(stored, torch.device("cpu"))
    assert rooms.keys() == stored.keys()
    assert {name: tuple(room.shape) for name, room in rooms.items()} == {
        name: weight.shape for name, weight in stored.items()
    }
    whole = {n for n, room in rooms.items() if room.untyped_storage().nbytes() == room.nbytes}
    together = {f"model.layers.1.self_attn.{role}_proj" for role in "qkv"}
    together |= {f"model.layers.{i}.mlp.{role}_proj" for i in (0, 1) for role in ("gate", "up")}
    assert whole == stored.keys() - together


def test_an_error_beside_the_reading_stops_it(checkpoint, monkeypatch):
    monkeypatch.setattr(weight_reader, "CHUNK_BYTES", 64)
    monkeypatch.setattr(
        weight_streaming, "grid8_from_scales", lambda scales: None
    )  # needs their values
    begun, told = threading.Event(), []

    def arrive(*step):
        told.append(step)
        begun.set()
        stopped.wait(10)

    stored, stopped = quantized_modules(checkpoint), threading.Event()
    tally = Tally(checkpoint.num_bytes, arrive)
    stop = tally.stop
    monkeypatch.setattr(tally, "stop", lambda: (stop(), stopped.set()))

    def build():
        with arriving(stored, {}, torch.device("meta"), tally):
            begun.wait(10)
            raise KeyError("of the block")

    with pytest.raises(KeyError, match="of the block"):
        build()
    assert 0 < len(told) <= weight_reader.NUM_THREADS


def test_a_file_cut_meanwhile_is_named(checkpoint):
    (shard,) = checkpoint.shards
    os.truncate(shard.path, shard.num_bytes // 2)
    with pytest.raises(CheckpointError, match=r"ends at byte \d+, expected \d+"):
        read(checkpoint)
