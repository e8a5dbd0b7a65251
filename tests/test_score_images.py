"""Scores of folders: every rater against what it must say, what is left out, what is written, and an opinion distilled from end to end."""

import csv
import io
import json
import random
import re
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train_latent_scorer
from examples.shapes.world import draw, random_scene
from library.diffusion.noise_schedule import per_sample, sigma_to_abar
from library.errors import UserError
from library.models.vae import VaeFingerprint, encode_images
from library.reports.contact_sheet import CaptionedPicture, contact_sheet, histograms
from library.scorer_data.buckets import BucketConfig
from library.scorer_data.pictures import cover, read_picture, to_pixels
from library.scorer_data.readers.recognition import read_records
from library.scorer_data.records import FilePicture, RatedImage, Skipped
from library.scorer_training.config import LatentScorerConfig
from library.scorers import raters as image_scoring
from library.scorers.base import SCORER_KINDS, ScorerSpec, build_scorer
from library.scorers.heads import HeadSpec
from library.scorers.io import load_scorer, save_scorer
from library.scorers.judges import Judge
from library.scorers.program_raters import CommandRater, TableRater
from library.scorers.raters import JudgeRater, LatentRater, RaterResult, RaterScore
from library.settings.options import build_config
from library.training.runtime import generator
from tests.helpers.tiny_models import tiny_vae
from tools import score_images

BUCKETS = BucketConfig(resolution="64", min_bucket_reso=32, max_bucket_reso=128, bucket_reso_steps=16)
BUCKET_WORDS = ["--resolution", "64", "--min_bucket_reso", "32", "--max_bucket_reso", "128", "--bucket_reso_steps", "16"]
MODEL = Path(__file__).resolve().parents[1] / "examples" / "shapes" / "model"
JUDGES = """
import torch

def brightness(pixels):
    return pixels.mean((1, 2, 3))

def fussy(pixels):
    if (pixels.mean((1, 2, 3)) < 0.3).any():
        raise RuntimeError("too dark\\nfor me")
    return pixels.mean((1, 2, 3))

def unsure(pixels):
    values = pixels.mean((1, 2, 3))
    return torch.where(values < 0.3, torch.nan, values)

def length(pixels, prompts):
    return torch.tensor([float(len(prompt)) for prompt in prompts])

def never(pixels):
    raise ValueError("no")
"""
# What a program of the user's may do: with an argument it prints words and then a score; without, a line for each line that it reads.
PROGRAM = """
import sys, time
from PIL import Image, ImageStat

def score(path):
    return ImageStat.Stat(Image.open(path).convert("L")).mean[0]

mode, arguments = sys.argv[1], sys.argv[2:]
if mode == "one":
    print("loading"); print(score(arguments[0]), flush=True); print("", file=sys.stderr)
elif mode == "all":
    for line in sys.stdin:
        try:
            print(score(line.rstrip("\\n")))
        except Exception:
            print("cannot open this")
elif mode == "sleep":
    time.sleep(30)
elif mode == "few":
    print("1.0")
elif mode == "fail":
    sys.exit("it went wrong")
elif mode == "silent":
    sys.exit(3)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Greys of four levels under difficult names, and what is no picture."""
    pictures = tmp_path / "pictures"
    (pictures / "sub folder").mkdir(parents=True)
    for level, (name, size) in enumerate(
        [("a.png", (64, 64)), ("sub folder/ö b.png", (96, 48)), ("c,c.png", (64, 64)), ("d.png", (40, 80))]
    ):
        Image.new("RGB", size, (40 + 60 * level,) * 3).save(pictures / name)
    (pictures / "broken.png").write_bytes(b"not a picture")
    (pictures / "empty.jpg").touch()
    (pictures / "notes.txt").write_text("no picture")
    (tmp_path / "judges.py").write_text(JUDGES)
    (tmp_path / "program.py").write_text(PROGRAM)
    return pictures


BRIGHTNESS = {"a.png": 40 / 255, "c,c.png": 160 / 255, "d.png": 220 / 255, "sub folder/ö b.png": 100 / 255}


