"""The process that brings pictures into a project: samples of the user's checkpoint, or a folder, each with its features.

    python -m library.rating.worker FOLDER < source.json

It says what it does as JSON lines on stdout, makes pictures a little ahead of the person who rates, and ends when its stdin is closed: so
it never outlives the server that started it, however that ended. Model and pictures live here, so that what goes wrong with them is a
sentence on the page, and not the end of the page.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import logging
import os
import random
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from library.settings.start_up import before_torch

if __name__ == "__main__":
    before_torch()

import numpy as np
import torch
from PIL import Image

from library.atomic_files import atomic_write_bytes
from library.errors import UserError
from library.models.base import DiffusionModel
from library.models.loading import load_model
from library.prompts.files import load_prompts
from library.rating.features import PictureFeatures
from library.rating.store import PICTURES, Project, StoredPicture
from library.rollouts.few_step import choose_sampling
from library.rollouts.sample import decode, sample
from library.scorer_data.pictures import cover, read_picture, to_pixels
from library.scorer_data.readers.files import pictures_below
from library.scorer_data.records import FilePicture, Skipped, SkipReport
from library.training.runtime import choose_precision, weight_dtype

AHEAD = 160  # pictures that wait to be rated, so that there is something to choose from
FIRST_BATCH, BATCH = 4, 8
LOOK_AGAIN = 1.0  # seconds
QUICK = {"num_steps": 10, "guidance_scale": 5.0, "sampler": "dpmpp_2m"}
SIDE_STEP = 64  # of what is looked at: the U-Net halves latents three times
LARGEST = 768  # a side of the copy of somebody's picture that the page shows


@dataclass(frozen=True, kw_only=True)
class PictureSource:
    """Where pictures come from.

    Attributes:
        model: checkpoint or diffusers folder. prompts_file: what its pictures show.
        pictures: a folder of pictures to rate in place of samples.
        resolution: of the samples, (width, height); None is what suits the model at a small size.
        num_steps, guidance_scale: of the sampler; None is what suits the model.
        mixed_precision: as in the trainings.
    """

    model: str
    prompts_file: str | None = None
    pictures: str | None = None
    resolution: tuple[int, int] | None = None
    num_steps: int | None = None
    guidance_scale: float | None = None
    mixed_precision: str | None = None


def small_size(model: DiffusionModel) -> tuple[int, int]:
    """(width, height) to rate pictures at: three quarters of SD's 512 pixels, half of SDXL's 1024, whole where the model is tiny."""
    native = model.spec.resolution
    side = native if native <= 256 else max(384, native // 2)
    return side, side


class PictureMaker:
    """Samples of a model, mixed over prompts and seeds. A prompt's and a seed's picture is the same in every session."""

    def __init__(self, model: DiffusionModel, source: PictureSource) -> None:
        assert source.prompts_file is not None
        self.model, self.features = model, PictureFeatures(model)
        self.prompts = load_prompts(source.prompts_file)
        width, height = source.resolution or small_size(model)
        given = {"num_steps": source.num_steps, "guidance_scale": source.guidance_scale}
        self.sampling = choose_sampling(model, (height, width), ordinary=QUICK, **given)

    def make(self, first: int, count: int) -> list[tuple[str, int, Image.Image, np.ndarray]]:
        """The pictures of these numbers: prompt, seed, picture and features [D]."""
        order = random.Random(0).sample(range(len(self.prompts)), len(self.prompts))
        wanted = [(self.prompts[order[number % len(order)]], number) for number in range(first, first + count)]
        made = []
        for _, group in itertools.groupby(
            wanted, key=lambda entry: (self.sampling.of(entry[0]).size, self.sampling.of(entry[0]).num_steps)
        ):
            prompts, seeds = zip(*group, strict=True)
            latents = sample(self.model, None, prompts, seeds, sampling=self.sampling)
            arrays = (decode(self.model, latents).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
            pictures = [Image.fromarray(array) for array in arrays]
            features = self.features(to_pixels(pictures))  # of what the file holds, as it will be read again
            made += zip((prompt.prompt for prompt in prompts), seeds, pictures, features, strict=True)
        return made


def make_samples(project: Project, maker: PictureMaker, enough: threading.Event) -> None:
    """Make pictures a little ahead of the ratings, until `enough`."""
    made = project.count_pictures()
    batch = FIRST_BATCH
    while not enough.is_set():
        if made - project.count_rated() >= AHEAD:
            tell_server("ready", pictures=made)
            enough.wait(LOOK_AGAIN)
            continue
        pictures, records = maker.make(made, batch), []
        for prompt, seed, picture, seen in pictures:
            buffer = io.BytesIO()
            picture.save(buffer, "PNG")
            name = hashlib.sha256(buffer.getvalue()).hexdigest()
            atomic_write_bytes(project.path_of(f"{PICTURES}/{name[:24]}.png"), buffer.getvalue())
            records.append(
                StoredPicture(
                    hash=name,
                    file=f"{PICTURES}/{name[:24]}.png",
                    shown=f"{PICTURES}/{name[:24]}.png",
                    prompt=prompt,
                    seed=seed,
                    width=picture.width,
                    height=picture.height,
                    features=seen,
                )
            )
        project.add_pictures(records)
        made, batch = made + len(pictures), BATCH
        tell_server("making", pictures=made)


def read_folder(project: Project, folder: Path, model: DiffusionModel, side: int, enough: threading.Event) -> None:
    """Take in a folder's pictures, in an order that is random and always the same; what cannot be read is left out and said."""
    tally, features = SkipReport(), PictureFeatures(model)
    if not folder.is_dir():
        raise UserError(f"pictures is {folder}, which is no folder; give a folder of pictures")
    names = sorted(pictures_below(folder, tally), key=lambda name: hashlib.sha256(name.encode(errors="surrogateescape")).digest())
    if not names:
        raise UserError(f"there are no pictures in {folder}; give a folder with .png, .jpg or .webp files")
    known = project.known_files()
    files = [str((folder / name).absolute()) for name in names]
    files = [file for file in files if file not in known]
    for batch in _batches(files, BATCH):
        if enough.is_set():
            return
        records, pixels = [], []
        for file in batch:
            try:
                picture = read_picture(FilePicture(file))
                digest = hashlib.sha256(Path(file).read_bytes()).hexdigest()
                size = picture.size
                shown = write_shown(project, picture, digest)
            except (UserError, OSError) as error:
                tally.add(Skipped(str(error), "picture cannot be read"))
                continue
            pixels.append(to_pixels([cover(picture, (side, side))])[0])
            records.append((digest, file, shown, size))
        if records:
            seen = features(torch.stack(pixels))
            project.add_pictures(
                StoredPicture(hash=digest, file=file, shown=shown, width=size[0], height=size[1], features=own)
                for (digest, file, shown, size), own in zip(records, seen, strict=True)
            )
        tell_server("reading", pictures=project.count_pictures(), left_out=len(tally), example=tally.first())
    if not project.count_pictures():
        raise UserError(f"none of the {len(names)} pictures in {folder} can be read; the first: {tally.first()}")
    tell_server("ready", pictures=project.count_pictures(), left_out=len(tally), example=tally.first())
    enough.wait()


