"""`halfweight plan`: verdicts, exit codes, JSON, and that it starts at once."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import run
from families import save_family

from halfweight.memory.cards import GIB
from halfweight.memory.named_model import planned_model
from halfweight.memory.plan import footprint
from halfweight.memory.plan_document import SCHEMA, VERSION
from halfweight.memory.workload import Workload

SEVENTY = ("plan", "llama-3-70b", "--context", "8192")


def answer(capsys, *arguments):
    code, out, _ = run(capsys, *arguments, "--json")
    return code, json.loads(out)


def test_fits_and_does_not_fit_exit_0_and_3(capsys):
    code, out, _ = run(capsys, *SEVENTY, "--gpus", "4x24GB")
    assert code == 0
    assert "FP16 does not fit" in out
    assert "INT8 fits" in out
    code, out, _ = run(capsys, *SEVENTY, "--gpus", "2x24GB")
    assert code == 3
    assert "GPUs 4 instead of 2 fits" in out


def test_the_document_is_the_plan_in_bytes(capsys):
    code, found = answer(capsys, *SEVENTY, "--gpus", "4x24GB")
    assert (code, found["schema"], found["version"]) == (0, SCHEMA, VERSION)
    model = planned_model("llama-3-70b")
    planned = footprint(model, Workload(8192, ranks=4), "int8")
    parts = found["footprints"]["int8"]["parts"]
    assert {p["name"]: p["bytes"] for p in parts} == {p.name: p.num_bytes for p in planned.parts}
    assert all(p["bytes"] == p["sharded"] + p["replicated"] for p in parts)
    assert found["footprints"]["int8"]["total_bytes"]["high"] == planned.total.high
    assert found["model"]["int8_resident_bytes"] == model.resident_bytes
    assert found["budget_bytes"] == int(23.5 * GIB)
    assert found["legal_tensor_parallel"][:4] == [1, 2, 4, 8]


def test_a_plan_for_vllm_counts_the_file_for_it_and_names_the_commands(capsys):
    """Embedding in 16 bits, head in INT8; with the plug-in neither."""
    call = (*SEVENTY, "--gpus", "2xh200", "--runtime", "vllm", "--kv-dtype", "int8")
    _, plain = answer(capsys, *call, "--budget", "120GB")
    _, plugged = answer(capsys, *call, "--plugin")
    more = plain["model"]["int8_disk_bytes"] - plugged["model"]["int8_disk_bytes"]
    assert more == 128256 * 8192 - 2 * 128256 * (8192 // 128) - 16
    serve = "vllm serve OUT --tensor-parallel-size 2 --max-model-len 8192 --max-num-seqs 1 "
    assert plain["vllm"] == {
        "commands": [
            "halfweight quantize MODEL OUT --for vllm",
            f"{serve}--gpu-memory-utilization 0.82 --kv-cache-dtype fp8",
        ],
        "unread": [],
    }
    assert plugged["vllm"]["commands"] == [
        "halfweight quantize MODEL OUT",
        f"{serve}--gpu-memory-utilization 0.95 --kv-cache-dtype fp8",
    ]
    _, here = answer(capsys, "plan", "llama-3-8b", "--gpus", "24GB")
    assert here["vllm"] is None


def test_a_plan_for_vllm_of_a_folder_says_what_vllm_does_not_read(capsys, int8_folder):
    call = ("plan", int8_folder, "--gpus", "24GB", "--context", "64", "--runtime", "vllm")
    code, out, _ = run(capsys, *call)
    assert code == 0
    assert "vLLM needs halfweight's plug-in for this file: tensor model.embed_tokens" in out
    assert f"run: vllm serve {int8_folder} --tensor-parallel-size 1 --max-model-len 64" in out
    assert "needs halfweight's plug-in" not in run(capsys, *call, "--plugin")[1]


def test_a_plan_for_vllm_refuses_groups_that_it_does_not_read(capsys):
    code, _, err = run(
        capsys, *SEVENTY, "--gpus", "2xh200", "--group-size", "256", "--runtime", "vllm"
    )
    assert code == 2
    assert "error: vllm does not read groups of 256" in err


def test_both_units_are_shown(capsys):
    _, out, _ = run(capsys, "plan", "llama-3-8b", "--gpus", "24GB")
    planned = footprint(planned_model("llama-3-8b"), Workload(), "int8")
    data = planned.bytes_of("int8 data")
    line = next(line for line in out.splitlines() if line.startswith("int8 data"))
    assert line.split()[2:] == [f"{data / 1e9:.3f}", f"{data / 2**30:.3f}"]


def test_the_budget_may_be_absolute_and_reserved_from(capsys):
    _, found = answer(capsys, "plan", "llama-3-8b", "--budget", "22GiB", "--reserve", "2GiB")
    assert found["budget_bytes"] == 20 * GIB
    code, _, err = run(capsys, "plan", "llama-3-8b", "--gpus", "24GB", "--reserve", "24GiB")
    assert code == 2
    assert "--reserve 24GiB leaves nothing" in err


def test_what_is_kept_and_how_scales_are_held_counts(capsys):
    _, plain = answer(capsys, "plan", "llama-3-8b", "--gpus", "h100")
    _, kept = answer(capsys, "plan", "llama-3-8b", "--gpus", "h100", "--keep", "*embed_tokens*")
    grown = kept["model"]["int8_resident_bytes"] - plain["model"]["int8_resident_bytes"]
    rows, width = 128256, 4096
    assert grown == rows * width - rows * (width // 128 + 1)
    _, wide = answer(capsys, "plan", "llama-3-8b", "--gpus", "h100", "--scale", "float32")
    assert wide["model"]["int8_resident_bytes"] > plain["model"]["int8_resident_bytes"]


def test_without_gpus_it_plans_for_this_machine(capsys, monkeypatch):
    from halfweight.memory import devices

    here = devices.parse_nvidia("NVIDIA H100 80GB HBM3, 580.1, 81559, 81000")
    monkeypatch.setattr(devices, "local_device", lambda: here)
    _, found = answer(capsys, "plan", "llama-3-8b")
    assert found["device"] == {"count": 1, "name": here.name, "num_bytes": 81000 * 2**20}
    assert found["workload"]["device"] == "cuda"
    monkeypatch.setattr(devices, "_nvidia", lambda: None)
    monkeypatch.setattr(devices, "local_device", devices.processor_device)
    _, found = answer(capsys, "plan", "smollm2-135m")
    assert found["workload"]["device"] == "cpu"
    names = [p["name"] for p in found["footprints"]["int8"]["parts"]]
    assert not {"decode step", "kernel workspace"} & set(names)


def test_the_command_that_runs_a_plan_is_printed(capsys):
    _, out, _ = run(capsys, *SEVENTY, "--gpus", "4x24GB", "--kv-dtype", "int8")
    assert "on each of 4 GPUs (halfweight)" in " ".join(out.split())
    assert "run: halfweight quantize MODEL OUT\n" in out
    assert "MODEL: the folder or Hub id of llama-3-70b in 16 bits\n" in out
    limits = "--max-context 8192 --max-sequences 1"
    assert f"run: halfweight serve OUT {limits} --tensor-parallel 4 --kv-cache int8\n" in out
    _, out, _ = run(capsys, *SEVENTY, "--gpus", "4x24GB", "--runtime", "vllm")
    assert out.count("halfweight quantize MODEL OUT") == out.count("vllm serve OUT") == 1
    assert "run: halfweight quantize MODEL OUT --for vllm\n" in out
    assert "run: vllm serve OUT --tensor-parallel-size 4 --max-model-len 8192 --max-num-" in out
    code, out, _ = run(capsys, *SEVENTY, "--gpus", "2x24GB")
    assert code == 3
    assert "run: " not in out
    _, out, _ = run(capsys, "plan", "gemma-3-4b", "--gpus", "2x24GB")
    assert "on each of 2 GPUs (vllm)" in " ".join(out.split())
    assert "run: halfweight quantize MODEL OUT --for vllm\n" in out
    assert "plug-in" not in out, "the file that is planned is one that vLLM reads"


@pytest.mark.parametrize(
    ("options", "quantize"),
    [
        (("--group-size", "64"), "OUT --group-size 64"),
        (("--group-size", "128"), "OUT --group-size 128"),
        (("--scale", "bfloat16", "--keep", "lm_head*"), "OUT --scale bfloat16 --keep 'lm_head*'"),
        (("--gpus", "32x24GB", "--tensor-parallel", "32"), "OUT --tensor-parallel 32"),
        (
            ("--runtime", "vllm", "--keep", "model.layers.0.mlp.up_proj.weight"),
            "OUT --for vllm --keep model.layers.0.mlp.up_proj.weight",
        ),
    ],
    ids=str,
)
def test_the_command_makes_the_file_that_was_planned(capsys, options, quantize):
    gpus = () if "--gpus" in options else ("--gpus", "80GB")
    _, out, _ = run(capsys, "plan", "llama-3-8b", *gpus, *options)
    assert f"run: halfweight quantize MODEL {quantize}\n" in out


def test_the_command_names_what_can_be_given(capsys, int8_folder, tmp_path):
    """A folder as it is, quoted; a config.json only describes a model."""
    folder = tmp_path / "a model"
    shutil.copytree(int8_folder, folder)
    options = ("--gpus", "24GB", "--context", "64")
    _, out, _ = run(capsys, "plan", str(folder), *options)
    assert f"run: halfweight serve '{folder}' --max-context 64" in out
    assert "quantize" not in out
    bare = json.loads((folder / "config.json").read_text())
    del bare["quantization_config"]
    (folder / "config.json").write_text(json.dumps(bare))
    _, out, _ = run(capsys, "plan", str(folder / "config.json"), *options)
    assert "run: halfweight quantize MODEL OUT" in out
    assert "MODEL: the folder or Hub id of a model in 16 bits\n" in out
    _, found = answer(capsys, "plan", str(folder / "config.json"), *options)
    assert found["commands"][0].startswith("halfweight quantize MODEL OUT")


def test_legal_sizes_are_the_same_in_the_table_and_in_the_error(capsys):
    words = "1, 2, 4, 8, 16; in smaller groups (--tensor-parallel) also 32"
    _, out, _ = run(capsys, "plan", "llama-3-8b", "--gpus", "4x24GB")
    assert f"tensor-parallel sizes: {words}\n" in out
    for asked in (("--gpus", "7x24GB"), ("--gpus", "7x24GB", "--tensor-parallel", "7")):
        code, _, err = run(capsys, "plan", "llama-3-8b", *asked)
        assert (code, f"hint: legal tensor-parallel sizes: {words}\n" in err) == (2, True)
    _, out, _ = run(capsys, "plan", "llama-3-8b", "--gpus", "32x24GB", "--tensor-parallel", "32")
    assert "tensor-parallel sizes: 1, 2, 4, 8, 16, 32\n" in out, "those of the file for 32"
    _, found = answer(capsys, "plan", "llama-3-8b", "--gpus", "24GB")
    assert found["legal_tensor_parallel"] == [1, 2, 4, 8, 16]
    assert found["regrouped_tensor_parallel"] == [32]
    both = ("--solve", "gpus", "--tensor-parallel", "2")
    code, _, err = run(capsys, "plan", "llama-3-8b", "--gpus", "2x24GB", *both)
    assert (code, "error: --solve gpus beside --tensor-parallel\n" in err) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpus", "banana"), "'banana' is no size and no card"),
        (("--gpus", "2x24GB", "--tensor-parallel", "4"), "--tensor-parallel 4 with 2 GPUs"),
        (("--gpus", "3x24GB"), "3 GPUs do not divide 32 heads"),
        (("--gpus", "24GB", "--batch", "0"), "batch is 0"),
        (("--gpus", "24GB", "--group-size", "100"), "group size 100 is not supported"),
    ],
)
def test_usage_errors(capsys, arguments, message):
    code, _, err = run(capsys, "plan", "llama-3-8b", *arguments)
    assert code == 2
    assert message in err
    assert "hint: " in err


def test_solve_answers_and_shows_the_table(capsys):
    code, found = answer(capsys, "plan", "llama-3-8b", "--gpus", "24GB", "--solve", "batch")
    assert code == 0
    best = found["solution"]["int8"]
    assert best > 1.9 * found["solution"]["16bit"]
    budget, model = found["budget_bytes"], planned_model("llama-3-8b")
    assert footprint(model, Workload(batch=best), "int8").total.high <= budget
    assert footprint(model, Workload(batch=best + 1), "int8").total.high > budget
    for cell in found["grid"]:
        work = Workload(cell["context"], cell["batch"])
        assert cell["total"]["likely"] == footprint(model, work, "int8").total.likely
    code, out, _ = run(capsys, "plan", "llama-3-8b", "--gpus", "24GB", "--solve", "batch")
    assert f"INT8 batch: {best}" in out


def test_solve_for_gpus_and_none(capsys):
    code, found = answer(capsys, *SEVENTY, "--gpus", "24GB", "--solve", "gpus")
    assert (code, found["solution"]) == (0, {"quantity": "gpus", "16bit": 8, "int8": 4})
    code, out, _ = run(capsys, *SEVENTY, "--gpus", "24GB", "--solve", "batch")
    assert code == 3
    assert "INT8 batch: none fits" in out


def test_price_and_read_bandwidth(capsys):
    _, found = answer(
        capsys, *SEVENTY, "--gpus", "4x24GB", "--price", "2", "--read-bandwidth", "3GB"
    )
    served, loaded = found["serving"], found["loading"]
    assert (served["sixteen_bit_gpus"], served["int8_gpus"], served["price"]) == (8, 4, 2.0)
    assert served["relative_cost"] == pytest.approx(
        4 * served["int8_step_bytes"] / (8 * served["sixteen_bit_step_bytes"])
    )
    assert loaded["int8_seconds"] == loaded["int8_bytes"] / 3e9
    assert loaded["sixteen_bit_seconds"] / loaded["int8_seconds"] > 1.9
    _, out, _ = run(capsys, *SEVENTY, "--gpus", "4x24GB", "--price", "2")
    assert "FP16 8 GPUs (16.00 an hour), INT8 4 GPUs (8.00 an hour)" in out.replace("\n", " ")


def test_reading_can_be_measured_on_the_models_own_files(capsys, tmp_path):
    folder = save_family("llama", tmp_path / "model")
    _, found = answer(capsys, "plan", str(folder), "--read-bandwidth", "measure")
    assert found["loading"]["int8_seconds"] > 0
    code, _, err = run(capsys, "plan", "llama-3-8b", "--read-bandwidth", "measure")
    assert code == 2
    assert "no file of the model is here" in err


def test_an_unknown_model_is_a_bad_checkpoint(capsys):
    code, _, err = run(capsys, "plan", "llama-9")
    assert code == 4
    assert "no such file, folder or preset" in err


def test_it_starts_without_torch():
    """Nor numpy or transformers: that is what makes it start in half a second."""
    script = (
        "import sys\n"
        "from halfweight.cli import main\n"
        "try: main(['plan', 'llama-3-70b', '--gpus', '4x24GB'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "found = [m for m in ('torch', 'numpy', 'transformers', 'numba') if m in sys.modules]\n"
        "sys.exit(repr(found) if found else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_documented_fields_are_those_of_the_document(capsys):
    _, found = answer(capsys, "plan", "llama-3-8b", "--gpus", "24GB")
    page = (Path(__file__).parents[2] / "docs" / "plan.md").read_text()
    rows = re.findall(r"^\| (`.*?) \|", page.split("## JSON")[1], re.M)
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == set(found)
