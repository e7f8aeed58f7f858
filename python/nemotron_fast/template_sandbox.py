# SPDX-License-Identifier: Apache-2.0
"""A jinja2 environment for templates that nobody here has read: sandboxed, immutable, and with limits.

jinja2's sandbox keeps a template from Python's internals, files and modules. It does not keep one from
running for hours or filling the memory, so here everything that a template makes passes a `Meter`: results of
operators, calls, filters and slices, lists and dicts written out in it, and output. Nothing of it runs while it
is compiled.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import wraps
from typing import Any

from jinja2 import TemplateError, nodes, pass_context
from jinja2.ext import loopcontrols
from jinja2.filters import make_attrgetter
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace

from nemotron_fast.template_limits import (
    CONTAINERS,
    LimitError,
    Meter,
    TemplateLimits,
    check_call,
    check_json_layout,
    check_operands,
    check_size,
    count_pieces,
    join_within,
)
from nemotron_fast.template_rewrite import Generation, Rewriter, Steps

# Slow or large on hostile text, or without use in a prompt.
_REMOVED_FILTERS = frozenset(
    {"batch", "pprint", "random", "slice", "striptags", "urlencode", "urlize", "wordcount", "wordwrap", "xmlattr"}
)
_COMPARISONS = frozenset(
    {"==", "!=", "<", "<=", ">", ">=", "eq", "equalto", "ne", "lt", "lessthan", "le", "gt", "greaterthan", "ge", "in"}
)
# Their results are part of what they are applied to.
_PICKING_CALLS = frozenset({"attr", "d", "default", "first", "get", "last", "max", "min"})
# The others make bytes, huge integers or texts of any length. Numbers have no method that a prompt needs.
# fmt: off
_TEXT_METHODS = frozenset({
    "capitalize", "casefold", "center", "count", "endswith", "expandtabs", "find", "format", "index", "isalnum",
    "isalpha", "isascii", "isdecimal", "isdigit", "isidentifier", "islower", "isnumeric", "isprintable",
    "isspace", "istitle", "isupper", "join", "ljust", "lower", "lstrip", "partition", "removeprefix",
    "removesuffix", "replace", "rfind", "rindex", "rjust", "rpartition", "rsplit", "rstrip", "split",
    "splitlines", "startswith", "strip", "swapcase", "title", "upper", "zfill",
})
# fmt: on
_ARGUMENT_ORDER = "old new"  # of `replace`; for the other filters any order will do
_MAX_RANGE_BOUND = 1 << 31  # multiples of 2**61 - 1 would all have one hash
_MAX_TIME_FORMAT = 256


@pass_context  # jinja2 runs what needs the context while rendering only, never while compiling
def _finalize(context: Any, value: Any) -> Any:
    return context.environment.written(value)


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of one template. Threads may render at the same time: each has its own meter."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, limits: TemplateLimits, now: Callable[[], datetime]) -> None:
        """`now` gives the time for strftime_now."""
        self.limits = limits
        self._now = now
        self._local = threading.local()
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            cache_size=0,
            optimized=False,
            finalize=_finalize,
            extensions=[Generation, Steps, loopcontrols],
        )
        self.concat = self.join  # joins what macros and {% set %} blocks write
        filters = {**self.filters, "join": self._join, "tojson": self._to_json}
        self.filters = {n: self._guard(f, n) for n, f in filters.items() if n not in _REMOVED_FILTERS}
        self.tests = {n: self._timed(f) if n in _COMPARISONS else f for n, f in self.tests.items()}
        del self.globals["lipsum"]
        self.globals |= {
            "range": self._range,
            "namespace": _Namespace,
            "raise_exception": _raise_exception,
            "strftime_now": self._strftime,
        }

    @contextmanager
    def metered(self) -> Iterator[None]:
        """Compiling and rendering happen inside this: starts the meter of this thread."""
        self._local.meter = Meter(self.limits)
        try:
            yield
        finally:
            del self._local.meter

    @property
    def meter(self) -> Meter:
        """Of the rendering in this thread."""
        return self._local.meter  # type: ignore[no-any-return]

    def output(self, pieces: Iterable[str]) -> str:
        """The whole prompt."""
        return join_within(pieces, self.limits.written_chars)

    def join(self, pieces: Iterable[str]) -> str:
        return self.meter.made(join_within(pieces, self.limits.value_chars))  # type: ignore[no-any-return]

    def written(self, value: Any) -> Any:
        """A value that is about to become text."""
        if isinstance(value, CONTAINERS):
            self.meter.weigh(value)
            value = str(value)
            self.meter.made(value)
        self.meter.charge()
        return value

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and attr not in _TEXT_METHODS:
            return False
        if isinstance(obj, int | float | type) and (obj, attr) != (dict, "fromkeys"):
            return False
        return super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            self._check_call("percent", [left, *(right if isinstance(right, tuple) else [right])])
        check_operands(operator, left, right, self.limits.value_chars)
        if operator == "*":
            for values, count in ((left, right), (right, left)):
                if isinstance(values, list | tuple) and isinstance(count, int):
                    check_size(self.meter.weigh(values).chars * count, self.limits.written_chars)
        return self.meter.made(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)  # str.format is wrapped
        if isinstance(owner, Steps):
            return __obj(*args)
        meter, name = __self.meter, getattr(__obj, "__name__", "")
        values = [*args, *kwargs.values()]
        own = [owner] if isinstance(owner, str) else []
        if name == "join":
            args = tuple(__self._listed(x) for x in args)
        # A macro gets its arguments as a tuple and a dict, a namespace copies its own.
        meter.charge(64 + 128 * len(values) + sum(128 * len(x) for x in args if isinstance(x, dict)))
        chars = sum(meter.weigh(x).chars for x in values if isinstance(x, CONTAINERS))
        check_size(chars, __self.limits.written_chars)
        if own:
            __self._before(name, [*own, *args, *kwargs.values()])
        result = super().call(__context, __obj, *args, **kwargs)
        return __self._after(name, result, own, isinstance(__obj, Macro))

    def _guard(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """A filter with checks before and after."""
        skip = 1 if hasattr(function, "jinja_pass_arg") else 0
        kind = "percent" if name == "format" else name

        @wraps(function)  # keeps jinja2's mark on filters that take the context first
        def guarded(*args: Any, **kwargs: Any) -> Any:
            source = args[skip] if len(args) > skip else None
            if isinstance(source, Iterator):
                args = (*args[:skip], self._items(source), *args[skip + 1 :])
            inputs = [*args[skip:], *(kwargs[n] for n in sorted(kwargs, key=_ARGUMENT_ORDER.find))]
            self._before(kind, inputs)
            result = function(*args, **kwargs)
            if isinstance(result, Iterator):
                self.meter.made_lazily(result, source)
                return result
            return self._after(kind, result, inputs)

        return guarded

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def timed(*args: Any) -> Any:
            self.meter.check_clock()
            return function(*args)

        return timed

    def _before(self, name: str, inputs: list[Any]) -> None:
        self._check_call(name, inputs)
        self.meter.charge(64 + 72 * count_pieces(name, inputs))

    def _check_call(self, name: str, inputs: list[Any]) -> None:
        check_call(name, inputs, self.limits.value_chars, lambda value: self.meter.weigh(value).chars)

    def _after(self, name: str, result: Any, inputs: list[Any], charged: bool = False) -> Any:
        if charged or name in _PICKING_CALLS or any(result is x for x in inputs):
            return result
        return self.meter.made(result)

    def _items(self, source: Iterator[Any]) -> Iterator[Any]:
        for item in source:  # one character is a new text each time, all else is charged where it is made
            self.meter.charge(72 if isinstance(item, str) and len(item) < 2 else 8)
            yield item

    def _listed(self, value: Any) -> Any:
        """An iterator as a list: its items may be one long text many times."""
        if not isinstance(value, Iterator):
            return value
        items: list[Any] = []
        total = 0
        for item in self._items(value):
            total += self.meter.weigh(item).chars
            check_size(total, self.limits.written_chars)
            items.append(item)
        return items

    def _join(self, value: Any, d: Any = "", attribute: str | int | None = None) -> str:
        """As jinja2's, whose items may come from anywhere with an attribute."""
        items = self._listed(iter(value) if attribute is None else map(make_attrgetter(self, attribute), value))
        self._check_call("join", [items, str(d)])
        return str(d).join(map(str, items))

    def _range(self, *args: int) -> range:
        if any(abs(x) > _MAX_RANGE_BOUND for x in args):
            raise LimitError(f"range{args} has a bound beyond {_MAX_RANGE_BOUND}")
        items = range(*args)
        if len(items) > self.limits.range_items:
            raise LimitError(f"range() of {len(items)} items, at most {self.limits.range_items}")
        return items

    def _strftime(self, form: str) -> str:
        check_size(len(form), _MAX_TIME_FORMAT)
        return self._now().strftime(form)

    def _to_json(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """JSON as is, without the HTML escapes of jinja2's own filter."""
        layout, weight = check_json_layout(indent, separators), self.meter.weigh(value)
        check_size(weight.chars + weight.nodes * (weight.depth + 1) * layout, self.limits.written_chars)
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        for count, _ in enumerate(self.lexer.tokeniter(source, name, filename)):
            if count > self.limits.source_tokens:
                raise LimitError(f"more than {self.limits.source_tokens} tokens in the source")
        tree = super()._parse(source, name, filename)
        return Rewriter(self.extensions[Steps.identifier]).visit(tree)  # type: ignore[no-any-return]


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

    def __repr__(self) -> str:  # jinja2's own writes all values out
        return "<Namespace>"


def _check_name(name: Any) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"namespace attribute {name!r} begins with an underscore")


def _raise_exception(message: Any) -> None:
    raise TemplateError(str(message))
