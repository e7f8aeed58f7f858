# SPDX-License-Identifier: Apache-2.0
"""`nemotron-fast quantize`: an FP8 copy of a checkpoint."""

from __future__ import annotations

import argparse
import time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("src", metavar="SRC", help="folder of a BF16, FP16 or FP32 checkpoint, or demo")
    parser.add_argument("dst", metavar="DST", help="folder to create; it must not exist, or be empty")


def run(args: argparse.Namespace) -> int:
    """Write the copy, with a progress bar on stderr.

    Raises:
        ConfigError, CheckpointError: SRC cannot be read, or DST cannot be written.
    """
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from nemotron_fast.cli import render
    from nemotron_fast.models import resolve_model
    from nemotron_fast.quantize import quantize_checkpoint

    source = resolve_model(args.src)
    err = render.console(stderr=True)
    columns = (TextColumn("quantising"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    start = time.perf_counter()
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task("quantising", total=None)

        def on_progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        quantize_checkpoint(source, args.dst, progress=on_progress)
        written = int(bar.tasks[0].completed)
    seconds = time.perf_counter() - start
    err.print(f"{render.size(written)} written to {args.dst} in {seconds:.1f} s", soft_wrap=True)
    return 0
