"""The commands quantize, inspect and verify: output, exit codes, Ctrl-C."""

import json
import os
import signal
import subprocess
import sys

import pytest
from command_line import run
from tiny import hashes, make_llama

from halfweight.checkpoint import layout
from halfweight.conversion import convert, shard_writer
from halfweight.conversion.workspace import workspace_folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make_llama(tmp_path_factory.mktemp("llama"))


def test_quantize_inspect_verify(capsys, llama, tmp_path):
    out = str(tmp_path / "out")
    code, text, err = run(capsys, "quantize", str(llama), out)
    assert code == 0
    assert "16 tensors quantized, 5 kept" in text
    assert "wrote " in text
    assert "group size 64: 128 does not divide 64" in err
    assert "\x1b" not in text + err  # neither colours nor a bar where there is no terminal
    code, text, _ = run(capsys, "inspect", out)
    assert code == 0
    assert "int8" in text
    assert "bits each" in text
    assert "in memory under halfweight" in text
    code, text, _ = run(capsys, "verify", out)
    assert code == 0
    assert "all as written" in text


def test_json_output(capsys, llama, tmp_path):
    out = str(tmp_path / "out")
    code, text, _ = run(capsys, "quantize", str(llama), out, "--json", "--scale", "bfloat16")
    report = json.loads(text)
    assert code == 0
    assert report["num_quantized"] == 16
    assert report["out"] == out
    _, text, _ = run(capsys, "inspect", out, "--json", "--tensors")
    contents = json.loads(text)
    assert sum(contents["bytes_by_kind"].values()) == contents["data_bytes"]
    assert contents["data_bytes"] == report["disk_bytes"]
    assert contents["resident_bytes"] == report["resident_bytes"]
    assert len(contents["tensors"]) == 21
    _, text, _ = run(capsys, "inspect", str(llama), "--json")
    assert json.loads(text)["plan"]["disk_bytes"] == report["disk_bytes"]
    _, text, _ = run(capsys, "verify", out, "--json")
    assert json.loads(text)["problems"] == []


def test_inspect_of_a_source_tells_what_quantize_would_make(capsys, llama):
    code, text, _ = run(capsys, "inspect", str(llama))
    assert code == 0
    assert "quantized, on disk:" in text
    assert "quantized, in memory:" in text


def test_inspect_tensors_prints_whole_names(capsys, llama):
    _, text, _ = run(capsys, "inspect", str(llama), "--tensors")
    assert "model.layers.1.post_attention_layernorm.weight" in text


def test_options_reach_the_recipe(capsys, llama, tmp_path):
    out = str(tmp_path / "out")
    options = ["--keep", "*embed*", "--keep", "*k_proj*", "--group-size", "row", "--jobs", "1"]
    options += ["--scale", "float32", "--scale-choice", "absmax"]
    code, _, err = run(capsys, "quantize", str(llama), out, *options)
    assert code == 0
    assert "kept by '*k_proj*'" in err
    recipe = json.loads((tmp_path / "out" / "halfweight.json").read_text())["job"]["recipe"]
    assert recipe == {
        "scheme": {"group_size": "row", "scale_format": "float32", "scale_choice": "absmax"},
        "keep": ["*embed*", "*k_proj*"],
    }
    code, _, err = run(capsys, "quantize", str(llama), out)
    assert code == 2
    assert "hint: choose another output folder, or replace it with --overwrite" in err
    assert run(capsys, "quantize", str(llama), out, "--overwrite")[0] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--group-size", "100"], "group size 100 is not supported"),
        (["--group-size", "colour"], "group size 'colour' is not supported"),
        (["--scale", "int3"], "scale format 'int3' is not known"),
        (["--scale-choice", "best"], "scale choice 'best' is not known"),
        (["--jobs", "0"], "--jobs"),
    ],
)
def test_bad_options_exit_2(capsys, llama, tmp_path, options, message):
    code, _, err = run(capsys, "quantize", str(llama), str(tmp_path / "out"), *options)
    assert code == 2
    assert message in err


