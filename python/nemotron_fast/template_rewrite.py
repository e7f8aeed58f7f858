# SPDX-License-Identifier: Apache-2.0
"""How a chat template is changed before it is compiled: calls of the meter where jinja2 has no hook for them."""

from __future__ import annotations

from typing import Any

from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.visitor import NodeTransformer


class Steps(Extension):
    """What the rewritten template calls. The methods of `environment` that they use are those of Sandbox."""

    identifier = "nemotron_fast_steps"
    environment: Any

    def step(self) -> None:
        self.environment.meter.step()

    def text(self) -> None:
        self.environment.meter.charge()

    def timed(self, value: Any) -> Any:
        self.environment.meter.check_clock()
        return value

    def made(self, value: Any) -> Any:
        return self.environment.meter.made(value)

    def literal(self, value: Any) -> Any:
        self.environment.meter.charge(64 * len(value))  # its parts may be new as well
        return self.environment.meter.made(value)

    def concat(self, *values: Any) -> str:
        return self.environment.join(str(self.environment.written(value)) for value in values)  # type: ignore[no-any-return]


class Rewriter(NodeTransformer):
    """Puts the meter's calls into a template: see Steps."""

    def __init__(self, steps: Extension) -> None:
        self._steps = steps

    def _call(self, name: str, node: nodes.Node, *args: Any) -> nodes.Call:
        return self._steps.call_method(name, list(args), lineno=node.lineno)

    def _visit_body(self, node: Any) -> Any:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(self._call("step", node), lineno=node.lineno))
        return node

    visit_For = visit_Macro = visit_CallBlock = _visit_body

    def visit_Output(self, node: nodes.Output) -> Any:
        self.generic_visit(node)
        if not all(isinstance(part, nodes.TemplateData) for part in node.nodes):
            return node  # `written` is called
        return [nodes.ExprStmt(self._call("text", node), lineno=node.lineno), node]

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._call("concat", node, *node.nodes)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = self._call("timed", node, node.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return self._call("made", node, node) if isinstance(node.arg, nodes.Slice) else node

    def _visit_literal(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        return self._call("literal", node, node) if node.items and getattr(node, "ctx", "load") == "load" else node

    visit_List = visit_Tuple = visit_Dict = _visit_literal


class Generation(Extension):
    """{% generation %}...{% endgeneration %} marks training targets: only what is inside matters here."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)
