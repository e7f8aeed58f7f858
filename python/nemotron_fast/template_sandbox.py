# SPDX-License-Identifier: Apache-2.0
"""A jinja2 environment for templates that nobody here has read: sandboxed, immutable, and with limits.

jinja2's sandbox keeps a template from Python's internals, files and modules. It does not keep one from
running for hours or filling the memory, so this adds a step for each loop turn and macro call, a deadline,
and a size check on operators, calls, filters and output. What these do not see: a list that holds one long
text many times and is turned into text (or JSON) by one call.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import wraps
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from nemotron_fast.template_limits import (
    LimitError,
    Meter,
    TemplateLimits,
    check_call,
    check_json_layout,
    check_operands,
    check_size,
    join_within,
)

# Slow on hostile text, or without use in a prompt.
_REMOVED_FILTERS = ("urlize", "wordwrap", "xmlattr", "random", "pprint", "striptags")


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of one template. Threads may render at the same time: each has its own meter."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, limits: TemplateLimits, now: Callable[[], datetime]) -> None:
        """`now` gives the time for strftime_now."""
        self.limits = limits
        self._local = threading.local()
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            cache_size=0,
            extensions=[_Generation, _Steps, loopcontrols],
        )
        self.concat = self.join  # joins what macros, {% set %} blocks and the whole template write
        filters = {**self.filters, "tojson": _to_json}
        self.filters = {n: self._guard(f, n) for n, f in filters.items() if n not in _REMOVED_FILTERS}
        del self.globals["lipsum"]
        self.globals |= {
            "range": self._range,
            "namespace": _Namespace,
            "raise_exception": _raise_exception,
            "strftime_now": lambda form: now().strftime(form),
        }

    @contextmanager
    def metered(self) -> Iterator[None]:
        """Rendering happens inside this: starts the count of steps and the clock of this thread."""
        self._local.meter = Meter(self.limits)
        try:
            yield
        finally:
            del self._local.meter

    def step(self) -> None:
        self._local.meter.step()

    def join(self, pieces: Iterable[str]) -> str:
        return join_within(pieces, self.limits.value_chars)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            self._check_call("format", [left, *(right if isinstance(right, tuple) else [right])])
        check_operands(operator, left, right, self.limits.value_chars)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)  # str.format is wrapped
        own = [owner] if isinstance(owner, str) else []
        __self._check_call(getattr(__obj, "__name__", ""), [*own, *args, *kwargs.values()])
        return __self._checked(super().call(__context, __obj, *args, **kwargs))

    def _guard(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """A filter with size checks before and after."""

        @wraps(function)  # keeps jinja2's mark on filters that take the context first
        def guarded(*args: Any, **kwargs: Any) -> Any:
            skip = 1 if hasattr(function, "jinja_pass_arg") else 0
            self._check_call(name, [*args[skip:], *kwargs.values()])
            return self._checked(function(*args, **kwargs))

        return guarded

    def _check_call(self, name: str, inputs: list[Any]) -> None:
        check_call(name, inputs, self.limits.value_chars)

    def _checked(self, value: Any) -> Any:
        if isinstance(value, str | list | tuple | dict):
            check_size(len(value), self.limits.value_chars)
        return value

    def _range(self, *args: int) -> range:
        items = range(*args)
        if len(items) > self.limits.range_items:
            raise LimitError(f"range() of {len(items)} items, at most {self.limits.range_items}")
        return items

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        return _Rewriter(self.extensions[_Steps.identifier]).visit(tree)  # type: ignore[no-any-return]


class _Steps(Extension):
    """What the rewritten template calls."""

    identifier = "nemotron_fast_steps"

    def step(self) -> None:
        self.environment.step()  # type: ignore[attr-defined]

    def concat(self, *values: Any) -> str:
        return self.environment.join(str(value) for value in values)  # type: ignore[attr-defined]


class _Rewriter(NodeTransformer):
    """Puts a step at the head of each loop body and macro, and makes each `~` a call that checks sizes."""

    def __init__(self, steps: Extension) -> None:
        self._steps = steps

    def _visit_body(self, node: Any) -> Any:
        self.generic_visit(node)
        step = self._steps.call_method("step", lineno=node.lineno)
        node.body.insert(0, nodes.ExprStmt(step, lineno=node.lineno))
        return node

    visit_For = visit_Macro = visit_CallBlock = _visit_body

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._steps.call_method("concat", node.nodes, lineno=node.lineno)


class _Generation(Extension):
    """{% generation %}...{% endgeneration %} marks training targets: only what is inside matters here."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Namespace(Namespace):
    """Without names that begin with an underscore, which could stand in for Python's own."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # no `self`: namespace(self=1) is allowed
        values = dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)


def _check_name(name: Any) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"namespace attribute {name!r} begins with an underscore")


def _raise_exception(message: Any) -> None:
    raise TemplateError(str(message))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as is, without the HTML escapes of jinja2's own filter."""
    check_json_layout(indent, separators)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
