"""Plots of a measurement, as PNG: the score over the multiplier, and the grid of images."""

from __future__ import annotations

import base64
import io
import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from library.measuring.calibration import Calibration
from library.measuring.comparison import summarise
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
UNIT = "change / standard deviation"
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


@dataclass(frozen=True)
class Line:
    """One line of a plot over LoRA weights: its label, and values with intervals; NaN bounds are no interval."""

    label: str
    weights: Sequence[float]
    values: Sequence[Interval]


def record_plots(records: Sequence[EvaluationRecord]) -> dict[str, Callable[[Palette], bytes]]:
    """What draws each plot of some records, by its description: of one slider all scores that have a unit on one scale, then each of the
    others; of several a plot a score, with a line a slider, all gains on one scale."""
    first = records[0]
    gains = [gain for record in records for score in record.scaled for gain in score.gains_std]
    limits = min((gain.low for gain in gains), default=0.0), max((gain.high for gain in gains), default=0.0)
    plots: dict[str, Callable[[Palette], bytes]] = {}
    if len(records) == 1 and first.scaled:
        roles = {"scorer": "training score", "judge": "judge", "stay": "side effect"}
        lines = [Line(f"{roles[score.role]} {_tail(score.name, 26)}", first.multipliers, score.gains_std) for score in first.scaled]
        line = summarise(first).line
        usable = (0.0, 0.0) if line is None else line.usable
        plots["Gain of every score over the weight."] = _drawing(lines, "Training score and judges", usable=usable)
    for name, response in first.responses.items():
        scaled = response in first.scaled
        if scaled and len(records) == 1:
            continue
        own = [record for record in records if name in record.responses]
        lines = [
            Line(record.name, record.multipliers, record.responses[name].gains_std if scaled else record.responses[name].means)
            for record in own
        ]
        unit = UNIT if scaled else "share of pictures" if response.is_share else "mean score"
        base = 0.0 if scaled else response.means[first.base].value
        drawing = _drawing(lines, name, unit=unit, base=base, limits=limits if scaled else None)
        plots[f"{'Gain' if scaled else 'Mean'} of {name} over the weight."] = drawing
    return plots


def _drawing(lines: Sequence[Line], title: str, **options: Any) -> Callable[[Palette], bytes]:
    return lambda palette: weight_plot(lines, title, **options, palette=palette)


def weight_plot(
    lines: Sequence[Line],
    title: str,
    *,
    unit: str = UNIT,
    base: float = 0.0,
    limits: tuple[float, float] | None = None,
    usable: tuple[float, float] = (0.0, 0.0),
    slope: float | None = None,
    points: Sequence[tuple[float, Interval]] = (),
    palette: Palette = LIGHT,
) -> bytes:
    """Lines over the LoRA's weight, PNG, with 95 % intervals.

    Args:
        unit: of the values, in words.
        base: the base model's value.
        limits: lowest and highest value that the axis is to hold; None takes those of `lines`.
        usable: weights that are shaded.
        slope: of a straight line through 0 to compare with, broken.
        points: values at weights that were measured again, on other seeds.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.14, h_pad=0.1)
    figure = Figure(figsize=(5.2, 3.9), dpi=130, facecolor=palette.paper, layout=layout)  # inches
    axes = figure.add_subplot()
    if usable[0] < usable[1]:
        axes.axvspan(*usable, color=USABLE if palette is LIGHT else "#1f332b", linewidth=0, zorder=0, label="usable")
    axes.axhline(base, color=palette.muted, linewidth=0.8, linestyle=BROKEN if slope is None else "-", zorder=1)
    axes.axvline(0, color=palette.rule, linewidth=1, zorder=0)
    for number, line in enumerate(lines):
        low, value, high = (np.array([getattr(gain, bound) for gain in line.values]) for bound in ("low", "value", "high"))
        colour = COLOURS[number % len(COLOURS)]
        axes.fill_between(line.weights, low, high, color=colour, alpha=0.18, linewidth=0, zorder=2)
        axes.plot(line.weights, value, color=colour, linewidth=2, marker="o", markersize=4.5, label=line.label, zorder=3)
    if slope is not None:
        ends = np.array([min(lines[0].weights), max(lines[0].weights)])
        axes.plot(ends, slope * ends, color=palette.ink, linewidth=1, linestyle=BROKEN, zorder=4, label=f"line: slope {slope:.2f}")
    for number, (weight, gain) in enumerate(points):
        error, label = [[gain.value - gain.low], [gain.high - gain.value]], "measured again, other seeds" if number == 0 else None
        axes.errorbar([weight], [gain.value], error, color=palette.ink, marker="D", markersize=5, capsize=3, zorder=5, label=label)
    if limits is not None:
        axes.update_datalim([(0.0, limit) for limit in limits])
        axes.autoscale_view()
    axes.set_title(_tail(title, 60), fontsize=11, color=palette.ink, loc="left", fontweight="bold")
    axes.set_xlabel("LoRA weight", fontsize=9, color=palette.ink)
    axes.set_ylabel(unit, fontsize=9, color=palette.ink)
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
    lines = [Line("training score", weights, [curve.interval_at(weight) for weight in weights])]
    for name in curve.judges:
        gains = [Interval(curve.gain_at(weight, name), math.nan, math.nan) for weight in weights]
        lines.append(Line(f"judge {_tail(name, 26)}", weights, gains))
    verified = ((1.0, calibration.verified_up), (-1.0, calibration.verified_down))
    points = [(weight, gain) for weight, gain in verified if gain is not None]
    return weight_plot(lines, title, usable=line.usable, slope=line.slope.value, points=points)


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


def jpeg_url(picture: Image.Image, longest: int, quality: int) -> str:
    """A copy of at most `longest` pixels a side, as an address that holds all of it."""
    small, buffer = picture.copy(), io.BytesIO()
    small.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    small.save(buffer, format="jpeg", quality=quality)
    return data_url("jpeg", buffer.getvalue())


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
