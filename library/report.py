"""A measurement as one self-contained HTML page."""

import base64
import math
from collections.abc import Iterable, Sequence
from html import escape

from library.findings import along, role_words, summary, warnings_of
from library.plots import signed
from library.slider_evaluation import SliderEvaluation
from library.statistics import Response

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
:root { color-scheme: light dark; --ink: #1f2937; --muted: #6b7280; --paper: #ffffff; --panel: #f6f7f9; --rule: #e2e5ea;
  --good: #047857; --bad: #b91c1c; --warn: #fff7e6; --warn-rule: #f59e0b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e5e7eb; --muted: #9ca3af; --paper: #14171c; --panel: #1d2128; --rule: #333943;
  --good: #34d399; --bad: #f87171; --warn: #33290f; --warn-rule: #d97706; } }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
.muted, caption { color: var(--muted); font-size: .875rem; }
.lead { font-size: 1.1rem; margin: 1rem 0; }
.warnings { background: var(--warn); border-left: 4px solid var(--warn-rule); border-radius: 4px; padding: .6rem 1rem .6rem 2rem; }
figure { margin: 0; background: #fff; border: 1px solid var(--rule); border-radius: 8px; padding: .6rem; overflow-x: auto; }
figure img { display: block; width: max(100%, 40rem); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .925rem; }
caption { caption-side: bottom; text-align: left; padding-top: .5rem; }
th, td { padding: .45rem .6rem; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 9rem; overflow-wrap: anywhere; }
thead th { color: var(--muted); font-weight: 600; }
td small { display: block; color: var(--muted); font-size: .75rem; }
.good { color: var(--good); } .bad { color: var(--bad); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; font-size: .925rem; }
dt { color: var(--muted); } dd { margin: 0; overflow-wrap: anywhere; }
"""


def html_report(evaluations: Sequence[SliderEvaluation], curve: bytes, grids: Sequence[bytes], title: str | None = None) -> str:
    """One page with everything in it: no script, nothing loaded from elsewhere.

    Args:
        evaluations: of one slider, or of several to compare.
        curve: PNG of all of them. grids: PNG of each.
        title: None takes the sliders' names.
    """
    heading = title or " and ".join(evaluation.name for evaluation in evaluations)
    body = [
        f"<h1>{escape(heading)}</h1>",
        '<p class="muted">A slider LoRA made with LECO score: a positive weight raises a score, a negative one lowers it.</p>',
        *(section for evaluation in evaluations for section in _findings(evaluation, len(evaluations) > 1)),
        "<h2>Score over weight</h2>",
        _figure(curve, "Mean score over the LoRA weight, one panel for each score."),
        '<p class="muted">Bands are 95 % intervals of the change from the base model (broken line), seed by seed.</p>',
    ]
    for evaluation, grid in zip(evaluations, grids, strict=True):
        suffix = f": {escape(evaluation.name)}" if len(evaluations) > 1 else ""
        body += [
            f"<h2>Same prompt, same seed, other weight{suffix}</h2>",
            _figure(grid, "Rows are prompts, columns are LoRA weights."),
            f"<h2>How much the scores move{suffix}</h2>",
            _gains_table(evaluation),
            f"<h2>What else changes{suffix}</h2>",
            _statistics_table(evaluation),
            f"<h2>How it was measured{suffix}</h2>",
            _settings(evaluation),
        ]
    return PAGE.format(title=escape(heading), style=STYLE, body="\n".join(body))


def _findings(evaluation: SliderEvaluation, named: bool) -> list[str]:
    lines = [f"<h2>{escape(evaluation.name)}</h2>"] if named else []
    lines.append(f'<p class="lead">{escape(summary(evaluation))}</p>')
    if warnings := warnings_of(evaluation):
        lines.append('<ul class="warnings">' + "".join(f"<li>{escape(line)}</li>" for line in warnings) + "</ul>")
    return lines


def _gains_table(evaluation: SliderEvaluation) -> str:
    rows = []
    for response in evaluation.responses.values():
        shape = "share of pictures" if response.is_share else f"{_shape_words(response)}; 1 std = {response.std:.3g}"
        label = f"<b>{escape(response.name)}</b><small>{role_words(response)}</small><small>{shape}</small>"
        rows.append([label, *(_gain_cell(evaluation, response, place) for place in range(len(evaluation.multipliers)))])
    note = (
        "Large figures: mean change in standard deviations (std) of the base model's score over seeds of one prompt, with 95 % bootstrap "
        "intervals; then the mean score itself and the share of pairs that moved the way the weight says. "
        "Yes-or-no judges show the share of pictures."
    )
    return _table(["weight", *map(signed, evaluation.multipliers)], rows, note)


def _gain_cell(evaluation: SliderEvaluation, response: Response, place: int) -> str:
    base, gain, mean = evaluation.multipliers.index(0), response.gains_std[place], response.means[place]
    if response.is_share or response.std == 0:
        return f"{mean.value:.4g}<small>[{mean.low:.4g}, {mean.high:.4g}]</small>"
    if place == base:
        return f"0<small>mean {mean.value:.4g}</small>"
    way = along(response, place, base)
    mark = "good" if way.low > 0 else "bad" if way.high < 0 else ""
    return (
        f'<span class="{mark}">{gain.value:+.2f}</span><small>[{gain.low:+.2f}, {gain.high:+.2f}]</small>'
        f"<small>mean {mean.value:.4g}</small><small>{response.moved[place]:.0%} of pairs</small>"
    )


def _statistics_table(evaluation: SliderEvaluation) -> str:
    statistics = evaluation.statistics
    rows = [
        ["distance from base, pixels (RMS, 0 to 1)", *(f"{value:.3f}" for value in statistics.pixel_drift)],
        ["distance from base, latents (RMS)", *(f"{value:.3f}" for value in statistics.latent_drift)],
        ["pixel values clipped", *(f"{value:.1%}" for value in statistics.clipped)],
        ["diversity over seeds, pixels (base = 1)", *(f"{value:.2f}" for value in statistics.pixel_diversity)],
        ["diversity over seeds, latents (base = 1)", *(f"{value:.2f}" for value in statistics.latent_diversity)],
    ]
    return _table(["weight", *map(signed, evaluation.multipliers)], rows)


def _settings(evaluation: SliderEvaluation) -> str:
    pairs = {"prompts": len(evaluation.prompts), "pairs of prompt and seed": evaluation.num_pairs, **evaluation.settings}
    entries = "".join(f"<dt>{escape(str(key))}</dt><dd>{escape(str(value))}</dd>" for key, value in pairs.items())
    prompts = "".join(f"<li>{escape(prompt)}</li>" for prompt in evaluation.prompts)
    return f"<dl>{entries}</dl><details><summary>All prompts</summary><ol>{prompts}</ol></details>"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "") -> str:
    """Header and caption are escaped here, cells are HTML."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    note = f'<p class="muted">{escape(caption)}</p>' if caption else ""
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{note}'


def _figure(png: bytes, description: str) -> str:
    data = base64.b64encode(png).decode("ascii")
    return f'<figure><img alt="{escape(description)}" src="data:image/png;base64,{data}"></figure>'


def _shape_words(response: Response) -> str:
    line = "" if math.isnan(response.r2) else f", straight line R\u00b2 {response.r2:.2f}"
    return ("rises throughout" if response.monotone else "does not rise throughout") + line
