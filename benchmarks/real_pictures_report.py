"""The numbers of benchmarks.real_pictures as Markdown."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; numbers are written with three decimals."""
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in rows:
        lines.append(f"| {' | '.join(f'{cell:.3f}' if isinstance(cell, float) else str(cell) for cell in row)} |")
    return "\n".join(lines)


def markdown(results: Mapping[str, Any]) -> str:
    """The tables of what was measured so far, each with a sentence on what it shows."""
    parts = {"subjects": _subjects, "distortions": _distortions, "distilled": _distilled, "same content": _same_content}
    paragraphs = _pictures(results)
    for name, write in parts.items():
        if name in results:
            paragraphs += write(results)
    return "\n\n".join(paragraphs) + "\n"


def _networks(results: Mapping[str, Any], stage: str) -> list[Mapping[str, Any]]:
    """The stage's own network and those that it is compared with."""
    return [part for name, part in results.items() if name.partition(",")[0] == stage]


def _pictures(results: Mapping[str, Any]) -> list[str]:
    vae = results["vae"]
    psnr = "; ".join(
        f"{vae[name]['pictures']} {name}: " + ", ".join(f"{value:.1f} dB at {size} pixels" for size, value in vae[name]["psnr"].items())
        for name in ("photographs", "drawings")
    )
    return [
        "# Real pictures",
        "Made by `python -m benchmarks.real_pictures`; what is measured, and on what, is in its docstring and in "
        f"`benchmarks/package_pictures.py`. Every training has batches of {results['batch_size']} pictures and one core; one run each.",
        f"The VAE has {vae['parameters'] / 1e6:.1f} M parameters and was trained for {vae['steps']} steps "
        f"({vae['cpu_minutes']:.0f} minutes on one core). PSNR on pictures that it never saw: {psnr}.",
    ]


def _subjects(results: Mapping[str, Any]) -> list[str]:
    part = results["subjects"]
    rows = [
        (row["network"], f"{row['parameters'] / 1e6:.1f} M", row["steps"], row["top1"], row["top5"], f"{row['seconds']:.0f}")
        for row in _networks(results, "subjects")
    ]
    return [
        "## Subjects of clip-art",
        f"{part['classes']} classes, {part['train']} drawings to train with, {part['tested']} never seen; always saying the most frequent "
        f"class is right for {part['most frequent class']:.1%}. All are trained on clean pictures only; the CPU seconds of `latent_resnet` "
        "are those of the whole script, with reading and encoding the pictures and validating.",
        table(["network", "parameters", "steps", "top-1", "top-5", "CPU seconds"], rows),
    ]


def _distortions(results: Mapping[str, Any]) -> list[str]:
    part = results["distortions"]
    kinds = ("blur", "jpeg", "noise", "exposure")
    rows = [
        (row["network"], f"{row['parameters'] / 1e6:.1f} M", row["steps"], *(row["srcc"][kind] for kind in kinds), f"{row['seconds']:.0f}")
        for row in _networks(results, "distortions")
    ]
    return [
        "## How much a photograph was made worse",
        f"SRCC with the strength; {part['train']} cuts to train with, {part['test']} cuts of {part['test'] // 8} photographs never seen. "
        "One backbone, an output for each kind. The cuts were distorted at half their size and then doubled: this VAE hides finer detail.",
        table(["network", "parameters", "steps", *kinds, "CPU seconds"], rows),
    ]


def _sigmas(rows: Sequence[Mapping[str, float]], metric: str) -> str:
    return table(["sigma", *(f"{row['sigma']:g}" for row in rows)], [[metric.upper(), *(row[metric] for row in rows)]])


def _distilled(results: Mapping[str, Any]) -> list[str]:
    part = results["distilled"]
    rows = [(f"scorer, {name}", part[name]["test"], part[name]["srcc"]) for name in ("cuts", "whole photographs")]
    if left := results.get("distilled, left by the VAE"):
        rows.append(("the function itself, on what the VAE makes of the cuts", left["test"], left["srcc"]))
    buckets = [(size, row["test"], row["srcc"], row["mean error"]) for size, row in part["by bucket"].items()]
    return [
        "## An opinion distilled: colourfulness",
        f"A function of pixels labels {part['train']} cuts (`tools/score_images.py --judge`), and the table is what "
        f"`train_latent_scorer.py` learns from, here in {part['steps']} steps. SRCC with the function on photographs never seen:",
        table(["who, on what", "test", "SRCC"], rows),
        "The same cuts by their bucket; the mean error, in standard deviations of the score, says whether a bucket is favoured:",
        table(["bucket", "test", "SRCC", "mean error"], buckets),
        _sigmas(part["by sigma, validation"], "srcc"),
    ]


def _same_content(results: Mapping[str, Any]) -> list[str]:
    part = results["same content"]
    rows = [
        (what, name, row["mean |difference|"], row["mean difference"], row["srcc"])
        for what, columns in part.items()
        if isinstance(columns, dict)
        for name, row in columns.items()
    ]
    return [
        "## One content in several buckets",
        f"The middles of {part['pictures']} photographs never seen, at other sizes, and at 96x96 on other canvases that continue them by "
        "their mirror image; always against the score at 128x128, in standard deviations of the score. What the function of pixels itself "
        "says of these pictures is beside it. Training saw areas of 128x128 only.",
        table(["what, who", "size", "mean abs. difference", "mean difference", "SRCC"], rows),
    ]
