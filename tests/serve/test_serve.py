"""The official client of OpenAI's API against `halfweight serve`'s application, over a socket."""

import asyncio
import copy
import gc
import json
import re
import threading
import time
import urllib.error
import urllib.request
from types import SimpleNamespace

import pytest
import torch
from byte_tokenizer import EOS, make_tokenizer
from tiny import small_llama

from halfweight.engine.loop import NanLogitsError
from halfweight.engine.sampler import Sampling
from halfweight.engine.streams import Piece

openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")
from live_server import Server  # noqa: E402

from halfweight.serve.app import _made, default_sampling  # noqa: E402
from halfweight.serve.schema import CompletionRequest  # noqa: E402

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


@pytest.fixture(scope="module")
def server(model, tokenizer):
    with Server(copy.deepcopy(model), tokenizer, max_requests=4, cache_tokens=2048) as server:
        yield server


@pytest.fixture
def client(server):
    return server.client()


@pytest.fixture(scope="module")
def greedy(model, tokenizer):
    """Prompt text -> tokens and text of transformers' own greedy decoding, eos excluded."""

    def run(text, num_tokens):
        prompt = torch.tensor([tokenizer(text)["input_ids"]])
        whole = model.generate(prompt, max_new_tokens=num_tokens, do_sample=False)
        tokens = [token for token in whole[0, prompt.shape[1] :].tolist() if token != EOS]
        return tokens, tokenizer.decode(tokens, skip_special_tokens=True)

    return run


def test_a_completion_is_the_models_own_greedy_text(client, greedy, tokenizer):
    _, text = greedy("hello", 12)
    answer = client.completions.create(model="tiny", prompt="hello", max_tokens=12, temperature=0)
    assert answer.choices[0].text == text
    assert answer.choices[0].finish_reason == "length"
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
    assert len(chunks) > 1
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
    stop = found[3]
    monkeypatch.setattr(server.engine, "stop_tokens", frozenset({stop}))
    answer = client.completions.create(model="tiny", prompt="hello", max_tokens=8, temperature=0)
    first = found.index(stop)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].text == tokenizer.decode(found[:first])


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
    options["logit_bias"] = {str(NAN_TOKEN): -100}
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
        ("completions", {"prompt": "x" * 300}, "the prompt has 300 tokens, with 16 new ones 316"),
        ("completions", {"max_tokens": 400}, "the context has room for 256"),
        ("completions", {"prompt": [1, 320]}, "the prompt has token id 320, expected 0 to 319"),
        ("completions", {"prompt": [-1]}, "the prompt has token id -1"),
        ("completions", {"prompt": [1, 2**40]}, "the prompt has token id 1099511627776"),
        ("completions", {"prompt": [1, -(2**70)]}, "the prompt has token id -1180591620717411303"),
        ("completions", {"prompt": [1.0]}, "prompt: expected a text, token ids, or a list of"),
        ("completions", {"prompt": [True]}, "prompt: expected a text, token ids, or a list of"),
        ("completions", {"prompt": [1, "2"]}, "prompt: expected a text, token ids, or a list of"),
        ("completions", {"prompt": [[[1]]]}, "prompt: expected a text, token ids, or a list of"),
        ("completions", {"prompt": [[1], []]}, "the prompt has no tokens"),
        ("completions", {"stop_token_ids": [True]}, "stop_token_ids.0: "),
        ("completions", {"prompt": ""}, "the prompt has no tokens"),
        ("completions", {"prompt": []}, "the prompt has no tokens"),
        ("completions", {"temperature": 3}, "temperature: "),
        ("completions", {"n": 9}, "1 prompts with n=9 are more than 4"),
        ("completions", {"typical_p": 0.9}, "'typical_p' is not supported"),
        ("completions", {"max_token": 5}, "'max_token' is not supported"),
        ("completions", {"best_of": 2}, "'best_of' is not supported"),
        ("completions", {"max_tokens": 0}, "max_tokens: 0 asks for nothing without echo"),
        ("completions", {"logit_bias": {"400": 1}}, "logit_bias"),
        ("completions", {"guided_regex": "("}, "regex"),
        ("completions", {"guided_regex": "[^\\x00-\\u{10FFFF}]"}, "regex: no text matches it"),
        ("completions", {"guided_json": "not json"}, "the schema is not JSON"),
        ("completions", {"structured_outputs": {"json": "{"}}, "the schema is not JSON"),
        ("completions", {"guided_choice": []}, "a choice of nothing"),
        ("completions", {"stop_token_ids": [9999], "min_tokens": 2}, "token id 9999"),
        ("completions", {"logit_bias": {"5": float("inf")}}, "logit_bias of token 5 is inf"),
        ("completions", {"repetition_penalty": float("inf")}, "repetition_penalty is inf"),
        ("completions", {"temperature": float("nan")}, "temperature: "),
        ("completions", {"prompt": "\ud800"}, "the tokenizer cannot read the prompt"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "\ud800"}]}]},
            "the tokenizer cannot read the prompt",
        ),
        (
            "chat/completions",
            {"chat_template_kwargs": {"chat_template": "{% for i in range(99999) %}{% endfor %}"}},
            "'chat_template' is not supported",
        ),
        ("chat/completions", {"chat_template_kwargs": {"self": 1}}, "'self' is not supported"),
        (
            "completions",
            {"guided_regex": "a", "response_format": {"type": "json_object"}},
            "two forms are asked for",
        ),
        ("completions", {"stream_options": {"x": 1}}, "'x' is not supported"),
        ("chat/completions", {"response_format": {"type": "json_schema"}}, "has no json_schema"),
        ("chat/completions", {"top_logprobs": 3}, "'top_logprobs' needs 'logprobs': true"),
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
    monkeypatch.setattr(server.engine, "aopen", None)
    body = (TEXT if kind == "completions" else CHAT) | changes
    status, error = post(server, kind, body)
    assert status == 400
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"


