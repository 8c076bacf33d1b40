"""peer_sum.cu without a GPU: ranks in an emulator, compiled for every architecture; its ways."""

from __future__ import annotations

import ctypes
import random
import re
import subprocess
from functools import cache

import emulated_gpu
import pytest
import torch
from emulated_gpu import needs_gxx, needs_nvcc

from halfweight.engine.parallel.link import CHECKED_NUMBERS
from halfweight.kernels.cuda import driver, peer_sum
from halfweight.kernels.cuda.peer_sum import (
    BLOCKS,
    BUFFER_BYTES,
    DTYPES,
    THREADS,
    TURN_BYTES,
    Operands,
    PeerSum,
    source,
    way,
)

BF16, F16, F32 = DTYPES
SMALL = {"blocks": 2, "threads": 64, "polls": 3}
TURN_VECTORS = 5000
ENTRY = """
struct Call { uint4* x[8]; u32 late[8], num_vectors, is_two_shots; };
static const Operands* ranks;
static const Call* calls;
static const int* num_calls;
static u64 num_ended[RANKS];  // threads, of all calls of a rank
static bool is_first_in_line() {
    return num_ended[current->group] >= current->call * BLOCKS * THREADS;
}
static void of_a_thread() {  // it begins a call while others are in the one before
    const u32 rank = current->group = blockIdx.x / BLOCKS;
    current->block.x %= BLOCKS;
    for (const Call* call = calls; call < calls + num_calls[rank]; ++call) {
        for (u32 i = 0; i < call->late[rank]; ++i) ++progress, pause();
        Operands o = ranks[rank];
        o.x = call->x[rank], o.num_vectors = call->num_vectors;
        call->is_two_shots ? two_shots(o) : one_shot(o);
        ++num_ended[rank], ++current->call, ++progress;
    }
}
extern "C" int run(const Operands* r, const Call* c, const int* n, unsigned seed) {
    ranks = r, calls = c, num_calls = n;
    has_previous_ended = is_first_in_line;
    for (u64& count : num_ended) count = 0;
    return launch(of_a_thread, RANKS * BLOCKS, THREADS, 0, seed);
}
"""


class Call(ctypes.Structure):
    _fields_ = [
        ("x", ctypes.c_void_p * 8),
        ("late", ctypes.c_uint32 * 8),
        ("num_vectors", ctypes.c_uint32),
        ("is_two_shots", ctypes.c_uint32),
    ]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """(ranks, dtype, changes of the text) -> the kernels of all ranks on the CPU."""

    @cache
    def build(ranks, dtype, changes):
        text, folder = source(ranks, dtype, **SMALL), tmp_path_factory.mktemp("emulated")
        return emulated_gpu.compiled(text, "constexpr u32 RANKS", ENTRY, changes, folder)

    return build


def numbers(ranks, count, dtype, generator):
    """[ranks, count]; some are NaN, of all bits set and others, infinite, or zero."""
    x = torch.randn(ranks, count, generator=generator).to(dtype)
    bits = x.view(torch.int32 if dtype == F32 else torch.int16)
    where = torch.rand(ranks, count, generator=generator)
    bits[where < 0.02] = -1
    x[(where > 0.02) & (where < 0.03)] = torch.nan
    x[(where > 0.03) & (where < 0.05)] = torch.inf
    x[(where > 0.05) & (where < 0.07)] = -0.0
    return x


def expected(x):
    """The sum in float32, rank after rank, rounded once."""
    total = torch.zeros(x.shape[1])
    for part in x:
        total += part.float()
    return total.to(x.dtype)


