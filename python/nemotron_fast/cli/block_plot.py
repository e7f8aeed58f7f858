# SPDX-License-Identifier: Apache-2.0
"""The block list as a picture: one column per block; attention above, FFN widths to scale, a strip of bytes below."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemotron_fast.errors import RequestError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")
INK, MUTED, GRID, EMPTY = "#1f2430", "#6b7280", "#e5e7eb", "#eef0f3"
FFN, LINEAR = "#f28e2b", "#59a14f"
ATTENTION = ("#a6c8e4", "#7aaed6", "#4e8fc4", "#2f6fa8", "#1d4f80")  # few KV heads ... many
# Widths more than CUT_RATIO times the next smaller one, of at most CUT_SHARE of the FFNs, are not drawn to scale.
CUT_RATIO, CUT_SHARE = 2.5, 0.1


def save_plot(summary: dict[str, Any], file: str) -> None:
    """Draw `summary` (of summary.summarise) into `file`; the ending says the format.

    Raises:
        RequestError: matplotlib is missing, the ending is not one of FORMATS, or the file cannot be written.
    """
    if Path(file).suffix.lower() not in FORMATS:
        raise RequestError(f"--plot {file!r} has an unknown ending, want one of {', '.join(FORMATS)}")
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise RequestError("--plot needs matplotlib; run: pip install 'nemotron-fast[plot]'") from None
    matplotlib.use("Agg")
    matplotlib.rcParams.update({"font.family": "DejaVu Sans", "font.size": 10, "svg.fonttype": "none"})
    figure = _draw(summary)
    try:
        figure.savefig(file, dpi=160, facecolor="white")
    except OSError as error:
        raise RequestError(f"cannot write {file}: {error.strerror}; give a file in an existing folder") from None


def _draw(summary: dict[str, Any]) -> Figure:
    from matplotlib.figure import Figure

    num = summary["num_blocks"]
    width = min(max(11.5, 3.0 + 0.12 * num), 17.0)
    figure = Figure(figsize=(width, 6.4))
    grid = figure.add_gridspec(
        3,
        1,
        height_ratios=(0.75, 5, 0.55),
        hspace=0.12,
        left=0.95 / width,
        right=1 - 0.3 / width,
        top=0.775,
        bottom=0.115,
    )
    top = figure.add_subplot(grid[0])
    middle = figure.add_subplot(grid[1], sharex=top)
    bottom = figure.add_subplot(grid[2], sharex=top)
    for axes in (top, middle, bottom):
        axes.set_xlim(-0.7, num - 0.3)
        axes.tick_params(colors=MUTED, length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
    _attention_row(top, summary["blocks"], _kv_colours(summary))
    note = _ffn_bars(middle, summary["blocks"])
    _bytes_strip(bottom, summary)
    for axes in (top, middle):
        axes.tick_params(labelbottom=False)
    bottom.set_xlabel("block", color=MUTED)
    _title_and_legend(figure, summary, note, width)
    return figure


def _kv_colours(summary: dict[str, Any]) -> dict[int, str]:
    """A shade for each number of KV heads; a model with one number gets the middle one."""
    heads = sorted(int(h) for h in summary["kv_heads"])
    if len(heads) < 2:
        return {h: ATTENTION[3] for h in heads}
    last = len(ATTENTION) - 1
    return {h: ATTENTION[round(i * last / (len(heads) - 1))] for i, h in enumerate(heads)}


def _attention_row(axes: Axes, blocks: list[dict[str, Any]], colours: dict[int, str]) -> None:
    kinds = [(b["attention"]["kind"], b["attention"].get("kv_heads")) for b in blocks]
    fills = {"linear": LINEAR, "noop": EMPTY}
    axes.bar(range(len(kinds)), 1, width=0.86, color=[fills.get(kind) or colours[heads] for kind, heads in kinds])
    start = 0
    for stop in range(1, len(kinds) + 1):
        if stop < len(kinds) and kinds[stop] == kinds[start]:
            continue
        kind, heads = kinds[start]
        if kind == "attention":  # above the cells, and as much of it as the run has room for
            label = f"{heads} KV head{'s' * (heads > 1)}" if stop - start >= 0.09 * len(kinds) else f"{heads}"
            axes.text((start + stop - 1) / 2, 1.08, label, ha="center", va="bottom", color=MUTED, fontsize=8)
        start = stop
    axes.set_ylim(0, 1)
    axes.set_yticks([0.5], ["attention"], color=INK)


def _ffn_bars(axes: Axes, blocks: list[dict[str, Any]]) -> str | None:
    """Bars of the FFN widths; returns a note if some are cut."""
    widths = [b["ffn"].get("width", 0) for b in blocks]
    full, tallest = _scale(widths)
    for index, block in enumerate(blocks):
        match block["ffn"]["kind"]:
            case "ffn" if widths[index] <= full:
                axes.bar(index, widths[index], width=0.86, color=FFN)
            case "ffn":
                _cut_bar(axes, index, widths[index], full, tallest)
            case "linear":
                axes.bar(index, 0.045 * tallest, width=0.86, color=LINEAR)
            case _:
                axes.bar(index, 0.012 * tallest, width=0.86, color="#d4d8de")
    axes.set_ylim(0, tallest * (1.12 if tallest > full else 1.03))
    ticks = _ticks(sorted({w for w in widths if 0 < w <= full}), full)
    axes.set_yticks(ticks, [f"{w:,}" for w in ticks])
    axes.set_ylabel("FFN width", color=INK)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    return "cut bars are not to scale: their widths are written above them" if tallest > full else None


def _scale(widths: list[int]) -> tuple[float, float]:
    """(largest width drawn to scale, height of the axis): a few far wider ones are cut, lest they flatten the rest."""
    present = [w for w in widths if w] or [1]
    distinct = sorted(set(present))
    for below, above in pairwise(distinct):
        few = sum(w >= above for w in present) <= CUT_SHARE * len(present)
        if few and above > CUT_RATIO * below:
            return below, below * 1.45
    return distinct[-1], distinct[-1]


def _ticks(widths: list[int], full: float) -> list[int]:
    """The widths that occur, from the top down, without those whose labels would touch."""
    kept: list[int] = []
    for width in reversed(widths):
        if all(abs(width - other) >= 0.055 * full for other in kept):
            kept.append(width)
    return sorted(kept)


def _cut_bar(axes: Axes, index: int, width: int, full: float, tallest: float) -> None:
    axes.bar(index, tallest, width=0.86, color=FFN)
    for low in (full * 1.10, full * 1.16):  # two slanted gaps
        axes.fill_between([index - 0.6, index + 0.6], [low, low + 0.03 * full], [low + 0.025 * full] * 2, color="white")
    axes.text(index, tallest * 1.015, f"{width:,}", ha="center", va="bottom", fontsize=8, color=INK)


def _bytes_strip(axes: Axes, summary: dict[str, Any]) -> None:
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm

    sizes = [b["bytes"] for b in summary["blocks"]]
    most = max(*sizes, 1)
    shades = LinearSegmentedColormap.from_list("bytes", ("#f3f4f6", "#8f7fb8", "#3b2a6b"))
    shade = PowerNorm(0.5, 0, most)
    axes.bar(range(len(sizes)), 1, width=0.86, color=[shades(shade(s)) for s in sizes])
    axes.set_ylim(0, 1)
    axes.set_yticks([0.5], ["bytes"], color=INK)


def _title_and_legend(figure: Figure, summary: dict[str, Any], note: str | None, width: float) -> None:
    from matplotlib.patches import Patch

    from nemotron_fast.cli.render import count, size

    parameters = summary["parameters"]["total"]
    left = 0.3 / width
    figure.text(left, 0.955, summary["name"], fontsize=15, fontweight="bold", color=INK, va="center")
    kv = summary["kv_bytes_per_token"]["bfloat16"]
    figure.text(
        left,
        0.905,
        f"{count(parameters)} parameters, {size(summary['weight_bytes'])} of weights   ·   "
        f"{summary['num_blocks']} blocks, {summary['attention_blocks']} with attention, {summary['empty_blocks']} empty"
        f"   ·   KV cache {kv:,} bytes a token in BF16",
        color=MUTED,
        va="center",
    )
    biggest = max(summary["blocks"], key=lambda b: b["bytes"])
    handles = [Patch(color=c, label=f"attention, {h} KV head{'s' * (h > 1)}") for h, c in _kv_colours(summary).items()]
    handles.append(Patch(color=FFN, label="FFN"))
    if summary["linear_attention_blocks"] or summary["linear_ffn_blocks"]:
        handles.append(Patch(color=LINEAR, label=f"linear, {summary['hidden_size']} x {summary['hidden_size']}"))
    handles.append(Patch(color="#d4d8de", label="nothing"))
    handles.append(Patch(color="#3b2a6b", label=f"bytes: darkest {size(biggest['bytes'])} (block {biggest['index']})"))
    figure.legend(
        handles=handles,
        loc="center left",
        bbox_to_anchor=(left - 0.04 / width, 0.85),
        ncols=len(handles),
        frameon=False,
        fontsize=9,
        handlelength=1.1,
        handleheight=1.0,
        borderpad=0,
        columnspacing=1.4,
        labelcolor=INK,
    )
    if note is not None:
        figure.text(1 - 0.3 / width, 0.02, note, ha="right", color=MUTED, fontsize=8.5)