def post(server, kind, body):
    """Status and error of a request that is refused."""
    status, answer = server.post(kind, body)
    return status, answer["error"]


def test_not_json_and_no_such_route(server):
    assert post(server, "completions", b"{not json")[0] == 400
    status, error = post(server, "embeddings", {})
    assert (status, error["type"]) == (404, "invalid_request_error")


def test_values_that_ask_for_nothing_are_accepted(client):
    nothing = {"tools": [], "best_of": 1, "min_p": None, "store": False, "response_format": None}
    answer = client.completions.create(
        **TEXT,
        **{"max_tokens": 2, "temperature": 0, "frequency_penalty": 0, "logprobs": None},
        **{"user": "me", "extra_body": nothing},
    )
    assert answer.usage.completion_tokens == 2


def test_a_seed_gives_its_answer_again_and_each_choice_its_own(client):
    options = {**TEXT, "max_tokens": 12, "temperature": 1.5, "n": 3}
    options["logit_bias"] = {str(NAN_TOKEN): -100}
    first, again, other = (
        [choice.text for choice in client.completions.create(**options, seed=seed).choices]
        for seed in (5, 5, 9)
    )
    assert first == again
    assert len(set(first)) == 3
    assert first != other


def test_logprobs_of_a_completion_and_of_its_echoed_prompt(client, model, tokenizer, greedy):
    tokens, text = greedy("hello", 4)
    ids = [*tokenizer("hello")["input_ids"], *tokens]
    expected = model(torch.tensor([ids])).logits[0].log_softmax(-1).detach()
    chosen = [float(expected[i - 1, ids[i]]) for i in range(1, len(ids))]
    answer = client.completions.create(
        **TEXT, max_tokens=4, temperature=0, logprobs=2, echo=True
    ).choices[0]
    assert answer.text == "hello" + text
    assert answer.logprobs.token_logprobs[0] is None
    assert answer.logprobs.token_logprobs[1:] == pytest.approx(chosen, abs=1e-4)
    assert answer.logprobs.tokens[:5] == list("hello")
    assert answer.logprobs.text_offset[:5] == [0, 1, 2, 3, 4]
    assert all(1 <= len(top) <= 2 for top in answer.logprobs.top_logprobs[1:])  # by their text
    only_echo = client.completions.create(**TEXT, max_tokens=0, logprobs=0, echo=True)
    assert only_echo.usage.completion_tokens == 0
    assert only_echo.usage.total_tokens == only_echo.usage.prompt_tokens == 5
    alone = only_echo.choices[0]
    assert alone.text == "hello"
    assert alone.logprobs.token_logprobs[1:] == pytest.approx(chosen[:4], abs=1e-4)


def test_logprobs_of_a_chat_are_the_same_streamed(client):
    options = {**CHAT, "max_tokens": 5, "temperature": 0, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**options).choices[0].logprobs.content
    chunks = client.chat.completions.create(**options, stream=True)
    parts = [c.choices[0].logprobs.content for c in chunks if c.choices[0].logprobs]
    streamed = [entry for part in parts for entry in part]
    assert [entry.token for entry in streamed] == [entry.token for entry in whole]
    expected = [entry.logprob for entry in whole]  # products of other sizes add in another order
    assert [entry.logprob for entry in streamed] == pytest.approx(expected, abs=1e-5)
    assert len(whole) == 5
    assert all(entry.top_logprobs[0].logprob == entry.logprob for entry in whole)


def test_output_of_a_form(client):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    options = {**CHAT, "max_tokens": 60, "seed": 1, "temperature": 0.5}
    answer = client.chat.completions.create(**options, response_format=form).choices[0]
    if answer.finish_reason == "stop":
        assert isinstance(json.loads(answer.message.content)["a"], int)
    for body in ({"guided_regex": "[ab]{7}"}, {"structured_outputs": {"regex": "[ab]{7}"}}):
        answer = client.completions.create(**TEXT, max_tokens=20, extra_body=body).choices[0]
        assert re.fullmatch("[ab]{7}", answer.text)
        assert answer.finish_reason == "stop"


