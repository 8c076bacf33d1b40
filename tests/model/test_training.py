"""Adapters on a model in INT8: peft takes our linears, gradients are those of 16 bits."""

import copy

import pytest
import torch
from families import save_family
from tiny import make_llama
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import halfweight
from halfweight.model.modules import QuantizedLinear, QuantizedWeight
from halfweight.quantization.numerics import dequantize
from halfweight.quantization.scheme import Recipe, Scheme

peft = pytest.importorskip("peft")

IDS = torch.tensor([[5, 3, 17, 300, 0, 2, 9, 41], [7, 7, 1, 30, 31, 32, 33, 34]])
LOADERS = {"load": halfweight.load, "from_pretrained": AutoModelForCausalLM.from_pretrained}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("training")
    source = make_llama(root / "source", tied=True)
    halfweight.quantize(source, root / "int8", Recipe(Scheme(32)))
    return source, root / "int8"


def adapted(model, targets="all-linear"):
    """With LoRA whose both halves are random, so that every gradient is one."""
    config = peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
    made = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapters(made).values():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return made.train()


def adapters(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gradients(model):
    model.zero_grad()
    model(IDS, labels=IDS).loss.backward()
    trained = adapters(model).items()
    return {name: p.grad.clone() for name, p in trained if p.grad is not None}


def with_dequantized_weights(source, int8):
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for name, module in int8.named_modules():
        if isinstance(module, QuantizedWeight):
            plain.get_submodule(name).weight.data = dequantize(module.quantized)
    return plain


@pytest.mark.parametrize("loader", LOADERS)
def test_twenty_steps_of_lora_make_the_loss_fall(folders, loader):
    model = LOADERS[loader](folders[1])
    before = {n: m.weight_packed.clone() for n, m in model.named_modules() if is_ours(m)}
    made = adapted(model, ["q_proj", "v_proj", "up_proj", "down_proj"])
    made.enable_input_require_grads()
    made.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(adapters(made).values(), lr=2e-2)
    losses = []
    for _ in range(20):
        loss = made(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    after = {n.replace(".base_layer", ""): m for n, m in model.named_modules() if is_ours(m)}
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name].weight_packed, before[name]) for name in before)


def is_ours(module):
    return isinstance(module, QuantizedWeight)


def test_every_linear_but_the_head_gets_an_adapter(folders):
    model = halfweight.load(folders[1])
    linears = {n for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    made = adapted(model)
    found = {n for n, m in model.named_modules() if isinstance(m, peft.tuners.lora.Linear)}
    assert found == linears - {"lm_head"}
    assert {p.dtype for p in adapters(made).values()} == {torch.float32}


def test_gradients_are_those_of_the_dequantized_model(folders):
    source, int8 = folders
    model = halfweight.load(int8, dtype=torch.float32)
    expected = gradients(adapted(with_dequantized_weights(source, model)))
    found = gradients(adapted(model))
    assert found.keys() == expected.keys()
    assert len(found) == 2 * 14
    for name, gradient in found.items():
        assert gradient.norm() > 0
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5)


def test_checkpointed_gradients_are_the_same(folders):
    made = adapted(halfweight.load(folders[1], dtype=torch.float32))
    expected = gradients(made)
    made.enable_input_require_grads()
    made.gradient_checkpointing_enable()
    for name, gradient in gradients(made).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


def test_a_bias_can_be_trained(tmp_path):
    halfweight.quantize(save_family("qwen2", tmp_path / "source"), tmp_path / "int8")
    model = halfweight.load(tmp_path / "int8")
    bias = model.model.layers[0].self_attn.q_proj.bias.requires_grad_()
    model(IDS, labels=IDS).loss.backward()
    assert bias.grad.shape == bias.shape
    assert bias.grad.norm() > 0


def test_experts_are_trained_one_by_one_and_gradients_pass_through_them(tmp_path):
    halfweight.quantize(save_family("mixtral", tmp_path / "source"), tmp_path / "int8")
    model = halfweight.load(tmp_path / "int8", dtype=torch.float32)
    found = gradients(adapted(model, ["q_proj", "up", "down"]))
    of_experts = [gradient for name, gradient in found.items() if ".experts." in name]
    assert len(of_experts) >= 2 * 2 * 2 * 2, "two experts a token in each layer"
    assert all(gradient.norm() > 0 for gradient in of_experts)
    before_experts = [gradient for name, gradient in found.items() if "layers.0.self_attn" in name]
    assert all(gradient.norm() > 0 for gradient in before_experts)


def test_adapters_are_saved_and_loaded_onto_the_folder_again(folders, tmp_path):
    made = adapted(halfweight.load(folders[1]))
    made.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(halfweight.load(folders[1]), tmp_path / "adapter")
    assert torch.equal(again.eval()(IDS).logits, made.eval()(IDS).logits)
    other = copy.deepcopy(made)
    assert torch.equal(other(IDS).logits, made(IDS).logits)


def test_adapters_are_not_merged_into_int8(folders):
    made = adapted(halfweight.load(folders[1]))
    expected = made.eval()(IDS).logits
    with pytest.raises(NotImplementedError, match="of a weight in INT8, which has shape and dtype"):
        made.merge_adapter()
    assert torch.equal(made(IDS).logits, expected)


def test_transformers_trainer_takes_adapters_and_refuses_bare_weights(folders, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folders[1])
    options = TrainingArguments(
        str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_checkpointing=True,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
    )
    with pytest.raises(ValueError, match="attach trainable adapters on top"):
        Trainer(model=model, args=options)
    made = adapted(model)
    before = {name: parameter.clone() for name, parameter in adapters(made).items()}
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    Trainer(model=made, args=options, train_dataset=rows).train()
    assert all(not torch.equal(p, before[name]) for name, p in adapters(made).items())
