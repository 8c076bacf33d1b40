"""What was read once is not read again: counted in the tokens that reach the runner."""

import io
import shutil
from itertools import pairwise

import pytest
import torch
from byte_tokenizer import make_tokenizer
from command_line import run
from tiny import small_llama

import halfweight
from halfweight.engine.engine import Engine
from halfweight.engine.runners.cpu import PAGE_TOKENS, CpuRunner

SHARED = 2000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small Llama in INT8 with a chat tokenizer of bytes, whose texts are ASCII."""
    root = tmp_path_factory.mktemp("prefixes")
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    model = small_llama(max_position_embeddings=8192, **special)
    head = model.lm_head.weight.data
    head[0], head[95:] = 0, head[1]  # the likeliest is among 1 to 94, the letters of ASCII
    model.to(torch.bfloat16).save_pretrained(root / "source")
    halfweight.quantize(root / "source", root / "int8")
    make_tokenizer().save_pretrained(root / "int8")
    shutil.rmtree(root / "source")
    return root / "int8"


@pytest.fixture
def read(monkeypatch):
    """The tokens of each chunk of each step of every CPU runner."""
    steps, run_step = [], CpuRunner.run

    def counted(self, step):
        steps.append([chunk.num_tokens for chunk in step])
        return run_step(self, step)

    monkeypatch.setattr(CpuRunner, "run", counted)
    return steps


def take(steps):
    """Tokens read since the last call."""
    found = sum(map(sum, steps))
    steps.clear()
    return found


def test_a_second_request_reads_what_is_behind_its_shared_beginning(folder, read):
    shared = [7 + 11 * i % 90 for i in range(SHARED)]
    with Engine(folder, device="cpu", max_sequences=4, cache_tokens=8192) as engine:
        whole = engine.generate([*shared, 5, 6, 7], max_new_tokens=1)
        assert take(read) == SHARED + 3
        again = engine.generate([*shared, 8, 9], max_new_tokens=1)
        assert take(read) == SHARED % PAGE_TOKENS + 2
    assert whole.num_shared_tokens == 0
    assert again.num_shared_tokens == SHARED - SHARED % PAGE_TOKENS


def test_those_that_come_together_share_as_well(folder, read):
    shared = [9 + 13 * i % 90 for i in range(SHARED)]
    with Engine(folder, device="cpu", max_sequences=8, cache_tokens=8192) as engine:
        engine.generate([[*shared, 5 + i] for i in range(8)], max_new_tokens=1)
    assert take(read) == SHARED + 1 + 7 * (SHARED % PAGE_TOKENS + 1)


def test_a_chats_next_turn_reads_only_what_is_new(capsys, folder, read, monkeypatch):
    """The new words, and of the last turn the page that was not full and its last token."""
    turns = ["tell me " + "a long story " * 40, "and then", "go on please"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(turns) + "\n"))
    of_turn = []
    chat_prompt = Engine.chat_prompt

    def next_turn(self, messages, **template):
        of_turn.append(take(read))
        ids = chat_prompt(self, messages, **template)
        lengths.append(len(ids))
        return ids

    lengths = []
    monkeypatch.setattr(Engine, "chat_prompt", next_turn)
    code, out, _ = run(capsys, "chat", str(folder), "--max-new-tokens", "20", "--greedy")
    of_turn.append(take(read))
    assert code == 0
    assert len(out.split("\n")) == 4
    _, *lengths = lengths  # the first asks whether there is a template
    _, _, *of_turn = of_turn
    new_tokens = 20 - 1  # the last one made is not read
    assert of_turn[0] == lengths[0] + new_tokens
    for num_read, (before, now) in zip(of_turn[1:], pairwise(lengths), strict=True):
        assert 0 < num_read - new_tokens <= now - before - new_tokens + PAGE_TOKENS
        assert num_read < lengths[0] / 4
