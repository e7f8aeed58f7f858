# SPDX-License-Identifier: Apache-2.0
"""Progress on stderr for work that takes a while."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)


@contextlib.contextmanager
def progress_bar(
    what: str, total: int, *, unit: str = "bytes", show: bool = True
) -> Iterator[Callable[[int, int], None]]:
    """Yields `update(done, new_tokens)`; the bar shows done of total, and tokens per second if there are any."""
    if not show:
        yield lambda done, new_tokens=0: None
        return
    columns = (
        TextColumn(what),
        BarColumn(),
        *((DownloadColumn(),) if unit == "bytes" else (MofNCompleteColumn(), TextColumn(unit))),
        TimeElapsedColumn(),
        TextColumn("{task.fields[rate]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total, rate="")
        tokens = 0

        def update(done: int, new_tokens: int = 0) -> None:
            nonlocal tokens
            tokens += new_tokens
            elapsed = bar.tasks[0].elapsed or 0
            rate = f"{tokens / elapsed:.1f} tok/s" if tokens and elapsed else ""
            bar.update(task, completed=done, rate=rate)

        yield update
