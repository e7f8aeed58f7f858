# SPDX-License-Identifier: Apache-2.0
"""Reasoning: profiles from templates, switches in messages, thought and content of streamed answers, budgets."""

import copy
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from test_tokenizer import tiny_backend

from nemotron_fast.chat_template import ChatTemplate
from nemotron_fast.errors import RequestError
from nemotron_fast.reasoning import (
    CLOSE_TEXT,
    DETAILED_THINKING,
    NO_THINK_FLAG,
    ReasoningSplitter,
    ThinkingBudget,
    apply_thinking,
    detect_profile,
    prompt_opens_thought,
)
from nemotron_fast.reasoning_stream import GRACE_TOKENS
from nemotron_fast.request import Request
from nemotron_fast.sampling_params import SamplingParams
from nemotron_fast.sequence_text import SequenceText
from nemotron_fast.tokenizer import Tokenizer

FOLDER = Path(__file__).resolve().parents[1] / "templates"
HELLO = {"role": "user", "content": "hi"}


def source(name: str) -> str:
    return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


# Profiles


@pytest.mark.parametrize(
    "name, profile", [("v1", DETAILED_THINKING), ("v1_5", NO_THINK_FLAG), ("nano", None), ("llama3", None)]
)
def test_profile_of_a_template(name, profile):
    assert detect_profile(source(name)) is profile


@pytest.mark.parametrize(
    "text, profile",
    [
        ("", None),
        ("{{ 'detailed thinking on' if think else 'detailed thinking off' }}", DETAILED_THINKING),
        ("<|im_start|>{{ content.split('</think>')[-1] }}", None),
        ("<|start_header_id|>{{ enable_thinking }}{{ content.split('</think>')[-1] }}", None),
    ],
)
def test_profile_of_other_templates(text, profile):
    assert detect_profile(text) is profile


def test_recommended_sampling():
    assert NO_THINK_FLAG.sampling(True) == {"temperature": 0.6, "top_p": 0.95}
    assert DETAILED_THINKING.sampling(False) == {"temperature": 0.0}


# Switches


@pytest.mark.parametrize(
    "messages, thinking, expected",
    [
        ([HELLO], True, [system("detailed thinking on"), HELLO]),
        ([HELLO], False, [system("detailed thinking off"), HELLO]),
        ([HELLO], None, [HELLO]),
        ([system("Be brief."), HELLO], None, [system("Be brief."), HELLO]),
        ([system("Be brief."), HELLO], True, [system("detailed thinking on"), user("Be brief.\n\nhi")]),
        (
            [system("Detailed thinking off.\n\nBe brief.\nBe kind.\n"), system("Yes."), HELLO],
            True,
            [system("detailed thinking on"), user("Be brief.\nBe kind.\n\nYes.\n\nhi")],
        ),
        ([system("detailed thinking on"), HELLO], False, [system("detailed thinking off"), HELLO]),
        ([system("Be brief.")], True, [system("detailed thinking on"), user("Be brief.")]),
        (
            [system("S"), {"role": "assistant", "content": "a"}, HELLO],
            False,
            [system("detailed thinking off"), {"role": "assistant", "content": "a"}, user("S\n\nhi")],
        ),
        (
            [system("S"), {"role": "user", "content": [{"type": "text", "text": "hi"}]}],
            True,
            [system("detailed thinking on"), user("S\n\nhi")],
        ),
    ],
)
def test_detailed_thinking(messages, thinking, expected):
    before = copy.deepcopy(messages)
    assert DETAILED_THINKING.apply(messages, thinking) == expected
    assert messages == before


@pytest.mark.parametrize(
    "messages, thinking, expected",
    [
        ([HELLO], True, [HELLO]),
        ([HELLO], False, [system("/no_think"), HELLO]),
        ([HELLO], None, [HELLO]),
        ([system("Be brief."), HELLO], False, [system("Be brief./no_think"), HELLO]),
        ([system("Be brief. /no_think"), HELLO], False, [system("Be brief./no_think"), HELLO]),
        ([system("Be brief. /no_think"), HELLO], True, [system("Be brief."), HELLO]),
        ([system("Be brief. /no_think"), HELLO], None, [system("Be brief. /no_think"), HELLO]),
        ([system("/think"), HELLO], False, [system("/no_think"), HELLO]),
        ([system(" See /think/about. "), HELLO], False, [system(" See /think/about. /no_think"), HELLO]),
    ],
)
def test_no_think_flag(messages, thinking, expected):
    before = copy.deepcopy(messages)
    assert NO_THINK_FLAG.apply(messages, thinking) == expected
    assert messages == before


