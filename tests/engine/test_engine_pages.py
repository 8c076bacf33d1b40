"""Pages: whose each is, what it holds, and that none is lost or given twice."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from halfweight.engine.pages import ROOT_KEY, PagePool, page_key

PAGE_TOKENS = 2


def keys_of(tokens):
    """Keys of all full pages of a sequence."""
    keys, key = [], ROOT_KEY
    for end in range(PAGE_TOKENS, len(tokens) + 1, PAGE_TOKENS):
        key = page_key(key, tokens[end - PAGE_TOKENS : end])
        keys.append(key)
    return keys


class Pool(RuleBasedStateMachine):
    """Sequences over two tokens come, grow, go; `held` is what a real cache would hold."""

    @initialize(num_pages=st.integers(2, 12))
    def start(self, num_pages):
        self.pool = PagePool(num_pages)
        self.sequences = []
        self.held = {}

    def write(self, sequence):
        """Fill the pages that the sequence owns, as steps would; then publish the full ones."""
        tokens, pages = sequence
        keys = keys_of(tokens)
        for i, page in enumerate(pages):
            whole = tuple(tokens[: (i + 1) * PAGE_TOKENS])
            if len(whole) == (i + 1) * PAGE_TOKENS:
                assert self.held.get(page) in (None, whole)
                self.held[page] = whole
                self.pool.publish(page, keys[i])

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=9))
    def come(self, tokens):
        shared = self.pool.find(keys_of(tokens))
        for i, page in enumerate(shared):
            assert self.held[page] == tuple(tokens[: (i + 1) * PAGE_TOKENS])
        needed = -(-len(tokens) // PAGE_TOKENS) - len(shared)
        if self.pool.num_available - self.pool.num_kept(shared) < needed:
            return
        before = self.pool.num_used
        new = self.pool.num_kept(shared) + needed
        self.pool.share(shared)
        fresh = self.pool.allocate(needed)
        assert self.pool.num_used == before + new
        for page in fresh:
            self.held[page] = None
        sequence = (list(tokens), shared + fresh)
        self.sequences.append(sequence)
        self.write(sequence)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), token=st.integers(0, 1))
    def grow(self, data, token):
        sequence = data.draw(st.sampled_from(self.sequences))
        tokens, pages = sequence
        if len(tokens) == len(pages) * PAGE_TOKENS:
            if not self.pool.num_available:
                return
            (page,) = self.pool.allocate(1)
            self.held[page] = None
            pages.append(page)
        tokens.append(token)
        self.write(sequence)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), spoiled=st.booleans())
    def leave(self, data, spoiled):
        index = data.draw(st.integers(0, len(self.sequences) - 1))
        tokens, pages = self.sequences.pop(index)
        if spoiled:
            self.pool.forget(keys_of(tokens))
            assert self.pool.find(keys_of(tokens)) == []
        self.pool.release(pages)

    @rule(tokens=st.lists(st.integers(0, 1), min_size=2, max_size=9))
    def forget(self, tokens):
        available = self.pool.num_available
        self.pool.forget(keys_of(tokens))
        assert self.pool.find(keys_of(tokens)) == []
        assert self.pool.num_available == available

    @invariant()
    def every_page_is_in_one_state(self):
        used = {page for _, pages in self.sequences for page in pages}
        assert self.pool.num_used == len(used)
        assert 0 not in used
        for _, pages in self.sequences:
            assert len(set(pages)) == len(pages)
        owners = {}
        for tokens, pages in self.sequences:
            for i, page in enumerate(pages):
                owners.setdefault(page, set()).add(tuple(tokens[: (i + 1) * PAGE_TOKENS]))
        assert all(len(contents) == 1 for contents in owners.values())

    def teardown(self):
        for _, pages in self.sequences:
            self.pool.release(pages)
        assert self.pool.num_used == 0
        every = self.pool.allocate(self.pool.num_pages - 1)
        assert sorted(every) == list(range(1, self.pool.num_pages))


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_a_page_is_released_once_only():
    pool = PagePool(3)
    pages = pool.allocate(2)
    pool.release(pages)
    with pytest.raises(AssertionError):
        pool.release(pages)


def test_no_more_pages_than_there_are():
    pool = PagePool(3)
    with pytest.raises(AssertionError):
        pool.allocate(3)


def test_the_page_let_go_longest_ago_is_evicted_first_and_ends_before_beginnings():
    pool = PagePool(6)
    old, new = keys_of([1] * 4), keys_of([2] * 4)
    for keys in (old, new):
        pages = pool.allocate(2)
        for page, key in zip(pages, keys, strict=True):
            pool.publish(page, key)
        pool.release(pages)
    pool.allocate(2)  # the one page that was free, and the end of `old`
    assert len(pool.find(old)) == 1
    assert len(pool.find(new)) == 2
    pool.allocate(1)
    assert len(pool.find(old)) == 0
    assert len(pool.find(new)) == 2


def test_sharing_a_page_again_makes_it_the_last_to_be_evicted():
    pool = PagePool(3)
    (first,), (second,) = pool.allocate(1), pool.allocate(1)
    pool.publish(first, b"first")
    pool.publish(second, b"second")
    pool.release([first])
    pool.release([second])
    pool.share(pool.find([b"first"]))
    pool.release([first])
    assert pool.allocate(1) == [second]
    assert pool.find([b"first"]) == [first]


def test_a_key_says_all_tokens_before_its_page_and_where_they_are_parted():
    assert keys_of([1, 2, 3, 4])[1] != keys_of([1, 3, 3, 4])[1]
    assert keys_of([1, 2, 3, 4])[0] == keys_of([1, 2])[0]
    assert page_key(ROOT_KEY, [1, 2, 3, 4]) != keys_of([1, 2, 3, 4])[1]
