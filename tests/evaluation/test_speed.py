"""Measuring whole models: what comes back is what was measured, and failures are told apart."""

import mmap
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from fresh_rows import count_to, die, fail_after_one, here, slow_to_end
from tiny import make_llama

import halfweight
from halfweight.engine.request import Output
from halfweight.evaluation.speed import generate, load
from halfweight.evaluation.speed.generate import DecodeTime, FirstTokenTime, Workload
from halfweight.evaluation.speed.process import HostMemory, from_fresh_process
from halfweight.evaluation.speed.rivals import (
    HALFWEIGHT,
    HALFWEIGHT_INT8,
    SIXTEEN_BIT,
    TORCHAO,
    Folders,
    open_model,
)

CPU = torch.device("cpu")
QUICK = Workload((1, 2), 8, 6, 16, repeats=1, steps=("eager",))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("speed")
    source = make_llama(root / "source", max_position_embeddings=512)
    halfweight.quantize(source, root / "int8")
    return Folders(source, root / "int8")


def test_rows_come_from_another_process_in_order():
    rows = list(from_fresh_process(count_to, 3))
    assert [i for _, i in rows] == [0, 1, 2]
    assert {pid for pid, _ in rows}.isdisjoint({os.getpid()})


def test_a_process_that_is_done_is_not_waited_for():
    begin = time.monotonic()
    assert list(from_fresh_process(slow_to_end)) == [1]
    assert time.monotonic() - begin < 10


@pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
def test_a_process_does_not_outlive_the_one_that_started_it():
    code = (
        "from fresh_rows import count_to\n"
        "from halfweight.evaluation.speed.process import from_fresh_process\n"
        "if __name__ == '__main__':\n"
        "    for pid, _ in from_fresh_process(count_to, 1000, 0.1): print(pid, flush=True)\n"
    )
    command = [sys.executable, "-c", code]
    parent = subprocess.Popen(
        command, cwd=Path(__file__).parents[1] / "helpers", stdout=subprocess.PIPE
    )
    child = int(parent.stdout.readline())
    os.kill(child, 0)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{child}").exists()


@pytest.mark.parametrize(
    ("rows", "message"),
    [(fail_after_one, "ValueError: the second$"), (die, "ended without a result")],
)
def test_a_process_that_fails_leaves_its_rows(rows, message):
    found = []
    with pytest.raises(RuntimeError, match=message):
        found.extend(_each(from_fresh_process(rows), found))
    assert found == [1]


def _each(rows, found):
    for row in rows:
        found.append(row)
    return []


def test_a_process_ends_at_the_deadline():
    begin = time.monotonic()
    rows = list(from_fresh_process(count_to, 10**6, 0.1, deadline=begin + 2))
    assert time.monotonic() - begin < 10
    assert len(rows) < 21


def test_loads_are_measured_in_turn(folders, monkeypatch):
    monkeypatch.setattr(load, "from_fresh_process", here)
    told = []
    found = load.compare(folders, CPU, repeats=1, report=told.append)
    assert told == found
    assert [row.rival for row in found] == [SIXTEEN_BIT, HALFWEIGHT]
    for row, folder in zip(found, (folders.source, folders.quantized), strict=True):
        assert row.file_bytes == sum(p.stat().st_size for p in folder.glob("*.safetensors"))
        assert row.seconds > 0
    parameters = sum(p.nbytes for p in open_model(HALFWEIGHT, folders, CPU).parameters())
    assert found[1].resident_bytes == parameters


def test_a_comparison_takes_medians():
    def row(rival, seconds, num_bytes):
        return load.LoadTime(rival, seconds, 1000, num_bytes, num_bytes, 0, 0)

    rows = [row(SIXTEEN_BIT, s, 200) for s in (4.0, 9.0, 5.0)]
    rows += [row(HALFWEIGHT, s, 101) for s in (1.0, 2.0, 60.0)]
    found = load.summarize(rows)
    assert found.speedup == 2.5
    assert found.bytes_change == pytest.approx(-0.495)
    assert found.bytes_per_second == 500


