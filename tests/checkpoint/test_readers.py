"""What a file for another program keeps, what that costs, and what is said of one that is not."""

import json
from dataclasses import dataclass

import pytest
import torch
from command_line import run
from tiny import make_llama, tensors_of

from halfweight.checkpoint import readers
from halfweight.conversion import convert
from halfweight.errors import UsageError
from halfweight.quantization.scheme import Decision, Recipe, Scheme, TensorInfo

SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64}
"""Large enough for Marlin, which takes rows by 64 and columns by 128."""
HIDDEN, VOCABULARY = 128, 320
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Llamas by whether head and embedding are tied."""
    root = tmp_path_factory.mktemp("readers")
    return {
        tied: make_llama(root / f"tied-{tied}", tied=tied, num_key_value_heads=2, **SIZES)
        for tied in (False, True)
    }


@dataclass(frozen=True)
class Ended:
    exit_code: int
    stdout: str
    stderr: str


@pytest.fixture
def command(capsys):
    """`halfweight` with these arguments."""
    return lambda *arguments: Ended(*run(capsys, *map(str, arguments)))


def packed_modules(folder):
    names = tensors_of(folder)
    return {name.removesuffix(".weight_packed") for name in names if "weight_packed" in name}


@pytest.mark.parametrize(
    ("name", "tied", "kept"),
    [
        ("vllm", False, {EMBEDDING}),
        ("vllm", True, {EMBEDDING}),
        ("sglang", False, {EMBEDDING, HEAD}),
        ("transformers", False, {EMBEDDING}),
    ],
)
def test_a_file_for_a_program_keeps_what_it_does_not_read(
    tmp_path, sources, command, name, tied, kept
):
    smallest = convert.quantize(sources[tied], tmp_path / "default")
    made = convert.quantize(sources[tied], tmp_path / "out", readers=(name,))
    assert packed_modules(tmp_path / "default") - packed_modules(tmp_path / "out") == kept
    assert made.readers_bytes == made.disk_bytes - smallest.disk_bytes
    matrix = VOCABULARY * HIDDEN
    assert made.readers_bytes == len(kept) * (matrix - 2 * VOCABULARY - 16)
    found = command("verify", tmp_path / "out", "--for", name)
    assert (found.exit_code, found.stdout.rpartition("; ")[2]) == (0, f"read by {name}\n")
    found = command("verify", tmp_path / "default", "--for", name)
    assert found.exit_code == 5
    assert f"{EMBEDDING}: {name} reads no embedding in INT8" in found.stdout
    assert f"hint: quantize the source with --for {name}" in found.stderr


def test_for_several_programs_what_any_does_not_read_is_kept(tmp_path, sources, command):
    out = tmp_path / "out"
    found = command("quantize", sources[False], out, "--for", "vllm", "--for", "sglang")
    assert found.exit_code == 0
    assert {EMBEDDING, HEAD}.isdisjoint(packed_modules(out))
    cost = 2 * (VOCABULARY * HIDDEN - 2 * VOCABULARY - 16)
    assert f"{cost:,} bytes of it for vllm and sglang" in found.stdout
    assert "kept: vllm reads no embedding in INT8" in found.stderr
    assert "kept: sglang reads no output head of llama in INT8" in found.stderr


def test_the_card_and_inspect_say_who_reads_a_file(tmp_path, sources, command):
    convert.quantize(sources[False], tmp_path / "default")
    convert.quantize(sources[False], tmp_path / "vllm", readers=("vllm",))
    card = (tmp_path / "default" / "README.md").read_text()
    reason = f"tensor {EMBEDDING}: vllm reads no embedding in INT8"
    assert f"- not vllm (0.22 and later): {reason}\n" in card
    assert "- vllm (0.22 and later)\n" in (tmp_path / "vllm" / "README.md").read_text()
    assert f"read by vllm: no, {reason}" in command("inspect", tmp_path / "default").stdout
    assert "read by vllm: yes" in command("inspect", tmp_path / "vllm").stdout
    found = json.loads(command("inspect", tmp_path / "default", "--json").stdout)
    assert found["readers"]["vllm"] == [reason]


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        (("--for", "ollama"), "no reader is called 'ollama'", "use one of vllm, sglang"),
        (("--for", "vllm", "--group-size", "256"), "vllm does not read groups of 256", "128 or"),
        (("--for", "sglang", "--scale", "float32"), "sglang would round float32", "grid8"),
    ],
)
def test_what_a_program_cannot_read_at_all_is_refused(
    tmp_path, sources, command, options, message, hint
):
    found = command("quantize", sources[False], tmp_path / "out", *options)
    assert found.exit_code == 2
    assert f"error: {message}" in found.stderr
    assert hint in found.stderr
    assert not (tmp_path / "out").exists()


def decisions(**shapes):
    tensors = [TensorInfo(f"{name}.weight", "BF16", shape) for name, shape in shapes.items()]
    return Recipe(Scheme(32)).decide_all(tensors)


def kept(found: list[Decision]):
    return {d.tensor.name.removesuffix(".weight"): d.reason for d in found if d.scheme is None}


def test_linears_that_are_joined_are_kept_together():
    shapes = {"a.q_proj": (64, 128), "a.k_proj": (32, 128), "a.v_proj": (64, 128)}
    found = readers.keep_for(
        readers.find_readers(["vllm"]), {}, decisions(**shapes, **{"a.o_proj": (128, 128)})
    )
    reason = "kept: vllm reads no 32 x 128, only multiples of 64 x 128"
    assert kept(found) == dict.fromkeys(shapes, reason)


def test_experts_are_kept():
    found = readers.keep_for(
        readers.find_readers(["vllm"]), {}, decisions(**{"m.experts.0.w1": (128, 128)})
    )
    assert kept(found) == {
        "m.experts.0.w1": "kept: vllm reads no experts in INT8, as far as was run"
    }


def test_a_head_of_a_model_that_is_not_listed_is_kept():
    weights = decisions(lm_head=(128, 128))
    vllm = readers.find_readers(["vllm"])
    assert kept(readers.keep_for(vllm, {"model_type": "bloom"}, weights))
    assert not kept(readers.keep_for(vllm, {"model_type": "llama"}, weights))


def test_find_readers_names_each_once():
    assert [r.name for r in readers.find_readers(["vllm", "vllm"])] == ["vllm"]
    with pytest.raises(UsageError, match="no reader"):
        readers.find_readers(["vllm", "x"])


@pytest.mark.parametrize("tied", [False, True])
def test_plain_transformers_loads_the_file_for_it(tmp_path, sources, tied):
    """With an untied head in INT8: the same logits as our own modules."""
    from transformers import AutoModelForCausalLM

    import halfweight

    convert.quantize(sources[tied], tmp_path / "out", readers=("transformers",))
    model, found = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.tensor([[1, 5, 9, 200, 31]])
    ours = halfweight.load(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, ours(ids).logits, atol=1e-5, rtol=1e-4)
