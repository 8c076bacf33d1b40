"""Registers and spills of w8a16.cu: the page's table is the result's, and limits hold."""

import json
from pathlib import Path

from architectures import CARDS, jobs, table

ROOT = Path(__file__).parents[2]
RESULT = json.loads((ROOT / "benchmarks" / "results" / "architectures.json").read_text())["results"]
MOST_SPILLS = 64


def test_the_page_has_the_results_table():
    assert table(RESULT) in (ROOT / "docs" / "kernels.md").read_text()


def test_every_form_was_compiled_for_every_architecture_and_keeps_to_the_limits():
    assert len(RESULT) == len(list(jobs()))
    assert {row["architecture"] for row in RESULT} == set(CARDS)
    for row in RESULT:
        card = CARDS[row["architecture"]]
        assert 0 < row["registers"] <= 255
        assert 0 < row["shared_bytes"] <= card.block_bytes
        assert row["spills"] <= MOST_SPILLS