def write_shown(project: Project, picture: Image.Image, digest: str) -> str:
    """Write the small copy of somebody's picture that the page shows: its name in the project."""
    copy, buffer = picture.copy(), io.BytesIO()
    copy.thumbnail((LARGEST, LARGEST))
    copy.save(buffer, "JPEG", quality=88)
    name = f"{PICTURES}/{digest[:24]}.jpg"
    atomic_write_bytes(project.path_of(name), buffer.getvalue())
    return name


def _batches(files: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    return (files[start : start + size] for start in range(0, len(files), size))


def tell_server(state: str, **details: object) -> None:
    """One line for the server: "loading", "making", "reading", "ready" or "error". Ends the process where the server is gone: it was
    killed, and nobody wants more pictures."""
    try:
        print(json.dumps({"state": state, **details}), flush=True)
    except OSError:  # a broken pipe, which has other names elsewhere
        os._exit(0)


def work(project: Project, source: PictureSource, enough: threading.Event) -> None:
    """Load the model and bring in pictures. Raises UserError for what cannot be used."""
    tell_server("loading", pictures=project.count_pictures())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    precision = choose_precision(source.mixed_precision, torch.device(device))
    model = load_model(source.model, dtype=weight_dtype(precision), device=device).freeze()
    if source.pictures is not None:
        side = max(SIDE_STEP, small_size(model)[0] // SIDE_STEP * SIDE_STEP)
        read_folder(project, Path(source.pictures), model, side, enough)
    else:
        make_samples(project, PictureMaker(model, source), enough)


def main() -> None:
    logging.basicConfig(level=logging.WARNING)
    given = json.loads(sys.stdin.readline())
    enough = threading.Event()

    def wait_for_the_end() -> None:
        sys.stdin.read()
        enough.set()
        time.sleep(5)  # a batch may be in the making
        os._exit(0)

    threading.Thread(target=wait_for_the_end, daemon=True).start()
    torch.set_num_threads(max(1, (os.cpu_count() or 2) // 2))  # the page is to stay quick
    try:
        work(Project(Path(sys.argv[1])), PictureSource(**given), enough)
    except UserError as error:
        tell_server("error", sentence=str(error))
        raise SystemExit(2) from None
    except Exception as error:
        tell_server(
            "error", sentence=f"pictures cannot be made ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"[:400]
        )
        raise


if __name__ == "__main__":
    main()
