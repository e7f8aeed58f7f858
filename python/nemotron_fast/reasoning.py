# SPDX-License-Identifier: Apache-2.0
"""How a model is told to think or not, and how its thought is told from its answer.

The profile follows from the text of the chat template, never from a model's name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemotron_fast.chat_template import Message, content_text, normalize_messages
from nemotron_fast.errors import RequestError
from nemotron_fast.reasoning_stream import CLOSE_TEXT, ReasoningSplitter, ThinkingBudget

__all__ = [
    "CLOSE_TEXT",
    "DETAILED_THINKING",
    "NO_THINK_FLAG",
    "ReasoningProfile",
    "ReasoningSplitter",
    "ThinkingBudget",
    "apply_thinking",
    "detect_profile",
    "prompt_opens_thought",
]

_DETAILED = "detailed thinking "
_DETAILED_SWITCHES = (_DETAILED + "on", _DETAILED + "off")
_FLAG_OFF = "/no_think"
_FLAG_PATTERN = re.compile(r"/no_think|(?<!\S)/think(?!\S)")
_TURN_HEADER_END, _TURN_END = "<|end_header_id|>", "<|eot_id|>"


@dataclass(frozen=True)
class ReasoningProfile:
    """One way of switching thought on and off."""

    name: str
    default_on: bool
    """Whether a model thinks when nothing in the messages says so."""
    open_tag: str = "<think>"
    close_tag: str = "</think>"

    def sampling(self, thinking: bool) -> dict[str, float]:
        """The model cards' recommended sampling parameters: greedy unless the model thinks."""
        return {"temperature": 0.6, "top_p": 0.95} if thinking else {"temperature": 0.0}

    def apply(self, messages: Sequence[Mapping[str, Any]], thinking: bool | None) -> list[Message]:
        """Messages that ask for what `thinking` says; the given ones are not changed.

        None leaves them as they are: what they say themselves, or else the model's default, holds. Otherwise
        `thinking` overrides switches in the leading system messages. For "detailed-thinking" the whole system
        text must be the switch, so any other text of those messages moves to the head of the first user turn
        (a new one if there is none), two newlines before it. For "no-think-flag" the switch is appended to
        the first system message (a new one if there is none); the template takes it out again.

        Raises:
            RequestError: malformed messages.
        """
        messages = normalize_messages(messages)
        if thinking is None:
            return messages
        if self.name == DETAILED_THINKING.name:
            return _apply_detailed(messages, thinking)
        return _apply_flag(messages, thinking)

    def is_thinking(self, messages: Sequence[Mapping[str, Any]], thinking: bool | None) -> bool:
        """Whether the model is going to think, as far as messages and `thinking` say: `apply` made plain."""
        if thinking is not None:
            return thinking
        system = next((content_text(m.get("content")) for m in messages if m.get("role") == "system"), "")
        if self.name == DETAILED_THINKING.name:
            found = [s for line in system.split("\n") if (s := _switch_of(line))]
            return found[-1].endswith("on") if found else self.default_on
        return _FLAG_OFF not in system and self.default_on


DETAILED_THINKING = ReasoningProfile("detailed-thinking", default_on=False)
"""Super v1, Ultra, Nano: the system message `detailed thinking on` or `detailed thinking off`. Without it the
cards promise nothing; it is taken as off."""
NO_THINK_FLAG = ReasoningProfile("no-think-flag", default_on=True)
"""Super v1.5: on, unless the first system message holds `/no_think`."""


def detect_profile(template_source: str) -> ReasoningProfile | None:
    """The profile that a chat template was written for; None if its model does not think.

    A template that knows `/no_think` is v1.5's. One in Llama-3 format that cuts past thoughts off at
    `</think>` without any switch of its own, or that writes `detailed thinking on`, is v1's. One that only
    ever writes `detailed thinking off` has thought turned off for good: None.
    """
    if _FLAG_OFF in template_source and "</think>" in template_source:
        return NO_THINK_FLAG
    cuts_thoughts = "</think>" in template_source and "<|start_header_id|>" in template_source
    if _DETAILED + "on" in template_source or (cuts_thoughts and "enable_thinking" not in template_source):
        return DETAILED_THINKING
    return None


def apply_thinking(
    profile: ReasoningProfile | None, messages: Sequence[Mapping[str, Any]], thinking: bool | None
) -> list[Message]:
    """`profile.apply`, also for models without a profile, which can only be asked not to think.

    Raises:
        RequestError: malformed messages, or `thinking` is true and there is no profile.
    """
    if profile is not None:
        return profile.apply(messages, thinking)
    if thinking:
        raise RequestError(
            "thinking=True, but this model's chat template has no reasoning switch: leave thinking out, or "
            "use a reasoning model such as Llama-3.3-Nemotron-Super-49B-v1.5"
        )
    return normalize_messages(messages)


def prompt_opens_thought(profile: ReasoningProfile, prompt: str) -> bool:
    """Whether a rendered prompt ends inside a thought, so that the model's first token belongs to it.

    Looks at the last turn only, and only at a tag that begins it: a user may write `<think>` as well. The
    empty closed block at the end of v1.5's prompt with thinking off does not count.
    """
    _, header, turn = prompt.rpartition(_TURN_HEADER_END)
    if not header:
        return prompt.rstrip().endswith(profile.open_tag)
    opens = turn.lstrip().startswith(profile.open_tag)
    return opens and profile.close_tag not in turn and _TURN_END not in turn


def _switch_of(line: str) -> str | None:
    """The v1 switch that a line of a system message consists of, if it does."""
    word = line.strip().rstrip(".").lower()
    return word if word in _DETAILED_SWITCHES else None


def _apply_detailed(messages: list[Message], thinking: bool) -> list[Message]:
    count = next((i for i, m in enumerate(messages) if m["role"] != "system"), len(messages))
    system, rest = messages[:count], messages[count:]
    texts = ["\n".join(x for x in m["content"].split("\n") if not _switch_of(x)).strip() for m in system]
    moved = "\n\n".join(text for text in texts if text)
    switch: Message = {"role": "system", "content": _DETAILED + ("on" if thinking else "off")}
    if not moved:
        return [switch, *rest]
    first = next((i for i, m in enumerate(rest) if m["role"] == "user"), None)
    if first is None:
        return [switch, {"role": "user", "content": moved}, *rest]
    user = {**rest[first], "content": f"{moved}\n\n{rest[first]['content']}"}
    return [switch, *rest[:first], user, *rest[first + 1 :]]


def _apply_flag(messages: list[Message], thinking: bool) -> list[Message]:
    index = next((i for i, m in enumerate(messages) if m["role"] == "system"), None)
    if index is None:
        return messages if thinking else [{"role": "system", "content": _FLAG_OFF}, *messages]
    text: str = messages[index]["content"]
    if _FLAG_PATTERN.search(text):
        text = _FLAG_PATTERN.sub("", text).strip()
    changed = {**messages[index], "content": text if thinking else text + _FLAG_OFF}
    return [*messages[:index], changed, *messages[index + 1 :]]
