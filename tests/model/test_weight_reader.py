"""Every byte of a checkpoint arrives, once, by whatever cut of chunks, threads and destinations."""

import os
import random

import pytest
import torch
from safetensors.torch import save_file
from tiny import make_llama, tensors_of

from halfweight.checkpoint.headers import read_headers
from halfweight.errors import CheckpointError, DoesNotFitError
from halfweight.memory import device_memory
from halfweight.model import weight_reader

GPU = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.fixture
def folder(tmp_path):
    return make_llama(tmp_path / "model")


def targets_of(checkpoint, device="cpu"):
    return {
        t.name: torch.zeros(t.info.shape, dtype=weight_reader.DTYPES[t.info.dtype], device=device)
        for t in checkpoint.tensors
    }


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].cpu(), tensor), name


def test_every_tensor_is_mapped(folder):
    assert_equal(weight_reader.map_tensors(read_headers(folder)), tensors_of(folder))


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("chunk", [64, 1000, 4096, 1 << 20])
@pytest.mark.parametrize("threads", [1, 5])
def test_any_cut_and_number_of_threads(folder, monkeypatch, chunk, threads, device):
    monkeypatch.setattr(weight_reader, "CHUNK_BYTES", chunk)
    monkeypatch.setattr(weight_reader, "NUM_THREADS", threads)
    checkpoint = read_headers(folder)
    targets = targets_of(checkpoint, device)
    weight_reader.read_into((t, targets[t.name]) for t in checkpoint.tensors)
    assert_equal(targets, tensors_of(folder))


def test_rows_of_one_tensor_as_targets(tmp_path):
    parts = {name: torch.randn(rows, 8) for name, rows in (("q", 16), ("k", 4), ("v", 4))}
    save_file(parts, tmp_path / "model.safetensors")
    fused = torch.zeros(24, 8)
    rows = dict(zip("qkv", fused.split([16, 4, 4]), strict=True))
    weight_reader.read_into((t, rows[t.name]) for t in read_headers(tmp_path).tensors)
    assert torch.equal(fused, torch.cat(list(parts.values())))


def test_some_tensors_only(folder, monkeypatch):
    monkeypatch.setattr(weight_reader, "CHUNK_BYTES", 512)
    checkpoint = read_headers(folder)
    wanted = random.Random(0).sample(checkpoint.tensors, 7)
    targets = targets_of(checkpoint)
    weight_reader.read_into((t, targets[t.name]) for t in wanted)
    expected = tensors_of(folder)
    names = {t.name for t in wanted}
    for name, target in targets.items():
        assert torch.equal(target, expected[name] if name in names else target * 0)


def test_neighbours_come_with_one_read(folder, monkeypatch):
    reads = []
    read = weight_reader._read
    monkeypatch.setattr(
        weight_reader, "_read", lambda chunk, buf: (reads.append(chunk), read(chunk, buf))
    )
    checkpoint = read_headers(folder)
    targets = targets_of(checkpoint)
    weight_reader.read_into((t, targets[t.name]) for t in checkpoint.tensors)
    assert len(reads) == len(checkpoint.shards) < len(checkpoint.tensors)


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool, torch.float16],
)
def test_dtypes_scalars_and_empty_tensors(tmp_path, dtype):
    tensors = {"a": torch.ones(3, 5).to(dtype), "b": torch.ones(()).to(dtype)}
    tensors["c"] = torch.empty(0, 4).to(dtype)
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = read_headers(tmp_path)
    assert_equal(weight_reader.map_tensors(checkpoint), tensors)
    targets = targets_of(checkpoint)
    weight_reader.read_into((t, targets[t.name]) for t in checkpoint.tensors)
    assert_equal(targets, tensors)


def test_progress_counts_every_byte(folder, monkeypatch):
    monkeypatch.setattr(weight_reader, "CHUNK_BYTES", 4096)
    checkpoint, told = read_headers(folder), []
    targets = targets_of(checkpoint)
    pairs = [(t, targets[t.name]) for t in checkpoint.tensors]
    tally = weight_reader.Tally(
        checkpoint.num_bytes, lambda done, total: told.append((done, total))
    )
    weight_reader.read_into(pairs, tally)
    assert {total for _, total in told} == {checkpoint.num_bytes}
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1][0] == checkpoint.num_bytes


