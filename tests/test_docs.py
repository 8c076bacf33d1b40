"""The documents' commands are executed: every console line and every Python block, in order."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import envelope
import export_table
import kernels
import kernels_table
import pytest
import readme_tables
import serve_table
import tiles
import torch
import training

from halfweight.cli import main

ROOT = Path(__file__).parent.parent

DOCS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
RESULTS = sorted((ROOT / "benchmarks/results").glob("*.json"))
SKIPPED = ("halfweight serve", "halfweight chat", "halfweight demo", "halfweight bench")
BLOCK = re.compile(r"```(console|python)\n(.*?)```", re.DOTALL)
NAMED = re.compile(r"`((?:[\w.-]+/)+[\w.-]+\.(?:py|cu|cuh|json|md|toml))`")
PLACES = (ROOT, ROOT / "halfweight", ROOT / "docs")
LINK = re.compile(r"\]\((?!https?://|#)([^)#]+)")


def commands(kind: str, page: str = "quickstart") -> list[str]:
    return [body for k, body in BLOCK.findall((ROOT / f"docs/{page}.md").read_text()) if k == kind]


@pytest.fixture
def workplace(int8_folder, tmp_path, monkeypatch):
    """A folder with the names that the quickstart uses: SRC and FILE."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "SRC").symlink_to(Path(int8_folder).parent / "source")
    (tmp_path / "FILE").write_text("w5 w6 w7 w8 w9 w10 w11 w12 " * 40)
    return tmp_path


def test_the_quickstart_runs(workplace, capsys):
    lines = [
        line.split("#")[0].strip() for body in commands("console") for line in body.splitlines()
    ]
    ran = 0
    for line in lines:
        if not line or line.startswith(SKIPPED):
            continue
        words = shlex.split(line)
        assert words[0] == "halfweight"
        extra = ["--group-size", "32"] if words[1] == "quantize" else []
        extra += ["--context", "16"] if words[1] == "evaluate" else []
        with pytest.raises(SystemExit) as ended:
            main([*words[1:], *extra])
        assert ended.value.code == 0, (line, capsys.readouterr().err)
        ran += 1
    assert ran >= 5


def test_the_python_of_the_quickstart_runs(workplace):
    names: dict[str, object] = {}
    for body in commands("python"):
        exec(compile(body, "quickstart.md", "exec"), names)
    assert type(names["model"]).__name__ == "LlamaForCausalLM"


