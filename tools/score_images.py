"""Score a folder of pictures: by a latent scorer, or by anything else that can be asked.

    python tools/score_images.py --images photos --scorer scorer.safetensors --pretrained_model_name_or_path sd15.safetensors
    python tools/score_images.py --images photos --judge my_judges.py:sharpness
    python tools/score_images.py --images photos --command "my_program --rate {image}"

Writes scores.csv (path, score and, where the scorer states one, its uncertainty), a sheet of the best and the worst pictures, and a
histogram. The CSV is what train_latent_scorer.py takes as train_data_file: any opinion can be distilled into a latent scorer
(docs/distilling.md). Several raters at once get a column each; the score is the first one's. Pictures that cannot be scored are
reported and left out.
"""

import csv
import io
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, so that the script runs from anywhere

from library.settings.start_up import before_torch

if __name__ == "__main__":
    before_torch()

import numpy as np
import torch
from tqdm import tqdm

from library.atomic_files import atomic_write_bytes, atomic_write_text, remove_unfinished
from library.errors import UserError
from library.models.loading import load_model, load_vae
from library.models.registry import FAMILIES
from library.models.vae import VaeFingerprint, place_vae
from library.reports.contact_sheet import CaptionedPicture, contact_sheet, histograms
from library.scorer_data.buckets import BucketConfig
from library.scorer_data.pictures import read_picture
from library.scorer_data.readers.base import ReaderOptions, split_name
from library.scorer_data.readers.files import PictureFiles, own_folder, pictures_below
from library.scorer_data.readers.recognition import read_records
from library.scorer_data.readers.rows import ROW_FORMATS, Row, read_rows, records_of
from library.scorer_data.readers.tables import path_text
from library.scorer_data.records import FilePicture, RatedImage, Skipped, SkipReport
from library.scorer_training.criteria.metrics import spearman
from library.scorers.image_models.base import build_image_model, read_image_model
from library.scorers.io import check_scorer_fits, load_scorer
from library.scorers.judges import Judge, load_judge
from library.scorers.program_raters import CommandRater, TableRater
from library.scorers.raters import JudgeRater, LatentRater, Rater, RaterResult, RaterScore
from library.settings.cli import parse_config, run_main
from library.settings.options import check_above, check_at_least, check_not_set, option
from library.training.output_files import check_outputs
from library.training.runtime import set_num_threads

THUMBNAIL = 512  # pixels of a picture on the sheet before it is fitted into its cell


