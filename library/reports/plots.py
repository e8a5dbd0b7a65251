"""Plots of a measurement, as PNG: the score over the multiplier, and the grid of images."""

from __future__ import annotations

import base64
import io
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from library.measuring.calibration import Calibration
from library.measuring.record import EvaluationRecord
from library.measuring.response_curve import WIDEST
from library.measuring.statistics import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed", "#475569")
INK, MUTED, PAPER, RULE = "#1f2937", "#6b7280", "#ffffff", "#e5e7eb"
BROKEN = (0, (4, 3))  # a line style
USABLE = "#e3f5ea"
MIN_CELL, MAX_CELL = 128, 320  # pixels, the longer side of a picture in a grid
LABEL_WIDTH, GAP, HEADER = 190, 6, 34  # pixels


@dataclass(frozen=True)
class Palette:
    """Colours of a plot: of words, of what matters less, of the ground, and of lines that only guide the eye."""

    ink: str
    muted: str
    paper: str
    rule: str


LIGHT = Palette(INK, MUTED, PAPER, RULE)
DARK = Palette("#e5e7eb", "#9ca3af", "#1d2128", "#3a414d")


def signed(value: float) -> str:
    """A multiplier as people write it: +1, -0.5, 0, with a real minus sign."""
    return f"{value:+g}".replace("-", "\u2212") if value else "0"


def score_curves(records: Sequence[EvaluationRecord]) -> bytes:
    """One panel a score, one line a slider: mean score over the multiplier, PNG.

    The band is the 95 % interval of the change against the base model (pair by pair), which is the broken line. The axis on the
    right is that change in within-prompt standard deviations of the base model, of the first slider's run.
    """
    names = list(records[0].responses)
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure = _figure(0.6 + 4.2 * columns, 0.3 + 3.5 * rows, LIGHT)
    for position, name in enumerate(names):
        axes = figure.add_subplot(rows, columns, position + 1)
        _score_panel(axes, records, name, LIGHT)
        if position == 0 and len(records) > 1:
            axes.legend(frameon=False, fontsize=8, loc="upper left")
    return figure_png(figure)


def score_plot(records: Sequence[EvaluationRecord], name: str, palette: Palette = LIGHT) -> bytes:
    """One panel of `score_curves`."""
    figure = _figure(5.2, 3.9, palette)
    axes = figure.add_subplot()
    _score_panel(axes, records, name, palette)
    if len(records) > 1:
        axes.legend(frameon=False, fontsize=8, loc="upper left", labelcolor=palette.ink)
    return figure_png(figure)


@dataclass(frozen=True)
class GainLine:
    """One score in a gain plot: its label, and gains in within-prompt standard deviations over LoRA weights; NaN bounds are no interval."""

    label: str
    weights: Sequence[float]
    gains: Sequence[Interval]


def lines_of(record: EvaluationRecord) -> list[GainLine]:
    """Every score of a record that has gains in standard deviations."""
    roles = {"scorer": "training score", "judge": "judge", "stay": "side effect"}
    return [GainLine(f"{roles[score.role]} {_tail(score.name, 26)}", record.multipliers, score.gains_std) for score in record.scaled]


