"""The loop: every request gets what it would get alone, and leaves nothing behind."""

import threading
import time

import pytest
from fake_model import POISON, STOP, VOCAB, FakeRunner, FakeSampler, alone, next_token
from hypothesis import given, settings
from hypothesis import strategies as st

from halfweight.engine.loop import EngineStoppedError, Loop, NanLogitsError
from halfweight.engine.request import Request, Sampling
from halfweight.errors import UsageError

SECONDS = 5
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


def test_prompts_that_begin_alike_are_read_once(start):
    """Also when they come at once: later ones wait for the pages of the first."""
    runner = FakeRunner(page_tokens=4, num_pages=64, max_step_tokens=200)
    loop = make_loop(runner, overlaps=True)
    shared = BASES[0][:20]
    prompts = [(*shared, last) for last in range(1, 5)]
    clients = [run(loop, Request(prompt, 3)) for prompt in prompts]
    loop.start()
    assert [client.last.finish_reason for client in clients] == ["length"] * 4
    num_read = sum(n for step in runner.steps for _, n, _ in step if n > 1)
    assert num_read == 21  # the first's prompt; of the others one token is left
    assert [client.outputs[0].num_shared_tokens for client in clients] == [0, 20, 20, 20]
    again = run(loop, Request(prompts[0], 3))
    assert again.last.finish_reason == "length"
    assert again.outputs[0].num_shared_tokens == 20
    loop.stop()


def test_the_next_turn_of_a_chat_reads_only_what_is_new(start):
    loop = start(FakeRunner(page_tokens=2, num_pages=64))
    first = run(loop, Request(tuple(BASES[1][:11]), 6, stop_tokens=frozenset()))
    assert first.last.finish_reason == "length"
    turn = (*BASES[1][:11], *first.tokens, 3, 1, 4)
    second = run(loop, Request(turn, 2))
    assert second.last
    assert second.outputs[0].num_shared_tokens == 16


def test_a_runner_that_cannot_share_pages_is_not_asked_to(start):
    loop = start(FakeRunner(shares_prefixes=False))
    for _ in range(2):
        client = run(loop, Request(tuple(BASES[0][:17]), 2))
        assert client.last
        assert client.outputs[0].num_shared_tokens == 0


def test_the_latest_gives_up_its_pages_and_goes_on_later():
    runner = FakeRunner(page_tokens=1, num_pages=1 + 20, max_sequences=2)
    loop = make_loop(runner, overlaps=True)
    requests = [
        Request((5, b), 14, Sampling(temperature=1.0), stop_tokens=frozenset()) for b in (1, 2)
    ]
    clients = [run(loop, request) for request in requests]
    loop.start()
    assert [client.last.finish_reason for client in clients] == ["length"] * 2
    reread = [n for step in runner.steps[1:] for _, n, _ in step if n > 1]
    assert len(reread) == 1, "one was preempted, once"
    assert len(clients[0].tokens) == len(clients[1].tokens) == 14
    assert_nothing_left(loop)
    loop.stop()


def test_a_step_is_launched_before_the_last_ones_tokens_are_looked_at():
    runner = FakeRunner()
    loop = make_loop(runner, overlaps=True)
    seen_before_step = []
    client = Client()
    runner.before_step = lambda count: seen_before_step.append(len(client.tokens))
    loop.submit(Request((1, 2), 5, stop_tokens=frozenset()), client)
    loop.start()
    assert client.last.finish_reason == "length"
    loop.stop()
    assert seen_before_step == [0, 0, 1, 2, 3]


def test_where_a_step_is_over_when_it_returns_its_tokens_come_first():
    runner = FakeRunner()
    loop = make_loop(runner)
    seen_before_step = []
    client = Client()
    runner.before_step = lambda count: seen_before_step.append(len(client.tokens))
    loop.submit(Request((1, 2), 5, stop_tokens=frozenset()), client)
    loop.start()
    assert client.last.finish_reason == "length"
    loop.stop()
    assert seen_before_step == [0, 1, 2, 3, 4]