def test_fields_of_vllms_clients(client, greedy, tokenizer):
    tokens, text = greedy("hello", 12)
    options = {**TEXT, "max_tokens": 12, "temperature": 0}
    stop = tokens[4]
    ended = client.completions.create(**options, extra_body={"stop_token_ids": [stop]}).choices[0]
    assert ended.text == tokenizer.decode(tokens[: tokens.index(stop)])
    assert (ended.finish_reason, ended.stop_reason) == ("stop", stop)
    asked = {**options, "extra_body": {"stop_token_ids": [stop]}, "stream": True}
    *_, last = client.completions.create(**asked)
    assert (last.choices[0].finish_reason, last.choices[0].stop_reason) == ("stop", stop)
    own = client.completions.create(**options, logit_bias={str(EOS): 100}).choices[0]
    assert (own.finish_reason, own.stop_reason) == ("stop", None), "nobody asked for this end"
    biased = client.completions.create(**options, logit_bias={"65": 100}).choices[0]
    assert set(biased.text) == {tokenizer.decode([65])}
    kept = client.completions.create(
        **options, stop=text[3], extra_body={"include_stop_str_in_output": True}
    ).choices[0]
    assert kept.text == text[: text.index(text[3]) + 1]


def test_a_second_request_with_the_same_beginning_reads_it_from_the_cache(client):
    options = {"model": "tiny", "prompt": "a beginning that is shared " * 6, "max_tokens": 3}
    first, second = (client.completions.create(**options, temperature=0) for _ in range(2))
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert second.usage.prompt_tokens_details.cached_tokens > 100
    assert first.choices[0].text == second.choices[0].text


def test_metrics(server, client):
    client.completions.create(**TEXT, max_tokens=2, temperature=0)
    with urllib.request.urlopen(f"{server.url}/metrics") as answer:
        page = answer.read().decode()
    assert re.search(r'^halfweight_requests_total{finish_reason="length"} [1-9]', page, re.M)
    assert re.search(r"^halfweight_generated_tokens_total [1-9]", page, re.M)


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
    def two_tokens(request):
        assert request.sampling.temperature == 1.0
        error = NanLogitsError("the model's logits are NaN after 7 tokens")
        pieces = [Piece("a", (70,)), Piece("b", (71,)), Piece("", (), "nan", error=error)]
        return SimpleNamespace(pieces=lambda: _all(pieces))

    async def _all(pieces):
        for piece in pieces:
            yield piece

    monkeypatch.setattr(server.engine, "aopen", two_tokens)
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
    assert "with 200 new ones 205; the KV cache has room for 128" in error["message"]
    assert error["message"].endswith("(shorten the prompt, or ask for 123 tokens)")


def test_a_model_that_is_not_sampled_is_at_1_over_http():
    engine = SimpleNamespace(sampling=Sampling(repetition_penalty=1.1))
    assert default_sampling(engine) == {"temperature": 1.0, "repetition_penalty": 1.1}


def test_an_engine_that_stopped(model, tokenizer):
    with Server(copy.deepcopy(model), tokenizer, cache_tokens=128) as server:
        server.engine.close()
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


def test_what_was_loaded_is_not_collected_again_while_it_serves(model, tokenizer):
    with Server(copy.deepcopy(model), tokenizer, cache_tokens=256):
        assert gc.get_freeze_count() > 0
    assert gc.get_freeze_count() == 0


def test_a_long_request_is_answered_as_a_short_one(client, tokenizer):
    options = {"model": "tiny", "max_tokens": 3, "temperature": 0}
    short = client.completions.create(prompt="hello", **options)
    ids = tokenizer("hello")["input_ids"]
    long = client.completions.create(
        prompt=ids, **options, extra_headers={"X-Padding": "x"}, user="x" * 9000
    )
    assert long.choices[0].text == short.choices[0].text


@pytest.mark.parametrize(
    ("changes", "num_bytes", "has_thread"),
    [
        ({}, "100", False),
        ({}, "9000", True),
        ({}, None, True),
        ({"prompt": [1, 2]}, "30000", False),
        ({"prompt": [1, 2]}, "33000", True),
        ({"prompt": [[1, 2]] * 16}, "200", False),
        ({"prompt": [[1, 2]] * 17}, "200", True),
        ({"prompt": ["a"] * 17}, "200", True),
        ({"guided_regex": "a"}, "100", True),
    ],
)
def test_what_takes_long_is_made_by_a_thread(changes, num_bytes, has_thread):
    body = CompletionRequest.model_validate(TEXT | changes)
    headers = {} if num_bytes is None else {"content-length": num_bytes}
    http = SimpleNamespace(headers=headers)
    made_by = asyncio.run(_made(lambda _: threading.get_ident(), body, http))
    assert (made_by != threading.get_ident()) == has_thread
