"""Copies of a model on the CPU: pickle, torch.save and deepcopy write each byte once."""

import copy
import io
import pickle

import pytest
import torch
from safetensors.torch import save_file
from tiny import make_llama, tensors_of

import halfweight
from halfweight.quantization.scheme import Recipe, Scheme

IDS = torch.tensor([[5, 3, 17, 300, 0, 2, 9, 41]])
BESIDE_BYTES = 64 << 10
"""Names, config and Python objects of a model; its weights are more than twice that."""


@pytest.fixture(scope="module", params=["untied", "tied", "tied, scales on no grid"])
def model(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("copies")
    source = make_llama(root / "source", tied=request.param != "untied", shard_size="10MB")
    halfweight.quantize(source, root / "int8", Recipe(Scheme(32)))
    if "no grid" in request.param:
        tensors = {
            name: tensor * 1.37 if name.endswith("weight_scale") else tensor
            for name, tensor in tensors_of(root / "int8").items()
        }
        save_file(tensors, root / "int8" / "model.safetensors", metadata={"format": "pt"})
    return halfweight.load(root / "int8")


def weight_bytes(model):
    return sum(parameter.nbytes for parameter in model.parameters())


def shares_its_table(model):
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    return table.weight_packed is head.weight_packed


def test_a_pickle_holds_each_byte_once(model):
    written = pickle.dumps(model)
    assert weight_bytes(model) < len(written) < weight_bytes(model) + BESIDE_BYTES
    again = pickle.loads(written)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert shares_its_table(again) == shares_its_table(model)
    layer = model.model.layers[0].mlp.up_proj
    assert len(pickle.dumps(layer)) < weight_bytes(layer) + 4096


def test_a_saved_state_dict_holds_each_byte_once(model):
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    assert weight_bytes(model) < file.tell() < weight_bytes(model) + BESIDE_BYTES
    file.seek(0)
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.zero_()
    other.load_state_dict(torch.load(file))
    assert torch.equal(other(IDS).logits, model(IDS).logits)


def test_a_deep_copy_is_a_model_of_its_own(model):
    expected = model(IDS).logits
    other = copy.deepcopy(model)
    assert torch.equal(other(IDS).logits, expected)
    assert shares_its_table(other) == shares_its_table(model)
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in other.parameters()}
    assert sum(storage.nbytes() for storage in storages.values()) == weight_bytes(model)
    for parameter in other.parameters():
        parameter.zero_()
    assert torch.equal(model(IDS).logits, expected)


def test_ties_are_worked_out_again(model):
    """As lm-eval does, and transformers after many an edit."""
    expected, ties = model(IDS).logits, model.all_tied_weights_keys
    assert model.get_expanded_tied_weights_keys(all_submodels=True) == ties
    other = copy.deepcopy(model)
    other.tie_weights()
    assert torch.equal(other(IDS).logits, expected)
    assert shares_its_table(other) == shares_its_table(model)
