"""docs/interop.md: every row has a test, a result or a word of doubt; every form has its row."""

import re
from pathlib import Path

import pytest

from halfweight.checkpoint import readers
from halfweight.checkpoint.forms import MARKS, METHODS, READERS, form_of
from halfweight.conversion.export import FORMS
from halfweight.quantization.scheme import TensorInfo

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/interop.md").read_text()
OURS, OTHERS, EXPORTS = "Our file in other", "Others' files", "Our file, written"
BY_HAND = re.compile(r"(run by hand \d{4}-\d\d-\d\d\b|read in its source)")
UNREAD = {
    method: name
    for method, name in METHODS.items()
    if not any(read.startswith(name) for read in READERS)
}


def rows(part: str) -> list[list[str]]:
    """Cells of each row of a section's tables, without the headings."""
    (section,) = (text for text in PAGE.split("\n## ") if text.startswith(part))
    lines = [line for line in section.splitlines() if line.startswith("|")]
    heads = {i for i, line in enumerate(lines[1:]) if line.startswith("|---")}
    found = [line for i, line in enumerate(lines) if i not in heads and i - 1 not in heads]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in found]


ROWS = [row for part in PAGE.split("\n## ")[1:] for row in rows(part[:17])]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: " ".join(row[:3])[:60])
def test_a_row_stands_on_something_that_is_there(row):
    proof = row[-1]
    assert bool(proof) != ("untested" in row), "a proof, or the word untested"
    named = re.findall(r"`([^`]+)`", proof)
    assert not proof or named or BY_HAND.search(proof), f"{proof} is no proof"
    for name in named:
        path, _, test = name.partition("::")
        if path.startswith("make "):
            assert f"\n{path.removeprefix('make ')}:" in (ROOT / "Makefile").read_text()
        elif BY_HAND.search(proof) is None:
            assert (ROOT / path).exists(), name
            assert not test or f"\ndef {test}(" in (ROOT / path).read_text(), name


def test_there_are_tables():
    assert len(ROWS) > 50


def test_every_form_that_is_read_has_a_row_and_no_other():
    found = {row[0] for row in rows(OTHERS) if len(row) == 5}
    of_gguf = {name for name in found if name.startswith("GGUF")}
    assert found - of_gguf == {*READERS, "compressed-tensors W8A16"}
    assert "GGUF Q8_0" in of_gguf


def test_every_form_that_is_not_read_has_a_row():
    refused = ", ".join(row[0] for row in rows(OTHERS) if len(row) == 4)
    names = {*UNREAD.values(), *(name for name, _ in MARKS if name not in READERS)}
    for name in names - {"torchao"}:  # its 8 bits are read
        assert re.search(rf"\b{re.escape(name)}\b", refused), name


@pytest.mark.parametrize("method", UNREAD)
def test_every_method_that_is_not_read_is_called_by_its_name(method):
    config = {"quantization_config": {"quant_method": method}}
    form = form_of(config, [TensorInfo("a.weight", "BF16", (4, 4))])
    assert form is not None
    assert (form.name, form.is_read) == (UNREAD[method], False)
    assert f"{UNREAD[method]} checkpoint" in str(form.refused("x"))


def test_every_form_of_export_has_rows():
    assert {row[0] for row in rows(EXPORTS)} == {f"`{form}`" for form in FORMS}


def test_every_program_of_the_option_for_has_rows():
    programs = {row[0].lower() for row in rows(OURS)}
    for name in readers.READERS:
        assert any(program.startswith(name) for program in programs), name
