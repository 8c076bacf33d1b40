"""What benchmarks/kernels_table.py writes of an H200's results, made up here, and when."""

import json

import kernels
import kernels_table
import pytest
import readme_tables

NAMES = ("float16", "halfweight cuda", "halfweight sm80", "halfweight triton")
SPEEDS = {
    ("gate_up", 1): (1.0, 2.0, 1.8, 1.9, 1.6, 1.5, 1.0),
    ("gate_up", 16): (1.0, 1.8, 1.6, 0.8, 1.9, 1.2, 1.805),
    ("down", 1): (1.0, 2.0, 1.8, 1.9, 1.6, 1.5, 1.0),
    ("down", 16): (1.0, 1.8, 1.6, 0.8, 0.9, 1.2, None),
}


def product_rows():
    for (shape, tokens), speeds in SPEEDS.items():
        heading = {"shape": shape, "out_features": 8, "in_features": 4, "tokens": tokens}
        for name, speed in zip((*NAMES, *kernels_table.SAME_KIND), speeds, strict=True):
            ran = {"microseconds": 1.0, "speedup_over_float16": speed}
            row = {"error": "it failed"} if speed is None else ran
            yield heading | {"kernel": name} | row


def decode_rows(batches):
    for rival, step, factor in (
        ("transformers 16-bit", "graph", 1),
        ("transformers 16-bit", "compiled", 2),
        ("halfweight", "engine", 4),
    ):
        yield {"rival": rival, "prompt_tokens": 2048, "milliseconds": 1.0}
        for batch in batches:
            rate, share = 1000.0 * factor * batch, 0.2 * factor
            times = {"tokens_per_second": rate, "fraction_of_read_bandwidth": share}
            yield {"rival": rival, "step": step, "batch_size": batch} | times


@pytest.fixture
def results(monkeypatch, tmp_path):
    """A folder of results for the page, and how one is written."""
    monkeypatch.setattr(kernels_table, "RESULTS", tmp_path)
    monkeypatch.setattr(readme_tables, "RESULTS", tmp_path)

    def write(name, found):
        versions = {"vllm": "0.22.0", "humming-kernels": "0.1.20"}
        facts = {"device": "NVIDIA H200", "versions": versions}
        facts["ceiling"] = {"read_bytes_per_second": 4.56e12}
        (tmp_path / f"{name}.json").write_text(json.dumps({**facts, "results": found}))

    return write


def decoding(old, new, batches):
    workload = {"batch_sizes": batches, "prompt_tokens": old, "new_tokens": new}
    return {"workload": workload, "rows": list(decode_rows(batches))}


def test_without_results_the_page_stays(results):
    assert kernels_table.page() == kernels_table.PAGE.read_text()


def test_the_products_replace_what_was_measured_before(results):
    rows = list(product_rows())
    results("kernels_h200", rows)
    page = kernels_table.page()
    assert kernels.markdown(rows) in page
    assert "(vLLM 0.22.0, humming 0.1.20)" in page
    assert "from 257 tokens on" in page
    assert "| Marlin g128 | 1.25 | 1.38 |" in page
    assert "| humming g128 | 2.00 | 1.00 |" in page
    assert "Ahead by more than 1%, by tokens: Marlin g128 at `gate_up` for 16 (1.90).\n" in page
    assert "`gate_up` and `down` this\nkernel reaches 2.00 of their speed at 16 tokens" in page
    assert "Over Marlin, which was written for Ampere, it\nhas 1.22 times the speed at 16" in page
    assert "three faults put into it are seen" in page


def test_it_is_said_that_no_peer_is_ahead():
    rows = [row for row in product_rows() if row["kernel"] != "Marlin g128"]
    assert kernels_table.ahead(rows) == "None of them is ahead by more than 1% in any product."


def test_steps_are_shown_once_both_workloads_were_measured(results):
    results("generate_h200", decoding(128, 256, [1, 64]))
    assert kernels_table.page() == kernels_table.PAGE.read_text()
    results("generate_h200_context", decoding(2048, 128, [16]))
    page = kernels_table.page()
    assert "| at once | 1 | 64 | 16 x 2,048 |\n|---|---|---|---|\n" in page
    assert "| 16 bit, tokens/s | 2,000 | 128,000 | 32,000 |" in page
    assert "| INT8, share of the read | 80% | 80% | 80% |" in page


def test_a_second_writing_changes_nothing(results, monkeypatch, tmp_path):
    results("kernels_h200", list(product_rows()))
    copy = tmp_path / "kernels.md"
    copy.write_text(kernels_table.page())
    monkeypatch.setattr(kernels_table, "PAGE", copy)
    assert kernels_table.page() == copy.read_text()
