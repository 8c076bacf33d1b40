"""`halfweight generate` and `chat` on a tiny model with a real tokenizer."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from command_line import run
from transformers import PreTrainedTokenizerFast

import halfweight


def test_generate_continues_a_prompt(capsys, int8_folder):
    code, out, err = run(capsys, "generate", int8_folder, "w5 w6", "--max-new-tokens", "4")
    assert code == 0
    assert 1 <= len(out.split()) <= 4
    assert "error" not in err


def test_generate_answers_every_line_of_a_file_in_order(capsys, int8_folder, tmp_path):
    lines = ["w5 w6 w7 w8", "w9", "w5 w6"]
    (tmp_path / "prompts.txt").write_text("\n".join(lines) + "\n")
    options = ("--max-new-tokens", "3", "--greedy", "--max-sequences", "2", "--json")
    code, out, _ = run(
        capsys, "generate", int8_folder, "--prompts", str(tmp_path / "prompts.txt"), *options
    )
    answers = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [a["prompt"] for a in answers] == lines
    _, alone, _ = run(capsys, "generate", int8_folder, "w9", *options[:3])
    assert answers[1]["text"].strip() == alone.strip()


def test_no_prompt_and_two_prompts_are_usage_errors(capsys, int8_folder, tmp_path):
    code, _, err = run(capsys, "generate", int8_folder)
    assert code == 2
    assert "error: no prompt\n" in err
    code, _, err = run(capsys, "generate", int8_folder, "w5", "--prompts", "file")
    assert code == 2
    assert "error: PROMPT and --prompts\n" in err
    missing = str(tmp_path / "none.txt")
    code, _, err = run(capsys, "generate", int8_folder, "--prompts", missing)
    assert code == 2
    assert missing in err
    (tmp_path / "empty.txt").write_text("\n\n")
    code, _, err = run(capsys, "generate", int8_folder, "--prompts", str(tmp_path / "empty.txt"))
    assert code == 2
    assert "no prompts" in err


def test_prompts_are_utf8_whatever_the_locale(capsys, int8_folder, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_bytes("w5 \u00e9\n".encode())
    monkeypatch.setattr("locale.getencoding", lambda: "ascii")
    monkeypatch.setattr("_locale.getencoding", lambda: "ascii")
    options = ("--prompts", str(tmp_path / "prompts.txt"), "--max-new-tokens", "1", "--json")
    code, out, _ = run(capsys, "generate", int8_folder, *options)
    assert code == 0
    assert json.loads(out)["prompt"] == "w5 \u00e9"


def test_a_prompt_that_is_refused_prints_nothing(capsys, int8_folder):
    code, out, err = run(capsys, "generate", int8_folder, "w5", "--max-new-tokens", "9999")
    assert (code, out) == (2, "")
    assert "hint: shorten the prompt, or ask for " in err


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("tpu", "device 'tpu' is not known"),
        ("", "device '' is not known"),
        ("cuda:-1", "device 'cuda:-1' is not known"),
        ("mps", "device is mps, expected cpu or a CUDA GPU"),
        ("meta", "device is meta, where nothing is computed"),
    ],
)
def test_what_no_model_runs_on_is_one_line(capsys, int8_folder, device, message):
    code, _, err = run(capsys, "generate", int8_folder, "w5", "--device", device)
    assert code == 2
    assert err.splitlines()[0] == f"error: {message}"
    assert err.splitlines()[1].startswith("hint: ")


def test_one_file_is_no_model(capsys, int8_folder):
    shard = Path(int8_folder) / "model.safetensors"
    code, _, err = run(capsys, "generate", str(shard), "w5")
    assert code == 4
    assert f"error: {shard}: no config.json read with it, expected a model folder" in err


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": "x"},
        {"num_attention_heads": 3},
        {"rope_parameters": 5},
        {"hidden_act": "foo"},
        {"num_key_value_heads": 0},
    ],
)
def test_a_config_that_transformers_cannot_build_is_one_line(capsys, int8_folder, tmp_path, change):
    folder = shutil.copytree(int8_folder, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    code, _, err = run(capsys, "generate", str(folder), "w5")
    assert code == 4
    assert f"error: {folder / 'config.json'}: " in err
    assert "Traceback" not in err


def test_a_chat_whose_stdin_is_closed_ends(capsys, int8_folder, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    code, out, _ = run(capsys, "chat", int8_folder)
    assert (code, out) == (0, "")


def test_sampling_is_the_models_unless_told_otherwise(capsys, caplog, int8_folder, tmp_path):
    folder = tmp_path / "sampled"
    shutil.copytree(int8_folder, folder)
    saved = {"do_sample": True, "temperature": 1.5, "top_k": 30, "eos_token_id": 2}
    (folder / "generation_config.json").write_text(json.dumps(saved))
    ask = ("generate", str(folder), "w5 w6", "--max-new-tokens", "8")
    texts = {run(capsys, *ask, "--seed", str(seed))[1] for seed in range(4)}
    assert len(texts) > 1
    greedy = {run(capsys, *ask, "--greedy", "--seed", str(seed))[1] for seed in range(2)}
    assert greedy == {run(capsys, *ask, "--temperature", "0")[1]}
    with caplog.at_level("INFO", "halfweight"):
        run(capsys, "-v", *ask)
    assert "temperature=1.5, top_k=30" in caplog.text
    code, _, err = run(capsys, *ask, "--greedy", "--temperature", "1")
    assert code == 2
    assert "--greedy and --temperature" in err


def test_logits_that_are_no_numbers_are_a_failure(capsys, int8_folder, tmp_path):
    folder = tmp_path / "nan"
    model = halfweight.load(int8_folder, dtype=torch.float32)
    model.model.norm.weight.data[0] = float("nan")
    model.save_pretrained(folder)
    shutil.copy(Path(int8_folder) / "tokenizer.json", folder)
    shutil.copy(Path(int8_folder) / "tokenizer_config.json", folder)
    for options in ((), ("--json",)):
        code, _, err = run(capsys, "generate", str(folder), "w5", *options)
        assert code == 1
        assert "logits are NaN after 1 tokens" in err
        assert "hint: " in err
        assert "bfloat16" in err


def test_chat_remembers_resets_and_quits(capsys, int8_folder, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("w5\n\nw6\n/reset\nw7\n/quit\nw8\n"))
    code, out, _ = run(capsys, "chat", int8_folder, "--max-new-tokens", "3", "--seed", "1")
    assert code == 0
    assert len(out.splitlines()) == 3


def test_chat_without_a_template_is_refused(capsys, int8_folder, monkeypatch):
    load = PreTrainedTokenizerFast.from_pretrained

    def without_template(*arguments, **options):
        tokenizer = load(*arguments, **options)
        tokenizer.chat_template = None
        return tokenizer

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", without_template)
    code, _, err = run(capsys, "chat", int8_folder)
    assert code == 2
    assert "no chat template" in err


TEMPLATES = {
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}": (
        2,
        "its chat template refuses these messages (no system here)",
    ),
    "{% for m in messages %}{{ m.content }": (4, "its chat template has a syntax error in line 1"),
    "{{ messages[0].content + 1 }}": (2, "its chat template cannot be used"),
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_chat_template_that_cannot_be_used_is_one_line(capsys, int8_folder, tmp_path, template):
    folder = shutil.copytree(int8_folder, tmp_path / "m")
    (folder / "chat_template.jinja").write_text(template)
    code, _, err = run(capsys, "chat", str(folder), "--system", "be brief")
    expected, message = TEMPLATES[template]
    assert code == expected
    assert message in err
    assert "Traceback" not in err


def test_several_templates_without_a_default_are_named(capsys, int8_folder, tmp_path):
    folder = shutil.copytree(int8_folder, tmp_path / "m")
    (folder / "chat_template.jinja").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = [
        {"name": name, "template": "{{ messages[0].content }}"} for name in ("rag", "tool_use")
    ]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    code, _, err = run(capsys, "chat", str(folder))
    assert code == 2
    assert "it has several (rag, tool_use) and none is called default" in err


def test_the_template_of_a_processor_is_used(capsys, int8_folder, tmp_path, monkeypatch):
    folder = shutil.copytree(int8_folder, tmp_path / "m")
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    monkeypatch.setattr("builtins.input", lambda _: "/quit")
    code, _, err = run(capsys, "chat", str(folder))
    assert code == 0, err
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": [1]}))
    code, _, err = run(capsys, "chat", str(folder))
    assert code == 4
    assert "chat_template.json: chat_template is list, expected text" in err


def test_an_encoder_does_not_generate(capsys, tmp_path):
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    BertModel(config).save_pretrained(tmp_path / "bert")
    for command in (("generate", str(tmp_path / "bert"), "x"), ("chat", str(tmp_path / "bert"))):
        code, _, err = run(capsys, *command)
        assert code == 2
        assert "bert: BertModel does not continue a text" in err


def test_a_broken_tokenizer_is_one_line_with_its_file(capsys, int8_folder, tmp_path):
    folder = shutil.copytree(int8_folder, tmp_path / "m")
    (folder / "tokenizer.json").write_text("[1")
    code, _, err = run(capsys, "generate", str(folder), "w1")
    assert code == 4
    assert "tokenizer.json: cannot be read as JSON" in err