def test_reading_ends_when_it_is_stopped_or_fails(folder, monkeypatch):
    monkeypatch.setattr(weight_reader, "CHUNK_BYTES", 64)
    checkpoint, told = read_headers(folder), []
    targets = targets_of(checkpoint)
    pairs = [(t, targets[t.name]) for t in checkpoint.tensors]
    tally = weight_reader.Tally(
        checkpoint.num_bytes, lambda done, _: (told.append(done), tally.stop())
    )
    weight_reader.read_into(pairs, tally)
    assert len(told) <= weight_reader.NUM_THREADS

    def fail(done, total):
        told.append(done)
        raise RuntimeError("no more")

    told.clear()
    with pytest.raises(RuntimeError, match="no more"):
        weight_reader.read_into(pairs, weight_reader.Tally(checkpoint.num_bytes, fail))
    assert len(told) <= weight_reader.NUM_THREADS


def test_a_mapped_tensor_is_written_without_touching_the_file(folder):
    before = tensors_of(folder)
    tensor = weight_reader.map_tensors(read_headers(folder))["model.norm.weight"]
    tensor.zero_()
    assert_equal(tensors_of(folder), before)


def test_mapping_reads_nothing(tmp_path):
    num_bytes = 256 << 20
    save_file({"a": torch.zeros(num_bytes, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    before = _resident_bytes()
    found = weight_reader.map_tensors(read_headers(tmp_path))
    assert found["a"].nbytes == num_bytes
    assert _resident_bytes() - before < num_bytes / 4


def _resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_file_cut_after_its_header_was_read(folder):
    checkpoint = read_headers(folder)
    shard = checkpoint.shards[0]
    os.truncate(shard.path, shard.num_bytes - 100)
    targets = targets_of(checkpoint)
    with pytest.raises(CheckpointError, match=r"ends at byte \d+, expected \d+") as raised:
        weight_reader.read_into((t, targets[t.name]) for t in checkpoint.tensors)
    assert str(shard.path) in raised.value.message
    assert raised.value.hint


def test_what_does_not_fit_is_refused(monkeypatch):
    monkeypatch.setattr(device_memory, "available_bytes", lambda device: 1 << 30)
    with pytest.raises(DoesNotFitError, match=r"loading a needs 2.00 GiB, 1.00 GiB free on cuda:0"):
        device_memory.require(2 << 30, "cuda:0", "loading a", hint="a smaller one")


def test_the_allocators_error_becomes_ours(monkeypatch):
    monkeypatch.setattr(device_memory, "available_bytes", lambda device: 3 << 30)
    with (
        pytest.raises(DoesNotFitError, match=r"out of memory in a batch: 3.00 GiB free on cuda:0"),
        device_memory.out_of_memory("cuda:0", "a batch", hint="a smaller one"),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_the_cpu_has_no_limit():
    assert device_memory.available_bytes("cpu") is None
    device_memory.require(1 << 60, "cpu", "anything", hint="")


@pytest.mark.gpu
def test_the_process_limit_counts():
    free = device_memory.available_bytes("cuda")
    torch.cuda.set_per_process_memory_fraction(0.1)
    try:
        limited = device_memory.available_bytes("cuda")
        total = torch.cuda.get_device_properties(0).total_memory
        assert limited <= 0.1 * total < free
        with pytest.raises(DoesNotFitError):
            device_memory.require(total // 2, "cuda", "half a card", hint="less")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.gpu
def test_memory_allocated_is_that_of_the_tensors(tmp_path):
    tensors = {f"t{i}": torch.randint(256, (64 << 20,), dtype=torch.uint8) for i in range(4)}
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = read_headers(tmp_path)
    before = torch.cuda.memory_allocated()
    targets = targets_of(checkpoint, "cuda")
    weight_reader.read_into((t, targets[t.name]) for t in checkpoint.tensors)
    allocated = torch.cuda.memory_allocated() - before
    assert abs(allocated / checkpoint.num_bytes - 1) < 1e-3
    assert_equal(targets, tensors)


@pytest.mark.parametrize("narrow", [1, 1 << 20], ids=["a read for each row", "rows read whole"])
def test_rows_and_columns_of_a_tensor_arrive(folder, monkeypatch, narrow):
    monkeypatch.setattr(weight_reader, "NARROW_BYTES", narrow)
    monkeypatch.setattr(weight_reader, "CHUNK_BYTES", 1000)
    whole, targets, expected = tensors_of(folder), [], []
    for stored in read_headers(folder).tensors:
        if len(stored.info.shape) == 2:
            rows, columns = stored.info.shape
            cuts = [(stored.rows(3, rows - 2), (slice(3, rows - 2), slice(None)))]
            cuts += [(stored.columns(5, columns - 7), (slice(None), slice(5, columns - 7)))]
            for part, span in cuts:
                targets.append((part, torch.zeros(part.info.shape, dtype=torch.bfloat16)))
                expected.append(whole[stored.name][span])
    weight_reader.read_into(targets)
    assert len(targets) > 20
    for (part, found), right in zip(targets, expected, strict=True):
        assert torch.equal(found, right), part
