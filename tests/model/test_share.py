"""What ranks read of a checkpoint: together all of it, each its own part, and no group in two."""

from pathlib import Path

import pytest
import torch
import tp_models

from halfweight.checkpoint.headers import quantized_modules, read_headers
from halfweight.errors import UsageError
from halfweight.memory.tensor_parallel import split_of
from halfweight.model import weight_reader
from halfweight.model.share import check_shareable, described, own_part
from halfweight.model.weight_reader import Tally, map_tensors
from halfweight.model.weight_streaming import read_weights


@pytest.fixture(scope="module", params=["llama", "mixtral"])
def folder(request, tmp_path_factory):
    return tp_models.make(request.param, tmp_path_factory.mktemp(request.param))


def parts_of(folder, ranks):
    checkpoint, model = read_headers(folder), described(folder)
    return [own_part(checkpoint, model, rank, ranks) for rank in range(ranks)]


def together(name, parts, whole):
    """What the ranks have of a tensor, put together again."""
    split = split_of(name.rpartition(".")[0])
    if split is None or all(part.shape == whole.shape for part in parts):
        return parts[0]
    if split == "columns":
        return torch.cat(parts, dim=1)
    if sum(len(part) for part in parts) == 2 * len(whole):  # two ranks have the same heads
        assert torch.equal(parts[0], parts[1])
        parts = parts[::2]
    return torch.cat(parts)


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_parts_are_the_whole(folder, ranks):
    whole = map_tensors(read_headers(folder))
    parts = [map_tensors(part) for part in parts_of(folder, ranks)]
    for name, tensor in whole.items():
        found = together(name, [part[name] for part in parts], tensor)
        assert torch.equal(found, tensor), name
        if name.endswith(("o_proj.weight_packed", "w2.weight_packed", "lm_head.weight_packed")):
            assert {part[name].numel() * ranks for part in parts} == {tensor.numel()}


def bytes_read():
    """What this process has asked the kernel to read."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["rchar"])


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_rank_reads_no_byte_of_another(folder, ranks, monkeypatch):
    monkeypatch.setattr(weight_reader, "NARROW_BYTES", 0)
    from concurrent.futures import ThreadPoolExecutor

    whole = sum(w.packed.info.num_bytes for w in quantized_modules(read_headers(folder)).values())
    for part in parts_of(folder, ranks):
        stored = quantized_modules(part)
        expected = sum(w.packed.info.num_bytes + w.scale.info.num_bytes for w in stored.values())
        with ThreadPoolExecutor(1) as pool:
            before = bytes_read()
            weights = read_weights(stored, torch.device("cpu"), Tally(0), pool)
            found = bytes_read() - before
        assert len(weights) == len(stored)
        assert expected <= found < expected + 2000  # of /proc itself
        assert expected < 1.25 * whole / ranks


def test_odd_numbers_are_refused_with_the_legal_ones_before_anything_is_read(folder, monkeypatch):
    monkeypatch.setattr(weight_reader.mmap, "mmap", None)
    model = described(folder)
    for ranks, words in ((3, "3 GPUs do not divide 8 heads"), (16, "do not divide 8 heads")):
        with pytest.raises(UsageError, match=words) as caught:
            check_shareable(model, ranks)
        assert caught.value.hint == "legal tensor-parallel sizes: 1, 2, 4, 8"