class Machine:
    """Ranks with their buffers, and the calls that they make."""

    def __init__(self, kernel, ranks, dtype, seed=0):
        self.kernel, self.ranks, self.dtype, self.seed = kernel, ranks, dtype, seed
        self.buffers = torch.full((ranks, 2 * TURN_VECTORS, 4), -1, dtype=torch.int32)
        self.turns = torch.zeros(ranks, SMALL["blocks"], dtype=torch.int32)
        self.is_over = torch.zeros(1, dtype=torch.int32)
        self.generator = torch.Generator().manual_seed(seed)

    def operands(self):
        places = (ctypes.c_void_p * 8)(*(buffer.data_ptr() for buffer in self.buffers))
        over = self.is_over.data_ptr()
        turns = [words.data_ptr() for words in self.turns]
        of = [Operands(0, places, turns[r], over, 0, TURN_VECTORS, r) for r in range(self.ranks)]
        return (Operands * self.ranks)(*of)

    def run(self, calls, num_calls=None):
        """The status and x of each call, before and after; `calls` are (vectors, is_two_shots)."""
        vector = 16 // self.dtype.itemsize
        given = [numbers(self.ranks, n * vector, self.dtype, self.generator) for n, _ in calls]
        found = [x.clone() for x in given]
        late = random.Random(self.seed)
        made = (Call * len(calls))()
        for call, x, (count, is_two_shots) in zip(made, found, calls, strict=True):
            call.num_vectors, call.is_two_shots = count, is_two_shots
            for rank in range(self.ranks):
                call.x[rank] = x[rank].data_ptr()
                call.late[rank] = late.choice((0, 0, 3, 60))
        ends = (ctypes.c_int * self.ranks)(*(num_calls or [len(calls)] * self.ranks))
        return self.kernel(self.operands(), made, ends, self.seed), given, found


def is_right(given, found):
    """Whether all ranks have the sum, all the same bits."""
    bits, right = found.view(torch.uint8), expected(given)
    same = bool((bits == bits[:1]).all())
    return same and torch.equal(found[0].nan_to_num(7.0), right.nan_to_num(7.0))


def calls_of(ranks, generator, count=24):
    """Both ways in any order, from one vector to several rounds of the threads."""
    sizes = [(n, False) for n in (1, 7, 33, 200, 700)]
    sizes += [(n, True) for n in (50, 129, 1000)] if ranks > 2 else []
    return [sizes[i] for i in torch.randint(len(sizes), (count,), generator=generator)]


@needs_gxx
@pytest.mark.parametrize(("ranks", "dtype"), [(2, BF16), (2, F32), (3, BF16), (8, F16)])
def test_all_ranks_have_the_sum_call_after_call(emulated, ranks, dtype):
    kernel = emulated(ranks, dtype, ())
    machine = Machine(kernel, ranks, dtype)
    for _ in range(2):  # the second begins where the first has left the turns
        calls = calls_of(ranks, machine.generator, 24 if ranks < 8 else 7)
        status, given, found = machine.run(calls)
        assert status == 0
        assert all(is_right(*pair) for pair in zip(given, found, strict=True))
        assert (machine.buffers == -1).all()


@needs_gxx
@pytest.mark.parametrize(
    "change",
    [
        ("erase(place);", ""),
        ("turn * o.turn_vectors", "0"),
        ("__syncthreads();  // all", "// all"),
        ("    wait_for_previous_kernel();\n    return", "    return"),
        ("sendable(own[k])", "own[k]"),
        ("v.x == NOTHING ||", ""),
    ],
    ids=[
        "nothing erased",
        "one turn",
        "no barrier",
        "no wait",
        "any NaN sent",
        "words not looked at",
    ],
)
def test_the_emulator_sees(emulated, change):
    machine = Machine(emulated(3, BF16, (change,)), 3, BF16)
    status, given, found = machine.run(calls_of(3, machine.generator))
    right = all(is_right(*pair) for pair in zip(given, found, strict=True))
    assert status == -1 or not right or not (machine.buffers == -1).all()


@needs_gxx
def test_ranks_that_wait_for_a_lost_one_end_when_told(emulated):
    kernel = emulated(3, BF16, ())
    calls, lost = [(33, False), (700, False), (129, True), (7, False)], [4, 1, 4]
    assert Machine(kernel, 3, BF16).run(calls, lost)[0] == -1  # they wait for ever
    machine = Machine(kernel, 3, BF16)
    machine.is_over.fill_(1)
    assert machine.run(calls, lost)[0] == 0