def test_a_bad_source_exits_4_and_a_bad_folder_5(capsys, llama, tmp_path):
    code, text, err = run(capsys, "quantize", str(tmp_path / "none"), str(tmp_path / "out"))
    assert (code, text) == (4, "")
    assert err.startswith("error: ")
    assert "\nhint: " in err
    out = tmp_path / "out"
    convert.quantize(llama, out)
    os.truncate(out / "model.safetensors", 1000)
    code, text, err = run(capsys, "verify", str(out))
    assert code == 5
    assert "1000 bytes, expected" in text
    assert "2 problems, first: " in err
    code, text, _ = run(capsys, "verify", str(out), "--json")
    assert code == 5
    assert len(json.loads(text)["problems"]) == 2
    code, text, err = run(capsys, "verify", str(tmp_path / "none"))
    assert (code, text) == (4, ""), "nothing is there to be verified"
    assert "none: no such file or folder" in err
    convert.quantize(llama, out, overwrite=True)
    (out / "README.md").write_text("")
    assert "1 problem, first: " in run(capsys, "verify", str(out))[2]


def test_ctrl_c_finishes_the_shard_and_exits_130(capsys, llama, tmp_path, monkeypatch):
    monkeypatch.setattr(layout, "MAX_SHARD_BYTES", 30_000)
    convert.quantize(llama, tmp_path / "whole")
    write_shard = shard_writer.write_shard

    def interrupted(*arguments):
        if arguments[1].name.startswith("model-00002"):
            os.kill(os.getpid(), signal.SIGINT)
        return write_shard(*arguments)

    out = str(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(shard_writer, "write_shard", interrupted)
        code, _, err = run(capsys, "quantize", str(llama), out)
    assert code == 130
    assert "finishing this step; Ctrl-C again stops now" in err
    assert "error: interrupted; 2 of " in err
    assert "hint: run the same command again" in err
    assert not (tmp_path / "out").exists()
    code, text, _ = run(capsys, "quantize", str(llama), out, "--json")
    assert (code, json.loads(text)["resumed_shards"]) == (0, 2)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_ctrl_c_twice_stops_now(llama, tmp_path):
    """In a process of its own, for it dies without unwinding."""
    program = f"""
import os, signal, time
from halfweight.conversion import shard_writer
from halfweight.cli import main
def interrupted(*arguments):
    while True:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)  # two signals at once may arrive as one
shard_writer.write_shard = interrupted
main(["quantize", {str(llama)!r}, {str(tmp_path / "out")!r}])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 130
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
    assert workspace_folder(tmp_path / "out").exists()
    convert.quantize(llama, tmp_path / "out")


def test_quantize_for_several_gpus_says_what_their_groups_cost(capsys, llama, tmp_path):
    out = str(tmp_path / "out")
    code, text, err = run(capsys, "quantize", str(llama), out, "--tensor-parallel", "2")
    assert code == 0
    assert "group size 32: 128 does not divide 32, the columns that each rank has" in err
    more = 2 * 2 * 64 * (1 + 3)  # two layers, scales of two bytes, 64 rows of o_proj and down_proj
    assert f"{more:,} bytes of it for 2 GPUs" in text
    recipe = json.loads((tmp_path / "out" / "halfweight.json").read_text())["job"]["recipe"]
    assert recipe["tensor_parallel"] == 2
    _, text, _ = run(capsys, "quantize", str(llama), str(tmp_path / "alone"), "--json")
    alone = json.loads(text)
    code, text, _ = run(
        capsys, *("quantize", str(llama), out, "--tensor-parallel", "2", "--json", "--overwrite")
    )
    found = json.loads(text)
    assert (found["ranks_bytes"], alone["ranks_bytes"]) == (more, 0)
    assert found["disk_bytes"] == alone["disk_bytes"] + more
    assert "tensor_parallel" not in (tmp_path / "alone" / "halfweight.json").read_text()


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        (3, "error: 3 GPUs do not divide 4 heads"),
        (
            4,
            "error: 4 GPUs leave model.layers.0.self_attn.o_proj.weight 16 columns each, which no ",
        ),
    ],
)
def test_quantize_refuses_gpus_that_no_groups_allow(capsys, llama, tmp_path, ranks, words):
    out = tmp_path / "out"
    command = ("quantize", str(llama), str(out), "--tensor-parallel", str(ranks))
    code, _, err = run(capsys, *command)
    assert code == 2
    assert words in err
    hint = "hint: legal tensor-parallel sizes: 1; in smaller groups (--tensor-parallel) also 2\n"
    assert hint in err
    assert not out.exists()
