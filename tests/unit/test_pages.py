# SPDX-License-Identifier: Apache-2.0
"""Pages: held, cached, free."""

import pytest

from nemotron_fast.pages import PAGE_SIZE, PagePool, page_key, pages_for


def cached(pool: PagePool, *keys: bytes) -> list[int]:
    """Pages with these keys that nobody holds."""
    pages = pool.allocate(len(keys))
    for page, key in zip(pages, keys, strict=True):
        pool.publish(page, key)
    pool.release(pages)
    return pages


def test_pages_for():
    assert [pages_for(n) for n in (0, 1, PAGE_SIZE, PAGE_SIZE + 1)] == [0, 1, 1, 2]


def test_a_key_names_the_tokens_and_all_before():
    first = page_key(b"", [1, 2])
    keys = {first, page_key(b"", [1, 3]), page_key(first, [1, 2]), page_key(page_key(b"", [1, 3]), [1, 2])}
    assert len(keys) == 4 and page_key(b"", [1, 2]) == first


def test_all_or_nothing():
    pool = PagePool(3)
    assert pool.allocate(4) is None and pool.num_free == 3
    first = pool.allocate(2)
    assert pool.allocate(2) is None
    pool.release(first)
    pool.check([])
    with pytest.raises(AssertionError, match="not held"):
        pool.release([first[0]])


def test_a_found_page_is_held_by_several_and_cached_after_the_last():
    pool = PagePool(4)
    (page,) = cached(pool, b"a")
    assert pool.find([b"a", b"b"]) == [page] and pool.find([b"b", b"a"]) == []
    pool.share([page])
    pool.share([page])
    pool.check([[page], [page]])
    pool.release([page])
    assert (pool.num_held, pool.num_cached, pool.num_free) == (1, 0, 3)
    pool.release([page])
    assert (pool.num_held, pool.num_cached, pool.num_free) == (0, 1, 3)


def test_the_page_unused_for_longest_is_given_up_first_and_the_front_of_a_sequence_last():
    pool = PagePool(3)
    cached(pool, b"a", b"b")
    cached(pool, b"c")
    held = pool.allocate(1)
    assert [len(pool.find([k])) for k in (b"a", b"b", b"c")] == [1, 0, 1]
    held += pool.allocate(1)
    assert [len(pool.find([k])) for k in (b"a", b"b", b"c")] == [0, 0, 1]
    pool.check([held])


def test_a_second_page_of_the_same_content_is_not_cached():
    pool = PagePool(3)
    (page,) = cached(pool, b"a")
    other = next(p for p in pool.allocate(2) if p != page)
    pool.publish(other, b"a")
    assert pool.find([b"a"]) == [page]


def test_what_can_be_held_beside_shared_pages():
    pool = PagePool(3)
    shared = cached(pool, b"a")
    assert pool.can_hold(shared, 2) and not pool.can_hold(shared, 3) and pool.can_hold([], 3)


def test_forget_all():
    pool = PagePool(3)
    cached(pool, b"a", b"b")
    held = pool.find([b"a"])
    pool.share(held)
    pool.forget_all()
    assert pool.find([b"a"]) == [] and pool.num_free == 2
    pool.release(held)
    pool.check([])
    assert pool.num_free == 3