def images_of(folder: Path, names: list[str] | None = None, prompts: dict[str, str] | None = None) -> list[RatedImage]:
    return [
        RatedImage(picture=FilePicture(folder / name), name=name, where="test", prompt=(prompts or {}).get(name, ""))
        for name in names or list(BRIGHTNESS)
    ]


def scores_of(outcomes: list[RaterResult]) -> list[float]:
    assert all(isinstance(outcome, RaterScore) for outcome in outcomes), outcomes
    return [outcome.score for outcome in outcomes if isinstance(outcome, RaterScore)]


def run(monkeypatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["score_images.py", "--num_threads", "1", *map(str, words)])
    score_images.run_main(score_images.main)


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def program(folder: Path, mode: str, *words: str) -> str:
    return " ".join([f'"{sys.executable}"', f'"{folder.parent / "program.py"}"', mode, *words])


# -- the script ----------------------------------------------------------------------------------------------------------


def test_a_judge_scores_a_folder_and_what_is_no_picture_is_reported(folder, tmp_path, monkeypatch, capsys) -> None:
    run(monkeypatch, "--images", folder, "--judge", f"{tmp_path / 'judges.py'}:brightness", "--output_dir", tmp_path / "out")
    rows = read_csv(tmp_path / "out" / "scores.csv")
    assert set(rows[0]) == {"path", "score"}
    found = {Path(row["path"]).relative_to(folder).as_posix(): float(row["score"]) for row in rows}
    assert found == pytest.approx(BRIGHTNESS, abs=1e-6)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"scores.csv", "sheet.png", "histogram.png"}
    printed = capsys.readouterr().out
    assert "brightness: 4 of 6 pictures, mean 0.5098, std 0.2631, min 0.1569, max 0.8627" in printed
    assert "left out: 3" in printed and "2: picture cannot be read" in printed and "notes.txt" in printed


def test_the_table_is_read_unchanged_as_training_data(folder, tmp_path, monkeypatch) -> None:
    run(monkeypatch, "--images", folder, "--judge", f"{tmp_path / 'judges.py'}:brightness", "--output_dir", tmp_path / "out")
    records = list(read_records(tmp_path / "out" / "scores.csv"))
    assert all(isinstance(record, RatedImage) for record in records)
    found = {record.picture.path.relative_to(folder).as_posix(): record.score for record in records}  # type: ignore[union-attr]
    assert found == pytest.approx(BRIGHTNESS, abs=1e-6)


def test_pictures_below_the_output_folder_have_relative_paths(folder, tmp_path, monkeypatch) -> None:
    run(monkeypatch, "--images", folder, "--judge", f"{tmp_path / 'judges.py'}:brightness", "--output_dir", folder)
    assert {row["path"] for row in read_csv(folder / "scores.csv")} == set(BRIGHTNESS)
    assert len(list(read_records(folder / "scores.csv"))) == 4


def test_several_raters_have_a_column_each_and_are_compared(folder, tmp_path, monkeypatch, capsys) -> None:
    judges = [f"{tmp_path / 'judges.py'}:{name}" for name in ("brightness", "fussy")]
    words = ["--images", folder, "--judge", *judges, "--command", program(folder, "one", "{image}"), "--output_dir", tmp_path / "out"]
    run(monkeypatch, *words)
    rows = {Path(row["path"]).name: row for row in read_csv(tmp_path / "out" / "scores.csv")}
    assert list(rows["a.png"]) == ["path", "score", "fussy", "program"]
    assert rows["a.png"]["fussy"] == "" and float(rows["d.png"]["fussy"]) == pytest.approx(220 / 255)  # its other raters' scores are kept
    assert float(rows["a.png"]["program"]) == 40
    printed = capsys.readouterr().out
    assert "SRCC of brightness and program: 1.000 (4 pictures)" in printed
    judge, line = re.escape(judges[1]), rf"\({re.escape(str(tmp_path / 'judges.py'))}, line \d+\)"
    assert re.search(rf"picture a.png: judge {judge} failed with RuntimeError: too dark for me {line}", printed)
    assert {path.name for path in (tmp_path / "out").glob("sheet*")} == {"sheet_brightness.png", "sheet_fussy.png", "sheet_program.png"}


