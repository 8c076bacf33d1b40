"""Plans beside measurements: what is kept, and what the next plan makes of it."""

import json

import pytest
import torch
from command_line import run
from tiny import make_llama

import halfweight
from halfweight.memory import devices, measurements
from halfweight.memory.architecture import architecture
from halfweight.memory.devices import Device
from halfweight.memory.measurements import Key, Record, add_record, calibrated_overhead, records_for
from halfweight.memory.named_model import planned_model
from halfweight.memory.plan import Model, footprint
from halfweight.memory.presets import preset
from halfweight.memory.workload import ASSUMED_OVERHEAD, MIB, Range, Workload

KEY = Key("card", "1", "2.13", "0.1.0", "2 x 64")


@pytest.fixture(autouse=True)
def _own_records(tmp_path, monkeypatch):
    monkeypatch.setattr(measurements, "records_path", lambda: tmp_path / "cache" / "memory.json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("measured")
    halfweight.quantize(make_llama(place / "source"), place / "int8")
    return place / "int8"


def record(total, *, batch=1, allocated=1000 * MIB, slack=0, key=KEY):
    workload = {"context": 64, "batch": batch, "kv_dtype": "16bit", "weights": "int8"}
    parts = {"weights": 1}
    return Record(key, workload, parts, parts, allocated, slack, 2000 * MIB, total)


def test_a_measurement_agrees_with_the_plan_and_serves_the_next(folder, capsys, monkeypatch):
    """Weights and cache to the byte, in a real process on the CPU."""
    here = devices.processor_device()
    monkeypatch.setattr(devices, "local_device", lambda: here)
    options = (str(folder), "--context", "128", "--batch", "2")
    code, out, _ = run(capsys, "measure", *options, "--json")
    found = json.loads(out)
    planned = footprint(
        planned_model(str(folder)), Workload(128, 2, device="cpu"), found["workload"]["weights"]
    )
    assert code == 0
    assert found["measured"]["weights"] == planned.weight_bytes == found["predicted"]["weights"]
    assert found["measured"]["KV cache"] == planned.kv_bytes
    assert sum(found["measured"].values()) == found["measured_total"]
    assert found["error"] == found["predicted_total"] / found["measured_total"] - 1
    _, out, _ = run(capsys, "plan", *options, "--json")
    plan = json.loads(out)
    assert plan["calibration"]["measurements"] == 1
    assert plan["calibration"]["worst_error"] == pytest.approx(abs(found["error"]))
    likely = plan["footprints"]["int8"]["total_bytes"]["likely"]
    assert likely == found["measured_total"], "the same workload again is predicted as it was"
    _, out, _ = run(capsys, "plan", *options)
    assert "measured here 1 times" in out


def test_options_may_stand_anywhere(folder, capsys, monkeypatch):
    """Before the model or after it, in any order, the same workload is run and written down."""
    monkeypatch.setattr(devices, "local_device", devices.processor_device)
    asked = []

    def measured(folder, model, work, weights):
        asked.append((folder, work.context, work.batch, work.kv_dtype, work.device, weights))
        return record(1000 * MIB)

    monkeypatch.setattr("halfweight.evaluation.memory_run.measure", measured)
    options = (("--context", "128"), ("--batch", "2"), ("--kv-dtype", "int8"), ("--device", "cpu"))
    for words in ((*options, (str(folder),)), ((str(folder),), *reversed(options))):
        code, _, _ = run(capsys, "measure", *(word for pair in words for word in pair))
        assert code == 0
    assert asked == [(str(folder), 128, 2, "int8", "cpu", "int8")] * 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpus_memory_is_taken_apart(folder, capsys):
    code, out, _ = run(capsys, "measure", str(folder), "--context", "128", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["measured"]["KV cache"] == found["predicted"]["KV cache"]
    assert found["measured"]["weights"] == pytest.approx(found["predicted"]["weights"], abs=MIB)
    assert sum(found["measured"].values()) == found["measured_total"]
    assert min(found["measured"].values()) >= 0
    assert found["measured_total"] == pytest.approx(found["predicted_total"], abs=400 * MIB)


@pytest.mark.parametrize("given_back", [0, 900], ids=["all is kept", "some is given back"])
def test_the_total_on_a_gpu_is_the_most_that_was_taken(monkeypatch, given_back):
    """10,000 MiB free before and 7,000 after, of which torch had reserved more meanwhile."""
    from halfweight.evaluation import memory_run
    from halfweight.model import loading

    free = iter((10_000, 7_000))
    monkeypatch.setattr(memory_run, "_free_bytes", lambda: next(free) * MIB)
    monkeypatch.setattr(loading, "load", lambda *_, **__: None)
    monkeypatch.setattr(memory_run, "_generate", lambda *_: 100 * MIB)
    for name, found in (
        ("synchronize", None),
        ("reset_peak_memory_stats", None),
        ("memory_allocated", 1_000 * MIB),
        ("max_memory_allocated", 1_700 * MIB),
        ("memory_reserved", 1_200 * MIB),
        ("max_memory_reserved", (1_200 + given_back) * MIB),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda found=found: found)
    (seen,) = memory_run.run_once("FOLDER", Workload(), 4096)
    assert seen.total == (3_000 + given_back) * MIB
    assert seen.components == {
        "weights": 1_000 * MIB,
        "KV cache": 100 * MIB,
        "activations": 600 * MIB,
    }


def test_what_cannot_fit_is_refused_unless_forced(folder, capsys, monkeypatch):
    from halfweight.evaluation import memory_run

    small = Device("cpu", "a processor", "1", 1 << 20, 1 << 20)
    monkeypatch.setattr(devices, "local_device", lambda: small)
    code, _, err = run(capsys, "measure", str(folder), "--context", "128", "--batch", "64")
    assert code == 3
    assert "batch 64 of 128 tokens needs" in err
    assert "--force" in err
    monkeypatch.setattr(memory_run, "measure", lambda *_: record(1000 * MIB))
    code, _, _ = run(capsys, "measure", str(folder), "--batch", "64", "--context", "128", "--force")
    assert code == 0


def test_a_context_beyond_the_models_is_refused(folder, capsys):
    code, _, err = run(capsys, "measure", str(folder), "--context", "9999")
    assert code == 2
    assert "context 9999 is more than the model's" in err


def test_a_gpu_that_is_not_there(folder, capsys, monkeypatch):
    monkeypatch.setattr(devices, "local_device", devices.processor_device)
    code, _, err = run(capsys, "measure", str(folder), "--device", "cuda")
    assert code == 2
    assert "no NVIDIA GPU here" in err


def test_a_failed_process_is_one_error(monkeypatch):
    from halfweight.errors import HalfweightError
    from halfweight.evaluation import memory_run

    def fail(*_, **__):
        raise RuntimeError("the process ended without a result (killed for memory?)")

    monkeypatch.setattr(memory_run, "from_fresh_process", fail)
    llama = Model.from_recipe(architecture(preset("llama-3-8b")))
    with pytest.raises(HalfweightError, match="measuring FOLDER: the process ended") as caught:
        memory_run.measure("FOLDER", llama, Workload(device="cpu"), "int8")
    assert "halfweight plan" in caught.value.hint


def test_records_lie_in_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert measurements.records_path() == tmp_path / "halfweight" / "memory.json"


def test_measurements_narrow_the_assumption():
    assumed = ASSUMED_OVERHEAD["cuda"]
    assert calibrated_overhead([], "cuda") == assumed
    below, above = assumed.likely - assumed.low, assumed.high - assumed.likely
    one = calibrated_overhead([record(1500 * MIB)], "cuda")
    assert one == Range(500 * MIB - below // 2, 500 * MIB, 500 * MIB + above // 2)
    three = calibrated_overhead([record(n * MIB, batch=n) for n in (1500, 1500, 1520)], "cuda")
    assert three == Range(500 * MIB - below // 4, 500 * MIB, 520 * MIB + above // 4)


def test_what_a_measurement_adds_is_beside_the_slack_of_its_own_workload():
    """Two workloads that differ in what comes and goes show the same process."""
    small = record(1600 * MIB, allocated=1000 * MIB, slack=0)
    large = record(3800 * MIB, batch=2, allocated=3000 * MIB, slack=200 * MIB)
    assert calibrated_overhead([small, large], "cuda").likely == 600 * MIB


def test_records_are_of_one_key_and_the_newest_of_a_workload_counts():
    add_record(record(1500 * MIB))
    add_record(record(1600 * MIB))
    add_record(record(1700 * MIB, batch=2))
    other = Key("card", "2", "2.13", "0.1.0", "2 x 64")
    add_record(record(1800 * MIB, key=other))
    assert [r.measured_total // MIB for r in records_for(KEY)] == [1600, 1700]
    assert record(1600 * MIB).error == pytest.approx(0.25)


def test_a_record_of_another_form_is_no_record():
    add_record(record(1500 * MIB))
    for text in ('{"records": [{"key": {}}]}', '{"records": [1]}', '{"rec', ""):
        measurements.records_path().write_text(text)
        assert measurements.read_records() == []
    add_record(record(1500 * MIB))
    assert len(measurements.read_records()) == 1


def test_the_key_tells_devices_drivers_and_architectures_apart():
    small, large = (architecture(preset(n)) for n in ("llama-3-8b", "llama-3-70b"))
    card = Device("cuda", "NVIDIA H100", "580.1", 1, 1)
    newer = Device("cuda", "NVIDIA H100", "590.1", 1, 1)
    keys = {measurements.key_of(d, a) for d, a in ((card, small), (newer, small), (card, large))}
    assert len(keys) == 3
