"""Answers to the same prompts by the ways that an engine may come to them."""

from contextlib import contextmanager

from halfweight.engine.engine import Engine
from halfweight.engine.sampler import Sampler
from halfweight.engine.streams import Completion

NUM_PROMPTS, NUM_OTHERS, NEW_TOKENS = 8, 56, 32


@contextmanager
def over(make, model, **limits):
    runner = make(model, max_context=256, **limits)
    engine = Engine.over(runner, Sampler(runner.table, runner.vocab_size), None)
    with engine:
        yield engine


class Ways:
    """Answers to the first prompts in every way that an engine may come to them."""

    def __init__(self, make, model, prompts, *, new_tokens=NEW_TOKENS, **sampling):
        self.make, self.model, self.sampling = make, model, sampling
        self.length = {"stop_tokens": (), "max_new_tokens": new_tokens}
        self.asked, self.others = prompts[:NUM_PROMPTS], prompts[NUM_PROMPTS:]

    def _ask(self, engine, prompt, i):
        return engine.request(prompt, **self.length, **self.sampling, seed=i, num_logprobs=2)

    def _together(self, engine, *, others):
        requests = [self._ask(engine, prompt, i) for i, prompt in enumerate(self.asked)]
        streams = [engine.open(request) for request in requests]
        beside = [engine.open(engine.request(prompt, **self.length)) for prompt in others]
        found = [answer_of(stream) for stream in streams]
        for stream in beside:
            stream.cancel()
        return found

    def all(self):
        """Each way but alone, by its name."""
        yield "among others", self.among_others()
        yield "preempted", self.preempted()
        yield "shared", self.shared()

    def alone(self):
        with over(self.make, self.model, max_sequences=1, cache_tokens=1024) as engine:
            asked = enumerate(self.asked)
            return [answer_of(engine.open(self._ask(engine, prompt, i))) for i, prompt in asked]

    def among_others(self):
        room = 3 * sum(len(prompt) for prompt in (*self.asked, *self.others))
        with over(self.make, self.model, max_sequences=64, cache_tokens=room) as engine:
            return self._together(engine, others=self.others)

    def preempted(self):
        """All of them, twice as many tokens as there is room for."""
        room = sum(len(prompt) + self.length["max_new_tokens"] for prompt in self.asked) // 2
        with over(self.make, self.model, max_sequences=8, cache_tokens=room) as engine:
            counter, add = [], engine._loop._scheduler.add
            engine._loop._scheduler.add = lambda sequence: (counter.append(0), add(sequence))
            found = self._together(engine, others=[])
            assert len(counter) > len(self.asked), "nobody had to give way"
            return found

    def shared(self):
        """Behind a text that goes on from the same beginning: all full pages are shared."""
        with over(self.make, self.model, max_sequences=2, cache_tokens=4096) as engine:
            found, page = [], engine._loop._scheduler._page_tokens
            for i, prompt in enumerate(self.asked):
                engine.generate([*prompt, 7, 8, 9], max_new_tokens=2, stop_tokens=())
                answer = answer_of(engine.open(self._ask(engine, prompt, i)))
                assert 0 < answer.num_shared_tokens == (len(prompt) - 1) // page * page
                found.append(answer)
            return found


def answer_of(stream):
    return Completion.of(list(stream))


def compare(way, found, alone):
    """Where answers part, with the gap of the two likeliest there; the first tokens apart only."""
    partings = []
    for i, (got, expected) in enumerate(zip(found, alone, strict=True)):
        assert len(got.tokens) == len(expected.tokens) >= NEW_TOKENS
        pairs = enumerate(zip(got.tokens, expected.tokens, strict=True))
        at = next((at for at, (a, b) in pairs if a != b), None)
        if at is not None:
            (_, first), (_, second) = expected.logprobs[at].top
            partings.append(first - second)
            print(f"{way}: prompt {i} parts at token {at}, gap {first - second:.4f} nats")
    return partings
