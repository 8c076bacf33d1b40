"""The command evaluate: figures, JSON, what it says before it starts."""

import json
import math
import sys

from command_line import run

import halfweight


def test_evaluate_prints_every_figure(capsys, pair, tmp_path):
    source, out, text = pair
    code, output, err = run(
        capsys, "evaluate", str(out), "--reference", str(source), "--text", str(text),
        "--context", "64", "--work", str(tmp_path),
    )  # fmt: skip
    assert code == 0, err
    assert "496 tokens in 8 windows" in err
    assert "states take 63.49 kB" in err
    for what in ("perplexity", "change (paired)", "KL mean", "KL 99.9 %", "same top token", "±"):
        assert what in output
    assert "\x1b" not in output + err


def test_evaluate_json_agrees_with_the_library(capsys, pair):
    source, out, text = pair
    options = {"context": 32, "stride": 16, "tokens": 200, "batch_size": 3}
    expected = halfweight.evaluate(out, text=text, reference=source, **options)
    code, output, _ = run(
        capsys, "evaluate", str(out), "--reference", str(source), "--text", str(text), "--json",
        "--context", "32", "--stride", "16", "--tokens", "200", "--batch-size", "3",
    )  # fmt: skip
    assert code == 0
    found = json.loads(output)
    assert found["num_tokens"] == expected.num_tokens == 199
    compared = found["comparison"]
    assert compared["kl_mean"]["value"] == expected.comparison.kl_mean.value
    assert 0 < compared["kl_mean"]["value"] < 1e-3
    assert abs(compared["perplexity_change"]["value"]) < 0.01
    assert compared["top_agreement"]["value"] > 0.9


def test_without_a_reference_only_perplexity_is_told(capsys, pair):
    source, _, text = pair
    code, output, _ = run(capsys, "evaluate", str(source), "--text", str(text), "--json")
    assert code == 0
    found = json.loads(output)
    assert found["comparison"] is None
    assert math.isfinite(found["perplexity"]["value"])


def test_a_missing_text_is_bad_input(capsys, pair):
    source, _, _ = pair
    code, _, err = run(capsys, "evaluate", str(source), "--text", "no-such-text")
    assert code == 4
    assert "no-such-text: cannot be read as UTF-8 text" in err
    assert "hint: give a file of plain text" in err


def test_quantize_check_passes_a_close_model(capsys, pair, tmp_path):
    source, _, text = pair
    arguments = ("--check", str(text), "--max-kl", "0.01")
    code, _, err = run(capsys, "quantize", str(source), str(tmp_path / "out"), *arguments)
    assert code == 0
    assert "KL divergence from the source: 0.0000" in err
    assert (tmp_path / "out" / "config.json").exists()


def test_quantize_check_publishes_nothing_that_fails(capsys, pair, tmp_path):
    source, _, text = pair
    arguments = ("quantize", str(source), str(tmp_path / "out"))
    code, _, err = run(capsys, *arguments, "--check", str(text), "--max-kl", "0")
    assert code == 5
    assert "error: KL divergence from the source is 0.0000" in err
    assert "expected at most 0" in err
    assert "hint: try a smaller group size" in err
    assert "what is finished is kept" in err
    assert not (tmp_path / "out").exists()
    code, output, _ = run(capsys, *arguments)  # without the check: all shards were kept
    assert code == 0
    assert "wrote " in output
    code, _, err = run(capsys, *arguments, "--check", str(text), "--max-kl", "0")
    assert code == 5  # a complete folder is checked too


def test_quantize_check_leaves_the_folder_it_was_to_replace(capsys, pair, tmp_path):
    source, _, text = pair
    out = tmp_path / "out"
    halfweight.quantize(source, out)
    before = (out / "halfweight.json").read_bytes()
    code, _, err = run(
        capsys, "quantize", str(source), str(out), "--overwrite", "--group-size", "32",
        "--check", str(text), "--max-kl", "0",
    )  # fmt: skip
    assert code == 5, err
    assert (out / "halfweight.json").read_bytes() == before
    assert halfweight.verify(out).problems == ()


def test_quantize_check_refuses_before_the_work(capsys, pair, tmp_path):
    source, _, _ = pair
    arguments = ("quantize", str(source), str(tmp_path / "out"))
    code, _, err = run(capsys, *arguments, "--check", "no-such-text")
    assert code == 4
    assert "no-such-text: cannot be read as UTF-8 text" in err
    (tmp_path / "short.txt").write_text("a")
    code, _, err = run(capsys, *arguments, "--check", str(tmp_path / "short.txt"))
    assert code == 2
    assert "the text has 1 tokens; a score needs 2" in err
    code, _, err = run(capsys, *arguments, "--max-kl", "0.1")
    assert code == 2
    assert "error: --max-kl 0.1 without --check has nothing to measure" in err
    assert "hint: give a file of plain text with --check" in err
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]  # nothing was begun


def test_a_text_or_tasks_and_not_both(capsys, pair):
    _, out, text = pair
    for words in ((), ("--text", str(text), "--tasks", "arc_easy")):
        code, _, err = run(capsys, "evaluate", str(out), *words)
        assert code == 2
        assert "evaluate needs either --text or --tasks" in err
    words = ("--tasks", "arc_easy", "--reference", str(out))
    code, _, err = run(capsys, "evaluate", str(out), *words)
    assert code == 2
    assert "--reference is for --text" in err


def test_tasks_need_the_harness(capsys, pair, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    code, _, err = run(capsys, "evaluate", str(pair[1]), "--tasks", "arc_easy")
    assert code == 2
    assert "tasks need lm-evaluation-harness, which is not installed" in err
    assert "halfweight[eval]" in err