def test_the_python_of_the_engines_page_runs(pair, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2-135m-int8").symlink_to(pair[1])
    names: dict[str, object] = {}
    for body in commands("python", "engine"):
        exec(compile(body, "engine.md", "exec"), names)
    assert len(names["answers"]) == 3
    assert re.search(r"[1-9]\d* tokens were in the cache\n", capsys.readouterr().out)


def test_the_engines_page_names_every_field_and_metric():
    from prometheus_client.parser import text_string_to_metric_families

    from halfweight.engine.request import Sampling
    from halfweight.serve import schema
    from halfweight.serve.metrics import Metrics

    page = (ROOT / "docs/engine.md").read_text()
    fields = set(schema.ChatRequest.model_fields) | set(schema.CompletionRequest.model_fields)
    fields |= schema.WITHOUT_EFFECT | set(schema.ASKS_NOTHING) | set(Sampling.__dataclass_fields__)
    found = text_string_to_metric_families(Metrics().page(0)[0].decode())
    counters = {f"{each.name}_total" if each.type == "counter" else each.name for each in found}
    counters = {name for name in counters if not name.endswith("_created")}
    for name in fields | counters:
        assert f"`{name}`" in page, name


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in LINK.findall(page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_files_that_a_page_names_are_there(page):
    for name in NAMED.findall(page.read_text()):
        there = any((place / name).exists() for place in PLACES)
        assert there, f"{page.name} names {name}"


def test_every_command_named_in_the_docs_exists():
    from typer.main import get_command

    from halfweight.cli import app

    known = set(get_command(app).commands)
    for page in DOCS:
        named = set(
            re.findall(r"`halfweight ([a-z]+)|^halfweight ([a-z]+)", page.read_text(), re.M)
        )
        for command in {a or b for a, b in named}:
            assert command in known, f"{page.name} names `halfweight {command}`"


def test_the_readmes_figures_are_those_of_the_results():
    assert readme_tables.PAGE.read_text() == readme_tables.page()


@pytest.mark.parametrize(
    ("page", "name"), [("kernels.md", "kernels"), ("notes/kernels.md", "kernels_sm80_h200")]
)
def test_the_kernels_pages_tables_are_those_of_the_results(page, name):
    text = (ROOT / "docs" / page).read_text()
    assert kernels.markdown(readme_tables.results(name)["results"]) in text


@pytest.mark.parametrize(
    ("family", "name"),
    [("hopper", "hopper_tiles_h200"), ("sm80", "sm80_tiles")],
)
def test_the_table_of_chosen_tiles_is_that_of_the_result(family, name):
    page = (ROOT / "docs" / "kernels.md").read_text()
    rows = readme_tables.results(name)["results"]
    assert tiles.markdown(tiles.FAMILIES[family], rows) in page


@pytest.mark.parametrize(
    ("family", "name"),
    [("hopper", "hopper_tiles_h200"), ("sm80", "sm80_tiles")],
)
def test_what_the_choice_of_tiles_loses_is_what_the_sweep_says(family, name):
    rows = readme_tables.results(name)["results"]
    lost = tiles.told_losses(tiles.FAMILIES[family], rows).splitlines()[-1]
    assert lost in (ROOT / "docs" / "kernels.md").read_text()


def test_the_figures_of_an_h200_are_those_of_the_results():
    assert kernels_table.PAGE.read_text() == kernels_table.page()


def test_the_training_pages_table_is_that_of_the_result():
    page = (ROOT / "docs/training.md").read_text()
    assert training.markdown(readme_tables.results("training")["results"]) in page


def test_the_export_pages_figures_are_those_of_its_results():
    assert export_table.PAGE.read_text() == export_table.page()


def test_a_results_command_names_no_folder_of_the_machine(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["benchmarks/x.py", "--models", str(tmp_path), "int8 rows"])
    found = envelope.envelope(torch.device("cpu"), {})["command"]
    assert found == f"python benchmarks/x.py --models {tmp_path.name} 'int8 rows'"


@pytest.mark.parametrize("result", RESULTS, ids=lambda path: path.stem)
def test_no_stored_command_names_a_folder_of_the_machine(result):
    command = json.loads(result.read_text())["command"]
    assert not [word for word in shlex.split(command) if word.startswith("/")]


def test_the_engines_figures_are_those_of_its_result():
    assert serve_table.PAGE.read_text() == serve_table.page()


def test_the_page_of_vllm_has_the_rates_that_were_recorded():
    page = (ROOT / "docs" / "vllm.md").read_text()
    rates = {"halfweight": [], "vllm": []}
    for row in readme_tables.results("vllm_plugin")["results"]:
        rates[row["kernel"]].append(row["tokens_per_second"])
    for name, kernel in (("our kernel", "halfweight"), ("vLLM's (Machete)", "vllm")):
        shown = (f"{rate:,.0f}" for rate in rates[kernel])
        assert f"| {name} | {' | '.join(shown)} tokens/s |" in page
    gains = [ours / theirs for ours, theirs in zip(rates["halfweight"], rates["vllm"], strict=True)]
    assert f"| | {' | '.join(f'{gain:.2f}' for gain in gains)} |" in page
    said = f"on H200s {min(gains):.2f} to {max(gains):.2f} times the tokens a second"
    assert said in (ROOT / "README.md").read_text()


def test_the_page_of_ranks_has_the_rates_that_were_recorded():
    page = (ROOT / "docs" / "distributed.md").read_text()
    rows = readme_tables.results("tensor_parallel")["results"]
    rates = [f"{row['tokens_per_second']:,.0f}" for row in rows if row["limit_bytes"] is None]
    assert len(rates) > 4
    assert [rate for rate in rates if f"| {rate} |" not in page] == []