def gain_plot(
    lines: Sequence[GainLine],
    usable: tuple[float, float],
    title: str,
    *,
    slope: float | None = None,
    points: Sequence[tuple[float, Interval]] = (),
    palette: Palette = LIGHT,
) -> bytes:
    """All scores of one slider on one scale, PNG, with 95 % intervals; the usable weights are shaded.

    Args:
        slope: of a straight line through 0 to compare with, broken.
        points: gains at weights that were measured again, on other seeds.
    """
    figure = _figure(5.2, 3.9, palette)
    axes = figure.add_subplot()
    if usable[0] < usable[1]:
        axes.axvspan(*usable, color=USABLE if palette is LIGHT else "#1f332b", linewidth=0, zorder=0, label="usable")
    axes.axhline(0, color=palette.muted, linewidth=0.8, linestyle=BROKEN if slope is None else "-", zorder=1)
    axes.axvline(0, color=palette.rule, linewidth=1, zorder=0)
    for number, line in enumerate(lines):
        low, value, high = (np.array([getattr(gain, bound) for gain in line.gains]) for bound in ("low", "value", "high"))
        colour = COLOURS[number % len(COLOURS)]
        axes.fill_between(line.weights, low, high, color=colour, alpha=0.18, linewidth=0, zorder=2)
        axes.plot(line.weights, value, color=colour, linewidth=2, marker="o", markersize=4.5, label=line.label, zorder=3)
    if slope is not None:
        ends = np.array([min(lines[0].weights), max(lines[0].weights)])
        axes.plot(ends, slope * ends, color=palette.ink, linewidth=1, linestyle=BROKEN, zorder=4, label=f"line: slope {slope:.2f}")
    for number, (weight, gain) in enumerate(points):
        error, label = [[gain.value - gain.low], [gain.high - gain.value]], "measured again, other seeds" if number == 0 else None
        axes.errorbar([weight], [gain.value], error, color=palette.ink, marker="D", markersize=5, capsize=3, zorder=5, label=label)
    axes.set_title(_tail(title, 60), fontsize=11, color=palette.ink, loc="left", fontweight="bold")
    axes.set_xlabel("LoRA weight", fontsize=9, color=palette.ink)
    axes.set_ylabel("change / standard deviation", fontsize=9, color=palette.ink)
    weights = sorted({weight for line in lines for weight in line.weights})
    if all(abs(weight * 4 - round(weight * 4)) < 1e-9 for weight in weights):  # as a person asked for them
        axes.set_xticks(weights, [signed(weight) for weight in weights])
    quiet(axes, palette)
    legend = axes.legend(frameon=False, fontsize=8, loc="upper left", labelcolor=palette.ink)
    for patch in legend.get_patches():  # of the colour of what lies behind it
        patch.set(edgecolor=palette.muted, linewidth=0.6)
    return figure_png(figure)


def calibration_plot(calibration: Calibration, title: str = "") -> bytes:
    """Gains of the calibrated slider over its weight, as far as 2, PNG: the training score with its interval and straight line, the
    judges, and what other seeds said at -1 and +1."""
    curve, line = calibration.curve, calibration.line
    assert curve is not None and line is not None, "nothing was measured"
    measured = [weight for weight in curve.multipliers if abs(weight) <= WIDEST + 1e-9]
    weights = sorted({*measured, *line.measured, *(end for end in (-1.0, 1.0) if line.measured[0] <= end <= line.measured[1])})
    lines = [GainLine("training score", weights, [curve.interval_at(weight) for weight in weights])]
    for name in curve.judges:
        gains = [Interval(curve.gain_at(weight, name), math.nan, math.nan) for weight in weights]
        lines.append(GainLine(f"judge {_tail(name, 26)}", weights, gains))
    verified = ((1.0, calibration.verified_up), (-1.0, calibration.verified_down))
    points = [(weight, gain) for weight, gain in verified if gain is not None]
    return gain_plot(lines, line.usable, title, slope=line.slope.value, points=points)


