"""A measurement as one self-contained HTML page, to be attached to the page where a slider is offered."""

import math
from collections.abc import Callable, Sequence
from html import escape

from library.measuring.comparison import Digest, differences, digest, scaled
from library.measuring.findings import along, ends, role_words, summary, warnings_of
from library.measuring.slider_evaluation import SliderEvaluation
from library.measuring.statistics import Interval, Response
from library.reports.plots import DARK, LIGHT, Palette, gain_plot, score_plot, signed
from library.reports.report_page import definitions, details, facts, page, plot, strip, table

STATISTICS = {  # field of PictureStatistics: its name and format
    "pixel_drift": ("distance from base, pixels (RMS, 0 to 1)", ".3f"),
    "latent_drift": ("distance from base, latents (RMS)", ".3f"),
    "perceptual_distance": ("distance from base, as the VAE's encoder sees it", ".3f"),
    "latent_statistics": ("shift of the latents' means and contrasts", ".3f"),
    "clipped": ("pixel values clipped", ".1%"),
    "saturation": ("strength of colours (base = 1)", ".2f"),
    "edges": ("strength of edges (base = 1)", ".2f"),
    "nyquist": ("finest detail (base = 1)", ".2f"),
    "pixel_diversity": ("diversity over seeds, pixels (base = 1)", ".2f"),
    "latent_diversity": ("diversity over seeds, latents (base = 1)", ".2f"),
}


def html_report(evaluations: Sequence[SliderEvaluation], title: str | None = None) -> str:
    """One page with everything in it: no script, nothing loaded from elsewhere; light or dark as the reader's device is.

    Args:
        evaluations: of one slider, or of several to compare, measured at the same multipliers.
        title: None takes the sliders' names.
    """
    heading = title or " and ".join(evaluation.name for evaluation in evaluations)
    first, digests = evaluations[0], [digest(evaluation) for evaluation in evaluations]
    body = [
        f"<h1>{escape(heading)}</h1>",
        '<p class="muted">A slider LoRA made with LECO score: a positive weight raises a score, a negative one lowers it.</p>',
    ]
    plots = ["<h2>Score over weight</h2>", _plots(evaluations, digests)]
    if len(evaluations) == 1:
        body += [_lead(first, digests[0]), "<h2>Same prompt, same seed, other weight</h2>", _pictures(first), *plots]
        return page(heading, [*body, *_sections(first, digests[0])])
    body.append(f'<p class="lead">{escape(_compared(evaluations))}</p>')
    for evaluation in evaluations:
        body.append(f"<h2>{escape(evaluation.name)}: same prompt, same seed, other weight</h2>")
        body.append(_pictures(first) if evaluation is first else details("Show the pictures", _pictures(evaluation)))
    body += [*plots, "<h2>Side by side</h2>", _comparison(evaluations, digests), _differences(evaluations), "<h2>One by one</h2>"]
    for evaluation, found in zip(evaluations, digests, strict=True):
        body.append(details(evaluation.name, "".join([_lead(evaluation, found), *_sections(evaluation, found)])))
    return page(heading, body)


def _lead(evaluation: SliderEvaluation, found: Digest) -> str:
    return f'<p class="lead">{escape(summary(evaluation))}</p>{_facts(evaluation, found)}'


def _compared(evaluations: Sequence[SliderEvaluation]) -> str:
    """Several sliders in a sentence: what each does at its highest weight up to 1."""
    first = evaluations[0]
    words = f"{len(evaluations)} sliders, measured on the same {len(first.prompts)} prompts with {len(first.seeds[0])} seeds each."
    responses, place = scaled(first), ends(first)[1]
    if not responses or not first.multipliers[place]:
        return words
    score = next((response for response in responses if response.role == "judge"), responses[0])
    ranked = sorted(evaluations, key=lambda evaluation: -evaluation.responses[score.name].gains_std[place].value)
    gains = [f"{evaluation.name} {evaluation.responses[score.name].gains_std[place].value:+.2f}" for evaluation in ranked]
    weight = signed(first.multipliers[place])
    return f"{words} At weight {weight} the {role_words(score)} {score.name} moves, in standard deviations: {', '.join(gains)}."


def _sections(evaluation: SliderEvaluation, found: Digest) -> list[str]:
    """All that is told of one slider below its pictures and curves."""
    warnings = "".join(f"<li>{escape(line)}</li>" for line in warnings_of(evaluation))
    return [
        f'<h2>What to know before using it</h2><ul class="warnings">{warnings}</ul>' if warnings else "",
        "<h2>How much the scores move</h2>",
        _gains_table(evaluation),
        "<h2>What else changes</h2>",
        _statistics_table(evaluation),
        "<h2>Which weight to use</h2>",
        _advice(found),
        "<h2>How it was made and measured</h2>",
        _settings(evaluation),
    ]


def _facts(evaluation: SliderEvaluation, found: Digest) -> str:
    entries = []
    if found.line is not None:
        recommended = "none" if found.recommended is None else signed(found.recommended)
        low, high = map(signed, found.line.usable)
        entries = [(recommended, "recommended weight"), ("none" if low == high else f"{low} to {high}", "usable weights")]
        entries.append((f"{found.line.slope.value:+.2f}", "standard deviations per weight"))
    if found.hack_index is not None:
        entries.append((f"{max(0.0, found.hack_index):.0%}", "of the gain not seen by the judges"))
    return facts([*entries, (f"{len(evaluation.prompts)} \u00d7 {len(evaluation.seeds[0])}", "prompts \u00d7 seeds")])


