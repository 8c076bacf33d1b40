"""Pieces of text, joined, are the decode of all tokens: for every kind of tokenizer."""

from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from halfweight.engine.text import REPLACEMENT, Detokenizer, TextStream

CORPUS = [
    "It isn't a test , is it ? Yes ! We 've seen it , they 're here . don't n't I 'm he 's",
    "Hello world. The quick brown fox , jumps over the lazy dog . n ' t ' s ' ve",
    "grüße aus köln, 日本語のテキスト, emoji 😀😀👨‍👩‍👧",
    "and  double  spaces\n\n\tcode() { return x; }",
]


def byte_level():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return wrapped(backend)


def byte_fallback():
    """Llama 2's: pieces with ▁ for a space, bytes for what no piece has."""
    pieces = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    letters = sorted(set("".join(CORPUS[:2]).replace(" ", "▁")))
    words = ["▁the", "▁fox", "he", "▁▁", "▁He", "llo", "▁.", "▁,", "日"]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces + letters + words))}
    model = models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return wrapped(backend, unk_token="<unk>")


def unigram():
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return wrapped(backend, unk_token="<unk>", clean_up_tokenization_spaces=True)


def word_piece(cleans=True):
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(
        vocab_size=160, special_tokens=["[UNK]"], show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return wrapped(backend, unk_token="[UNK]", clean_up_tokenization_spaces=cleans)


def word_suffix():
    """BPE with `</w>` at the end of words, which reads otherwise at the end of all."""
    backend = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.BPEDecoder()
    trainer = trainers.BpeTrainer(vocab_size=200, end_of_word_suffix="</w>", show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return wrapped(backend)


def wrapped(backend, **options):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", **options)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<mark>"]})
    tokenizer.add_tokens(["<plain>", " added "])
    return tokenizer


KINDS = {f.__name__: f() for f in (byte_level, byte_fallback, unigram, word_piece, word_suffix)} | {
    "word_piece_as_it_is": word_piece(cleans=False)
}


def pieces_of(tokenizer, ids, stops=(), **options):
    stream = TextStream(Detokenizer(tokenizer), stops, **options)
    return [*(stream.add(token) for token in ids), stream.finish()], stream


def whole(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_pieces_joined_are_the_decode_of_any_tokens(kind, data):
    tokenizer = KINDS[kind]
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=60))
    pieces, _ = pieces_of(tokenizer, ids)
    assert "".join(pieces) == whole(tokenizer, ids)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=200, deadline=None)
@given(text=st.text(st.sampled_from(" .,?!'ntsmverdo日😀é\n"), max_size=40))
@example(text="They 're here , aren 't they ? I 'm not sure . ' s")
@example(text="grüße 😀😀 日本語 😀")
def test_pieces_joined_are_the_decode_of_text(kind, text):
    tokenizer = KINDS[kind]
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces, _ = pieces_of(tokenizer, ids)
    assert "".join(pieces) == whole(tokenizer, ids)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_every_piece_is_final(kind, data):
    tokenizer = KINDS[kind]
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=30))
    pieces, _ = pieces_of(tokenizer, ids)
    for end in range(len(ids)):
        assert whole(tokenizer, ids).startswith("".join(pieces[:end]))


@pytest.mark.parametrize("method", ["decode", "_decode"])
def test_a_tokenizer_that_decodes_in_its_own_way_is_left_to_it(method):
    class Loud(PreTrainedTokenizerFast):
        pass

    def loud(self, *ids, **options):
        return getattr(PreTrainedTokenizerFast, method)(self, *ids, **options).upper()

    setattr(Loud, method, loud)
    backend = KINDS["byte_level"].backend_tokenizer
    tokenizer = Loud(tokenizer_object=backend, clean_up_tokenization_spaces=False)
    ids = tokenizer.encode(CORPUS[1])
    pieces, _ = pieces_of(tokenizer, ids)
    assert "".join(pieces) == whole(tokenizer, ids) == CORPUS[1].upper()


def test_the_window_stays_short():
    tokenizer = KINDS["byte_level"]
    ids = tokenizer.encode(CORPUS[1] * 50)
    longest = 0

    class Watched(Detokenizer):
        def raw(self, ids):
            nonlocal longest
            longest = max(longest, len(ids))
            return super().raw(ids)

    stream = TextStream(Watched(tokenizer))
    assert "".join([stream.add(token) for token in ids]) == CORPUS[1] * 50
    assert longest < 20


def test_text_comes_with_its_token_where_nothing_can_change_it():
    tokenizer = KINDS["byte_level"]
    ids = tokenizer.encode("Hello, the quick brown fox.")
    pieces, _ = pieces_of(tokenizer, ids)
    assert pieces == [tokenizer.decode([token]) for token in ids] + [""]


