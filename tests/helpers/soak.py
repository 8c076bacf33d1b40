"""Traffic as bad as clients can make it, on one engine: over HTTP and by its own calls.

A request is a `Wish`: what it asks for, the way it goes, and what its client does. `run` plays many
of them, so many at a time, and gives their outcomes; `alone` is what a wish must get.
"""

import asyncio
import json
import random
from dataclasses import dataclass, field

from halfweight.engine.grammar import Grammar
from halfweight.engine.loop import NanLogitsError

NAN_TOKEN = 300
"""Its embedding is NaN: who reads it has NaN logits."""
SECONDS = 240
DOCUMENTS = [f"document {i}: " + "all happy families are alike, " * 3 for i in range(3)]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
REFUSED = [
    {"prompt": "x" * 3000},
    {"max_tokens": 5000},
    {"typical_p": 0.9},
    {"tools": [{"type": "function"}]},
    {"temperature": -1},
    {"stop_token_ids": [999_999], "min_tokens": 2},
    {"guided_regex": "("},
    {"guided_json": "{"},
    {"logit_bias": {"5000": 1}},
    {"prompt": [1, 999]},
    {"prompt": []},
    {"n": 5000},
]


@dataclass(frozen=True)
class Wish:
    """One client's request."""

    body: dict
    """As OpenAI's completions take it; `leaves` are not among its fields."""
    over_http: bool
    leaves_after: int | None = None
    """Pieces after which the client goes away; None reads to the end."""
    is_wrong: bool = False

    @property
    def key(self):
        """The same for wishes that must get the same."""
        return json.dumps({**self.body, "stream": None}, sort_keys=True)


@dataclass
class Outcome:
    """What a client got: a status, and for each choice its text and reason."""

    wish: Wish
    status: int = 200
    texts: dict = field(default_factory=dict)
    reasons: dict = field(default_factory=dict)


def wishes(count, seed):
    """So many wishes, the same for the same seed."""
    draw = random.Random(seed)
    return [_wish(draw) for _ in range(count)]


def _wish(draw):
    over_http = draw.random() < 0.5
    document = draw.choice(DOCUMENTS)
    prompt = draw.choice(["", document, document]) + f"question {draw.randrange(12)}?"
    body = {"prompt": prompt, "max_tokens": draw.choice([1, 8, 40, 100, 180]), "temperature": 0.0}
    body |= {"ignore_eos": draw.random() < 0.5}
    kind = draw.random()
    if kind < 0.12 and over_http:
        return Wish(body | draw.choice(REFUSED), True, is_wrong=True)
    if kind < 0.17:
        body |= {"prompt": [5, 6, NAN_TOKEN, 7]}
    elif kind < 0.32:
        body |= {"temperature": draw.choice([0.7, 1.3]), "seed": draw.randrange(6)}
        body |= {"top_p": draw.choice([1.0, 0.9]), "top_k": draw.choice([0, 40])}
    elif kind < 0.38:
        body |= {"guided_regex": draw.choice(["[ab]{5,40}", "(the|cat| )*12"])}
    elif kind < 0.42:
        body |= {"guided_json": SCHEMA}
    elif kind < 0.48:
        body |= {"stop": draw.choice([["a", "zz"], "7", "\n"])}
    elif kind < 0.54:
        body |= {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "min_tokens": 4}
    elif kind < 0.60 and over_http:
        body |= {"n": 3, "temperature": 1.0, "seed": draw.randrange(3)}
    elif kind < 0.65:
        body |= {"logprobs": 2}
    leaves = draw.choice([0, 1, 3, 10]) if draw.random() < 0.2 else None
    if over_http:
        body |= {"stream": leaves is not None or draw.random() < 0.6}
    return Wish(body, over_http, leaves)


async def run(server, found, *, at_once):
    """Outcomes of wishes, `at_once` at a time, in their order."""
    turn = asyncio.Semaphore(at_once)

    async def one(wish):
        async with turn:
            ask = _over_http(server, wish) if wish.over_http else _by_call(server.engine, wish)
            return await asyncio.wait_for(ask, SECONDS)

    return await asyncio.gather(*map(one, found))


async def _over_http(server, wish):
    """HTTP/1.0, where an answer ends with its connection."""
    outcome = Outcome(wish)
    data = json.dumps(wish.body).encode()
    head = f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        writer.write(f"POST /v1/completions HTTP/1.0\r\n{head}".encode() + data)
        outcome.status = int((await reader.readline()).split()[1])
        while (await reader.readline()).strip():
            pass
        await (_read_events if wish.body.get("stream") else _read_body)(reader, outcome)
    finally:
        writer.close()
    return outcome


async def _read_body(reader, outcome):
    for choice in json.loads(await reader.read()).get("choices", []):
        outcome.texts[choice["index"]] = choice["text"]
        outcome.reasons[choice["index"]] = choice["finish_reason"]


async def _read_events(reader, outcome):
    num_read = 0
    while num_read != outcome.wish.leaves_after:
        line = (await reader.readline()).decode()
        if not line:
            return
        if not line.startswith("data: {"):
            continue
        event = json.loads(line.removeprefix("data: "))
        if "error" in event:
            outcome.status = 500
            return
        num_read += 1
        for choice in event["choices"]:
            index = choice["index"]
            outcome.texts[index] = outcome.texts.get(index, "") + choice["text"]
            outcome.reasons[index] = choice["finish_reason"]


async def _by_call(engine, wish):
    outcome = Outcome(wish)
    text, num_read = "", 0
    stream = engine.aopen(engine.request(**options(wish)))
    pieces = stream.pieces()
    try:
        async for piece in pieces:
            text += piece.text
            num_read += 1
            outcome.reasons[0] = piece.finish_reason
            if piece.error is not None:
                outcome.status = 500
            elif num_read == wish.leaves_after:
                break
    finally:
        await pieces.aclose()
    outcome.texts[0] = text
    return outcome


def options(wish, choice=0):
    """A wish as the engine's own calls take it."""
    body = wish.body
    found = {"prompt": body["prompt"], "max_new_tokens": body["max_tokens"]}
    given = ("temperature", "top_p", "top_k", "stop", "repetition_penalty", "frequency_penalty")
    found |= {name: body[name] for name in given if name in body}
    found |= {"stop_tokens": ()} if body["ignore_eos"] else {}
    if "seed" in body:
        found["seed"] = body["seed"] + choice
    if "min_tokens" in body:
        found["min_new_tokens"] = body["min_tokens"]
    if "logprobs" in body:
        found["num_logprobs"] = body["logprobs"]
    if "guided_regex" in body:
        found["grammar"] = Grammar.regex(body["guided_regex"])
    if "guided_json" in body:
        found["grammar"] = Grammar.json_schema(body["guided_json"])
    return found


def alone(engine, wish):
    """What a wish must get: status, and (text, reason) of each choice."""
    found = []
    for choice in range(wish.body.get("n", 1)):
        asked = options(wish, choice)
        answer = engine.generate(asked.pop("prompt"), **asked)
        if isinstance(answer.error, NanLogitsError):
            return 500, []
        found.append((answer.text, answer.finish_reason))
    return 200, found
