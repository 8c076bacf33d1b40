"""The loop: every request gets what it would get alone, and leaves nothing behind."""

import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))

from fake_model import STOP, VOCAB, FakeRunner, FakeSampler, alone, next_token

from halfweight.engine.loop import Loop
from halfweight.engine.request import Request, Sampling

SECONDS = 20
BASES = [[(7 * i * i + b) % 38 + 1 for i in range(40)] for b in range(3)]


class Client:
    """Collects what one request is told."""

    def __init__(self):
        self.outputs = []
        self.ended = threading.Event()
        self.number = None

    def __call__(self, output):
        assert not self.ended.is_set(), "told after its last output"
        self.outputs.append(output)
        if output.finish_reason is not None or output.error is not None:
            self.ended.set()

    @property
    def tokens(self):
        return [token for output in self.outputs for token in output.tokens]

    @property
    def last(self):
        assert self.ended.wait(SECONDS), "no end"
        return self.outputs[-1]


def make_loop(runner, **options):
    return Loop(runner, FakeSampler(runner.table), stop_tokens=frozenset({STOP}), **options)


@pytest.fixture
def start():
    loops = []

    def start(runner=None, **options):
        loop = make_loop(runner or FakeRunner(), **options)
        loops.append(loop)
        loop.start()
        return loop

    yield start
    for loop in loops:
        loop.stop()


def run(loop, request):
    client = Client()
    client.number = loop.submit(request, client)
    return client


def assert_nothing_left(loop):
    deadline = time.monotonic() + SECONDS
    while loop.num_requests or loop.num_used_pages:
        assert time.monotonic() < deadline, (loop.num_requests, loop.num_used_pages)
        time.sleep(0.001)
    scheduler = loop._scheduler
    assert (scheduler.num_running, scheduler.num_waiting) == (0, 0)
    assert len(scheduler._slots) == loop._runner.max_sequences


class Guesses:
    """Drafts: right, wrong at their end, or none, by the length of the text."""

    def __init__(self, tokens):
        self.tokens = list(tokens)

    def extend(self, tokens):
        self.tokens += tokens

    def draft(self, limit):
        if len(self.tokens) % 3 == 0:
            return []
        right = list(self.tokens)
        for _ in range(len(right) % 4):
            token = next_token(right)
            if token is None:
                break
            right.append(token)
        drafts = right[len(self.tokens) :]
        if len(self.tokens) % 5 == 0 and drafts:
            drafts[-1] = (drafts[-1] + 1) % VOCAB
        return drafts[:limit]


@st.composite
def runners(draw):
    page_tokens = draw(st.integers(1, 5))
    max_sequences = draw(st.integers(1, 5))
    return FakeRunner(
        page_tokens=page_tokens,
        num_pages=1 + -(-36 // page_tokens) + draw(st.integers(0, 30)),
        max_sequences=max_sequences,
        max_context=draw(st.sampled_from([36, 60])),
        max_step_tokens=max_sequences + draw(st.integers(2, 20)),
        shares_prefixes=draw(st.integers(0, 4)) > 0,
    )


@st.composite
def requests(draw):
    base = draw(st.sampled_from(BASES))
    prompt = base[: draw(st.integers(1, 24))] + draw(st.lists(st.integers(1, 39), max_size=2))
    random = draw(st.booleans())
    return Request(
        tuple(prompt),
        max_new_tokens=draw(st.integers(1, 10)),
        sampling=Sampling(temperature=float(random), seed=draw(st.integers(0, 3))),
        stop_tokens=draw(st.sampled_from([None, frozenset(), frozenset({3, 5, 8})])),
        prompt_logprobs=draw(st.sampled_from([None, None, None, 0, 2])),
    )


class Script:
    """Submits requests and cancels some, at given steps, on the loop's own thread."""

    def __init__(self, loop, arrivals):
        self.loop = loop
        self.left = sorted(arrivals, key=lambda arrival: arrival[0])
        self.cancels = {}
        self.clients = []
        self.done = threading.Event()
        self.num_open = 0

    def start(self):
        self.loop._runner.before_step = self.at_step
        self.at_step(-1)
        if not self.num_open:
            self.submit_next()
        self.loop.start()

    def at_step(self, count):
        while self.left and self.left[0][0] <= count:
            self.submit_next()
        for number, step in list(self.cancels.items()):
            if step <= count:
                self.loop.cancel(number)
                del self.cancels[number]

    def submit_next(self):
        step, request, cancel_after = self.left.pop(0)
        client = Client()
        self.clients.append((request, client, cancel_after is not None))
        self.num_open += 1

        def tell(output):
            client(output)
            if client.ended.is_set():
                self.num_open -= 1
                if self.loop.fault:
                    self.done.set()
                elif not self.num_open:
                    self.submit_next() if self.left else self.done.set()

        number = self.loop.submit(request, tell)
        if cancel_after is not None:
            self.cancels[number] = step + cancel_after


arrivals = st.tuples(
    st.integers(-1, 25), requests(), st.sampled_from([None, None, None, 0, 1, 3, 8])
)


@settings(max_examples=250, deadline=None)
@given(
    runner=runners(),
    arrivals=st.lists(arrivals, min_size=1, max_size=9),
    overlaps=st.booleans(),
    drafts=st.booleans(),
)
def test_every_request_gets_what_it_gets_alone(runner, arrivals, overlaps, drafts):
    loop = make_loop(runner, overlaps=overlaps, make_drafter=Guesses if drafts else None)
    script = Script(loop, arrivals)
    script.start()
    try:
        assert script.done.wait(SECONDS)
        assert loop.fault is None
        assert_nothing_left(loop)
    finally:
        loop.stop()
    assert len(script.clients) == len(arrivals)
    for request, client, may_be_cancelled in script.clients:
        tokens, reason = alone(request)
        if may_be_cancelled and client.last.finish_reason == "cancelled":
            assert client.tokens == tokens[: len(client.tokens)]
            continue
        assert (client.tokens, client.last.finish_reason) == (tokens, reason)
        check_prompt_logprobs(request, client)


def check_prompt_logprobs(request, client):
    found = client.outputs[0].prompt_logprobs
    if request.prompt_logprobs is None or client.outputs[0].finish_reason == "nan":
        return
    assert [entry and entry.token for entry in found] == [None, *request.prompt[1:]]
    for i, entry in enumerate(found[1:], 1):
        likeliest = next_token(request.prompt[:i])
        assert len(entry.top) == request.prompt_logprobs
        if request.prompt_logprobs:
            assert entry.top[0][0] == likeliest
        is_likely = entry.logprob > -1
        assert is_likely == (likeliest == request.prompt[i])
    assert not any(output.prompt_logprobs for output in client.outputs[1:])
