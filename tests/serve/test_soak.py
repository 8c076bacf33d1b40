"""Many requests of every kind at once, good and bad: each gets its own answer and nothing is left.

300 requests here; `pytest tests/serve/test_soak.py --soak 2000` takes as many as it is told.
"""

import asyncio
import ctypes
import gc
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch
from byte_tokenizer import EOS, make_tokenizer
from tiny import small_llama

import halfweight

pytest.importorskip("openai")
pytest.importorskip("uvicorn")
import soak
from live_server import Server

from halfweight.engine.engine import Engine
from halfweight.engine.runners.cpu import CpuRunner
from halfweight.quantization.scheme import Recipe, Scheme

AT_ONCE = 64
BATCH = 150
MOST_GROWTH_MB = 12
"""Of the resident set over the second half of the requests. It grows by some 1 MB then, as the
allocator finds its size; 1,000 requests that kept 12 KB each, a page of this model's tokens, would
be found out by it."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small Llama in INT8 that the CPU runner runs, one of whose tokens is poison."""
    root = tmp_path_factory.mktemp("soak")
    special = {"bos_token_id": None, "eos_token_id": EOS, "pad_token_id": EOS}
    source = small_llama(max_position_embeddings=512, **special)
    source.lm_head.weight.data[257:] = 0
    source.to(torch.bfloat16).save_pretrained(root / "source")
    halfweight.quantize(root / "source", root / "int8", Recipe(Scheme(64, "float16")))
    model = halfweight.load(root / "int8", device="cpu", dtype=torch.float32)
    scale = model.model.embed_tokens.weight_scale
    scale.data = scale.data.clone()  # the file's is mapped
    scale.data[soak.NAN_TOKEN] = float("nan")
    return model


@pytest.fixture(scope="module")
def reference(model):
    """One request at a time, room for all of it, nothing guessed."""
    limits = {"max_sequences": 1, "cache_tokens": 4096, "speculates": False}
    with Engine(model, tokenizer=make_tokenizer(), **limits) as engine:
        yield engine


def resident_mb():
    """Of this process, after what can be given back was."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def test_soak(model, reference, request):
    count = request.config.getoption("soak")
    found = soak.wishes(count, seed=count)
    before = set(threading.enumerate())
    limits = {"max_sequences": 16, "cache_tokens": 768, "max_requests": 4096}
    with Server(model, make_tokenizer(), speculates=True, **limits) as server:
        assert isinstance(server.engine._loop._runner, CpuRunner)
        num_added = count_calls(server.engine._loop._scheduler, "add")
        resident, outcomes = [], []
        for begin in range(0, count, BATCH):
            batch = found[begin : begin + BATCH]
            outcomes += asyncio.run(soak.run(server, batch, at_once=AT_ONCE))
            server.wait_until_idle()
            resident.append(resident_mb())
        growth = resident[-1] - resident[len(resident) // 2 - 1]
        loop = server.engine._loop
        num_preempted = num_added["add"] - loop._num_submitted
        assert server.engine.fault is None
        assert loop.num_used_pages == 0
        assert len(loop._scheduler._slots) == 16
        assert (loop._scheduler.num_running, loop._scheduler.num_waiting) == (0, 0)
        assert not loop._inbox
    print(f"{count} requests, {num_preempted} preemptions, {growth:+.1f} MB since half of them")
    left = set(threading.enumerate()) - before
    assert not [thread for thread in left if "asyncio" not in thread.name], left
    assert growth < MOST_GROWTH_MB
    assert num_preempted > count / 30
    check(outcomes, reference)


def count_calls(owner, name):
    """A counter of the calls from now on."""
    counter, call = Counter(), getattr(owner, name)

    def counted(*arguments):
        counter[name] += 1
        return call(*arguments)

    setattr(owner, name, counted)
    return counter


def check(outcomes, reference):
    """Each outcome is that of its wish alone, or the beginning of it where the client left."""
    expected = {}
    num_whole = num_left = num_nan = 0
    for outcome in outcomes:
        wish = outcome.wish
        if wish.is_wrong:
            assert outcome.status == 400, wish
            continue
        if wish.key not in expected:
            expected[wish.key] = soak.alone(reference, wish)
        status, choices = expected[wish.key]
        if wish.leaves_after is not None:
            num_left += 1
            for i, text in outcome.texts.items():
                assert status == 500 or choices[i][0].startswith(text), wish
            continue
        assert outcome.status == status, wish
        num_nan += status == 500
        if status == 200:
            got = [(outcome.texts[i], outcome.reasons[i]) for i in sorted(outcome.texts)]
            assert got == choices, wish
            num_whole += 1
    assert num_whole > len(outcomes) / 2
    assert num_left > len(outcomes) / 10
    assert num_nan > len(outcomes) / 100
