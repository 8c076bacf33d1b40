"""Links between ranks without a GPU: which sums go which way, and what is left when one fails."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from threading import Event
from types import SimpleNamespace

import pytest
import torch
import tp_models
from torch import distributed as dist

import halfweight
from halfweight.engine.parallel import link as links
from halfweight.engine.parallel import ranks as ranks_module
from halfweight.engine.parallel import start, symmetric
from halfweight.engine.parallel.faults import BrokenLinkError, RankError
from halfweight.engine.parallel.link import GroupLink, choose_backend, make_link
from halfweight.engine.parallel.symmetric import SymmetricSum
from halfweight.errors import DoesNotFitError, HalfweightError, UsageError

CPU = torch.device("cpu")


def on_ranks(run, ranks=2):
    """What each of the ranks gets, which are threads here."""
    with ThreadPoolExecutor(ranks) as threads:
        return [found.result(60) for found in [threads.submit(run, rank) for rank in range(ranks)]]


@pytest.fixture
def pair():
    """Two links of one group."""
    store = dist.HashStore()
    options = {"backend": "gloo", "is_local": True}
    made = on_ranks(lambda rank: make_link(store, rank, 2, CPU, **options))
    yield made
    for link in made:
        link.close()


class Near:
    """In place of SymmetricSum: takes few numbers and sums them, or does not."""

    takes_of = 1 << 12

    def __init__(self, group, wrong=0.0, error=None, alone=False):
        """`alone`: its kernel has given up to wait for others."""
        self.group, self.wrong, self.error, self.alone = group, wrong, error, alone
        self.events = []

    def takes(self, x):
        return x.numel() <= self.takes_of

    def sum(self, x):
        self.events.append("sum")
        if self.error is not None:
            raise self.error
        if self.alone:
            return x
        total = x.clone()
        self.group.allreduce([total], links._c10d.AllreduceOptions()).wait()
        return total + self.wrong

    def let_go(self):
        self.events.append("let_go")

    def close(self):
        self.events.append("close")


def sums(pair, count):
    return on_ranks(lambda rank: pair[rank].sum(torch.full((count,), rank + 1.0)))


def test_small_sums_go_by_memory_where_all_ranks_have_them(pair):
    nears = [Near(link._group) for link in pair]
    on_ranks(lambda rank: pair[rank].add_near(nears[rank]))
    for near in nears:
        near.events.clear()
    assert all(torch.equal(found, torch.full((8,), 3.0)) for found in sums(pair, 8))
    assert [near.events for near in nears] == [["sum"]] * 2
    assert all(torch.equal(found, torch.full((8192,), 3.0)) for found in sums(pair, 8192))
    assert [near.events for near in nears] == [["sum"]] * 2
    on_ranks(lambda rank: pair[rank].close())
    assert [near.events for near in nears] == [["sum", "let_go", "close"]] * 2


@pytest.mark.parametrize(
    "options",
    [
        ({}, None),
        ({"wrong": 1.0}, {}),
        ({"error": RuntimeError("not for this dtype")}, {"error": RuntimeError("neither here")}),
        ({"error": RuntimeError("not here")}, {"alone": True}),
    ],
    ids=["one_has_none", "one_is_wrong", "none_can", "one_raises"],
)
def test_what_is_not_right_on_all_ranks_is_not_taken(pair, options):
    nears = [
        None if given is None else Near(link._group, **given)
        for link, given in zip(pair, options, strict=True)
    ]
    on_ranks(lambda rank: pair[rank].add_near(nears[rank]))
    assert [link._near for link in pair] == [None, None]
    assert all(near is None or near.events[-1] == "close" for near in nears)
    assert all(torch.equal(found, torch.full((8,), 3.0)) for found in sums(pair, 8))


class Group:
    """In place of a process group that can be aborted."""

    def __init__(self):
        self.num_aborted = 0

    def abort(self):
        self.num_aborted += 1

    def _set_default_timeout(self, timeout):
        pass


@pytest.mark.parametrize("is_told", [True, False])
def test_kernels_that_wait_for_others_are_let_go_before_the_group_is_left(is_told):
    """Leaving may free memory, which waits for all kernels."""
    group = Group()
    near = Near(group)
    group.abort = lambda: near.events.append("abort")
    link = GroupLink(group, 0, 2, CPU, is_nccl=True)
    link._near = near
    if is_told:
        link.let_go()
    link.close()
    assert near.events == ["let_go", "abort", "close"]


def test_numbers_that_never_arrive_are_not_waited_for(pair, monkeypatch, caplog):
    """Nor is a link taken that was let go of while its last number came."""
    caplog.set_level("INFO", "halfweight")
    monkeypatch.setattr(links, "NEAR_SECONDS", 0.02)
    nears = [Near(link._group) for link in pair]
    told, add = Event(), nears[0].sum

    def wait_and_add(x):
        assert told.wait(10)
        return add(x)

    nears[0].sum, nears[0].let_go = wait_and_add, told.set
    on_ranks(lambda rank: pair[rank].add_near(nears[rank]))
    assert [link._near for link in pair] == [None, None]
    assert "sums by each other's memory do not come out right here" in caplog.text
    assert "sums by memory: nothing has come within" in caplog.text


def test_a_rank_that_is_lost_while_sums_are_checked_is_no_wrong_sum(pair):
    near = Near(pair[0]._group, error=BrokenLinkError("gone"))
    pair[0].least = lambda number: number
    with pytest.raises(BrokenLinkError):
        pair[0].add_near(near)


def test_a_gpu_that_never_answers_is_left_behind(monkeypatch, caplog):
    monkeypatch.setattr(links, "LEAVING_SECONDS", 0.02)
    group, end = Group(), Event()
    group.abort = lambda: end.wait(10)
    link = GroupLink(group, 0, 2, CPU, is_nccl=True)
    link.let_go()
    link.close()
    end.set()
    assert "rank 0: cpu still waits for a rank" in caplog.text


@pytest.mark.parametrize("step", ["check", "add_near", "make"])
def test_a_link_that_is_not_made_leaves_the_group(monkeypatch, step):
    group, told = Group(), []
    fault = dist.DistStoreError("wait timeout") if step == "make" else RankError("no", hint="")
    monkeypatch.setattr(links, "_make_group", lambda *_, **__: group)
    monkeypatch.setattr(GroupLink, "check", lambda link: None)
    monkeypatch.setattr(SymmetricSum, "make", lambda *_: None)

    def fail(*_):
        raise fault

    monkeypatch.setattr(SymmetricSum if step == "make" else GroupLink, step, fail)
    with pytest.raises(BrokenLinkError if step == "make" else RankError, match=r"no|timeout"):
        make_link(None, 0, 2, CPU, backend="nccl", is_local=True, on_fault=told.append)
    assert group.num_aborted == 1
    assert len(told) == 1  # a rank that is lost while the link is made was not waited for either


def test_gpus_reach_each_other_where_every_pair_does(monkeypatch):
    asked = []

    def reaches(one, other):
        asked.append((one, other))
        return (one, other) != (2, 0)

    monkeypatch.setattr(torch.cuda, "can_device_access_peer", reaches)
    assert symmetric._reach_each_other(["0", "1"])
    assert sorted(asked) == [(0, 1), (1, 0)]
    assert not symmetric._reach_each_other(["0", "1", "2"])
    assert not symmetric._reach_each_other(["0", "0"])
    assert not symmetric._reach_each_other(["0", ""])


@pytest.mark.parametrize(
    ("settings", "is_off"),
    [
        ({}, False),
        ({"HALFWEIGHT_PEER_READS": "0"}, True),
        ({"HALFWEIGHT_PEER_READS": "1"}, False),
        ({"NCCL_P2P_DISABLE": "1"}, True),
        ({"NCCL_P2P_DISABLE": "0"}, False),
    ],
)
def test_sums_by_memory_are_switched_off_by_either_name(monkeypatch, settings, is_off):
    for name in ("HALFWEIGHT_PEER_READS", "NCCL_P2P_DISABLE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert symmetric._is_off() == is_off


def made_sums(monkeypatch, store, pair):
    """What two ranks make that believe to have GPUs that reach each other."""
    monkeypatch.setattr(symmetric, "unavailable", lambda device: None)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda one, other: True)
    monkeypatch.delenv("HALFWEIGHT_PEER_READS", raising=False)
    monkeypatch.delenv("NCCL_P2P_DISABLE", raising=False)
    monkeypatch.setenv("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")  # which `make` would leave behind
    devices = [torch.device("cpu", rank) for rank in range(2)]
    return on_ranks(
        lambda rank: SymmetricSum.make(store, rank, 2, devices[rank], pair[rank]._group)
    )


def test_where_torch_has_no_such_memory_the_group_is_forgotten(monkeypatch, pair):
    """Which is so on a CPU."""
    registered, forgotten = [], []
    c10d = symmetric._c10d
    monkeypatch.setattr(c10d, "_register_process_group", lambda name, _: registered.append(name))
    monkeypatch.setattr(c10d, "_unregister_process_group", forgotten.append)
    store = dist.HashStore()
    assert made_sums(monkeypatch, store, pair) == [None, None]
    assert len(registered) == 2
    assert forgotten == registered
    assert len(set(registered)) == 1
    assert registered[0].startswith("halfweight-")


def test_a_torch_without_such_memory_is_like_gpus_without_it(monkeypatch, pair):
    monkeypatch.delattr(symmetric._c10d, "_SymmetricMemory")
    monkeypatch.setattr(symmetric._c10d, "_register_process_group", lambda *_: None)
    monkeypatch.setattr(symmetric._c10d, "_unregister_process_group", lambda *_: None)
    assert made_sums(monkeypatch, dist.HashStore(), pair) == [None, None]


def test_a_kernel_that_does_not_compile_is_no_fault(monkeypatch, pair, caplog):
    def fail(rank, buffers):
        raise HalfweightError("the kernel does not compile for sm_90: ...", hint="")

    memory = SimpleNamespace(
        empty_strided_p2p=lambda *_: None,
        rendezvous=lambda *_: SimpleNamespace(get_buffer=lambda *_: None),
    )
    monkeypatch.setattr(symmetric, "PeerSum", fail)
    monkeypatch.setattr(symmetric._c10d, "_SymmetricMemory", memory)
    monkeypatch.setattr(symmetric._c10d, "_register_process_group", lambda *_: None)
    monkeypatch.setattr(symmetric._c10d, "_unregister_process_group", lambda *_: None)
    with caplog.at_level("INFO", logger="halfweight"):
        assert made_sums(monkeypatch, dist.HashStore(), pair) == [None, None]
    assert "no sums by memory on rank 1: the kernel does not compile for sm_90" in caplog.text


def test_one_rank_whose_kernels_cannot_run_tells_the_others(monkeypatch, caplog):
    store = dist.HashStore()
    store.set("symmetric/device of 1", "1")
    monkeypatch.delenv("HALFWEIGHT_PEER_READS", raising=False)
    monkeypatch.setattr(symmetric, "unavailable", lambda device: "needs NVRTC")
    with caplog.at_level("INFO", logger="halfweight"):
        assert SymmetricSum.make(store, 0, 2, torch.device("cuda", 0), None) is None
    assert store.get("symmetric/device of 0") == b""
    assert "no sums by memory on cuda:0: needs NVRTC" in caplog.text


def test_one_rank_that_switches_them_off_does_so_for_all(monkeypatch):
    store = dist.HashStore()
    store.set("symmetric/device of 1", "")
    monkeypatch.setattr(symmetric, "unavailable", lambda device: None)
    monkeypatch.delenv("HALFWEIGHT_PEER_READS", raising=False)
    assert SymmetricSum.make(store, 0, 2, torch.device("cuda", 0), None) is None


def test_a_rank_that_does_not_come_is_waited_for_a_while_only(monkeypatch):
    monkeypatch.setattr(symmetric, "MEETING", timedelta(milliseconds=50))
    monkeypatch.setattr(symmetric, "unavailable", lambda device: None)
    with pytest.raises(dist.DistError):
        SymmetricSum.make(dist.HashStore(), 0, 2, torch.device("cuda", 0), None)


def test_a_gpu_of_two_names_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    found = start.choose_devices(2, ["cuda", "cuda:1"])
    assert found == [torch.device("cuda", 1)] * 2
    assert choose_backend(found) == "gloo"


def test_rank_0_that_cannot_make_its_runner_ends_the_others_and_leaves(monkeypatch, tmp_path):
    events = []

    def full(*_, **__):
        raise DoesNotFitError("no room for a cache", hint="make some")

    def noted(owner, name):
        call = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda self: (events.append((name, self)), call(self)))

    noted(ranks_module.Ranks, "end")
    noted(GroupLink, "close")
    monkeypatch.setattr(ranks_module, "ENDING_SECONDS", 0.5)  # it waits for rank 0 in a sum
    monkeypatch.setattr(start, "make_runner", full)
    with pytest.raises(DoesNotFitError, match="no room for a cache"):
        halfweight.Engine(tp_models.make("qwen2", tmp_path), tensor_parallel=2, devices=["cpu"] * 2)
    assert [name for name, _ in events] == ["end", "close"]
    (member,) = events[0][1].members
    assert member.process.poll() is not None


def test_ranks_whose_model_runs_without_pages_alone_are_refused(monkeypatch, tmp_path):
    """By its architecture, or because a trial over pages fails in its dtype."""
    make = start.make_runner

    def static(model, **limits):
        runner = make(model, **limits)
        runner.release = lambda pages: None  # as the static runner has it
        return runner

    monkeypatch.setattr(start, "make_runner", static)
    with pytest.raises(UsageError, match="Qwen2ForCausalLM runs here without pages alone") as found:
        halfweight.Engine(tp_models.make("qwen2", tmp_path), tensor_parallel=2, devices=["cpu"] * 2)
    assert "the log (-v) says why" in found.value.hint
