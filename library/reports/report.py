"""Evaluation records as one self-contained HTML page, to be attached to the page where a slider is offered. The page is in templates/."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np
from PIL import Image
from torch import Tensor

from library.measuring.comparison import Summary, differences, summarise
from library.measuring.record import EvaluationRecord
from library.measuring.warnings import SliderWarning, final_warnings
from library.reports.plots import DARK, LIGHT, data_url, jpeg_url, png_bytes, record_plots, signed
from library.reports.text import role_words, summary_sentence

STATISTICS = {  # of a record: name and format
    "pixel_drift": ("distance from base, pixels (RMS, 0 to 1)", ".3f"),
    "latent_drift": ("distance from base, latents (RMS)", ".3f"),
    "perceptual_distance": ("distance from base, as the VAE's encoder sees it", ".3f"),
    "latent_statistics": ("shift of the latents' means and contrasts", ".3f"),
    "clipped": ("pixel values clipped", ".1%"),
    "saturation": ("strength of colours (base = 1)", ".2f"),
    "edges": ("strength of edges (base = 1)", ".2f"),
    "nyquist": ("finest detail, pixels (base = 1)", ".2f"),
    "latent_nyquist": ("finest detail, latents (base = 1)", ".2f"),
    "pixel_diversity": ("diversity over seeds, pixels (base = 1)", ".2f"),
    "latent_diversity": ("diversity over seeds, latents (base = 1)", ".2f"),
}
SMALL = 128  # pixels: pictures up to this longer side are kept as they are and enlarged without smoothing
LARGE = 512  # pixels: larger ones are shrunk to this
QUALITY = 88  # of the JPEGs


@dataclass(frozen=True)
class _View:
    """What the page shows of one record."""

    record: EvaluationRecord
    summary: Summary
    sentence: str
    warnings: list[SliderWarning]
    pictures: list[dict[str, object]]
    statistics: list[dict[str, object]]


def html_report(records: Sequence[EvaluationRecord], title: str | None = None) -> str:
    """One page with everything in it: no script, nothing loaded from elsewhere; light or dark as the reader's device is.

    Args:
        records: of one slider, or of several to compare, measured at the same multipliers.
        title: None takes the sliders' names.
    """
    loader = jinja2.FileSystemLoader(Path(__file__).with_name("templates"))
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {"signed": signed, "role": role_words, "percent": "{:.0%}".format}
    views, plots = [_view(record) for record in records], record_plots(records).items()
    return environment.get_template("report.html.j2").render(
        heading=title or " and ".join(record.name for record in records),
        views=views,
        plots=[{"light": data_url("png", draw(LIGHT)), "dark": data_url("png", draw(DARK)), "description": words} for words, draw in plots],
        ranking=_ranking(records),
        differences=differences(records),
    )


def _view(record: EvaluationRecord) -> _View:
    rows = []
    for name, (words, form) in STATISTICS.items():
        values = record.statistics.get(name, ())
        if values:
            rows.append({"name": words, "cells": ["" if math.isnan(value) else format(value, form) for value in values]})
    return _View(record, summarise(record), summary_sentence(record), final_warnings(record), _pictures(record), rows)


def _pictures(record: EvaluationRecord) -> list[dict[str, object]]:
    """A row a prompt, with a picture a weight."""
    captions = [signed(weight) if weight else "0 (base)" for weight in record.multipliers]
    rows = []
    for prompt, seeds, pictures in zip(record.prompts, record.seeds, record.pictures, strict=False):
        shown = [
            {"uri": _picture_uri(picture), "small": max(picture.shape[-2:]) <= SMALL, "base": place == record.base, "caption": caption}
            for place, (picture, caption) in enumerate(zip(pictures, captions, strict=True))
        ]
        rows.append({"prompt": prompt, "seed": seeds[0], "pictures": shown})
    return rows


def _ranking(records: Sequence[EvaluationRecord]) -> dict[str, object] | None:
    """The sliders by what the first judge (or training score) gains at the highest weight up to 1."""
    first = records[0]
    scores, place = [*first.judges, *first.scaled], first.ends[0]
    if not scores or place < first.base:
        return None
    gains = [(record.name, record.responses[scores[0].name].gains_std[place].value) for record in records]
    return {"score": scores[0], "gains": sorted(gains, key=lambda gain: -gain[1])}


def _picture_uri(picture: Tensor) -> str:
    """PNG where it is small, so that a pixel stays a pixel; else JPEG."""
    image = Image.fromarray(np.ascontiguousarray(picture.permute(1, 2, 0).cpu().numpy()))
    return data_url("png", png_bytes(image)) if max(image.size) <= SMALL else jpeg_url(image, LARGE, QUALITY)
