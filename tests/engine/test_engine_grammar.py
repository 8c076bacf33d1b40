"""Structured output: masks over three kinds of tokenizers, drafts, the end, and plain refusals."""

import json
import random
import re
import sys

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from halfweight.engine.grammar import Grammar, GrammarCompiler
from halfweight.engine.request import Sampling
from halfweight.engine.sampler import Sampler
from halfweight.engine.step import Chunk
from halfweight.errors import UsageError

pytest.importorskip("llguidance")

TEXT = [
    '{"name": "Zoë", "age": 41, "tags": ["a b", "c"], "ok": true}',
    "the cat sat on the mat 12:34",
]
BYTES = [f"<0x{i:02X}>" for i in range(256)]
SPECIAL = ["<unk>", "<s>", "</s>"]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["a b", "ü"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def check_schema(found):
    """What SCHEMA says."""
    assert list(found) == ["name", "age", "tags"]
    assert len(found["name"]) <= 8
    assert type(found["age"]) is int
    assert 0 <= found["age"] <= 99
    assert len(found["tags"]) <= 2
    assert set(found["tags"]) <= {"a b", "ü"}


def byte_level():
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        TEXT * 5,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=SPECIAL,
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    return inner


def byte_fallback():
    """As Llama 2's: a byte without a token of its own is <0x..>."""
    inner = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    inner.normalizer = normalizers.Replace(" ", "▁")
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL + BYTES, show_progress=False
    )
    inner.train_from_iterator(TEXT * 5, trainer)
    return edited(inner, lambda model: None)


