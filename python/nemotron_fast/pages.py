# SPDX-License-Identifier: Apache-2.0
"""Who owns which page of the KV cache. A page holds PAGE_SIZE tokens in every attention block at once."""

from __future__ import annotations

PAGE_SIZE = 64  # tokens


def pages_for(num_tokens: int) -> int:
    """Pages that hold `num_tokens` tokens."""
    return -(-num_tokens // PAGE_SIZE)


class PageAllocator:
    """Hands out page numbers 0..num_pages-1. Every page is either free or held by exactly one owner."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))  # a stack: the page freed last is reused first
        self._held: set[int] = set()

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int] | None:
        """`count` pages, or None (and nothing taken) if fewer are free."""
        if count > len(self._free):
            return None
        pages = [self._free.pop() for _ in range(count)]
        self._held.update(pages)
        return pages

    def release(self, pages: list[int]) -> None:
        """Give pages back; each must be held."""
        for page in pages:
            assert page in self._held, f"page {page} is released but not held"
            self._held.remove(page)
            self._free.append(page)

    def check(self) -> None:
        """The invariant: free and held are disjoint and together are all pages."""
        free = set(self._free)
        assert len(free) == len(self._free) and not free & self._held, "a page is free twice, or free and held"
        assert len(free) + len(self._held) == self.num_pages, (len(free), len(self._held), self.num_pages)
