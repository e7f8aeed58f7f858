# SPDX-License-Identifier: Apache-2.0
"""Who owns which page of the KV cache, and which pages hold what has been computed before.

A page holds PAGE_SIZE tokens in every attention block at once. Each is in one of three states:

    held    by one or more requests; more than one only if it is full, and then nobody writes to it
    cached  by nobody, but its content is known by a key: the next request that begins alike takes it as it is
    free    the rest

A key names a full page's tokens and all tokens before them. The pool belongs to one model and one KV type, so that
nothing else decides what a page holds.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from hashlib import blake2b

PAGE_SIZE = 64  # tokens


def pages_for(num_tokens: int) -> int:
    """Pages that hold `num_tokens` tokens."""
    return -(-num_tokens // PAGE_SIZE)


def page_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The key of a page with these tokens behind the page of key `parent`, b"" for the first."""
    return blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()


class PagePool:
    """Hands out page numbers 0..num_pages-1; a cached page is given up when no free one is left, the page that has
    gone unused for longest first."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))  # a stack: the page freed last is reused first
        self._owners: dict[int, int] = {}  # held page -> number of its owners
        self._cached: dict[int, None] = {}  # in the order in which they were released
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_held(self) -> int:
        return len(self._owners)

    def allocate(self, count: int) -> list[int] | None:
        """`count` pages, or None (and nothing taken) if fewer are free or cached."""
        if count > len(self._free) + len(self._cached):
            return None
        while len(self._free) < count:
            self._forget(next(iter(self._cached)))
        pages = [self._free.pop() for _ in range(count)]
        self._owners.update(dict.fromkeys(pages, 1))
        return pages

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The pages of the leading keys that are here; they are not taken yet."""
        pages = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            pages.append(page)
        return pages

    def can_hold(self, shared: list[int], count: int) -> bool:
        """Whether an owner of the `shared` pages can have `count` others."""
        return count <= len(self._free) + len(self._cached) - sum(page in self._cached for page in shared)

    def share(self, pages: list[int]) -> None:
        """One more owner for pages that `find` gave."""
        for page in pages:
            self._cached.pop(page, None)
            self._owners[page] = self._owners.get(page, 0) + 1

    def publish(self, page: int, key: bytes) -> None:
        """A held page is full, and `key` names its content; a page that has the key already keeps it."""
        assert page in self._owners, f"page {page} is published but not held"
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key], self._key_of[page] = page, key

    def release(self, pages: list[int]) -> None:
        """One owner less for each page; the front of a sequence is given up last."""
        for page in reversed(pages):
            assert page in self._owners, f"page {page} is released but not held"
            self._owners[page] -= 1
            if self._owners[page] == 0:
                del self._owners[page]
                if page in self._key_of:
                    self._cached[page] = None
                else:
                    self._free.append(page)

    def forget_all(self) -> None:
        """No page's content may be used again."""
        self._page_of.clear()
        self._key_of.clear()
        self._free += self._cached
        self._cached.clear()

    def check(self, owned: Iterable[list[int]]) -> None:
        """The invariant: every page is free, cached or held, and `owned` are the pages of all owners."""
        assert Counter(page for pages in owned for page in pages) == self._owners, "owners and their pages differ"
        states = [*self._free, *self._cached, *self._owners]
        assert sorted(states) == list(range(self.num_pages)), (self.num_free, self.num_cached, self.num_held)
        assert all(self._key_of[page] == key for key, page in self._page_of.items())
        assert len(self._key_of) == len(self._page_of) and self._cached.keys() <= self._key_of.keys()

    def _forget(self, page: int) -> None:
        del self._cached[page], self._page_of[self._key_of.pop(page)]
        self._free.append(page)
