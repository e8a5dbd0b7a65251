"""Pictures of scores, as PNG: the best and the worst with their scores written on, and how the scores are spread."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from library.reports.plots import COLOURS, INK, MUTED, PAPER, figure_png, font, png_bytes, quiet

CELL, GAP, CAPTION, TITLE = 192, 10, 38, 40  # pixels
COLUMNS = 8


@dataclass(frozen=True)
class CaptionedPicture:
    """A picture, what is written large below it, and what small."""

    picture: Image.Image
    score: str
    name: str


def contact_sheet(sections: Mapping[str, Sequence[CaptionedPicture]]) -> bytes:
    """Pictures in rows of eight below the title of their section, in the order given, PNG. Pictures keep their proportions."""
    rows = {title: -(-len(pictures) // COLUMNS) for title, pictures in sections.items()}
    columns = min(COLUMNS, max(1, *map(len, sections.values())))
    cell_height = CELL + CAPTION + GAP
    canvas = Image.new("RGB", (GAP + columns * (CELL + GAP), GAP + sum(TITLE + count * cell_height for count in rows.values())), PAPER)
    draw, bold, plain = ImageDraw.Draw(canvas), font(15, bold=True), font(11)
    top = GAP
    for title, pictures in sections.items():
        draw.text((GAP, top + TITLE // 2), title, fill=INK, font=font(17, bold=True), anchor="lm")
        top += TITLE
        for number, captioned in enumerate(pictures):
            left, above = GAP + number % COLUMNS * (CELL + GAP), top + number // COLUMNS * cell_height
            picture = _fit(captioned.picture)
            canvas.paste(picture, (left + (CELL - picture.width) // 2, above + (CELL - picture.height) // 2))
            draw.text((left + CELL // 2, above + CELL + 11), captioned.score, fill=INK, font=bold, anchor="mm")
            draw.text((left + CELL // 2, above + CELL + 28), _shorten(captioned.name, plain), fill=MUTED, font=plain, anchor="mm")
        top += rows[title] * cell_height
    return png_bytes(canvas)


def histograms(scores: Mapping[str, Sequence[float]]) -> bytes:
    """How the scores of each rater are spread, side by side, with their mean as a line, PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(0.4 + 4.6 * len(scores), 3.2), dpi=130, facecolor=PAPER, layout="constrained")
    for number, (name, values) in enumerate(scores.items()):
        axes = figure.add_subplot(1, len(scores), number + 1)
        axes.hist(values, bins=max(5, min(40, round(2 * len(values) ** 0.5))), color=COLOURS[number % len(COLOURS)], alpha=0.85)
        axes.axvline(float(np.mean(values)), color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.set_title(name[-40:], fontsize=11, color=INK, loc="left", fontweight="bold")
        axes.set_xlabel(f"score (mean {np.mean(values):.4g}, standard deviation {np.std(values):.4g})", fontsize=9, color=INK)
        axes.set_ylabel("pictures", fontsize=9, color=INK)
        quiet(axes)
    return figure_png(figure)


def _fit(picture: Image.Image) -> Image.Image:
    """At most a cell large. Small pictures are enlarged by a whole factor without smoothing, so that a pixel stays a pixel."""
    longer = max(picture.size)
    if 2 * longer <= CELL:
        factor = CELL // longer
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    scale = min(1.0, CELL / longer)
    return picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))), Image.Resampling.LANCZOS)


def _shorten(name: str, face: ImageFont.FreeTypeFont) -> str:
    """The end of a name, which is what differs, as far as a cell is wide."""
    if face.getlength(name) <= CELL:
        return name
    while name and face.getlength(f"\u2026{name}") > CELL:
        name = name[1:]
    return f"\u2026{name}"
