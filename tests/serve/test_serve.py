"""The official client of OpenAI's API against `halfweight serve`'s application, over a socket."""

import copy
import json
import threading
import time
import urllib.error
import urllib.request

import pytest
import torch
from byte_tokenizer import EOS, make_tokenizer
from tiny import small_llama

from halfweight.engine.decoder import Sampling, generate

openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")
from halfweight.engine.continuous import Engine  # noqa: E402
from halfweight.serve.app import build_app  # noqa: E402

KEY = "secret"
NAN_TOKEN = 300
CONTEXT = 256


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def model():
    special = {"bos_token_id": None, "eos_token_id": EOS, "pad_token_id": EOS}
    model = small_llama(max_position_embeddings=CONTEXT, **special)
    model.lm_head.weight.data[257:] = 0
    model.model.embed_tokens.weight.data[NAN_TOKEN] = float("nan")
    return model


class Server:
    def __init__(self, model, tokenizer, **options):
        api_key = options.pop("api_key", None)
        self.engine = Engine(model, **options)
        app = build_app(self.engine, tokenizer, "tiny", api_key=api_key)
        self._server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
        self._thread = threading.Thread(target=self._server.run)

    def __enter__(self):
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        self.port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    def __exit__(self, *_):
        self._server.should_exit = True
        self._thread.join()

    def client(self, **options):
        options = {"api_key": "none", "max_retries": 0} | options
        return openai.OpenAI(base_url=f"{self.url}/v1", **options)

    def wait_until_idle(self):
        limit = time.monotonic() + 10
        while self.engine.num_requests:
            assert time.monotonic() < limit
            time.sleep(0.01)


@pytest.fixture(scope="module")
def server(model, tokenizer):
    with Server(copy.deepcopy(model), tokenizer, max_requests=4, cache_tokens=2048) as server:
        yield server


@pytest.fixture
def client(server):
    return server.client()


@pytest.fixture(scope="module")
def greedy(model, tokenizer):
    """Prompt text -> tokens and text of halfweight's own greedy decoding, eos excluded."""

    def run(text, num_tokens):
        prompt = tokenizer(text)["input_ids"]
        (found,) = generate(model, [prompt], max_new_tokens=num_tokens)
        return found, tokenizer.decode(found.tokens, skip_special_tokens=True)

    return run


def test_a_completion_is_the_models_own_greedy_text(client, greedy, tokenizer):
    found, text = greedy("hello", 12)
    answer = client.completions.create(model="tiny", prompt="hello", max_tokens=12, temperature=0)
    assert answer.choices[0].text == text
    assert answer.choices[0].finish_reason == found.finish_reason == "length"
    assert answer.usage.prompt_tokens == 5
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == 17
    assert (answer.object, answer.model) == ("text_completion", "tiny")


def test_a_chat_goes_through_the_models_template(client, greedy):
    _, text = greedy("<system>be brief\n<user>hi\n<assistant>", 10)
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    ]
    options = {"model": "tiny", "messages": messages, "temperature": 0}
    answer = client.chat.completions.create(**options, max_completion_tokens=10)
    assert answer.choices[0].message.content == text
    assert answer.choices[0].message.role == "assistant"
    assert answer.object == "chat.completion"


@pytest.mark.parametrize("prompt", ["hello", "\u4f60\u597d"])
def test_a_stream_adds_up_to_the_whole(client, prompt):
    options = {"model": "tiny", "prompt": prompt, "max_tokens": 40, "temperature": 0}
    whole = client.completions.create(**options)
    chunks = list(client.completions.create(**options, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert len(chunks) > 3
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_chat_stream_has_a_role_first_and_usage_last(client):
    chunks = list(
        client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "hi"}],
            max_tokens=6,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].delta.role for chunk in chunks[1:-1]] == [None] * (len(chunks) - 2)
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 6


def test_the_stop_token_ends_a_text(client, model, greedy, tokenizer, monkeypatch, server):
    found, _ = greedy("hello", 8)
    stop = found.tokens[3]
    monkeypatch.setattr(server.engine, "stops", frozenset({stop}))
    answer = client.completions.create(model="tiny", prompt="hello", max_tokens=8, temperature=0)
    first = found.tokens.index(stop)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].text == tokenizer.decode(found.tokens[:first])