@needs_nvcc
@pytest.mark.parametrize("architecture", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"])
def test_every_architecture_compiles_it(architecture, tmp_path):
    path = tmp_path / "kernel.cu"
    path.write_text(source(8, BF16))
    command = ["nvcc", "-cubin", "-std=c++17", f"-arch={architecture}", "-Xptxas", "-v", "-o"]
    done = subprocess.run(
        [*command, path.with_suffix(".cubin"), path], capture_output=True, text=True, check=True
    )
    assert re.findall(r"(\d+) bytes spill stores", done.stderr) == ["0", "0"]
    assert all(int(used) <= 64 for used in re.findall(r"Used (\d+) registers", done.stderr))


def test_which_way_sums_go():
    assert [way(2, size) for size in (16, TURN_BYTES, TURN_BYTES + 16)] == ["one_shot"] * 2 + [None]
    assert [way(4, size << 10) for size in (16, 400, 500, 4096)] == ["one_shot"] * 2 + [
        "two_shots"
    ] * 2
    assert way(8, 64 << 10) == "one_shot"
    assert way(8, 256 << 10) == "two_shots"
    assert way(3, TURN_BYTES) is None
    assert way(9, 16) is None
    assert way(2, 0) is None
    assert way(2, 24) is None


@pytest.mark.parametrize("ranks", range(2, 9))
def test_what_is_written_fits_and_every_way_is_checked_at_the_start(ranks):
    ways = {}
    for size in range(16, TURN_BYTES + 32, 16 * 1021):
        ways.setdefault(way(ranks, size), []).append(size)
    assert (ranks - 1) * max(ways["one_shot"]) <= TURN_BYTES
    if "two_shots" in ways:
        part = -(-max(ways["two_shots"]) // (16 * ranks))
        assert (2 * ranks - 1) * part * 16 <= TURN_BYTES
        least = min(ways["two_shots"]) // 16
        assert (ranks - 1) * -(-least // ranks) < least  # no part is empty
    assert {way(ranks, 4 * count) for count in CHECKED_NUMBERS} == {*ways, None}


@pytest.fixture(params=[False, True], ids=["", "inference_mode"])
def made(monkeypatch, request):
    """A rank of two whose driver notes what it is to launch; also made in a mode of its own."""
    size = ctypes.sizeof(Operands)
    launched = []

    def launch(start, where):
        launched.append((start, Operands.from_buffer_copy(ctypes.string_at(where, size))))

    monkeypatch.setattr(driver, "load", lambda text, arch, entry, *_: (arch, entry, text))
    monkeypatch.setattr(driver, "prepare", lambda *given, **options: (given, options))
    monkeypatch.setattr(driver, "launch", launch)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    stream = type("Stream", (), {"cuda_stream": 5})
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    peer_sum._kernel.cache_clear()
    buffers = [torch.zeros(64, dtype=torch.uint8) for _ in range(2)]
    with torch.inference_mode(request.param):
        kernels = PeerSum(1, buffers)
    yield kernels, buffers, launched
    peer_sum._kernel.cache_clear()


def test_a_launch_is_of_the_kernel_for_its_numbers(made):
    kernels, buffers, launched = made
    assert (buffers[1] == 255).all()
    assert not buffers[0].any()  # which its own rank fills
    x = torch.zeros(3, 8, dtype=BF16)
    assert kernels.takes(x)
    assert kernels.sum(x) is x
    ((((arch, entry, text), sizes, *where), options), given) = launched[0]
    assert (arch, entry, sizes) == ("sm_86", b"one_shot", (BLOCKS, THREADS, 0))
    assert where == [5, buffers[1].device.index]
    assert options == {"is_early": False}
    assert "constexpr u32 RANKS = 2;" in text
    assert "#define BF16 1" in text
    assert kernels._turns.shape == (BLOCKS,)
    assert list(given.buffers) == [*(buffer.data_ptr() for buffer in buffers), *[None] * 6]
    assert (given.x, given.turns) == (x.data_ptr(), kernels._turns.data_ptr())
    assert (given.num_vectors, given.rank) == (3, 1)
    assert given.turn_vectors * 32 == BUFFER_BYTES


def test_what_is_not_aligned_is_copied_first(made):
    kernels, _, launched = made
    x = torch.arange(12, dtype=F32)[1:9]
    assert torch.equal(kernels.sum(x), x)
    assert launched[0][1].x % 16 == 0
    assert launched[0][1].x != x.data_ptr()


def test_what_it_does_not_take(made):
    kernels, *_ = made
    others = [torch.zeros(7, dtype=BF16), torch.zeros(4, dtype=torch.int32), torch.zeros(0)]
    assert not any(kernels.takes(x) for x in others)


def test_giving_up_is_a_word_that_the_kernels_see(made):
    kernels, _, launched = made
    kernels.sum(torch.zeros(4))
    word = ctypes.c_int.from_address(launched[0][1].is_over)
    assert word.value == 0
    kernels.give_up()
    assert word.value == 1