def _figure(width: float, height: float, palette: Palette) -> Figure:
    """An empty figure, inches."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.14, h_pad=0.1)
    return Figure(figsize=(width, height), dpi=130, facecolor=palette.paper, layout=layout)


def _tail(name: str, length: int) -> str:
    """The end of a name, which is what differs."""
    return name if len(name) <= length else f"\u2026{name[1 - length :]}"


def quiet(axes: Axes, palette: Palette = LIGHT) -> None:
    """Axes that let the data speak."""
    axes.set_facecolor(palette.paper)
    axes.tick_params(labelsize=8, colors=palette.muted, length=3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(palette.rule)
    axes.grid(axis="y", color=palette.rule, linewidth=0.6)
    axes.set_axisbelow(True)


def figure_png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _score_panel(axes: Axes, records: Sequence[EvaluationRecord], name: str, palette: Palette) -> None:
    first = records[0].responses[name]
    base = first.means[records[0].multipliers.index(0)].value
    axes.axhline(base, color=palette.muted, linewidth=1, linestyle=BROKEN, zorder=1)
    axes.axvline(0, color=palette.rule, linewidth=1, zorder=0)
    for number, record in enumerate(records):
        gains, colour = record.responses[name].gains, COLOURS[number % len(COLOURS)]
        low, value, high = (base + np.array([getattr(gain, bound) for gain in gains]) for bound in ("low", "value", "high"))
        axes.fill_between(record.multipliers, low, high, color=colour, alpha=0.18, linewidth=0, zorder=2)
        axes.plot(record.multipliers, value, color=colour, linewidth=2, marker="o", markersize=4.5, label=record.name, zorder=3)
    axes.set_title(
        textwrap.shorten(name, 36, placeholder=" ...") if " " in name else _tail(name, 36),
        fontsize=11,
        color=palette.ink,
        loc="left",
        fontweight="bold",
        pad=20,
    )
    subtitle = "training score" if first.role == "scorer" else "independent judge"
    axes.text(0, 1.025, subtitle, transform=axes.transAxes, fontsize=8.5, color=palette.muted, va="bottom")
    axes.set_xlabel("LoRA weight", fontsize=9, color=palette.ink)
    axes.set_ylabel("share of pictures" if first.is_share else "mean score", fontsize=9, color=palette.ink)
    axes.set_xticks(records[0].multipliers, [signed(value) for value in records[0].multipliers])
    axes.margins(x=0.04, y=0.12)
    if first.is_share:
        axes.set_ylim(-0.03, 1.06)
    quiet(axes, palette)
    if first.std > 0 and not first.is_share:
        to_gain, to_score = (lambda score: (np.asarray(score) - base) / first.std), (lambda gain: base + np.asarray(gain) * first.std)
        right = axes.secondary_yaxis("right", functions=(to_gain, to_score))
        right.set_ylabel("change / standard deviation", fontsize=8, color=palette.muted)
        right.tick_params(labelsize=8, colors=palette.muted, length=3)
        right.spines["right"].set_color(palette.rule)


def image_grid(rows: Sequence[Tensor], row_labels: Sequence[str] | None, column_labels: Sequence[str]) -> Image.Image:
    """Labelled pictures, rows of uint8 [M, 3, H, W]; sizes may differ from row to row. Without row_labels there is no room for them.

    Small pictures are enlarged by a whole factor without smoothing, so that a pixel stays a pixel; large ones are reduced.
    """
    pictures = [[_resize(Image.fromarray(picture.permute(1, 2, 0).cpu().numpy())) for picture in row] for row in rows]
    width = max(picture.width for row in pictures for picture in row)
    heights = [max(picture.height for picture in row) for row in pictures]
    margin = GAP if row_labels is None else LABEL_WIDTH
    canvas = Image.new("RGB", (margin + len(column_labels) * (width + GAP), HEADER + sum(heights) + GAP * len(rows)), PAPER)
    draw = ImageDraw.Draw(canvas)
    bold, plain = font(16, bold=True), font(12)
    for column, label in enumerate(column_labels):
        draw.text((margin + column * (width + GAP) + width // 2, HEADER // 2), label, fill=INK, font=bold, anchor="mm")
    top = HEADER
    for row, label, height in zip(pictures, row_labels or [""] * len(pictures), heights, strict=True):
        lines = textwrap.wrap(label, 26, max_lines=max(2, height // 17), placeholder=" \u2026")
        draw.multiline_text((12, top + height // 2), "\n".join(lines), fill=INK, font=plain, anchor="lm", spacing=3)
        for column, picture in enumerate(row):
            left = margin + column * (width + GAP) + (width - picture.width) // 2
            canvas.paste(picture, (left, top + (height - picture.height) // 2))
        top += height + GAP
    return canvas


def multiplier_grid(rows: Sequence[Tensor], row_labels: Sequence[str], multipliers: Sequence[float]) -> bytes:
    """`image_grid` with a column a multiplier, PNG."""
    return png_bytes(image_grid(rows, row_labels, [signed(value) if value else "0 (base)" for value in multipliers]))


def png_bytes(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="png")
    return buffer.getvalue()


def data_url(kind: str, content: bytes) -> str:
    """A picture as an address that holds all of it; `kind` is png or jpeg."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _resize(picture: Image.Image) -> Image.Image:
    longer = max(picture.size)
    if longer < MIN_CELL:
        factor = -(-MIN_CELL // longer)
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    if longer > MAX_CELL:
        return picture.resize((picture.width * MAX_CELL // longer, picture.height * MAX_CELL // longer), Image.Resampling.LANCZOS)
    return picture


def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """The font that matplotlib brings, so that a grid looks the same on every system."""
    import matplotlib

    file = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", file)), size)