def test_generation_is_measured_and_errors_are_reported(folders, monkeypatch):
    monkeypatch.setattr(generate, "from_fresh_process", here)
    told = []
    rivals = (SIXTEEN_BIT, HALFWEIGHT, TORCHAO)
    rows = generate.compare(
        rivals, folders, CPU, QUICK, report=lambda rival, row: told.append((rival, row))
    )
    measured = [row for _, row in told if not isinstance(row, str)]
    assert measured == rows
    assert [type(row) for row in rows[:3]] == [FirstTokenTime, DecodeTime, DecodeTime]
    decoding = [row for row in rows if isinstance(row, DecodeTime)]
    assert [row.step for row in decoding if row.rival == SIXTEEN_BIT] == ["eager", "eager"]
    assert [row.step for row in decoding if row.rival == HALFWEIGHT] == ["engine", "engine"]
    for row in rows:
        if isinstance(row, DecodeTime):
            rate = row.batch_size / row.step_milliseconds * 1e3
            assert row.tokens_per_second == pytest.approx(rate)
            assert row.bytes_per_second == pytest.approx(
                row.step_bytes * row.tokens_per_second / row.batch_size
            )
    if told[-1][0] == rivals[-1] and isinstance(told[-1][1], str):
        assert "torchao" in told[-1][1]


def test_a_step_is_timed_while_all_requests_decode(monkeypatch):
    """Two requests, of which the second starts late and the first ends early."""
    now = iter([0.0, 1.0, 2.0, 5.0, 6.0, 7.0, 8.0, 9.0])
    monkeypatch.setattr(generate.time, "perf_counter", lambda: next(now))
    arrivals, first, second = generate.Arrivals(2), [], []
    for seen, reason in (
        *((first, None), (first, None), (second, None), (first, None)),
        *((second, None), (first, "length"), (second, "length")),
    ):
        arrivals._take(seen, Output((1,), reason))
    assert arrivals.first_token_seconds == 5.0
    assert arrivals.step_seconds == pytest.approx((8.0 - 5.0) * 2 / 3)
    assert arrivals._done.is_set()


def test_speedups_are_of_each_rivals_best_step():
    def decode(rival, step, batch, rate):
        return DecodeTime(rival, step, batch, rate, 1.0, 1, 1.0, 0.5, 0.0)

    rows = [
        FirstTokenTime(SIXTEEN_BIT, 16, 10.0),
        FirstTokenTime(HALFWEIGHT, 16, 11.0),
        decode(SIXTEEN_BIT, "graph", 1, 50.0),
        decode(SIXTEEN_BIT, "compiled", 1, 100.0),
        decode(HALFWEIGHT, "graph", 1, 190.0),
        decode(HALFWEIGHT, "compiled", 1, 180.0),
        decode(HALFWEIGHT, "graph", 64, 1.0),
    ]
    (found,) = generate.speedups(rows)
    assert found.rival == HALFWEIGHT
    assert found.decode == {1: 1.9}
    assert found.first_token_ratio == 1.1


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rival", [SIXTEEN_BIT, HALFWEIGHT])
def test_a_step_reads_every_weight_once_but_the_table(tmp_path, rival, tied):
    source = make_llama(tmp_path / "source", tied=tied)
    halfweight.quantize(source, tmp_path / "int8")
    model = open_model(rival, Folders(source, tmp_path / "int8"), CPU)
    table = sum(p.nbytes for p in model.get_input_embeddings().parameters())
    weights = {p.data_ptr(): p.nbytes for p in model.parameters()}
    expected = sum(weights.values()) - (0 if tied else table)
    assert generate.step_bytes(model, 3, 10) == expected + 3 * 10 * 2 * 2 * 2 * 16 * 2


def test_int8_activations_are_a_rival_of_their_own(folders, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "halfweight.model.loading.load", lambda *_, **options: asked.append(options)
    )
    with pytest.raises(AttributeError):
        open_model(HALFWEIGHT_INT8, folders, CPU)
    assert asked[0]["activations"] == "int8"


def test_host_memory_sees_an_allocation():
    with HostMemory() as memory:
        # malloc might hand out pages that the process has already
        pages = mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        torch.frombuffer(pages, dtype=torch.uint8).fill_(1)
        deadline = time.monotonic() + 10
        while memory.peak_bytes < 60 << 20 and time.monotonic() < deadline:
            time.sleep(0.005)
        del pages
    assert 60 << 20 < memory.peak_bytes < 200 << 20
    assert memory.peak_resident_bytes > memory.peak_bytes
