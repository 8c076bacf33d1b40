"""`halfweight serve`: its options reach the application; loopback unless asked otherwise."""

import builtins
import shutil
import socket
import sys

import pytest
from byte_tokenizer import make_tokenizer
from tiny import make_llama

import halfweight
from halfweight.cli import main

pytest.importorskip("uvicorn")
import halfweight.serve.listen


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("serve")
    source = make_llama(root / "source")
    halfweight.quantize(source, root / "tiny-int8")
    shutil.rmtree(source)
    make_tokenizer().save_pretrained(root / "tiny-int8")
    return root / "tiny-int8"


def run(monkeypatch, *arguments):
    """The application, and where it was to listen."""
    given = {}

    def listen(app, engine, host, port):
        given.update(app=app, host=host, port=port)

    monkeypatch.setattr(halfweight.serve.listen, "listen", listen)
    monkeypatch.setattr(halfweight.serve.listen, "require_address", lambda host, port: None)
    with pytest.raises(SystemExit) as left:
        main(["serve", *map(str, arguments)])
    return left.value.code, given


def ask(app, path, **headers):
    from starlette.testclient import TestClient

    with TestClient(app) as client:
        return client.get(path, headers=headers)


def test_it_listens_on_loopback(folder, monkeypatch, capsys):
    code, given = run(monkeypatch, folder, "--device", "cpu")
    assert code == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "requests are sampled by temperature 0.7, top_k 0, top_p 1.0" in said
    assert (given["host"], given["port"]) == ("127.0.0.1", 8000)
    assert ask(given["app"], "/v1/models").json()["data"][0]["id"] == "tiny-int8"


def test_a_key_and_a_name(folder, monkeypatch):
    options = ["--device", "cpu", "--api-key", "k", "--name", "mine", "--port", "0"]
    _, given = run(monkeypatch, folder, *options)
    assert ask(given["app"], "/v1/models/mine").status_code == 401
    headers = {"authorization": "Bearer k"}
    assert ask(given["app"], "/v1/models/mine", **headers).json()["id"] == "mine"


def test_an_open_door_is_mentioned(folder, monkeypatch, capsys):
    run(monkeypatch, folder, "--device", "cpu", "--host", "0.0.0.0")
    assert "0.0.0.0 is reachable by others and there is no --api-key" in capsys.readouterr().err
    run(monkeypatch, folder, "--device", "cpu", "--host", "0.0.0.0", "--api-key", "k")
    assert "reachable" not in capsys.readouterr().err


def refused(*arguments):
    with pytest.raises(SystemExit) as left:
        main(["serve", "no-such-model", *arguments])
    return left.value.code


def test_a_port_that_is_taken_is_told_before_anything_is_loaded(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert refused("--port", str(port)) == 2
    message = f"error: 127.0.0.1:{port}: cannot be listened on (Address already in use)"
    assert capsys.readouterr().err == f"{message}\nhint: --port 0 takes a free one\n"


def test_an_address_of_another_machine_is_told(capsys):
    assert refused("--host", "203.0.113.7", "--port", "0", "--api-key", "k") == 2
    written = capsys.readouterr().err
    assert written.startswith("error: 203.0.113.7:0: cannot be listened on (Cannot assign")
    assert "hint: --host 127.0.0.1 is for this machine alone" in written


def test_without_the_extra(folder, monkeypatch, capsys):
    import_module = builtins.__import__

    def refuse(name, *arguments, **options):
        if name == "uvicorn":
            raise ImportError("no", name="uvicorn")
        return import_module(name, *arguments, **options)

    monkeypatch.delitem(sys.modules, "halfweight.serve.listen")
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(SystemExit) as left:
        main(["serve", str(folder)])
    assert left.value.code == 2
    captured = capsys.readouterr().err
    assert "serving needs uvicorn, which is not installed" in captured
    assert "pip install 'halfweight[serve]'" in captured
