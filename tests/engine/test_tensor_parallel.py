"""Several ranks give the logits of one device, each reading and holding its part of the model."""

import pytest
import rank_program
import torch
import tp_models

import halfweight
from halfweight.checkpoint.headers import read_headers
from halfweight.errors import UsageError
from halfweight.memory.architecture import architecture
from halfweight.memory.plan import Model, footprint
from halfweight.memory.workload import Workload
from halfweight.model.share import check_shareable, described
from halfweight.quantization.scheme import Recipe, Scheme

LIMITS = {"float32": 1e-4, "bfloat16": 2e-2}
"""Largest difference of a logit, as a part of the largest logit."""
KINDS = tuple(tp_models.CONFIGS)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of small INT8 models by kind."""
    root = tmp_path_factory.mktemp("models")
    found = {kind: tp_models.make(kind, root / kind) for kind in KINDS}
    kept = Recipe(Scheme(32), keep=("*embed*", "lm_head*", "*.0.self_attn.o_proj*"))
    found["llama-kept"] = tp_models.make("llama", root / "kept", kept)
    found["groups"] = tp_models.make("llama", root / "groups", Recipe(tensor_parallel=4))
    found["mixtral-16bit"] = root / "mixtral" / "source"
    return found


NAMES = (
    *("llama-2", "llama-4", "qwen2-2", "qwen2-4", "qwen3-2", "qwen3-4", "mixtral-2"),
    *("qwen3_moe-2", "qwen3_moe-4", "llama-kept-2", "mixtral-16bit-2", "groups-4"),
    *("own-llama-4", "own-qwen3-2"),
)
"""Model and number of ranks; "own" by the runner of GPUs, whose kernels are interpreted here."""


def test_groups_of_128_would_have_been_refused(models):
    """What four ranks run as `groups-4`: groups are smaller where ranks divide columns alone."""
    made = described(models["groups"])
    sizes = {d.tensor.name.split(".")[-2]: d.scheme.group_size for d in made.decisions if d.scheme}
    columns = {"o_proj": 64, "down_proj": 64}
    assert sizes == dict.fromkeys(sizes, 128) | columns
    source = read_headers(models["groups"].parent / "source")
    plain = Model.from_recipe(architecture(source.config, "", [t.info for t in source.tensors]))
    with pytest.raises(UsageError, match=r"4 GPUs cut .* inside a group of 128"):
        check_shareable(plain, 4)


UNWANTED = (8, 9)
"""Tokens of the first step, that asks for no logits: 9 are no recorded step of the GPU runner."""


def case_of(name, models):
    kind, _, ranks = name.removeprefix("own-").rpartition("-")
    in_16_bits = name in ("llama-2", "qwen2-4", "qwen3-2")
    return {
        "name": name,
        "model": str(models[kind]),
        "ranks": int(ranks),
        "runner": "gpu" if name.startswith("own") else "transformers",
        "dtype": "bfloat16" if in_16_bits else "float32",
        "kv_cache": "int8" if name == "own-qwen3-2" else "16bit",
        "unwanted": UNWANTED[name == "own-qwen3-2"],
    }


@pytest.fixture(scope="module")
def ran(models, tmp_path_factory):
    """What each case gave; a case's options."""
    folder = tmp_path_factory.mktemp("ranks")
    some = [case_of(name, models) for name in NAMES]
    found = rank_program.run_all(some, folder, 4)
    return {case["name"]: (case, *found[case["name"]]) for case in some}


def test_logits_are_those_of_one_device(ran):
    for name, (case, logits, _) in ran.items():
        dtype = getattr(torch, case["dtype"])
        model = halfweight.load(case["model"], dtype=dtype)
        limit = 0.03 if case["kv_cache"] == "int8" else LIMITS[case["dtype"]]
        for ids, found in zip(rank_program.texts(model.config.vocab_size), logits, strict=True):
            with torch.inference_mode():
                expected = model(torch.tensor([ids]), use_cache=False).logits[0].float()
            if len(ids) == rank_program.LENGTHS[0]:
                expected = expected[case["unwanted"] :]
            assert found.shape == expected.shape
            error = (found - expected).abs().max() / expected.abs().max()
            print(name, f"{float(error):.1e}")
            assert error < limit, (name, error)
            assert expected.argmax(dim=1).unique().numel() > 2, name


def test_each_rank_holds_its_part_and_its_heads_alone(ran):
    for name, (case, _, held) in ran.items():
        dtype, ranks = getattr(torch, case["dtype"]), case["ranks"]
        whole = halfweight.load(case["model"], dtype=dtype)
        everywhere = sum(p.nbytes for n, p in whole.named_parameters() if "norm" in n)
        total = sum(p.nbytes for p in whole.parameters())
        stored = read_headers(case["model"]).num_bytes
        for rank in held:
            assert rank["held"] < (total - everywhere) / ranks * 1.2 + 2 * everywhere, name
            assert rank["read"] < stored / ranks * 1.3 + everywhere, name
        assert len({rank["cache"] for rank in held}) == 1
        assert {rank["runner"] for rank in held} == {
            "GpuRunner" if case["runner"] == "gpu" else "TransformersRunner"
        }
    one, two = (ran[name][2][0]["cache"] for name in ("qwen3-4", "qwen3-2"))
    assert one == two  # float32 of one head, bfloat16 of two


def test_a_rank_holds_what_the_planner_says(ran):
    """Weights to the byte in bfloat16; a page of the runner that plans know."""
    for name in ("llama-2", "qwen2-4", "qwen3-2"):
        case, _, held = ran[name]
        found = footprint(described(case["model"]), Workload(ranks=case["ranks"]), "int8")
        biases = 2 * 2 * 128 if name == "llama-2" else 0  # of o, which rank 0 has alone
        assert held[0]["held"] == found.weight_bytes
        assert {rank["held"] for rank in held[1:]} == {found.weight_bytes - biases}
    case, _, held = ran["own-llama-4"]
    work = Workload(context=64, ranks=4)  # a page, and the one that is nobody's
    pages = footprint(described(case["model"]), work, "int8").kv_bytes
    assert held[0]["cache"] == 2 * pages / 2  # in float32