def test_a_stop_string_is_cut_off(client, greedy):
    _, text = greedy("hello", 40)
    stop = text[5:8]
    at = text.index(stop)
    options = {"model": "tiny", "prompt": "hello", "max_tokens": 40, "temperature": 0}
    answer = client.completions.create(**options, stop=["never", stop])
    assert answer.choices[0].text == text[:at]
    assert answer.choices[0].finish_reason == "stop"
    streamed = client.completions.create(**options, stop=stop, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == text[:at]


def test_several_prompts_and_choices(client, greedy):
    prompts = ["one", "two"]
    answer = client.completions.create(
        model="tiny", prompt=prompts, n=2, max_tokens=5, temperature=0
    )
    expected = [greedy(prompt, 5)[1] for prompt in prompts for _ in range(2)]
    assert [choice.text for choice in answer.choices] == expected
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage.completion_tokens == 20


def test_prompts_as_token_ids(client, greedy, tokenizer):
    ids = tokenizer("hello")["input_ids"]
    for prompt in (ids, [ids]):
        answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=5, temperature=0)
        assert answer.choices[0].text == greedy("hello", 5)[1]


def test_sampling_differs_and_top_k_1_does_not(client, greedy):
    options = {"model": "tiny", "prompt": "hello", "max_tokens": 24, "n": 4}
    hot = client.completions.create(**options, temperature=2.0)
    assert len({choice.text for choice in hot.choices}) > 1
    cold = client.completions.create(**options, temperature=2.0, extra_body={"top_k": 1})
    assert {choice.text for choice in cold.choices} == {greedy("hello", 24)[1]}


def test_requests_at_the_same_time_do_not_touch_each_other(client, greedy):
    prompts = ["a", "some longer prompt", "xyz", "1234567"]
    found = {}

    def ask(prompt):
        answer = client.completions.create(
            model="tiny", prompt=prompt, max_tokens=30, temperature=0
        )
        found[prompt] = answer.choices[0].text

    threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {prompt: greedy(prompt, 30)[1] for prompt in prompts}


def test_models_and_health(client, server):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with urllib.request.urlopen(f"{server.url}/health") as answer:
        assert json.load(answer) == {"status": "ok", "requests": {"running": 0, "most": 4}}


CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "tiny", "prompt": "hello"}


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("completions", {"prompt": "x" * 300}, "prompt 0 has 300 tokens, with 16 new ones 316"),
        ("completions", {"max_tokens": 400}, "the model's context is 256"),
        ("completions", {"prompt": [1, 320]}, "prompt 0 has token id 320, expected 0 to 319"),
        ("completions", {"prompt": [-1]}, "prompt 0 has token id -1"),
        ("completions", {"prompt": ""}, "prompt: "),
        ("completions", {"prompt": []}, "prompt"),
        ("completions", {"temperature": 3}, "temperature: "),
        ("completions", {"max_tokens": 0}, "max_tokens: "),
        ("completions", {"n": 9}, "1 prompts with n=9 are more than 4"),
        ("completions", {"logprobs": 3}, "'logprobs' is not supported"),
        ("completions", {"frequency_penalty": 0.5}, "'frequency_penalty' is not supported"),
        ("chat/completions", {"messages": []}, "messages: "),
        ("chat/completions", {"messages": "hi"}, "messages: "),
        ("chat/completions", {"tools": [{"type": "function"}]}, "'tools' is not supported"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "only parts of type 'text' are supported",
        ),
    ],
)
def test_bad_requests_get_400_before_anything_runs(server, kind, changes, message, monkeypatch):
    monkeypatch.setattr(server.engine, "tokens", None)
    body = (TEXT if kind == "completions" else CHAT) | changes
    status, error = post(server, kind, body)
    assert status == 400
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"


def post(server, kind, body):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(
        f"{server.url}/v1/{kind}", data, {"Content-Type": "application/json"}
    )
    with pytest.raises(urllib.error.HTTPError) as raised:
        urllib.request.urlopen(request)
    return raised.value.code, json.load(raised.value)["error"]


def test_not_json_and_no_such_route(server):
    assert post(server, "completions", b"{not json")[0] == 400
    status, error = post(server, "embeddings", {})
    assert (status, error["type"]) == (404, "invalid_request_error")


