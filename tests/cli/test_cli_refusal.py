"""generate and serve refuse what the plan says cannot fit on a GPU, before they load."""

import shutil

import pytest
from command_line import run

from halfweight.memory import device_memory


@pytest.fixture
def full_gpu(monkeypatch):
    """A GPU with 100 kB free, and a loader that must not be reached."""

    def loads(*_, **__):
        raise AssertionError("loaded")

    monkeypatch.setattr(device_memory, "available_bytes", lambda device: 100_000)
    monkeypatch.setattr("halfweight.model.loading.load", loads)


def test_generate_refuses_and_says_what_would_fit(full_gpu, capsys, int8_folder):
    code, _, err = run(capsys, "generate", int8_folder, "w5 w6", "--max-new-tokens", "60")
    assert code == 3
    assert "error: batch 1 of 62 tokens needs" in err
    assert "--force tries all the same" in err
    with pytest.raises(AssertionError, match="loaded"):
        run(capsys, "generate", int8_folder, "w5 w6", "--max-new-tokens", "60", "--force")


def test_the_longest_of_several_prompts_counts(full_gpu, capsys, int8_folder, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("w5\nw6 w7 w8\nw9\n")
    options = ("--prompts", str(prompts), "--max-new-tokens", "10")
    code, _, err = run(capsys, "generate", int8_folder, *options)
    assert code == 3
    assert "batch 1 of 13 tokens needs" in err


def test_serve_refuses(full_gpu, capsys, int8_folder):
    code, _, err = run(capsys, "serve", int8_folder, "--cache-tokens", "4096")
    assert code == 3
    assert "batch 1 of 4096 tokens needs" in err
    with pytest.raises(AssertionError, match="loaded"):
        run(capsys, "serve", int8_folder, "--cache-tokens", "4096", "--force")


def test_with_room_it_goes_on(full_gpu, capsys, int8_folder, monkeypatch):
    for free in (10**9, None):
        monkeypatch.setattr(device_memory, "available_bytes", lambda device, free=free: free)
        with pytest.raises(AssertionError, match="loaded"):
            run(capsys, "generate", int8_folder, "w5 w6", "--max-new-tokens", "60")


@pytest.mark.parametrize(
    "command", [("generate", "w5"), ("chat",), ("serve",), ("bench", "serve", "--http")], ids=str
)
def test_a_model_without_a_tokenizer_is_refused(full_gpu, capsys, int8_folder, tmp_path, command):
    folder = tmp_path / "bare"
    shutil.copytree(int8_folder, folder, ignore=shutil.ignore_patterns("*token*"))
    forced = ("--force",) if command[0] in ("generate", "serve") else ()
    at = 2 if command[0] == "bench" else 1
    words = [*command[:at], str(folder), *command[at:], *forced]
    code, _, err = run(capsys, *words)
    assert code == 2
    assert f"error: {folder}: found no tokenizer, needed to turn text into tokens\n" in err
    assert "hint: copy tokenizer.json and tokenizer_config.json from the original model\n" in err