def test_is_thinking():
    flag, detailed = NO_THINK_FLAG.is_thinking, DETAILED_THINKING.is_thinking
    assert flag([HELLO], None) and not flag([system("a /no_think"), HELLO], None)
    assert flag([system("/no_think"), HELLO], True) and not flag([HELLO], False)
    assert not flag([system([{"type": "text", "text": "/no_think"}]), HELLO], None)
    assert not detailed([HELLO], None) and detailed([HELLO], True)
    assert detailed([system("detailed thinking on"), HELLO], None)
    assert not detailed([system("detailed thinking off"), HELLO], None)
    assert not detailed([user("detailed thinking on")], None)


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("name", ["v1", "v1_5"])
def test_what_apply_asks_for_is_what_the_messages_then_say(name, thinking):
    profile = detect_profile(source(name))
    for messages in ([HELLO], [system("Be brief."), HELLO], [system("/no_think"), HELLO]):
        assert profile.is_thinking(profile.apply(messages, thinking), None) is thinking


def test_models_without_a_switch():
    assert apply_thinking(None, [HELLO], None) == apply_thinking(None, [HELLO], False) == [HELLO]
    with pytest.raises(RequestError, match="thinking=True, but this model's chat template has no reasoning switch"):
        apply_thinking(None, [HELLO], True)
    assert apply_thinking(NO_THINK_FLAG, [HELLO], False)[0] == system("/no_think")
    with pytest.raises(RequestError, match="messages is empty"):
        apply_thinking(NO_THINK_FLAG, [], True)


# Prompts


def test_thought_in_rendered_prompts():
    header = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    for name in ("v1", "v1_5"):
        chat = ChatTemplate(source(name), "<|begin_of_text|>")
        profile = detect_profile(chat.source)
        for thinking in (True, False, None):
            prompt = chat.render(profile.apply([user("What does <think> do?")], thinking))
            assert not prompt_opens_thought(profile, prompt)
            assert prompt_opens_thought(profile, prompt.removesuffix("<think>\n\n</think>\n\n") + "<think>\n")
        assert not prompt_opens_thought(profile, chat.render([user("<think>")], add_generation_prompt=False))
    assert prompt_opens_thought(NO_THINK_FLAG, header + "<think>\nso far")
    assert not prompt_opens_thought(NO_THINK_FLAG, header + "The tag <think>")
    assert prompt_opens_thought(NO_THINK_FLAG, "<|im_start|>assistant\n<think>\n")
    assert not prompt_opens_thought(NO_THINK_FLAG, "<|im_start|>assistant\n")


# Splitting


def split(pieces: list[str], inside: bool = False) -> tuple[str, str]:
    splitter = ReasoningSplitter(NO_THINK_FLAG, inside)
    found = {"reasoning": "", "content": ""}
    for part in [*(p for piece in pieces for p in splitter.push(piece)), *splitter.flush()]:
        assert part[1]
        found[part[0]] += part[1]
    return found["reasoning"], found["content"]


def split_whole(text: str, inside: bool) -> tuple[str, str]:
    if not inside:
        if not text.lstrip().startswith("<think>"):
            return "", text
        text = text.lstrip().removeprefix("<think>")
    thought, _, content = text.partition("</think>")
    return thought.strip(), content.lstrip()


words = st.lists(st.sampled_from(["<think>", "</think>", "<", "/", "think>", "</thi", " ", "\n", "a", "é", "🙂"]))


@given(text=words.map("".join), cuts=st.lists(st.integers(0, 40), max_size=12), inside=st.booleans())
@example(text="\n<think>\n a \n</think>\n\n b </think> c\n", cuts=list(range(40)), inside=False)
@example(text="a</thi </think>b", cuts=[6, 9], inside=True)
def test_any_cut_gives_the_same(text, cuts, inside):
    borders = [0, *sorted(min(c, len(text)) for c in cuts), len(text)]
    assert split([text[a:b] for a, b in pairwise(borders)], inside) == split_whole(text, inside)