def test_drafts_that_are_right_save_steps():
    def steps(make_drafter):
        runner = FakeRunner()
        loop = make_loop(runner, overlaps=True, make_drafter=make_drafter)
        client = run(loop, Request((4, 2), 24, stop_tokens=frozenset()))
        loop.start()
        assert client.last.finish_reason == "length"
        loop.stop()
        assert client.tokens == alone(Request((4, 2), 24, stop_tokens=frozenset()))[0]
        return len(runner.steps)

    assert steps(Guesses) < steps(None) == 24


def test_a_nan_ends_the_one_that_has_it_and_its_pages_are_found_by_nobody(start):
    loop = start(FakeRunner(page_tokens=2, num_pages=64))
    bad = Request((1, 2, 3, POISON, 5, 6), 4)
    good = Request((1, 2, 3, 4, 5, 6), 4)
    clients = [run(loop, request) for request in (bad, good, bad)]
    for client in (clients[0], clients[2]):
        assert client.last.finish_reason == "nan"
        assert isinstance(client.last.error, NanLogitsError)
        assert "after 6 tokens" in client.last.error.message
        assert client.tokens == []
    assert clients[1].last
    assert (clients[1].tokens, clients[1].last.finish_reason) == alone(good)
    assert_nothing_left(loop)
    again = run(loop, bad)
    assert again.last.finish_reason == "nan"
    assert again.outputs[0].num_shared_tokens <= 2


def test_cancel_frees_pages_within_a_step():
    runner = FakeRunner(max_context=600, num_pages=400)
    loop = make_loop(runner, overlaps=True)
    client = Client()
    used = []

    def before_step(count):
        used.append(loop.num_used_pages)
        if count == 10:
            loop.cancel(1)

    runner.before_step = before_step
    loop.submit(Request((1, 2, 3), 500, stop_tokens=frozenset()), client)
    loop.start()
    assert client.last.finish_reason == "cancelled"
    assert_nothing_left(loop)
    loop.stop()
    assert len(used) <= 12
    assert len(client.tokens) <= 11


def test_cancelling_what_waits_or_has_ended_or_never_was(start):
    runner = FakeRunner(max_sequences=1, max_context=600, num_pages=400)
    loop = make_loop(runner)
    running = run(loop, Request((1,), 400, stop_tokens=frozenset()))
    waiting = run(loop, Request((1,), 400))
    loop.cancel(waiting.number)
    loop.start()
    assert waiting.last.finish_reason == "cancelled"
    assert waiting.tokens == []
    loop.cancel(999)
    loop.cancel(waiting.number)
    loop.cancel(running.number)
    assert running.last.finish_reason == "cancelled"
    assert run(loop, Request((1,), 2)).last.finish_reason in ("length", "stop")
    loop.stop()


def test_a_failed_step_fails_the_running_and_whoever_comes_later(start, caplog):
    runner = FakeRunner(max_context=600, num_pages=400)
    closed = []
    runner.close = lambda: closed.append(True)
    loop = make_loop(runner)
    clients = [run(loop, Request((n,), 400, stop_tokens=frozenset())) for n in range(1, 7)]

    def fail(count):
        if count == 5:
            raise RuntimeError("device-side assert")

    runner.before_step = fail
    assert loop.fault is None
    loop.start()
    for client in clients:
        assert isinstance(client.last.error, EngineStoppedError)
        assert "RuntimeError: device-side assert" in client.last.error.message
    assert loop.fault is clients[0].last.error
    assert loop.num_requests == 0
    with pytest.raises(EngineStoppedError, match="device-side assert"):
        run(loop, Request((1,), 2))
    loop.stop()
    assert closed == [True]
    assert "a step failed" in caplog.text


def test_stopping_cancels_what_runs_and_closes_the_runner():
    runner = FakeRunner(max_context=600, num_pages=400)
    closed = []
    runner.close = lambda: closed.append(True)
    loop = make_loop(runner)
    begun = threading.Event()
    runner.before_step = lambda count: begun.set()
    client = run(loop, Request((1,), 500, stop_tokens=frozenset()))
    loop.start()
    assert begun.wait(SECONDS)
    loop.stop()
    assert client.last.finish_reason == "cancelled"
    assert closed == [True]
    with pytest.raises(EngineStoppedError, match="closed"):
        run(loop, Request((1,), 2))
    loop.stop()


