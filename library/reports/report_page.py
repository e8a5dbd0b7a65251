"""The parts that a report page is made of: style, tables, pictures. Text is escaped here, except where an argument is said to be HTML."""

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape

import numpy as np
from PIL import Image
from torch import Tensor

SMALL = 128  # pixels: pictures up to this longer side are kept as they are and enlarged without smoothing
LARGE = 512  # pixels: larger ones are shrunk to this
QUALITY = 88  # of the JPEGs

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""

STYLE = """
:root { color-scheme: light dark; --ink: #1f2937; --muted: #6b7280; --paper: #ffffff; --panel: #f3f5f8; --rule: #e2e5ea;
  --good: #047857; --bad: #b91c1c; --warn: #fff7e6; --warn-rule: #f59e0b; --accent: #2563eb; }
@media (prefers-color-scheme: dark) { :root { --ink: #e5e7eb; --muted: #9ca3af; --paper: #14171c; --panel: #1d2128; --rule: #333943;
  --good: #34d399; --bad: #f87171; --warn: #33290f; --warn-rule: #d97706; --accent: #7aa7ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 66rem; padding: 1.5rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; overflow-wrap: anywhere; }
.muted { color: var(--muted); font-size: .875rem; }
.lead { font-size: 1.1rem; margin: 1rem 0; }
.facts { display: flex; flex-wrap: wrap; gap: .6rem; margin: 1rem 0; padding: 0; list-style: none; }
.facts li { background: var(--panel); border-radius: 8px; padding: .45rem .8rem; }
.facts b { display: block; font-size: 1.15rem; font-variant-numeric: tabular-nums; }
.facts span { color: var(--muted); font-size: .8rem; }
.warnings { background: var(--warn); border-left: 4px solid var(--warn-rule); border-radius: 4px; padding: .6rem 1rem .6rem 2rem; }
.prompt { margin: 1.1rem 0 .35rem; font-size: .925rem; }
.strip { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(6.5rem, 1fr); gap: .35rem; overflow-x: auto; }
.strip figure { margin: 0; }
.strip img { display: block; width: 100%; height: auto; border-radius: 4px; }
.strip img.small { image-rendering: pixelated; }
.strip figcaption { text-align: center; font-size: .8rem; color: var(--muted); font-variant-numeric: tabular-nums; }
.strip .base { outline: 2px solid var(--accent); outline-offset: -2px; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: .8rem; }
.plots img { display: block; width: 100%; height: auto; border: 1px solid var(--rule); border-radius: 8px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .925rem; }
th, td { padding: .45rem .6rem; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap; vertical-align: top; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 8.5rem; overflow-wrap: anywhere; }
thead th { color: var(--muted); font-weight: 600; white-space: normal; vertical-align: bottom; min-width: 4.5rem; }
td small { display: block; color: var(--muted); font-size: .75rem; }
.good { color: var(--good); } .bad { color: var(--bad); }
dl { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: .2rem 1rem; font-size: .925rem; }
dt { color: var(--muted); } dd { margin: 0; overflow-wrap: anywhere; }
summary { cursor: pointer; color: var(--accent); margin: .6rem 0; overflow-wrap: anywhere; }
"""


def page(title: str, body: Sequence[str]) -> str:
    """A whole page. `body` is HTML."""
    return PAGE.format(title=escape(title), style=STYLE, body="\n".join(body))


def table(header: Sequence[str], rows: Iterable[Sequence[str]], note: str = "") -> str:
    """`rows` are HTML."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    below = f'<p class="muted">{escape(note)}</p>' if note else ""
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{below}'


def details(summary: str, body: str) -> str:
    """What is folded away until somebody asks for it. `body` is HTML."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def definitions(entries: Iterable[tuple[str, object]]) -> str:
    return "<dl>" + "".join(f"<dt>{escape(key)}</dt><dd>{escape(str(value))}</dd>" for key, value in entries) + "</dl>"


def facts(entries: Iterable[tuple[str, str]]) -> str:
    """Figures in boxes: the figure and what it is."""
    return (
        '<ul class="facts">' + "".join(f"<li><b>{escape(figure)}</b><span>{escape(what)}</span></li>" for figure, what in entries) + "</ul>"
    )


def plot(light: bytes, dark: bytes, description: str) -> str:
    """A PNG for light pages and one for dark pages."""
    source = f'<source media="(prefers-color-scheme: dark)" srcset="{_png_uri(dark)}">'
    return f'<picture>{source}<img alt="{escape(description)}" src="{_png_uri(light)}"></picture>'


def strip(pictures: Tensor, captions: Sequence[str], description: str, base: int) -> str:
    """A row of pictures uint8 [M, 3, H, W] with a caption each; the one at `base` is framed."""
    figures = []
    for place, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        kinds = " ".join(["small"] * (max(picture.shape[-2:]) <= SMALL) + ["base"] * (place == base))
        alt = escape(f"{description}, {caption}")
        figures.append(
            f'<figure><img class="{kinds}" alt="{alt}" src="{_picture_uri(picture)}"><figcaption>{escape(caption)}</figcaption></figure>'
        )
    return f'<div class="strip">{"".join(figures)}</div>'


def _picture_uri(picture: Tensor) -> str:
    """PNG where it is small, so that a pixel stays a pixel; else JPEG."""
    image = Image.fromarray(np.ascontiguousarray(picture.permute(1, 2, 0).cpu().numpy()))
    buffer = io.BytesIO()
    if max(image.size) <= SMALL:
        image.save(buffer, format="png")
        return _png_uri(buffer.getvalue())
    image.thumbnail((LARGE, LARGE), Image.Resampling.LANCZOS)
    image.save(buffer, format="jpeg", quality=QUALITY)
    return _uri("jpeg", buffer.getvalue())


def _png_uri(content: bytes) -> str:
    return _uri("png", content)


def _uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
