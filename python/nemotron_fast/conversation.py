# SPDX-License-Identifier: Apache-2.0
"""A prompt made ready for the engine: token ids, and how to read what comes back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from nemotron_fast.errors import RequestError
from nemotron_fast.reasoning import ReasoningProfile, apply_thinking, detect_profile, prompt_opens_thought
from nemotron_fast.tokenizer import Tokenizer


@dataclass(frozen=True)
class Conversation:
    text: str | None  # as tokenised; None when token ids were given
    token_ids: list[int]
    profile: ReasoningProfile | None = None  # how to tell the thought from the answer
    starts_in_thought: bool = False
    sampling: dict[str, Any] = field(default_factory=dict)  # what the model's card recommends for this call


def prepare_chat(tokenizer: Tokenizer | None, messages: list[dict[str, Any]], thinking: bool | None) -> Conversation:
    """Render messages with the checkpoint's own chat template.

    Raises:
        RequestError: no tokenizer, no template, malformed messages, or `thinking` on a model without the switch.
    """
    if tokenizer is None or tokenizer.chat_template is None:
        raise RequestError("this checkpoint has no chat template; use generate with a plain prompt")
    template = tokenizer.chat_template
    profile = detect_profile(template.source)
    asked = apply_thinking(profile, messages, thinking)
    text = template.render(asked)
    if profile is None:
        return Conversation(text, tokenizer.encode(text))
    return Conversation(
        text,
        tokenizer.encode(text),
        profile,
        starts_in_thought=prompt_opens_thought(profile, text),
        sampling=profile.sampling(profile.is_thinking(asked, thinking)),
    )