def test_a_client_that_fails_loses_its_request_only(start, caplog):
    loop = start()
    loop.submit(Request((1, 2), 20, stop_tokens=frozenset()), lambda output: 1 / 0)
    good = Request((1, 2), 20, stop_tokens=frozenset())
    client = run(loop, good)
    assert client.last.finish_reason == "length"
    assert client.tokens == alone(good)[0]
    assert_nothing_left(loop)
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request((), 4), "no tokens"),
        (Request((1,), 0), "max_new_tokens is 0, expected at least 1"),
        (Request((1, VOCAB), 4), f"token id {VOCAB}, expected 0 to {VOCAB - 1}"),
        (Request((1, -1), 4), "token id -1"),
        (Request((1, 1 << 31), 4), "token id 2147483648, expected 0 to"),
        (Request((1, -1 << 63), 4), "token id -9223372036854775808, expected 0 to"),
        (Request((1, 1.5), 4), "a token id of the prompt is 1.5, expected a whole number"),
        (Request((1, "2"), 4), "a token id of the prompt is '2', expected a whole number"),
        (Request((1,), 1.5), "max_new_tokens is 1.5, expected a whole number"),
        (Request((1,) * 60, 5), "with 5 new ones 65; the context has room for 64"),
    ],
)
def test_what_can_never_run_is_refused_at_once(start, request_, message):
    with pytest.raises(UsageError, match=message):
        start().submit(request_, print)


def test_what_the_cache_can_never_hold_is_refused_at_once(start):
    loop = start(FakeRunner(page_tokens=4, num_pages=6))
    with pytest.raises(UsageError, match="the KV cache has room for 20") as error:
        loop.submit(Request((1,) * 15, 6), print)
    assert error.value.hint == "shorten the prompt, or ask for 5 tokens"
    with pytest.raises(UsageError, match="the KV cache has room for 20") as error:
        loop.submit(Request((1,) * 20, 1), print)
    assert error.value.hint == "shorten the prompt"  # there is none for any new token
    assert loop.room(15) == 5
    assert run(loop, Request((1,) * 15, 5)).last.finish_reason in ("length", "stop")


def test_nothing_is_sampled_where_only_the_prompt_is_asked_about(start):
    request = Request(tuple(BASES[2][:9]), 0, prompt_logprobs=3)
    client = run(start(), request)
    assert (client.tokens, client.last.finish_reason) == ([], "length")
    check_prompt_logprobs(request, client)


def test_logprobs_come_one_for_each_token(start):
    request = Request((7, 8, 9), 6, Sampling(num_logprobs=0))
    client = run(start(make_drafter=Guesses), request)
    assert client.last
    tokens, _ = alone(request)
    found = [entry for output in client.outputs for entry in output.logprobs]
    assert [entry.token for entry in found] == tokens
    assert [entry.logprob for entry in found] == [-3.0 - i for i in range(len(tokens))]


def test_the_stop_token_is_told_and_is_not_among_the_tokens(start):
    free = alone(Request((9, 9), 10), stops=frozenset())[0]
    client = run(start(), Request((9, 9), 10, stop_tokens=frozenset({free[3]})))
    assert client.last.finish_reason == "stop"
    assert client.last.stop_token == free[3]
    assert client.tokens == free[: free.index(free[3])]


def test_without_a_seed_two_answers_differ(start):
    loop = start()
    request = Request((3, 1), 12, Sampling(temperature=1.0), stop_tokens=frozenset())
    clients = [run(loop, request) for _ in range(2)]
    assert all(client.last.finish_reason == "length" for client in clients)
    assert clients[0].tokens != clients[1].tokens


def test_thousands_of_requests_leave_nothing_behind(start):
    """Nor does the last output of one go missing, from many threads at once."""
    loop = start(FakeRunner(page_tokens=2, num_pages=80, max_sequences=8, max_step_tokens=64))
    num_ended = 0
    lock = threading.Lock()

    def work(thread):
        nonlocal num_ended
        for i in range(400):
            client = run(loop, Request((thread + 1, i % 38 + 1), 1 + i % 3))
            if i % 5 == 0:
                loop.cancel(client.number)
            assert client.last
            with lock:
                num_ended += 1

    threads = [threading.Thread(target=work, args=(n,)) for n in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert num_ended == 2000
    assert_nothing_left(loop)
    assert loop._live == {}
    assert len(loop._scheduler.pool._page_of) < 80
