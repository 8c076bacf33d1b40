"""Which sequence has which page of the KV cache, and which pages hold the same beginning of a text.

A page is in one of three states:

- free: holds nothing of use;
- used: counted references, one for each sequence that has it in its page table;
- kept: no references, yet still findable by what it holds, until the room is needed. The page that
  was let go longest ago is evicted first, and of one sequence the last page before the first, since
  a page can only be reached through those before it.

A full page is found by a key: a digest over the key of the page before it and its own token ids.
So equal keys mean that all tokens from the sequence's first on are equal (BLAKE2b, 256 bits: nobody
can make two texts that share one). A page that is not full yet has no key and one owner.

Only the host's numbers are here, no memory: page ids are 1 .. num_pages - 1, page 0 is nobody's.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

KEY_BYTES = 32
ROOT_KEY = b""
"""The key before a sequence's first page."""


def page_key(previous: bytes, tokens: Sequence[int]) -> bytes:
    """The key of a full page of `tokens` after the page of key `previous`."""
    return blake2b(previous + array("i", tokens).tobytes(), digest_size=KEY_BYTES).digest()


class PagePool:
    """Hands out page ids; counts who has them. Not for several threads at once."""

    def __init__(self, num_pages: int) -> None:
        """`num_pages` with page 0."""
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, 0, -1))
        self._kept: OrderedDict[int, None] = OrderedDict()
        self._references = [0] * num_pages
        self._keys: list[bytes | None] = [None] * num_pages
        self._page_of: dict[bytes, int] = {}

    @property
    def num_available(self) -> int:
        """Pages that `allocate` can give: free ones, and kept ones that it would evict."""
        return len(self._free) + len(self._kept)

    @property
    def num_used(self) -> int:
        """Pages that sequences have."""
        return self.num_pages - 1 - self.num_available

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The pages of the longest run of keys from the first on that are all there."""
        found = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            found.append(page)
        return found

    def num_kept(self, pages: Iterable[int]) -> int:
        """How many of `pages` no sequence has: sharing them uses up so many available ones."""
        return sum(self._references[page] == 0 for page in pages)

    def share(self, pages: Iterable[int]) -> None:
        """One more reference to each page, found just now."""
        for page in pages:
            if self._references[page] == 0:
                del self._kept[page]
            self._references[page] += 1

    def allocate(self, count: int) -> list[int]:
        """Pages of which the caller is the only owner; there must be as many available."""
        assert count <= self.num_available, (count, self.num_available)
        return [self._allocate_one() for _ in range(count)]

    def publish(self, page: int, key: bytes) -> None:
        """A used page is full and others may share it; if another has that key, nothing happens."""
        assert self._references[page] > 0, page
        if self._keys[page] is None and key not in self._page_of:
            self._keys[page] = key
            self._page_of[key] = page

    def forget(self, keys: Iterable[bytes]) -> None:
        """No page is found by these keys any more; sequences keep the pages that they have."""
        for key in keys:
            page = self._page_of.pop(key, None)
            if page is not None:
                self._keys[page] = None
                if self._references[page] == 0:
                    del self._kept[page]
                    self._free.append(page)

    def release(self, pages: Sequence[int]) -> None:
        """One reference less to each page of a sequence, given in the sequence's order."""
        for page in reversed(pages):
            assert self._references[page] > 0, page
            self._references[page] -= 1
            if self._references[page] == 0:
                if self._keys[page] is None:
                    self._free.append(page)
                else:
                    self._kept[page] = None

    def _allocate_one(self) -> int:
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._kept.popitem(last=False)
            key = self._keys[page]
            assert key is not None, page
            del self._page_of[key]
            self._keys[page] = None
        self._references[page] = 1
        return page
