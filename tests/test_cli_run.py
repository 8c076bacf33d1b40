"""`halfweight generate` and `chat` on a tiny model with a real tokenizer."""

from __future__ import annotations

import io
import json

import pytest
from tiny import make_llama
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

import halfweight
from halfweight.cli import main
from halfweight.scheme import Recipe, Scheme

TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An INT8 folder whose tokenizer knows 320 words."""
    root = tmp_path_factory.mktemp("cli")
    source = make_llama(root / "source")
    words = ["user", "assistant", "system", *(f"w{i}" for i in range(317))]
    inner = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="w0"))
    inner.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w0")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(source)
    halfweight.quantize(source, root / "int8", Recipe(Scheme(32)))
    return str(root / "int8")


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main([*arguments])
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err


def test_generate_continues_a_prompt(capsys, folder):
    code, out, err = run(capsys, "generate", folder, "w5 w6", "--max-new-tokens", "4")
    assert code == 0
    assert 1 <= len(out.split()) <= 4
    assert "error" not in err


def test_generate_answers_every_line_of_a_file_in_order(capsys, folder, tmp_path):
    lines = ["w5 w6 w7 w8", "w9", "w5 w6"]
    (tmp_path / "prompts.txt").write_text("\n".join(lines) + "\n")
    options = ("--max-new-tokens", "3", "--batch-size", "2", "--json")
    code, out, _ = run(
        capsys, "generate", folder, "--prompts", str(tmp_path / "prompts.txt"), *options
    )
    answers = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [a["prompt"] for a in answers] == lines
    _, alone, _ = run(capsys, "generate", folder, "w9", *options[:2])
    assert answers[1]["text"].strip() == alone.strip()


def test_no_prompt_and_two_prompts_are_usage_errors(capsys, folder, tmp_path):
    code, _, err = run(capsys, "generate", folder)
    assert code == 2
    assert "no prompt" in err
    missing = str(tmp_path / "none.txt")
    code, _, err = run(capsys, "generate", folder, "--prompts", missing)
    assert code == 2
    assert missing in err
    (tmp_path / "empty.txt").write_text("\n\n")
    code, _, err = run(capsys, "generate", folder, "--prompts", str(tmp_path / "empty.txt"))
    assert code == 2
    assert "no prompts" in err


def test_a_wrong_batch_size_is_a_usage_error(capsys, folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("w1\n")
    code, _, err = run(
        capsys, "generate", folder, "--prompts", str(tmp_path / "prompts.txt"), "--batch-size", "x"
    )
    assert code == 2
    assert "batch size is 'x'" in err


def test_chat_remembers_resets_and_quits(capsys, folder, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("w5\n\nw6\n/reset\nw7\n/quit\nw8\n"))
    code, out, _ = run(capsys, "chat", folder, "--max-new-tokens", "3", "--seed", "1")
    assert code == 0
    assert len(out.splitlines()) == 3


def test_chat_without_a_template_is_refused(capsys, folder, monkeypatch):
    load = PreTrainedTokenizerFast.from_pretrained

    def without_template(*arguments, **options):
        tokenizer = load(*arguments, **options)
        tokenizer.chat_template = None
        return tokenizer

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", without_template)
    code, _, err = run(capsys, "chat", folder)
    assert code == 2
    assert "no chat template" in err