def test_values_that_ask_for_nothing_are_accepted(client):
    answer = client.completions.create(
        **TEXT, max_tokens=2, frequency_penalty=0, logprobs=None, user="me", seed=7
    )
    assert answer.usage.completion_tokens == 2


def test_another_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError, match="'gpt' is not served; this is 'tiny'"):
        client.completions.create(model="gpt", prompt="hello")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt")


def test_more_requests_than_the_engine_takes(server, client):
    streams = [
        client.completions.create(**TEXT, max_tokens=200, stream=True, temperature=0)
        for _ in range(4)
    ]
    with pytest.raises(openai.RateLimitError, match="4 requests are running") as raised:
        client.completions.create(**TEXT)
    assert raised.value.response.headers["retry-after"] == "1"
    for stream in streams:
        stream.close()
    server.wait_until_idle()
    assert client.completions.create(**TEXT, max_tokens=1).choices


def test_a_client_that_goes_away_frees_its_place(server, client):
    stream = client.completions.create(**TEXT, max_tokens=230, stream=True, temperature=0)
    next(iter(stream))
    assert server.engine.num_requests == 1
    stream.close()
    server.wait_until_idle()
    impatient = server.client(timeout=0.05)
    with pytest.raises(openai.APITimeoutError):
        impatient.completions.create(**TEXT, max_tokens=250, temperature=0)
    server.wait_until_idle()


def test_nan_logits_end_that_request_only(server, client, greedy):
    others = {}

    def ask():
        answer = client.completions.create(
            model="tiny", prompt="innocent", max_tokens=60, temperature=0
        )
        others["text"] = answer.choices[0].text

    thread = threading.Thread(target=ask)
    thread.start()
    while not server.engine.num_requests:
        time.sleep(0.001)
    with pytest.raises(openai.InternalServerError, match="logits are NaN after 2 tokens"):
        client.completions.create(model="tiny", prompt=[5, NAN_TOKEN], max_tokens=60)
    thread.join()
    assert others["text"] == greedy("innocent", 60)[1]
    server.wait_until_idle()


def test_a_fault_in_a_stream_is_its_last_event(client, server, monkeypatch):
    from halfweight.engine.continuous import NanLogitsError

    async def two_tokens(prompt, max_new_tokens, sampling):
        assert sampling == Sampling(temperature=1.0)
        yield 70
        yield 71
        raise NanLogitsError("the model's logits are NaN after 7 tokens")

    monkeypatch.setattr(server.engine, "tokens", two_tokens)
    stream = client.completions.create(**TEXT, stream=True)
    with pytest.raises(openai.APIError, match="logits are NaN after 7 tokens"):
        list(stream)


def test_an_api_key(model, tokenizer):
    fresh = copy.deepcopy(model)
    with Server(fresh, tokenizer, cache_tokens=512, api_key=KEY) as server:
        assert server.client(api_key=KEY).completions.create(**TEXT, max_tokens=1).choices
        with pytest.raises(openai.AuthenticationError, match="key is missing or wrong"):
            server.client(api_key="wrong").completions.create(**TEXT)
        with pytest.raises(openai.AuthenticationError):
            server.client(api_key="wrong").models.list()
        with urllib.request.urlopen(f"{server.url}/health") as answer:
            assert answer.status == 200


def test_a_prompt_larger_than_the_cache(model, tokenizer):
    with Server(copy.deepcopy(model), tokenizer, cache_tokens=128) as server:
        status, error = post(server, "completions", TEXT | {"max_tokens": 200})
    assert status == 400
    assert "prompt and new tokens are 205, the cache holds 128" in error["message"]


def test_an_engine_that_stopped(model, tokenizer):
    with Server(copy.deepcopy(model), tokenizer, cache_tokens=128) as server:
        server.engine._manager.stop(block=True)
        status, error = post(server, "completions", TEXT)
        assert (status, error["type"]) == (503, "server_error")
        with pytest.raises(urllib.error.HTTPError) as raised:
            urllib.request.urlopen(f"{server.url}/health")
        assert raised.value.code == 503


def test_stopping_leaves_the_model_as_it_was(model, tokenizer):
    fresh = copy.deepcopy(model)
    ids = torch.tensor([[1, 2, 3]])
    before = fresh(ids).logits
    with Server(fresh, tokenizer, cache_tokens=128):
        pass
    assert torch.equal(fresh(ids).logits, before)