def test_a_character_comes_whole_with_its_last_byte():
    tokenizer = KINDS["byte_level"]
    ids = tokenizer.convert_tokens_to_ids(list("ðŁĺĥ")) + tokenizer.encode("a")
    assert pieces_of(tokenizer, ids)[0] == ["", "", "", "😃", "a", ""]


def test_bytes_that_never_become_a_character_are_not_lost():
    tokenizer = KINDS["byte_level"]
    cut = tokenizer.convert_tokens_to_ids(list("ðŁĺ"))
    assert pieces_of(tokenizer, cut)[0] == ["", "", "", REPLACEMENT]
    assert "".join(pieces_of(tokenizer, cut + tokenizer.encode("ab"))[0]) == REPLACEMENT + "ab"


def test_a_run_of_byte_tokens_comes_when_it_has_ended():
    tokenizer = KINDS["byte_fallback"]
    a, e2, fox = tokenizer.convert_tokens_to_ids(["<0x41>", "<0xE2>", "▁fox"])
    assert pieces_of(tokenizer, [fox, a, a, fox])[0] == ["fox", "", "", "AA fox", ""]
    assert pieces_of(tokenizer, [fox, a, e2, fox])[0] == ["fox", "", "", "�� fox", ""]


def test_cleaned_text_waits_for_what_may_come_and_no_longer():
    tokenizer = KINDS["word_piece"]
    ids = tokenizer.encode("The fox , it is here .", add_special_tokens=False)
    pieces, _ = pieces_of(tokenizer, ids)
    assert "".join(pieces) == "The fox, it is here."
    words = [tokenizer.decode(ids[:end]) for end in range(1, len(ids) + 1)]
    late = [len(words[i]) - len("".join(pieces[: i + 1])) for i in range(len(words))]
    assert max(late) <= 3


class Parts:
    """A detokenizer whose token i is a part of a text, cut at some places."""

    special_tokens = byte_tokens = frozenset()

    def __init__(self, text, cuts, cleans=False):
        places = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
        self.parts = [text[a:b] for a, b in pairwise(places)]
        self.cleans = cleans

    def raw(self, ids):
        return "".join(self.parts[i] for i in ids)

    def cleaned(self, text):
        return KINDS["word_piece"].clean_up_tokenization(text)

    def whole(self, ids):
        return self.cleaned(self.raw(ids)) if self.cleans else self.raw(ids)


@settings(max_examples=1000, deadline=None)
@given(
    text=st.lists(st.sampled_from([*" .,'nst", " n", " '", " 've", "'re", " ' "])).map("".join),
    cuts=st.lists(st.integers(0, 40)),
)
@example(text="x n ' t", cuts=range(9))
@example(text="x ' s n't 've", cuts=range(20))
def test_text_cleaned_in_parts_is_the_text_cleaned_as_a_whole(text, cuts):
    parts = Parts(text, cuts, cleans=True)
    stream = TextStream(parts)
    pieces = [stream.add(i) for i in range(len(parts.parts))]
    assert parts.cleaned(text).startswith("".join(pieces))
    assert "".join(pieces) + stream.finish() == parts.cleaned(text)


stop_lists = st.lists(st.sampled_from(["ab", "abc", "b", "cab", "aab", ". ", "zz"]), max_size=3)


@settings(max_examples=300, deadline=None)
@given(
    text=st.text("abc. ", max_size=20),
    cuts=st.lists(st.integers(0, 20)),
    stops=stop_lists,
    include_stop=st.booleans(),
)
def test_text_ends_before_the_first_complete_stop_string(text, cuts, stops, include_stop):
    """However the text is parted into tokens; `finish` is part of the text."""

    parts = Parts(text, cuts)
    stream = TextStream(parts, stops, include_stop=include_stop)
    found = "".join([stream.add(i) for i in range(len(parts.parts))]) + stream.finish()
    ends = [
        (end, end - len(stop))
        for stop in stops
        for end in range(len(text) + 1)
        if text[:end].endswith(stop)
    ]
    assert stream.stopped == bool(ends)
    if not ends:
        assert found == text
        return
    end, begin = min(ends)
    assert found == text[: end if include_stop else begin]
    assert stream.stop_string == text[begin:end]


def test_what_cannot_begin_a_stop_string_is_not_held():
    pieces, stream = pieces_of(
        KINDS["byte_level"], KINDS["byte_level"].encode("Hello\n\tcode"), ["\n\nUser"]
    )
    assert "".join(pieces) == "Hello\n\tcode"
    assert pieces[-1] == ""
    assert not stream.stopped
