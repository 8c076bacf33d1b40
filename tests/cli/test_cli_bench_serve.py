"""`halfweight bench serve` on a tiny model: the engine, and the same through HTTP."""

import json
from dataclasses import fields

import pytest
from command_line import run
from tiny import make_llama

import halfweight
from halfweight.evaluation.speed.serving import Row

SMALL = ["--prompt-tokens", "20", "--new-tokens", "6", "--no-speculate"]


def bench(capsys, *arguments):
    return run(capsys, "bench", "serve", *map(str, arguments))


def test_engine_and_server_answer_every_request(pair, capsys):
    pytest.importorskip("uvicorn")
    _, folder, _ = pair
    loads = ["--concurrency", 1, "--concurrency", 3, "--rate", 50, "--requests", 6]
    code, out, err = bench(capsys, folder, *loads, *SMALL, "--http", "--json")
    assert code == 0, err
    rows = json.loads(out)
    found = [(row["runner"], row["concurrency"], row["rate"]) for row in rows]
    assert found == [
        *(("engine", 1, None), ("http", 1, None)),
        *(("engine", 3, None), ("http", 3, None)),
        *(("engine", None, 50.0), ("http", None, 50.0)),
    ]
    for row in rows:
        assert row.keys() == {field.name for field in fields(Row)}
        assert (row["num_requests"], row["prompt_tokens"], row["new_tokens"]) == (6, 20, 6)
        assert row["tokens_per_second"] > 0
        assert 0 < row["first_token_ms_p50"] <= row["first_token_ms_p95"]
        assert row["first_token_ms_p95"] <= row["first_token_ms_p99"]
        assert (row["prefill_tokens_per_second"] is None) == (row["rate"] is not None)
        assert (row["client_busy"] is None) == (row["runner"] == "engine")


def test_a_table_of_prompts_from_a_text(pair, capsys):
    _, folder, text = pair
    code, out, _ = bench(capsys, folder, "--concurrency", 2, *SMALL, "--text", text)
    assert code == 0
    assert "prompts of 20 tokens, 6 new" in out
    assert "engine" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text", "nowhere.txt"], "nowhere.txt: "),
        (["--prompt-tokens", "600"], "prompts of 600"),
        (["--url", "http://127.0.0.1:9"], "http: "),
    ],
)
def test_what_cannot_run_is_refused(pair, capsys, options, message):
    _, folder, text = pair
    code, _, err = bench(capsys, folder, "--text", text, "--new-tokens", "4", *options)
    assert code in (1, 2)
    assert message in err


def test_a_server_needs_a_tokenizer(tmp_path, capsys):
    source = make_llama(tmp_path / "source")
    (source / "tokenizer.json").unlink()
    halfweight.quantize(source, tmp_path / "int8")
    code, _, err = bench(capsys, tmp_path / "int8", *SMALL, "--http")
    assert code == 2
    assert "no tokenizer" in err