def test_a_table_of_paths_keeps_its_prompts_and_splits(folder, tmp_path, monkeypatch) -> None:
    table = tmp_path / "list.csv"
    table.write_text("path,prompt,split\na.png,a cat,train\nd.png,,val\ngone.png,x,\n", encoding="utf-8")
    words = ["--images", table, "--image_dir", folder, "--judge", f"{tmp_path / 'judges.py'}:length", "--output_dir", tmp_path / "out"]
    run(monkeypatch, *words)
    rows = read_csv(tmp_path / "out" / "scores.csv")
    assert [(Path(row["path"]).name, row["score"], row["prompt"], row["split"]) for row in rows] == [
        ("a.png", "5", "a cat", "train"),
        ("d.png", "0", "", "val"),
    ]


def test_a_rated_source_is_compared_with_and_its_pictures_need_not_be_files(folder, tmp_path, monkeypatch, capsys) -> None:
    with tarfile.open(tmp_path / "pictures.tar", "w") as tar:
        for number, name in enumerate(BRIGHTNESS):
            for suffix, content in ((".png", (folder / name).read_bytes()), (".json", json.dumps({"score": -number}).encode())):
                entry = tarfile.TarInfo(f"{number}{suffix}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    words = ["--images", tmp_path / "pictures.tar", "--reader", "webdataset", "--command", program(folder, "one", "{image}")]
    run(monkeypatch, *words, "--output_dir", tmp_path / "out")
    assert "SRCC of program and the source's own scores: -0.400 (4 pictures)" in capsys.readouterr().out
    assert [float(row["score"]) for row in read_csv(tmp_path / "out" / "scores.csv")] == pytest.approx([40, 160, 220, 100])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--images": "{folder}/gone"}, "there is no folder or file"),
        ({"--images": "{folder}/notes.txt"}, "to one of ava, danbooru"),
        ({"--judge": None}, "nothing scores the pictures"),
        ({"--judge": "{judges}:gone"}, "has no function 'gone'"),
        ({"--judge": "{judges}:never"}, "never could score none of 6 pictures"),
        ({"--judge": "{judges}:length"}, "length reads prompts and these pictures have none"),
        ({"--scorer": "x.safetensors"}, "give their model by pretrained_model_name_or_path"),
        ({"--scorer": "x.safetensors", "--vae": "y"}, "there is no scorer file x.safetensors"),
        ({"--command": "no-such-program {{image}}"}, "there is no program 'no-such-program'"),
        ({"--scores_csv": "{folder}/gone.csv"}, "gone.csv cannot be read"),
        ({"--image_model": "nothing:x"}, "no family of image models 'nothing'"),
        ({"--sigma": "-1"}, "sigma"),
        ({"--image_dir": "{folder}"}, "image_dir is set, but the pictures are those of the folder"),
        ({"--resolution": "256"}, "resolution is set, but no scorer is given"),
    ],
)
def test_bad_input_ends_with_one_sentence_and_writes_no_table(folder, tmp_path, refused, changes, message) -> None:
    words = {"--images": "{folder}", "--judge": "{judges}:brightness", "--output_dir": str(tmp_path / "out")} | changes
    places = {"folder": folder, "judges": tmp_path / "judges.py"}
    given = [word for key, value in words.items() if value is not None for word in (key, value.format(**places))]
    assert message in refused(score_images.main, "--num_threads", 1, *given)
    assert not (tmp_path / "out" / "scores.csv").exists()


# -- latent scorers ------------------------------------------------------------------------------------------------------


def tiny_scorer(vae, **changes):
    torch.manual_seed(0)
    architecture = SCORER_KINDS["latent_resnet"].preset("tiny") | {"in_channels": 4}
    spec = ScorerSpec(kind="latent_resnet", architecture=architecture, vae=VaeFingerprint.of(vae), **changes)
    return build_scorer(spec).eval().requires_grad_(False)