def unigram():
    """As Gemma's or T5's, with bytes."""
    inner = Tokenizer(models.Unigram())
    inner.normalizer = normalizers.Replace(" ", "▁")
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    trainer = trainers.UnigramTrainer(
        vocab_size=100, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    inner.train_from_iterator(TEXT * 5, trainer)

    def add_bytes(model):
        model["byte_fallback"] = True
        model["vocab"][3:3] = [[token, -20.0] for token in BYTES]

    return edited(inner, add_bytes)


def edited(inner, change):
    """With a changed model, and with bytes as plain tokens."""
    parsed = json.loads(inner.to_str())
    change(parsed["model"])
    parsed["added_tokens"] = [t for t in parsed["added_tokens"] if t["content"] in SPECIAL]
    return Tokenizer.from_str(json.dumps(parsed))


@pytest.fixture(scope="module", params=[byte_level, byte_fallback, unigram])
def tokenizer(request):
    return PreTrainedTokenizerFast(tokenizer_object=request.param(), eos_token="</s>")


@pytest.fixture(scope="module")
def compiler(tokenizer):
    """For a model with a few more rows of logits than the tokenizer has ids."""
    return GrammarCompiler(tokenizer, len(tokenizer) + 13, [tokenizer.eos_token_id])


def allowed(state, drafts=(), num_ids=480):
    """Sets of ids, one for each row."""
    bits = np.empty((1 + len(drafts), num_ids // 32), np.int32)
    state.fill(bits, drafts)
    flags = np.unpackbits(bits.view(np.uint8), axis=1, bitorder="little")
    return [set(row.nonzero()[0].tolist()) for row in flags]


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def walk(tokenizer, compiler, grammar, seed):
    """A text of random allowed tokens."""
    state, chosen, tokens = compiler.start(grammar), random.Random(seed), []
    while len(tokens) < 500:
        token = chosen.choice(sorted(allowed(state)[0]))
        if token == tokenizer.eos_token_id:
            assert state.is_complete
            return tokenizer.decode(tokens, skip_special_tokens=False)
        tokens.append(token)
        state.advance([token])
    return None


@pytest.mark.parametrize("seed", range(4))
def test_any_allowed_tokens_make_what_was_asked_for(tokenizer, compiler, seed):
    text = walk(tokenizer, compiler, Grammar.json_schema(SCHEMA), seed)
    if text is not None:  # else a string or number went on to the end
        check_schema(json.loads(text))
    pattern = r"(cat|mat){2} [0-9]{2}:[0-9]{2}( é)?"
    assert re.fullmatch(pattern, walk(tokenizer, compiler, Grammar.regex(pattern), seed))
    lark = 'start: "[" item ("," item)* "]"\nitem: "the" | "sat"'
    assert re.fullmatch(
        r"\[(the|sat)(,(the|sat))*\]", walk(tokenizer, compiler, Grammar.ebnf(lark), seed)
    )
    gbnf = 'root ::= "[" item ("," item)* "]"\nitem ::= "the" | "sat"'
    assert re.fullmatch(
        r"\[(the|sat)(,(the|sat))*\]", walk(tokenizer, compiler, Grammar.ebnf(gbnf), seed)
    )


def test_the_tokenizers_own_tokens_are_allowed_and_wrong_ones_are_not(tokenizer, compiler):
    state = compiler.start(Grammar.json_object())
    for token in ids_of(tokenizer, '{"name": "Zoë 日本", "x": [1.5e3, null]}'):
        assert token in allowed(state)[0]
        state.advance([token])
    assert state.is_complete
    assert allowed(state) == [{tokenizer.eos_token_id}]
    array = compiler.start(Grammar.json_object())
    assert ids_of(tokenizer, "[")[0] not in allowed(array)[0]
    assert not array.is_complete


def test_ids_that_the_tokenizer_does_not_have_are_never_allowed(tokenizer, compiler):
    free = allowed(compiler.start(Grammar.regex("(.|\n)*")))[0]
    assert max(free) < len(tokenizer)
    assert tokenizer.eos_token_id in free
    assert len(free) > 200


def test_whitespace_ends(tokenizer, compiler):
    state = compiler.start(Grammar.json_object())
    state.advance(ids_of(tokenizer, "{"))
    newline = ids_of(tokenizer, "\n")[-1:]
    count = 0
    while newline[0] in allowed(state)[0]:
        state.advance(newline)
        count += 1
    assert 10 < count < 100


def test_drafts_are_masked_one_by_one_and_leave_the_state(tokenizer, compiler):
    state = compiler.start(Grammar.regex("(the|cat) sat"))
    first, *rest = ids_of(tokenizer, "the sat")
    before = allowed(state)[0]
    rows = allowed(state, [first, *rest])
    assert rows[0] == before
    state.advance([first])
    assert rows[1] == allowed(state)[0]
    state.advance(rest)
    assert rows[-1] == allowed(state)[0] == {tokenizer.eos_token_id}
    again = compiler.start(Grammar.regex("(the|cat) sat"))
    wrong = ids_of(tokenizer, "12")[0]
    masked, *behind = allowed(again, [wrong, first])
    assert masked == before
    assert behind == [set(range(480))] * 2
    assert allowed(again)[0] == before


def test_a_complete_text_with_its_end_still_has_a_mask(tokenizer, compiler):
    state = compiler.start(Grammar.regex("the"))
    state.advance([*ids_of(tokenizer, "the"), tokenizer.eos_token_id])
    assert allowed(state)[0] <= {tokenizer.eos_token_id}


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (Grammar.json_schema({"type": "objekt"}), "json_schema: Invalid type: objekt"),
        (
            Grammar.json_schema({"uniqueItems": True}),
            'json_schema: Unimplemented keys: ["uniqueItems"]',
        ),
        (Grammar("json_schema", "{nope"), "json_schema: "),
        (Grammar.regex("(a[b"), "regex: .*unclosed character class"),
        (Grammar.regex("(?=a)b"), "regex: .*look-around"),
        (Grammar.ebnf("start: foo"), 'ebnf: .*unknown name: "foo"'),
        (Grammar.ebnf('root ::= "a'), "ebnf: "),
    ],
)
def test_bad_grammars_are_one_line_with_a_hint(compiler, grammar, message):
    with pytest.raises(UsageError) as caught:
        compiler.start(grammar)
    assert re.match(message.replace("[", r"\["), caught.value.message)
    assert "\n" not in caught.value.message
    assert caught.value.hint


def test_without_the_library_a_grammar_is_refused_with_what_to_install(monkeypatch, tokenizer):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    fresh = GrammarCompiler(tokenizer, len(tokenizer), [2])
    with pytest.raises(UsageError, match="needs llguidance") as caught:
        fresh.start(Grammar.json_object())
    assert caught.value.hint == "pip install 'halfweight[serve]'"


def test_without_a_fast_tokenizer_a_grammar_is_refused():
    class Slow:
        is_fast = False

        def __len__(self):
            return 10

    with pytest.raises(UsageError, match="needs a fast tokenizer, this model's is Slow"):
        GrammarCompiler(Slow(), 10, [2]).start(Grammar.json_object())
    with pytest.raises(UsageError, match="needs the model's tokenizer"):
        Sampler(torch.zeros(2, 9, dtype=torch.int32), 10).check(
            Sampling(grammar=Grammar.regex("a"))
        )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("num_drafts", [0, 3])
def test_the_sampler_keeps_to_the_grammar_of_each_slot(
    tokenizer, compiler, temperature, num_drafts
):
    """Two slots with grammars and one without, on noise; drafts are the last tokens."""
    vocab = len(tokenizer) + 13
    table = torch.zeros(4, 200, dtype=torch.int32)
    sampler = Sampler(table, vocab, grammars=compiler)
    grammars = [Grammar.regex("(the|cat|sat| )*12:34"), None, Grammar.json_schema(SCHEMA)]
    for slot, grammar in enumerate(grammars):
        sampling = Sampling(temperature=temperature, seed=slot, grammar=grammar)
        sampler.set(slot, sampling, [1])
    texts = [[1], [1], [1]]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(200, 3, vocab, generator=generator) * 2
    noise[:, :, tokenizer.eos_token_id] += 3
    ended = set()
    while not {0, 2} <= ended and max(map(len, texts)) < 150:
        drafts = {s: texts[s][-num_drafts:] if num_drafts else [] for s in range(3)}
        chunks, rows = [], []
        for slot in (2, 0, 1):
            length, count = len(texts[slot]), len(drafts[slot])
            table[slot, length : length + count] = torch.tensor(drafts[slot], dtype=torch.int32)
            chunks.append(Chunk(slot, length - 1, 1 + count, 1 + count, ()))
            rows += [noise[length + i, slot] for i in range(1 + count)]
        found = sampler.sample(torch.stack(rows), chunks, drafts).wait()
        for chunk, gained in zip(chunks, found, strict=True):
            if chunk.slot not in ended:
                texts[chunk.slot] += gained.tokens
            if tokenizer.eos_token_id in gained.tokens and grammars[chunk.slot]:
                ended.add(chunk.slot)
    assert 0 in ended
    first = tokenizer.decode(texts[0][1:-1])
    assert re.fullmatch("(the|cat|sat| )*12:34", first)
    alone = Sampler(table, vocab, grammars=compiler)
    alone.set(0, Sampling(temperature=temperature, seed=0, grammar=grammars[0]), [1])
    again = [1]
    while again[-1] != tokenizer.eos_token_id:
        chunk = Chunk(0, len(again) - 1, 1, 1, ())
        again += alone.sample(noise[len(again), :1], [chunk]).wait()[0].tokens
    assert again == texts[0]