@dataclass(frozen=True, kw_only=True)
class ScoringConfig:
    """Which pictures, who scores them, and where the results go."""

    images: Path | None = option(None, help="Folder, searched with its subfolders; a table with path[, prompt, split]; or a rated source.")
    reader: str | None = option(None, help="Reader of a rated source, such as webdataset; its own scores are compared with.")
    image_dir: Path | None = option(None, help="What the paths in a table are relative to; not set: its own folder.")
    scorer: tuple[Path, ...] = option((), help="Scorer files that train_latent_scorer.py wrote.")
    allow_code: tuple[str, ...] = option(
        (), help="Code that scorer files may run, as they ask for it, such as my_scorer.py:score.", only_with="scorer"
    )
    judge: tuple[str, ...] = option((), help="Functions of pixels in 0..1: package.module:function or file.py:function.")
    image_model: tuple[str, ...] = option(
        (), help="Ready-made image scorers, such as laion_v2:FILE or pyiqa:musiq (docs/pixel_scorers.md)."
    )
    command: tuple[str, ...] = option((), help='Programs: "prog {image}" prints a score a picture; "prog" reads paths, prints scores.')
    command_timeout: float | None = option(None, help="Seconds that a command may take for a picture; not set: 60.")
    scores_csv: tuple[Path, ...] = option((), help="Tables that another program wrote, with path and score.")
    scores_csv_path_column: str | None = option(None, help="Name of their column of paths; not set: path.")
    scores_csv_score_column: str | None = option(None, help="Name of their column of scores; not set: score.")
    pretrained_model_name_or_path: str | None = option(
        None, help="Model whose latents scorers read; only its VAE, unless they use prompts."
    )
    vae: Path | None = option(None, help="VAE file or folder to use in place of the model's own; enough by itself.")
    model_family: str = option(
        "auto", choices=("auto", *FAMILIES), help="Kind of model; needed for a file with only a VAE.", only_with="scorer"
    )
    sigma: float | None = option(None, help="Noise level at which scorers are asked; not set: 0, which is clean.")
    seed: int | None = option(None, help="Seed of the noise; not set: 0.")
    batch_size: int = option(8, help="Pictures of one size scored together.", only_with=("scorer", "judge", "image_model"))
    num_shown: int = option(16, help="How many of the best, and of the worst, are on the sheet.")
    num_threads: int | None = option(None, help="CPU threads for torch; not set: the cores that this process may use.")
    output_dir: Path = option(Path("scores"), help="Folder for the results.")

    def __post_init__(self) -> None:
        if self.images is None:
            raise UserError("images is not set; give a folder of pictures, or a table of their paths")
        if not (self.scorer or self.judge or self.image_model or self.command or self.scores_csv):
            raise UserError("nothing scores the pictures; give scorer, judge, image_model, command or scores_csv")
        if self.scorer and self.vae is None and self.pretrained_model_name_or_path is None:
            raise UserError("a scorer reads latents; give their model by pretrained_model_name_or_path, or its VAE by vae")
        if not self.scorer:
            check_not_set(self, "no scorer is given", "pretrained_model_name_or_path", "vae", "sigma")
        if not self.sigma:
            check_not_set(self, "no noise is added at sigma 0", "seed")
        if not self.command:
            check_not_set(self, "no command is given", "command_timeout")
        if not self.scores_csv:
            check_not_set(self, "no scores_csv is given", "scores_csv_path_column", "scores_csv_score_column")
        check_at_least(self, 0, "sigma", "seed")
        check_at_least(self, 1, "batch_size", "num_shown", "num_threads")
        check_above(self, 0, "command_timeout")


@dataclass(frozen=True, kw_only=True)
class ScoreImagesConfig:
    scoring: ScoringConfig
    buckets: BucketConfig

    def __post_init__(self) -> None:
        changed = [name for name, value in vars(BucketConfig()).items() if getattr(self.buckets, name) != value]
        if changed and not self.scoring.scorer:
            raise UserError(f"{changed[0]} is set, but no scorer is given, and all others see whole pictures; leave it out")


