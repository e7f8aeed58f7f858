# SPDX-License-Identifier: Apache-2.0
"""Stop strings: the same result however the text is cut, and nothing shown that belongs to a stop string."""

from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nemotron_fast.stop_strings import StopStrings


def run(pieces: list[str], stops: list[str], include: bool = False) -> tuple[str, str | None]:
    watcher = StopStrings(stops, include)
    shown = []
    for piece in pieces:
        visible, match = watcher.push(piece)
        shown.append(visible)
        if match is not None:
            return "".join(shown), match
    return "".join(shown) + watcher.flush(), None


def whole(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """Character by character: the first end of any stop string; the longest of those that end there."""
    for end in range(len(text) + 1):
        if ending := [stop for stop in stops if text[:end].endswith(stop)]:
            stop = max(ending, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


few_letters = st.text("abé\n", max_size=24)


@given(
    text=few_letters,
    stops=st.lists(st.text("abé\n", min_size=1, max_size=5), max_size=4),
    cuts=st.lists(st.integers(0, 24), max_size=8),
    include=st.booleans(),
)
@example(text="aab", stops=["aab", "ab"], cuts=[1, 2], include=False)
@example(text="abab", stops=["abb", "ba"], cuts=[1, 2, 3], include=True)
def test_any_cut_gives_the_same(text, stops, cuts, include):
    borders = [0, *sorted(min(c, len(text)) for c in cuts), len(text)]
    pieces = [text[a:b] for a, b in pairwise(borders)]
    assert run(pieces, stops, include) == whole(text, stops, include)


def test_text_that_may_begin_a_stop_string_is_held_back():
    watcher = StopStrings(["</end>"])
    assert watcher.push("so </e") == ("so ", None)
    assert watcher.push("n") == ("", None)
    assert watcher.push("ough") == ("</enough", None)
    assert watcher.push(" </end> more") == (" ", "</end>")
    assert watcher.push("and more") == ("", "</end>")
    assert watcher.flush() == ""


def test_with_include_nothing_is_held_back():
    watcher = StopStrings(["</end>"], include=True)
    assert watcher.push("so </e") == ("so </e", None)
    assert watcher.push("nd> more") == ("nd>", "</end>")


def test_the_end_of_the_text_shows_what_was_held():
    watcher = StopStrings(["\n\n"])
    assert watcher.push("line\n") == ("line", None)
    assert watcher.flush() == "\n"
    assert watcher.flush() == ""


def test_without_stop_strings_everything_passes():
    assert run(["a", "", "b"], []) == ("ab", None)


@pytest.mark.parametrize("stops", [[""], [3], [None], "abc"])
def test_bad_stop_strings_are_refused(stops):
    with pytest.raises(ValueError, match=r"^stop (has|is)"):
        StopStrings(stops)