def test_a_latent_scorer_sees_each_picture_in_its_bucket(folder) -> None:
    vae = tiny_vae()
    scorer = tiny_scorer(vae)
    names = list(BRIGHTNESS)
    ratings = scores_of(LatentRater(scorer, vae, BUCKETS, batch_size=3).rate(images_of(folder)))
    buckets = {"a.png": (64, 64), "c,c.png": (64, 64), "d.png": (48, 80), "sub folder/ö b.png": (80, 48)}
    for name, rating in zip(names, ratings, strict=True):
        pixels = to_pixels([cover(Image.open(folder / name), buckets[name])])
        assert rating == pytest.approx(scorer(encode_images(vae, pixels), torch.zeros(1)).item(), abs=1e-5), name


def test_noise_depends_on_the_picture_and_the_seed_alone(folder) -> None:
    vae = tiny_vae()
    scorer, names = tiny_scorer(vae), list(BRIGHTNESS)
    together = scores_of(LatentRater(scorer, vae, BUCKETS, sigma=1.0, batch_size=8).rate(images_of(folder)))
    alone = scores_of(LatentRater(scorer, vae, BUCKETS, sigma=1.0, batch_size=1).rate(images_of(folder, names[::-1])))[::-1]
    assert together == pytest.approx(alone, abs=1e-5)
    other = scores_of(LatentRater(scorer, vae, BUCKETS, sigma=1.0, seed=1).rate(images_of(folder)))
    assert np.abs(np.subtract(together, other)).min() > 1e-4
    latents = encode_images(vae, to_pixels([Image.open(folder / "a.png")]))
    abar = per_sample(sigma_to_abar(torch.ones(1)), latents)
    noisy = abar.sqrt() * latents + (1 - abar).sqrt() * torch.randn(latents.shape[1:], generator=generator(0, "a.png"))
    assert together[0] == pytest.approx(scorer(noisy, torch.ones(1)).item(), abs=1e-5)


def test_an_ensembles_uncertainty_is_written(folder, tmp_path, monkeypatch) -> None:
    vae = tiny_vae()
    vae.save_pretrained(tmp_path / "vae")
    scorer = tiny_scorer(vae, heads=(HeadSpec(members=3),))
    save_scorer(tmp_path / "mine.safetensors", scorer)
    words = ["--images", folder, "--scorer", tmp_path / "mine.safetensors", "--vae", tmp_path / "vae", *BUCKET_WORDS]
    run(monkeypatch, *words, "--output_dir", tmp_path / "out")
    rows = {Path(row["path"]).name: row for row in read_csv(tmp_path / "out" / "scores.csv")}
    pixels = to_pixels([Image.open(folder / "a.png")])
    score, spread = scorer.score_and_uncertainty(encode_images(vae, pixels), torch.zeros(1))
    assert float(rows["a.png"]["score"]) == pytest.approx(score.item(), abs=1e-5)
    assert float(rows["a.png"]["uncertainty"]) == pytest.approx(spread.item(), abs=1e-5) and spread > 0


def test_a_scorer_of_another_vae_is_refused(folder, tmp_path, monkeypatch, capsys) -> None:
    save_scorer(tmp_path / "mine.safetensors", tiny_scorer(tiny_vae()))
    tiny_vae(seed=5).save_pretrained(tmp_path / "vae")
    with pytest.raises(SystemExit):
        run(monkeypatch, "--images", folder, "--scorer", tmp_path / "mine.safetensors", "--vae", tmp_path / "vae", *BUCKET_WORDS)
    assert "another VAE" in capsys.readouterr().err


def test_a_scorer_that_knows_clean_pictures_only_is_not_asked_about_noise() -> None:
    vae = tiny_vae()
    with pytest.raises(UserError, match="trained on clean pictures only"):
        LatentRater(tiny_scorer(vae, noise_aware=False), vae, BUCKETS, sigma=0.5)


