# SPDX-License-Identifier: Apache-2.0
"""What several commands share when they print: consoles, tables, numbers."""

from __future__ import annotations

import json
import sys
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

PIPE_WIDTH = 120  # columns, where stdout is no terminal


def console(*, stderr: bool = False) -> Console:
    """A console for stdout or stderr; plain text and a fixed width if that is no terminal."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else PIPE_WIDTH, highlight=False)


def print_json(data: Any) -> None:
    """One JSON document on stdout."""
    print(json.dumps(data, indent=2, ensure_ascii=False))


def table(title: str | None, *columns: str, left: int = 1) -> Table:
    """A table whose first `left` columns are left-aligned, and the rest, numbers, to the right."""
    made = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=None, pad_edge=False)
    for index, name in enumerate(columns):
        made.add_column(Text(name), justify="left" if index < left else "right", no_wrap=True)
    return made


def size(num_bytes: int) -> str:
    """Decimal units, as memory is sold: `1.05 GB`, `16.4 kB`, `-` for nothing."""
    if not num_bytes:
        return "-"
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(num_bytes) >= scale:
            value = num_bytes / scale
            return f"{value:.2f} {unit}" if abs(value) < 100 else f"{value:.1f} {unit}"
    return f"{num_bytes} B"


def count(number: int) -> str:
    """`49.87 B`, `855.6 M`, `8,192`; `-` for nothing."""
    if not number:
        return "-"
    for unit, scale in (("B", 1e9), ("M", 1e6)):
        if number >= scale:
            value = number / scale
            return f"{value:.2f} {unit}" if value < 100 else f"{value:.1f} {unit}"
    return f"{number:,}"
