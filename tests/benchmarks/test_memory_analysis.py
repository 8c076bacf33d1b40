"""The memory analysis is what its script writes, and the script's sums are true."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def analysis():
    spec = importlib.util.spec_from_file_location(
        "memory_analysis", ROOT / "benchmarks" / "memory_analysis.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_script_writes(analysis):
    written = (ROOT / "docs" / "memory-analysis.md").read_text()
    assert written == analysis.page(), "run python benchmarks/memory_analysis.py"


def rows(text):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]


def test_the_textbook_sum(analysis):
    """By hand: 8e9 / 128 = 62.5e6 scales."""
    by_bytes = {row[1]: row for row in rows(analysis.nominal_totals()) if row[0] == "Llama-3-8B"}
    assert by_bytes["4"][3:] == ["0.2500 GB", "8.250 GB (7.683 GiB)", "48.44 %"]
    assert by_bytes["1"][3:] == ["0.0625 GB", "8.062 GB (7.509 GiB)", "49.61 %"]


def test_the_real_totals(analysis):
    """By hand from the published shapes of Llama-3-8B: linears, embedding, head."""
    layer = 4096 * (4096 + 1024 + 1024 + 4096) + 3 * 4096 * 14336
    weights = 32 * layer + 2 * 128256 * 4096
    row = next(r for r in rows(analysis.real_totals(())) if r[:2] == ["Llama-3-8B", "4"])
    assert row[2:4] == [f"{weights:,}", f"{weights // 128 * 4:,}"]
    assert row[-1] == "48.44 %"


def test_70b_fits_four_cards_of_24_gb_in_int8_only(analysis):
    verdicts = {r[0]: r[-1] for r in rows(analysis.on_cards("llama-3-70b", ("4x24GB",), 8192))}
    assert verdicts["4x24GB, FP16"] == "does not fit"
    assert verdicts["4x24GB, INT8"] == "fits"