def test_a_picture_that_its_bucket_would_cut_apart_is_left_out(folder) -> None:
    Image.new("RGB", (640, 16)).save(folder / "strip.png")
    vae = tiny_vae()
    kept, left_out = LatentRater(tiny_scorer(vae), vae, BUCKETS).rate(images_of(folder, ["a.png", "strip.png"]))
    assert isinstance(kept, RaterScore) and isinstance(left_out, Skipped) and "would cut off" in left_out.reason


# -- judges, commands, tables --------------------------------------------------------------------------------------------


def test_a_judge_sees_pictures_whole_and_one_bad_number_costs_one_picture(folder) -> None:
    sizes = []

    def judge(pixels: torch.Tensor) -> torch.Tensor:
        sizes.append(tuple(pixels.shape))
        values = pixels.mean((1, 2, 3))
        return torch.where(values < 0.3, torch.nan, values)

    outcomes = JudgeRater(Judge("judge", judge, takes_prompts=False), "judge").rate(images_of(folder))
    assert (2, 3, 64, 64) in sizes and (1, 3, 80, 40) in sizes and (1, 3, 48, 96) in sizes
    assert isinstance(outcomes[0], Skipped) and "returned NaN" in outcomes[0].reason
    assert scores_of(outcomes[1:]) == pytest.approx(list(BRIGHTNESS.values())[1:])


def test_few_pictures_wait_in_memory_whatever_their_sizes(tmp_path, monkeypatch) -> None:
    for number in range(30):
        Image.new("RGB", (8 + number, 8)).save(tmp_path / f"{number}.png")
    read: list[RatedImage] = []
    waiting: list[int] = []
    progress: list[int] = []
    monkeypatch.setattr(image_scoring, "read_picture", lambda picture: read.append(picture) or read_picture(picture))

    def judge(pixels: torch.Tensor) -> torch.Tensor:
        waiting.append(len(read) - sum(progress))
        return pixels.mean((1, 2, 3))

    images = images_of(tmp_path, [f"{number}.png" for number in range(30)])
    JudgeRater(Judge("judge", judge, takes_prompts=False), "judge", batch_size=2).rate(images, progress.append)
    assert sum(progress) == 30 and max(waiting) == 8


def test_a_command_is_asked_for_each_picture(folder) -> None:
    rater = CommandRater(program(folder, "one", "{image}"))
    assert rater.name == "program"
    outcomes = rater.rate(images_of(folder, [*BRIGHTNESS, "broken.png"]))
    assert scores_of(outcomes[:4]) == pytest.approx([40, 160, 220, 100])
    assert isinstance(outcomes[4], Skipped) and re.search(
        r"broken.png: program ended with code 1: .*UnidentifiedImageError", outcomes[4].reason
    )


def test_a_command_is_asked_for_all_pictures_at_once(folder) -> None:
    outcomes = CommandRater(program(folder, "all")).rate(images_of(folder, [*BRIGHTNESS, "broken.png"]))
    assert scores_of(outcomes[:4]) == pytest.approx([40, 160, 220, 100])
    assert isinstance(outcomes[4], Skipped) and "said 'cannot open this', which is no number" in outcomes[4].reason


def test_a_command_that_hangs_is_stopped(folder) -> None:
    [outcome] = CommandRater(program(folder, "sleep", "{image}"), timeout=0.5).rate(images_of(folder, ["a.png"]))
    assert isinstance(outcome, Skipped) and "took longer than 0.5 s" in outcome.reason
    with pytest.raises(UserError, match="took longer than"):
        CommandRater(program(folder, "sleep"), timeout=0.25).rate(images_of(folder, ["a.png", "d.png"]))


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("few", "printed 1 lines for 4 pictures"),
        ("fail", "ended with code 1: it went wrong"),
        ("silent", "ended with code 3: it said nothing"),
    ],
)
def test_a_command_that_fails_for_all_is_the_users_to_mend(folder, mode, message) -> None:
    with pytest.raises(UserError, match=message):
        CommandRater(program(folder, mode)).rate(images_of(folder))