@pytest.mark.parametrize(
    "text, inside, expected",
    [
        ("<think>\nSo.\n</think>\n\nYes.\n", False, ("So.", "Yes.\n")),
        ("So.\n</think>\n\nYes.", True, ("So.", "Yes.")),
        ("No thought <think>here</think>.", False, ("", "No thought <think>here</think>.")),
        ("\n Yes.", False, ("", "\n Yes.")),
        ("<think>never closed </thi", False, ("never closed </thi", "")),
        ("<think>\n\n</think>\n\nYes.", False, ("", "Yes.")),
        ("<think>a</think>b</think>c", False, ("a", "b</think>c")),
        ("  \n", False, ("", "  \n")),
        ("", True, ("", "")),
    ],
)
def test_splitting(text, inside, expected):
    assert split([text], inside) == split(list(text), inside) == expected


def test_text_is_shown_as_soon_as_it_is_decided():
    splitter = ReasoningSplitter(NO_THINK_FLAG)
    assert splitter.push("<thi") == [] and not splitter.in_thought
    assert splitter.push("nk>\nSo ") == [("reasoning", "So")] and splitter.in_thought and not splitter.mid_tag
    assert splitter.push("it is </th") == [("reasoning", " it is")] and splitter.mid_tag
    assert splitter.push("at</think>") == [("reasoning", " </that")] and not splitter.in_thought
    assert splitter.push("\n\n") == [] and splitter.push("Yes \n") == [("content", "Yes \n")]
    assert splitter.flush() == [] == splitter.flush()


# Budgets


def forced_at(states: list[bool], budget: ThinkingBudget) -> list[int]:
    return [i for i, inside in enumerate(states) if budget.push(inside)]


def test_budget_counts_tokens_wholly_inside():
    budget = ThinkingBudget(3)
    assert not budget.at_start()
    # two tokens of the tag (the second completes it), then thought
    assert forced_at([False, True, True, True, True, True, False], budget) == [4]
    assert budget.spent == 3 and budget.close_text == CLOSE_TEXT == "\n</think>\n\n"


def test_budget_of_a_thought_that_the_prompt_opens():
    assert forced_at([True, True, True], ThinkingBudget(2, starts_inside=True)) == [1]
    assert ThinkingBudget(0, starts_inside=True).at_start()


def test_budget_of_zero():
    assert forced_at([False, True, True], ThinkingBudget(0)) == [1]
    assert not ThinkingBudget(0).at_start()


def test_short_thoughts_are_left_alone():
    assert forced_at([True, True, False, False], ThinkingBudget(3, starts_inside=True)) == []
    assert forced_at([False] * 9, ThinkingBudget(3)) == []


def test_a_closing_tag_under_way_is_not_interrupted():
    budget = ThinkingBudget(1, starts_inside=True)
    assert not budget.push(True, mid_piece=True)
    assert not budget.push(False)
    budget = ThinkingBudget(1, starts_inside=True)
    assert not budget.push(True, mid_piece=True)
    assert budget.push(True, mid_piece=False)


@pytest.mark.parametrize("bad", [-1, 1.5, True, None, "3"])
def test_bad_budgets_are_refused(bad):
    with pytest.raises(ValueError, match=r"thinking budget is .*, want a number of tokens >= 0"):
        ThinkingBudget(bad)


def test_forced_text_closes_the_thought():
    splitter = ReasoningSplitter(NO_THINK_FLAG, starts_inside=True)
    parts = [*splitter.push("So, first"), *splitter.push(CLOSE_TEXT), *splitter.push("Yes."), *splitter.flush()]
    assert parts == [("reasoning", "So, first"), ("content", "Yes.")]


def test_a_thought_that_only_begins_pieces_ends_all_the_same():
    budget = ThinkingBudget(2, starts_inside=True)
    assert [budget.push(True, mid_piece=True) for _ in range(12)].index(True) == 1 + GRACE_TOKENS


@pytest.mark.parametrize("budget", range(8))
def test_a_budget_does_not_cut_a_character(budget):
    tokenizer = Tokenizer(tiny_backend())
    params = SamplingParams(max_tokens=40, max_thinking_tokens=budget)
    request = Request(0, [1], params, seed=0, max_tokens=40, stop_ids=frozenset())
    text = SequenceText(request, 0, tokenizer, NO_THINK_FLAG, starts_in_thought=True)
    for token in tokenizer.encode("ab 😀 ab", add_special_tokens=False):
        if request.forced:
            break
        request.output.append(token)
        text.advance()
    assert not any("\ufffd" in delta.text for delta in text.deltas) and bool(request.forced)
    assert not text._decoder.mid_character