def _pictures(evaluation: SliderEvaluation) -> str:
    captions = [signed(weight) if weight else "0 (base)" for weight in evaluation.multipliers]
    rows = []
    for prompt, seeds, pictures in zip(evaluation.prompts, evaluation.seeds, evaluation.pictures, strict=False):
        line = f'<p class="prompt">{escape(prompt)} <span class="muted">seed {seeds[0]}</span></p>'
        rows.append(line + strip(pictures, captions, prompt, evaluation.multipliers.index(0)))
    return "".join(rows)


def _plots(evaluations: Sequence[SliderEvaluation], digests: Sequence[Digest]) -> str:
    """One slider: its scores on one scale, then those that have another. Several: a plot a score."""
    first, draw = evaluations[0], []
    names = list(first.responses)
    if len(evaluations) == 1 and scaled(first):
        line = digests[0].line
        usable = line.usable if line is not None else (0.0, 0.0)
        draw.append(_twice(lambda palette: gain_plot(first, usable, palette), "Gain of every score over the weight."))
        names = [name for name in names if name not in {response.name for response in scaled(first)}]
    draw += [_twice(lambda palette, name=name: score_plot(evaluations, name, palette), f"Mean {name} over the weight.") for name in names]
    note = "Bands are 95 % intervals of the change from the base model (broken line), seed by seed."
    return f'<div class="plots">{"".join(draw)}</div><p class="muted">{note}</p>'


def _twice(draw: Callable[[Palette], bytes], description: str) -> str:
    return plot(draw(LIGHT), draw(DARK), description)


def _comparison(evaluations: Sequence[SliderEvaluation], digests: Sequence[Digest]) -> str:
    first = evaluations[0]
    places = [place for place in reversed(ends(first)) if first.multipliers[place]]
    columns = [(response.name, place) for response in scaled(first) for place in places]
    header = ["slider", *(f"{_column_name(first.responses[name])} at {signed(first.multipliers[place])}" for name, place in columns)]
    header += ["R\u00b2", "usable", "not seen by judges", "drift", "diversity"]
    rows = []
    for evaluation, found in zip(evaluations, digests, strict=True):
        cells = [f"<b>{escape(evaluation.name)}</b>"]
        cells += [_interval_cell(evaluation.responses[name].gains_std[place]) for name, place in columns]
        line, far = found.line, max(places, key=lambda place: abs(first.multipliers[place]))
        cells += ["" if line is None else f"{line.r2:.3f}", "" if line is None else " to ".join(map(signed, line.usable))]
        cells.append("" if found.hack_index is None else f"{found.hack_index:.0%}")
        cells += [f"{evaluation.statistics.pixel_drift[far]:.3f}", f"{evaluation.statistics.pixel_diversity[far]:.2f}"]
        rows.append(cells)
    return table(header, rows, "Gains in standard deviations of the base model's score over seeds of one prompt, with 95 % intervals.")


def _column_name(response: Response) -> str:
    """Short enough for a column: of a function its own name."""
    return response.name if response.role == "scorer" else f"judge {response.name.rpartition(':')[2]}"


def _differences(evaluations: Sequence[SliderEvaluation]) -> str:
    first = evaluations[0]
    places = [place for place, weight in enumerate(first.multipliers) if weight]
    rows = [
        [f"<b>{escape(name)}</b><small>{escape(score)}</small>", *(_interval_cell(row[place], significant=True) for place in places)]
        for name, found in differences(evaluations).items()
        for score, row in found.items()
    ]
    note = f"Gain minus that of {first.name} on the same prompts and seeds, in standard deviations; bold where the interval leaves out 0."
    return table(["more than the first", *(signed(first.multipliers[place]) for place in places)], rows, note) if rows else ""


def _interval_cell(gain: Interval, significant: bool = False) -> str:
    value = f"{gain.value:+.2f}"
    value = f"<b>{value}</b>" if significant and gain.low * gain.high > 0 else value
    return f"{value}<small>[{gain.low:+.2f}, {gain.high:+.2f}]</small>"


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
    return table(["weight", *map(signed, evaluation.multipliers)], rows, note)


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
    rows = []
    for field, (name, form) in STATISTICS.items():
        values = getattr(evaluation.statistics, field)
        if values:
            rows.append([name, *("" if math.isnan(value) else format(value, form) for value in values)])
    return table(["weight", *map(signed, evaluation.multipliers)], rows)


def _advice(found: Digest) -> str:
    line = found.line
    if line is None:
        return f"<p>{escape(found.score)} does not vary without the slider, so nothing can be said about weights.</p>"
    if found.recommended is None:
        return "<p>No positive weight is usable.</p>"
    interval = f"{line.slope.low:.2f} to {line.slope.high:.2f}"
    words = (
        f"Begin with weight {signed(found.recommended)}. The slider is {line.usable_words}: so far the score rises with every step, keeps "
        f"at least half of its effect per weight, and the pictures do not burn out. {found.score} moves by {line.slope.value:.2f} "
        f"standard deviations per unit of weight ({interval}); a straight line explains {line.r2:.1%} of its curve."
    )
    return f"<p>{escape(words)}</p>"


def _settings(evaluation: SliderEvaluation) -> str:
    made = [(f"{key} (from the file)", value) for key, value in evaluation.origin.items()]
    measured = {"prompts": len(evaluation.prompts), "pairs of prompt and seed": evaluation.num_pairs, **evaluation.settings}
    prompts = "<ol>" + "".join(f"<li>{escape(prompt)}</li>" for prompt in evaluation.prompts) + "</ol>"
    return definitions([*made, *measured.items()]) + details("All prompts", prompts)


def _shape_words(response: Response) -> str:
    line = "" if math.isnan(response.r2) else f", straight line R\u00b2 {response.r2:.2f}"
    return ("rises throughout" if response.monotone else "does not rise throughout") + line