def test_a_table_of_another_programs_output(folder, tmp_path) -> None:
    table = tmp_path / "theirs.csv"
    table.write_text(f'file,quality,other\n{folder / "a.png"},1.5,x\nd.png,nan,x\n"c,c.png",,x\n', encoding="utf-8")
    outcomes = TableRater(table, path_column="file", score_column="quality").rate(images_of(folder))
    assert isinstance(outcomes[0], RaterScore) and outcomes[0].score == 1.5  # by its absolute path
    reasons = [outcome.reason for outcome in outcomes[1:] if isinstance(outcome, Skipped)]
    assert "said '', which is no number" in reasons[0] and "nan" in reasons[1] and "is not in" in reasons[2]
    with pytest.raises(UserError, match="has no column 'path'; it has file, quality, other"):
        TableRater(table)
    table.write_text("path,score,score\na.png,1,2\n", encoding="utf-8")
    with pytest.raises(UserError, match="has 2 columns 'score'"):
        TableRater(table)


# -- pictures of scores --------------------------------------------------------------------------------------------------


def test_a_sheet_shows_the_pictures_in_their_order_and_proportions() -> None:
    pictures = [CaptionedPicture(Image.new("RGB", (80, 40), colour), "1.0", "name") for colour in ("red", "blue")]
    sheet = np.asarray(Image.open(io.BytesIO(contact_sheet({"best": pictures, "worst": pictures[::-1]}))))
    red, blue = (np.argwhere((sheet == colour).all(2)) for colour in ([255, 0, 0], [0, 0, 255]))
    top, bottom = red[red[:, 0] < sheet.shape[0] // 2], red[red[:, 0] >= sheet.shape[0] // 2]
    assert top[:, 1].max() < blue[blue[:, 0] < sheet.shape[0] // 2][:, 1].min() == bottom[:, 1].min()
    height, width = np.ptp(top, axis=0) + 1
    assert width == 2 * height == 160  # enlarged by a whole factor


def test_histograms_are_a_panel_for_each_rater() -> None:
    one, two = (Image.open(io.BytesIO(histograms({name: [0.0, 1.0, 2.0] for name in names}))) for names in (["a"], ["a", "b"]))
    assert two.width > 1.7 * one.width and two.height == one.height


# -- distilling ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_opinion_is_distilled_into_a_latent_scorer(tmp_path, monkeypatch, capsys) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    rng = random.Random(0)
    for number in range(60):
        draw(random_scene(rng, (64, 64))).save(pictures / f"{number:02d}.png")
    (tmp_path / "judges.py").write_text(JUDGES)
    run(monkeypatch, "--images", pictures, "--judge", f"{tmp_path / 'judges.py'}:brightness", "--output_dir", tmp_path / "labels")

    settings = {
        "pretrained_model_name_or_path": str(MODEL),
        "train_data_file": str(tmp_path / "labels" / "scores.csv"),
        "resolution": "64",
        "min_bucket_reso": 32,
        "bucket_reso_steps": 16,
        "validation_split": 0.3,
        "validation_folds": 0,
        "scorer_size": "tiny",
        "max_train_steps": 30,
        "train_batch_size": 16,
        "validate_every_n_steps": 15,
        "lr_warmup_steps": 2,
        "ema_decay": 0.8,
        "num_threads": 1,
        "output_dir": str(tmp_path / "out"),
    }
    path = train_latent_scorer.train(build_config(LatentScorerConfig, settings))
    table = load_scorer(path).spec.training["validation"]
    assert next(row["srcc"] for row in table if row["sigma"] == 0) > 0.7  # on pictures that it was not trained on

    words = [
        "--images",
        pictures,
        "--scorer",
        path,
        "--pretrained_model_name_or_path",
        MODEL,
        "--scores_csv",
        tmp_path / "labels" / "scores.csv",
    ]
    capsys.readouterr()
    run(monkeypatch, *words, *BUCKET_WORDS, "--output_dir", tmp_path / "check")
    agreement = re.search(r"SRCC of scorer and scores: (\S+) \(60 pictures\)", capsys.readouterr().out)
    assert agreement and float(agreement[1]) > 0.7