def main() -> None:
    config = parse_config(ScoreImagesConfig, description="Score a folder of pictures.")
    settings = config.scoring
    set_num_threads(settings.num_threads)
    assert settings.images is not None
    skipped = SkipReport()
    images = []
    for found in find_pictures(settings.images, settings.reader, settings.image_dir):
        if isinstance(found, Skipped):
            skipped.add(found)
        else:
            images.append(found)
    if not images:
        raise UserError(f"there are no pictures at {settings.images}" + (f": {skipped.first()}" if skipped else ""))
    raters = make_raters(settings, config.buckets, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    check_outputs(*(settings.output_dir / name for name in ("scores.csv", "histogram.png")))
    remove_unfinished(settings.output_dir, r".+\.(png|json|html|csv)")

    outcomes: dict[str, list[RaterResult]] = {}
    for rater in raters:
        with tqdm(total=len(images), desc=f"scoring by {rater.name}", unit="picture") as progress:
            outcomes[rater.name] = rater.rate(images, progress.update)
        for outcome in outcomes[rater.name]:
            if isinstance(outcome, Skipped):
                skipped.add(outcome)
        if not any(isinstance(outcome, RaterScore) for outcome in outcomes[rater.name]):
            raise UserError(f"{rater.name} could score none of {len(images)} pictures: {skipped.first()}")
    paths = write_results(settings.output_dir, images, outcomes, settings.num_shown)
    print(summary(images, outcomes))
    if skipped:
        print(skipped)
    print("\n" + "\n".join(map(str, paths)))


def find_pictures(source: Path, reader: str | None, image_dir: Path | None) -> Iterator[RatedImage | Skipped]:
    """The pictures of a folder, of a table of paths, or of a source that a reader knows. Raises UserError if there is no such source."""
    if reader or (source.suffix.lower() not in ROW_FORMATS and not source.is_dir()):
        if not source.exists():
            raise UserError(f"there is no folder or file {source}")
        for record in read_records(source, reader or "auto", ReaderOptions(image_dir=image_dir)):
            yield record if isinstance(record, RatedImage | Skipped) else Skipped(f"{record.where}: this is a pair", "row is a pair")
    elif source.is_dir():
        if image_dir is not None:
            raise UserError(f"image_dir is set, but the pictures are those of the folder {source}; leave it out")
        tally, root = SkipReport(), os.path.abspath(source)
        for name in pictures_below(Path(root), tally):
            yield RatedImage(picture=FilePicture(os.path.join(root, name)), name=name, where=str(source))
        yield from tally.skipped()
    else:
        files = PictureFiles(image_dir or own_folder(source))

        def image(row: Row) -> RatedImage:
            name = path_text(row.get("path"))
            picture, split = files.find(name), split_name(row.get("split"))
            return RatedImage(picture=picture, name=name, where=row.where, prompt=str(row.get("prompt") or ""), split=split)

        yield from records_of(read_rows(source, [("path",)], ["path", "prompt", "split", "score"]), image)


def make_raters(settings: ScoringConfig, buckets: BucketConfig, device: torch.device) -> list[Rater]:
    """Everything that scores, with names of their own. Raises UserError for a scorer of another VAE, and for what cannot be loaded."""
    raters: list[Rater] = []
    scorers = [load_scorer(path, settings.allow_code).to(device) for path in settings.scorer]
    if scorers:
        encode_prompts = None
        if any(scorer.spec.uses_prompt for scorer in scorers):
            path = settings.pretrained_model_name_or_path
            if not path:
                raise UserError("this scorer uses the prompt; give the whole model by pretrained_model_name_or_path, not only a vae")
            model = load_model(path, family=settings.model_family, vae=settings.vae, device=device)
            vae, encode_prompts = model.vae, model.encode_prompts
        else:
            vae = load_vae(settings.vae or str(settings.pretrained_model_name_or_path), family=settings.model_family)
            place_vae(vae, device)
        for scorer in scorers:
            check_scorer_fits(scorer, VaeFingerprint.of(vae))
            sizes = {"sigma": settings.sigma or 0.0, "seed": settings.seed or 0, "batch_size": settings.batch_size}
            raters.append(LatentRater(scorer, vae, buckets, **sizes, encode_prompts=encode_prompts))
    for name in settings.judge:
        raters.append(JudgeRater(load_judge(name), name.rpartition(":")[2], batch_size=settings.batch_size, device=device))
    for text in settings.image_model:
        raters.append(JudgeRater(image_model_judge(text, device), text.partition("?")[0], batch_size=settings.batch_size, device=device))
    raters += [CommandRater(command, timeout=settings.command_timeout or 60.0) for command in settings.command]
    columns = {"path_column": settings.scores_csv_path_column or "path", "score_column": settings.scores_csv_score_column or "score"}
    raters += [TableRater(file, **columns) for file in settings.scores_csv]
    for number, rater in enumerate(raters):
        if rater.name in {"path", "score", "uncertainty", "prompt", "split", *(other.name for other in raters[:number])}:
            rater.name = f"{rater.name}-{number + 1}"
    return raters


def image_model_judge(text: str, device: torch.device) -> Judge:
    """A ready-made image scorer as a judge. Raises UserError if it is none, or puts out something other than one score."""
    loaded = read_image_model(text)
    model = build_image_model(loaded.architecture)
    model.load_state_dict(loaded.weights)
    model.to(device).eval().requires_grad_(False)
    if model.feature_width != 1:
        raise UserError(f"image model {text!r} puts out {model.feature_width} numbers a picture and no score; see docs/pixel_scorers.md")
    return Judge(text, lambda pixels, prompts=None: model(pixels, prompts).flatten(), model.uses_prompt)


def write_results(
    output_dir: Path, images: Sequence[RatedImage], outcomes: Mapping[str, Sequence[RaterResult]], num_shown: int
) -> list[Path]:
    """Write the table, the sheets and the histogram, and return their paths."""
    table = output_dir / "scores.csv"
    atomic_write_text(table, table_text(images, outcomes, output_dir))
    paths = [table]
    for name, column in outcomes.items():
        scores = {row: outcome.score for row, outcome in enumerate(column) if isinstance(outcome, RaterScore)}
        ranked = sorted(scores, key=lambda row: -scores[row])
        sections = {f"{name}: highest": ranked[:num_shown], f"{name}: lowest": ranked[::-1][:num_shown]}
        sheet = contact_sheet({title: [captioned(images[row], scores[row]) for row in rows] for title, rows in sections.items()})
        paths.append(output_dir / ("sheet.png" if len(outcomes) == 1 else f"sheet_{file_name(name)}.png"))
        atomic_write_bytes(paths[-1], sheet)
    paths.append(output_dir / "histogram.png")
    atomic_write_bytes(paths[-1], histograms({name: scores_of(column) for name, column in outcomes.items()}))
    return paths


def table_text(images: Sequence[RatedImage], outcomes: Mapping[str, Sequence[RaterResult]], folder: Path) -> str:
    """The CSV: every picture that the first rater scored. Paths below `folder` are relative to it, others are absolute."""
    first, *others = outcomes.items()
    columns: dict[str, list[str]] = {"path": [path_in_table(image, folder) for image in images]}
    for name, column in (("score", first[1]), *others):
        columns[name] = [f"{outcome.score:.7g}" if isinstance(outcome, RaterScore) else "" for outcome in column]
        spreads = [outcome.uncertainty if isinstance(outcome, RaterScore) else None for outcome in column]
        if any(spread is not None for spread in spreads):
            title = "uncertainty" if name == "score" else f"{name}_uncertainty"
            columns[title] = ["" if spread is None else f"{spread:.7g}" for spread in spreads]
    for name in ("prompt", "split"):
        values = [getattr(image, name) or "" for image in images]
        if any(values):
            columns[name] = values
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(row for row, score in zip(zip(*columns.values(), strict=True), columns["score"], strict=True) if score)
    return text.getvalue()


def path_in_table(image: RatedImage, folder: Path) -> str:
    if not isinstance(image.picture, FilePicture):
        return image.picture.key  # a part of a file: for people to read, no reader finds it again
    path = Path(os.path.abspath(image.picture.path))
    root = Path(os.path.abspath(folder))
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()


def summary(images: Sequence[RatedImage], outcomes: Mapping[str, Sequence[RaterResult]]) -> str:
    """A line for each rater, and how they agree with each other and with the source's own scores."""
    lines = []
    for name, column in outcomes.items():
        scores = np.array(scores_of(column))
        line = f"{name}: {len(scores)} of {len(images)} pictures, mean {scores.mean():.4g}, std {scores.std():.4g}, "
        lines.append(line + f"min {scores.min():.4g}, max {scores.max():.4g}")
    columns: dict[str, list[float | None]] = {
        name: [outcome.score if isinstance(outcome, RaterScore) else None for outcome in column] for name, column in outcomes.items()
    }
    given = [image.score for image in images]
    if any(score is not None for score in given):
        columns["the source's own scores"] = given
    names = list(columns)
    for number, name in enumerate(names):
        for other in names[number + 1 :]:
            pairs = [pair for pair in zip(columns[name], columns[other], strict=True) if None not in pair]
            if len(pairs) > 2:
                first, second = torch.tensor(pairs, dtype=torch.float64).T
                lines.append(f"SRCC of {name} and {other}: {spearman(first, second):.3f} ({len(pairs)} pictures)")
    return "\n".join(lines)


def captioned(image: RatedImage, score: float) -> CaptionedPicture:
    picture = read_picture(image.picture)
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    return CaptionedPicture(picture, f"{score:.4g}", image.name)


def scores_of(column: Sequence[RaterResult]) -> list[float]:
    return [outcome.score for outcome in column if isinstance(outcome, RaterScore)]


def file_name(name: str) -> str:
    """A rater's name without what a file's name cannot have."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name)


if __name__ == "__main__":
    run_main(main)
