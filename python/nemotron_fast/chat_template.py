# SPDX-License-Identifier: Apache-2.0
"""Messages -> prompt text, by the checkpoint's own chat template."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2

from nemotron_fast.errors import CheckpointError, RequestError
from nemotron_fast.template_limits import LimitError, TemplateLimits
from nemotron_fast.template_sandbox import Sandbox

Message = dict[str, Any]

ALLOWED_VARIABLES = frozenset(
    {"enable_thinking", "thinking", "reasoning_effort", "date_string", "tools_in_user_message"}
)
"""Template variables that a caller may set; what else a template reads comes from the checkpoint."""
_MAX_DEPTH = 64


class ChatTemplateError(CheckpointError):
    """A chat template that is not valid jinja, is too large, or goes beyond its limits."""


class ChatTemplate:
    """One compiled template; renders as transformers' apply_chat_template does. Threads may share it."""

    def __init__(
        self,
        source: str,
        bos_token: str | None = None,
        eos_token: str | None = None,
        *,
        special_tokens: Mapping[str, str] | None = None,
        limits: TemplateLimits | None = None,
        extra_variables: Iterable[str] = (),
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        """`special_tokens` are further names such as pad_token for the template, `extra_variables` names that
        render() accepts beside ALLOWED_VARIABLES, `now` is the clock of strftime_now.

        Raises:
            ChatTemplateError: the source is too large or not valid.
        """
        limits = limits or TemplateLimits()
        if len(source) > limits.source_chars:
            raise ChatTemplateError(f"chat template has {len(source)} characters, want at most {limits.source_chars}")
        self.source = source
        self.sha256 = hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()
        """Of the source's UTF-8, to recognise a template in a log."""
        tokens = {**(special_tokens or {}), "bos_token": bos_token, "eos_token": eos_token}
        self._tokens = {name: token for name, token in tokens.items() if token is not None}
        self._variables = ALLOWED_VARIABLES | set(extra_variables)
        self._sandbox = Sandbox(limits, now)
        try:
            with self._sandbox.metered():
                self._template = self._sandbox.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ChatTemplateError(f"chat template, line {error.lineno}: {error.message}") from error
        except Exception as error:  # such as RecursionError on very deep nesting
            raise ChatTemplateError(f"chat template cannot be compiled: {_describe(error)}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt. It usually holds BOS already; `Tokenizer.encode` adds no second one.

        Raises:
            RequestError: messages that are malformed or that the template refuses, or an unknown variable.
            ChatTemplateError: the rendering goes beyond the limits.
        """
        if unknown := sorted(set(variables) - self._variables):
            raise RequestError(f"template variables {unknown} cannot be set, only {', '.join(sorted(self._variables))}")
        context = {
            **self._tokens,
            **plain_data(variables, "variables"),
            "messages": normalize_messages(messages),
            "tools": None if tools is None else plain_data(list(tools), "tools"),
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            with self._sandbox.metered():
                return self._sandbox.output(self._template.generate(context))
        except LimitError as error:
            raise ChatTemplateError(f"chat template goes beyond its limits: {error}") from error
        except jinja2.TemplateError as error:
            raise RequestError(f"the chat template refuses these messages: {_describe(error)}") from error
        except Exception as error:  # a template can fail in any way an expression can
            raise RequestError(f"the chat template fails on these messages: {_describe(error)}") from error


def normalize_messages(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Check messages and copy them as plain data, with each content as one string.

    A list of text parts is joined by newlines; a missing or null content, as beside tool calls, becomes "".
    Which roles there are is up to the template.

    Raises:
        RequestError: names the message and what is wrong with it.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise RequestError(f"messages is {type(messages).__name__}, want a list of role and content dicts")
    if not messages:
        raise RequestError("messages is empty, want at least one message")
    return [_normalize_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _normalize_message(message: Any, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise RequestError(f"{where} is {type(message).__name__}, want a dict with role and content")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise RequestError(f"{where} has the role {role!r:.40}, want a string such as 'user'")
    if message.get("content") is None and not message.get("tool_calls"):
        raise RequestError(f"{where} ({role:.40}) has no content, want a string or a list of text parts")
    copy: Message = plain_data(message, where)
    copy["content"] = content_text(message.get("content"), f"{where}.content")
    return copy


def content_text(content: Any, where: str = "content") -> str:
    """A message's content as one string: text parts joined by newlines, None as "".

    Raises:
        RequestError: content that is neither a string nor a list of text parts.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return str.__str__(content)
    if not isinstance(content, list | tuple):
        raise RequestError(f"{where} is {type(content).__name__}, want a string or a list of text parts")
    texts: list[str] = []
    for i, part in enumerate(content):
        match part:
            case {"type": "text", "text": str(text)}:
                texts.append(text)
            case {"type": str(kind)} if kind != "text":
                raise RequestError(f"{where}[{i}] has the type {kind!r:.40}: only text can be read")
            case _:
                raise RequestError(f"{where}[{i}] is {part!r:.60}, want {{'type': 'text', 'text': ...}}")
    return "\n".join(texts)


def plain_data(value: Any, where: str, depth: int = 0) -> Any:
    """A copy out of plain JSON types, so that a template never holds an object with methods of its own.

    Raises:
        RequestError: another type, or nesting deeper than 64 levels.
    """
    if depth > _MAX_DEPTH:
        raise RequestError(f"{where} is nested more than {_MAX_DEPTH} levels deep")
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):  # a subclass, such as an enum
        return str.__str__(value)
    if isinstance(value, int | float):
        return int(value) if isinstance(value, int) else float(value)
    if isinstance(value, Mapping):
        if bad := next((key for key in value if not isinstance(key, str)), None):
            raise RequestError(f"{where} has the key {bad!r:.40}, want strings")
        return {str(key): plain_data(item, f"{where}.{key:.40}", depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_data(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value)]
    raise RequestError(f"{where} holds {type(value).__name__}, want plain JSON data")


def template_sources(value: Any, file: str | None = None) -> dict[str, str]:
    """Template sources by name, from `chat_template` of tokenizer_config.json (one string, or a list of
    {name, template}) and chat_template.jinja, which wins. A single one is called "default".

    Raises:
        ChatTemplateError: `value` has another form.
    """
    named: dict[str, str] = {}
    for entry in [{"name": "default", "template": value}] if isinstance(value, str) else value or []:
        match entry:
            case {"name": str(name), "template": str(source)}:
                named[name] = source
            case _:
                raise ChatTemplateError(
                    f"chat_template in tokenizer_config.json has {entry!r:.80}, want a string or a list of "
                    '{"name": ..., "template": ...}'
                )
    return named if file is None else {**named, "default": file}


def _describe(error: Exception) -> str:
    kind = "" if type(error) is jinja2.TemplateError else f"{type(error).__name__}: "
    return f"{kind}{error!s:.500}"
