"""The benchmark of the plan's accuracy: what it runs, what it sums up, that it runs."""

import json
import sys
from dataclasses import fields
from pathlib import Path

import plan_accuracy
import pytest

from halfweight.evaluation import memory_run
from halfweight.memory.devices import Device
from halfweight.memory.measurements import Key, Record
from halfweight.memory.named_model import planned_model
from halfweight.memory.plan import footprint
from halfweight.memory.workload import MIB, Workload

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

KEY = Key("card", "1", "2.13", "0.1.0", "x")
CARD = Device("cuda", "card", "1", 24_000 * MIB, 24_000 * MIB)


def record(batch, allocated, overhead):
    """Predicted with 700 MiB, of which 100 are the allocator's slack."""
    total = allocated + overhead * MIB
    predicted = allocated + 700 * MIB
    return Record(KEY, {"batch": batch}, {}, {}, allocated, 100 * MIB, predicted, total)


RESULTS = BENCHMARKS / "results"
BY_ENGINE = RESULTS / "plan_accuracy_engine.json"
BEFORE = RESULTS / "plan_accuracy.json"


def test_the_plan_of_today_meets_the_goal_on_what_was_measured():
    """Within 3 % in the mean and 6 % at worst, and short of no card by more than 2 %."""
    found = json.loads(BY_ENGINE.read_text())
    rows, card = found["results"]["rows"], found["ceiling"]["device_bytes"]
    assert found["results"]["runs_by"] == "engine"
    model = planned_model(found["results"]["shape"])
    pairs = [(planned(model, row["workload"]), row["measured_total"]) for row in rows]
    errors = [abs(predicted / measured - 1) for predicted, measured in pairs]
    assert {row["workload"]["weights"] for row in rows} == {"16bit", "int8"}
    assert {row["workload"]["batch"] for row in rows} >= {1, 8}
    assert sum(errors) / len(errors) < 0.03
    assert max(errors) < 0.06
    assert max(measured - predicted for predicted, measured in pairs) < 0.02 * card


@pytest.mark.parametrize("result", [BY_ENGINE, BEFORE], ids=["by the engine", "before it"])
def test_the_summary_of_the_result_is_that_of_its_rows(result):
    """One row may be of an earlier run, and says so."""
    found = json.loads(result.read_text())
    names = [field.name for field in fields(Record) if field.name != "key"]
    records = [Record(KEY, **{n: row[n] for n in names}) for row in found["results"]["rows"]]
    size = found["ceiling"]["device_bytes"]
    card = Device("cuda", found["device"], "1", size, size)
    assert plan_accuracy.summary(records, card) == pytest.approx(found["results"]["summary"])


def planned(model, workload):
    """Bytes that are likely for the workload of a row."""
    weights = workload["weights"]
    work = Workload(workload["context"], workload["batch"], workload["kv_dtype"])
    return footprint(model, work, weights).total.likely


def test_the_configurations_span_what_is_claimed():
    found = plan_accuracy.CONFIGURATIONS
    assert len(set(found)) == 12
    for field, values in (
        (0, {"16bit", "int8"}),
        (1, {512, 32768}),
        (2, {1, 32}),
        (3, {"16bit", "int8"}),
    ):
        assert values <= {configuration[field] for configuration in found}
    assert {(w, c) for w, c, _, _ in found} >= {("16bit", 32768), ("int8", 32768)}


def test_the_summary_counts_errors_and_what_a_plan_was_short_of():
    """700 MiB are assumed; 940 and 460 were taken beside 1,000 and 11,540 allocated. By the one
    measurement the other is predicted with 460 and 940.
    """
    records = [record(1, 1000 * MIB, 940), record(2, 11540 * MIB, 460)]
    found = plan_accuracy.summary(records, CARD)
    low, high = 240 / 1940, 240 / 12000
    assert found["mean_absolute_error"] == pytest.approx((low + high) / 2)
    assert found["worst_absolute_error"] == pytest.approx(low)
    assert found["most_short_of_card"] == pytest.approx(240 / 24000)
    assert found["calibrated_worst_absolute_error"] == pytest.approx(480 / 1940)
    assert found["calibrated_most_short_of_card"] == pytest.approx(480 / 24000)


def test_it_runs_and_writes(tmp_path, monkeypatch):
    """Two workloads of the tiny shape, run in this process."""
    monkeypatch.setattr(memory_run, "from_fresh_process", lambda run, *rest, **_: run(*rest))
    options = ["--tiny", "--configurations", "2", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["plan_accuracy.py", *options])
    plan_accuracy.main()
    found = json.loads((tmp_path / "plan_accuracy.json").read_text())
    assert {"command", "commit", "device", "versions", "ceiling"} <= found.keys()
    rows = found["results"]["rows"]
    assert [r["workload"]["weights"] for r in rows] == ["16bit", "int8"]
    for row in rows:
        for part in ("weights", "KV cache"):
            assert row["measured"][part] == row["predicted"][part]
    assert found["results"]["summary"]["worst_absolute_error"] > 0
