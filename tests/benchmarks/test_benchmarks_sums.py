"""The rows of the benchmark of sums, the clock and the GPU's norm replaced."""

import sums
import torch

CPU = torch.device("cpu")


def test_a_row_has_each_way_alone_and_between_norms(monkeypatch):
    times, added = [], []

    def microseconds(link, run, device):
        run()
        times.append(10.0 if not added else 10.0 + len(added))
        return times[-1], 2 * times[-1]

    monkeypatch.setattr(sums, "microseconds", microseconds)
    monkeypatch.setattr(sums, "launch", lambda *given, **meta: None)
    ways = {"own": lambda x: added.append(x.nbytes), "nccl": lambda x: added.append(x.nbytes)}
    found = sums.row(None, ways, 16 << 10, CPU)
    assert found == {
        "bytes": 16 << 10,
        "norm_us": 10.0,
        "own_us": 11.0,
        "own_between_us": 2.0,
        "own_slowest_us": 22.0,
        "nccl_us": 13.0,
        "nccl_between_us": 4.0,
        "nccl_slowest_us": 26.0,
    }
    assert added == [16 << 10] * 4


def test_norms_are_of_whole_rows(monkeypatch):
    launched = []
    monkeypatch.setattr(sums, "launch", lambda *given, **meta: launched.append((given, meta)))
    hidden, x = torch.zeros(2, 2, sums.HIDDEN_SIZE)
    sums.norm(hidden, x, torch.ones(sums.HIDDEN_SIZE))
    (((name, grid, tokens, operands), meta),) = launched
    assert (name, grid, tokens, meta["SIZE"]) == ("add_norm", (2, 1), 2, sums.HIDDEN_SIZE)
    assert operands[1] is operands[3] is x
