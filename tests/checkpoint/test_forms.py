"""What others made and halfweight does not read is called by its name, by every command alike."""

import json

import pytest
import torch
from command_line import run
from others import rewritten, with_linears
from tiny import make_llama

import halfweight
from halfweight.checkpoint.forms import METHODS, ORIGINAL, Form, form_of
from halfweight.checkpoint.inspection import inspect
from halfweight.errors import CheckpointError
from halfweight.memory.named_model import planned_model
from halfweight.quantization.scheme import TensorInfo

GROUP = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "symmetric": True}}


def words(weight, per_word, along_k):
    rows, columns = weight.shape
    shape = (columns // per_word, rows) if along_k else (columns, rows // per_word)
    return torch.zeros(shape, dtype=torch.int32)


def gptq(name, weight):
    columns = weight.shape[1]
    return {
        f"{name}.qweight": words(weight, 8, True),
        f"{name}.qzeros": torch.zeros(columns // 32, len(weight) // 8, dtype=torch.int32),
        f"{name}.scales": torch.ones(columns // 32, len(weight), dtype=torch.float16),
        f"{name}.g_idx": torch.arange(columns, dtype=torch.int32) // 32,
    }


def awq(name, weight):
    columns = weight.shape[1]
    return {
        f"{name}.qweight": words(weight, 8, False),
        f"{name}.qzeros": torch.zeros(columns // 32, len(weight) // 8, dtype=torch.int32),
        f"{name}.scales": torch.ones(columns // 32, len(weight), dtype=torch.float16),
    }


def parts(**shapes_and_dtypes):
    """A packing of tensors whose sizes do not matter, under the names of a form."""

    def pack(name, weight):
        return {
            f"{name}.{part.replace('__', '.')}": torch.zeros(4, dtype=dtype)
            for part, dtype in shapes_and_dtypes.items()
        }

    return pack


U8, I32, I16 = torch.uint8, torch.int32, torch.int16
CALLED = {
    "a GPTQ 4-bit": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": 32}),
    "an AWQ 4-bit": (awq, {"quant_method": "awq", "bits": 4}),
    "a bitsandbytes 4-bit": (
        parts(weight=U8, weight__absmax=U8, weight__quant_state__bitsandbytes__nf4=U8),
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
    ),
    "an EXL2 4.5-bit": (
        parts(q_weight=I32, q_scale=I32, q_groups=I16, q_invperm=I16),
        {"quant_method": "exl2", "bits": 4.5},
    ),
    "an EXL3 3.0-bit": (
        parts(trellis=I16, suh=torch.float16, svh=torch.float16),
        {"quant_method": "exl3", "bits": 3.0},
    ),
    "an HQQ": (parts(W_q=U8, scale=torch.float16, zero=torch.float16), {"quant_method": "hqq"}),
    "an MLX 4-bit": (
        parts(weight=I32, scales=torch.float16, biases=torch.float16),
        {"group_size": 64, "bits": 4},
    ),
    "an AQLM": (
        parts(codes=torch.int8, codebooks=torch.float16, scales=torch.float16),
        {"quant_method": "aqlm"},
    ),
    "a quanto": (
        parts(weight___data=torch.int8, weight___scale=torch.float16),
        {"quant_method": "quanto", "weights": "int8"},
    ),
    "a compressed-tensors 4-bit": (
        parts(weight_packed=I32, weight_scale=torch.float16, weight_shape=torch.int64),
        {"quant_method": "compressed-tensors", "format": "pack-quantized",
         "config_groups": {"group_0": GROUP}},
    ),
    "a compressed-tensors nvfp4-pack-quantized FP4": (
        parts(weight_packed=U8, weight_scale=U8, weight_global_scale=torch.float32),
        {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized",
         "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "float"}}}},
    ),
}  # fmt: skip
SAY_NO_MORE = ("a compressed-tensors",)
"""Forms whose tensors alone look like others'."""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_llama(tmp_path_factory.mktemp("forms") / "source", shard_size="1GB")


@pytest.fixture(params=CALLED)
def found(request, source, tmp_path):
    """How a folder is called, and the folder."""
    pack, config = CALLED[request.param]
    change = lambda tensors: with_linears(tensors, pack)  # noqa: E731
    return request.param, rewritten(source, tmp_path / "theirs", change, **config)


def assert_refused(call, name):
    with pytest.raises(CheckpointError, match=f"theirs: this is {name}.* checkpoint, which") as one:
        call()
    assert one.value.hint.endswith(ORIGINAL)


def test_every_command_calls_it_by_name_with_a_remedy(found, tmp_path, capsys):
    name, folder = found
    for call in (
        lambda: halfweight.load(folder),
        lambda: planned_model(str(folder)),
        lambda: halfweight.quantize(folder, tmp_path / "out"),
    ):
        assert_refused(call, name)
    assert inspect(folder).form == f"{name} checkpoint"
    assert inspect(folder).plan is None
    assert run(capsys, "inspect", str(folder))[0] == 0


def test_without_a_config_that_says_so(found, tmp_path):
    name, folder = found
    if name.startswith(SAY_NO_MORE):
        pytest.skip("its tensors alone do not tell")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    first_words = " ".join(name.split()[:2])
    assert_refused(lambda: halfweight.load(folder), first_words)


def test_the_command_line_says_it_in_two_lines(source, tmp_path, capsys):
    folder = rewritten(
        source, tmp_path / "theirs", lambda t: with_linears(t, awq), quant_method="awq", bits=4
    )
    for command in (
        ("quantize", str(folder), str(tmp_path / "out")),
        ("plan", str(folder), "--gpus", "24GB"),
    ):
        code, _, err = run(capsys, *command)
        assert code == 4
        message = (
            f"this is an AWQ 4-bit checkpoint, which halfweight does not read\nhint: {ORIGINAL}"
        )
        assert message in err.replace(f"{folder}: ", "")
    assert f"this is an AWQ 4-bit checkpoint: {ORIGINAL}" in run(capsys, "inspect", str(folder))[1]
    fields = json.loads(run(capsys, "inspect", str(folder), "--json")[1])
    assert (fields["form"], fields["remedy"]) == ("an AWQ 4-bit checkpoint", ORIGINAL)


def test_exllama_beside_the_index_of_the_16_bit_model(tmp_path):
    folder = make_llama(tmp_path / "theirs")
    assert (folder / "model.safetensors.index.json").exists()
    for shard in folder.glob("*.safetensors"):
        shard.unlink()
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "exl2", "bits": 4.0}
    (folder / "config.json").write_text(json.dumps(config))
    assert_refused(lambda: halfweight.load(folder), "an EXL2 4.0-bit")


def test_every_method_of_transformers_has_a_name():
    from transformers.utils.quantization_config import QuantizationMethod

    known = {method.value for method in QuantizationMethod} - {"gguf"}
    assert known <= METHODS.keys()


@pytest.mark.parametrize("config", [None, [], 3, "x", {"quant_method": {}}, {"config_groups": [1]}])
def test_configs_that_make_no_sense_are_not_a_form_or_named(config):
    tensors = [TensorInfo("a.weight", "BF16", (4, 4))]
    found = form_of({"quantization_config": config}, tensors)
    assert found is None or isinstance(found, Form)
