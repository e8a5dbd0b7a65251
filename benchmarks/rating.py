"""The page, by a simulated person in a real browser: how few ratings make a slider, and what the running scorer says of itself.

    python -m benchmarks.rating session --scores brightness --seeds 0           # rate 60 pictures on the page, train, measure
    python -m benchmarks.rating session --mode pairs                             # the same person chooses 60 times between two pictures
    python -m benchmarks.rating curves --folder PROJECT --seeds 0 1 2            # ratings in random and in chosen order, stars and pairs

A session needs Playwright and Chromium (`--chromium`, where Debian has it). The person has a true score of pixels, feels it with an error
of 0.4 standard deviations, gives stars or chooses, and sees what the page shows: nothing is handed to the scorer but keys that are pressed.
"""

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import torch
from PIL import Image

from benchmarks import ROOT, argument_parser, markdown_table
from examples.shapes.scores import SCORES
from library.models.loading import load_model
from library.rating.agreement import rank_correlation
from library.rating.choice import choose
from library.rating.live import FIRST_BY_CHANCE, LEARN_EVERY
from library.rating.progress import measure_progress
from library.rating.space import FeatureSpace
from library.rating.store import Project, StoredPicture
from library.rating.taste import Answers, Taste
from library.scorer_data.pictures import to_pixels
from library.scorers.io import load_scorer
from tests.helpers.rating_project import served, stars_of
from tools.rate import EMBEDDED, RateConfig, embedded_prompts, make_recipe, make_source

NOISE = 0.4  # standard deviation of an answer's error, where pictures' true scores have 1
TIE = 0.25  # a lead below which the person calls two pictures equal
SIZES = (20, 40, 60, 100, 200)
CHROMIUM = "/usr/bin/chromium"
SHOWN = "[...document.querySelectorAll('.stage img')].map(image => image.getAttribute('src'))"  # what the page asks about
RESULTS = ROOT / "benchmarks" / "results"


def true_worth(project: Project, pictures: Sequence[StoredPicture], score: str) -> np.ndarray:
    """What the person thinks of pictures [N], in standard deviations."""
    values = []
    for picture in pictures:
        array = np.asarray(Image.open(project.path_of(picture.file)).convert("RGB"), dtype=np.float32) / 255
        values.append(SCORES[score](torch.from_numpy(array).permute(2, 0, 1)[None]).item())
    worth = np.array(values)
    return (worth - worth.mean()) / worth.std()


def file_worth(scorer: Path, project: Project, pictures: Sequence[StoredPicture]) -> np.ndarray:
    """What a scorer's file says of pictures of one size, without noise [N]."""
    model = load_model(str(EMBEDDED), dtype=torch.float32, device="cpu").freeze()
    with torch.no_grad():
        latents = model.encode_images(to_pixels([Image.open(project.path_of(picture.file)).convert("RGB") for picture in pictures]))
        return load_scorer(scorer)(latents, torch.zeros(len(latents))).numpy()


def within_prompts(values: Sequence[Sequence[Sequence[float]]], place: int) -> np.ndarray:
    """Values by prompt, seed and weight, at one weight, less the mean of their prompt [P * S]."""
    array = np.array(values)[:, :, place]
    return (array - array.mean(1, keepdims=True)).flatten()


def choice_of(felt: np.ndarray) -> float:
    """How far the first of two pictures wins, by what a person feels of each [2]: 1, 0, or 0.5 where they are near."""
    return 0.5 if abs(felt[0] - felt[1]) < TIE else float(felt[0] > felt[1])


def key_of(worth: np.ndarray, mode: str, rng: np.random.Generator) -> str:
    """What the person presses on seeing one picture or two, by their true worth [1 or 2]."""
    if mode == "stars":
        return str(stars_of(float(worth[0]), rng, NOISE))
    return {1.0: "ArrowLeft", 0.5: "ArrowDown", 0.0: "ArrowRight"}[choice_of(worth + NOISE * rng.normal(size=2))]


def session(score: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """One person, from an empty folder to a slider that is measured by the true score."""
    from playwright.sync_api import sync_playwright

    folder = args.folder / f"{score}-{args.mode}-{seed}"
    project = Project(folder)
    config = RateConfig(scorer_steps=args.scorer_steps, train_steps=args.train_steps)
    prompts = embedded_prompts(folder)
    recipe = make_recipe(config, str(EMBEDDED), prompts)
    judges = [f"examples.shapes.scores:{score}", "examples.shapes.judge:caption_obeyed"]
    recipe.check["evaluation"].update({"judges": judges, "num_prompts": 12, "seeds_per_prompt": 3, "multipliers": args.weights})  # pyright: ignore[reportAttributeAccessIssue]
    rng, started = np.random.default_rng(seed), time.monotonic()
    with served(project, recipe=recipe, source=dict(make_source(config, str(EMBEDDED), prompts))) as (address, rating_session):
        while len(rating_session.gallery.pictures) < args.pictures:
            assert rating_session.worker.get("state") != "error", rating_session.worker
            time.sleep(1)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=args.chromium, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1440, "height": 900})
            page.goto(address)
            page.wait_for_selector(".stage img", timeout=120_000)
            if args.mode == "pairs":
                page.keyboard.press("p")
            began = time.monotonic()
            shown: list[str] = []
            for _ in range(args.ratings):
                page.wait_for_function(
                    f"([n, old]) => {{ const now = {SHOWN}; return now.length === n && now.join() !== old.join() }}",
                    arg=[2 if args.mode == "pairs" else 1, shown],
                    timeout=120_000,
                )
                shown = page.evaluate(SHOWN)
                rating_session.gallery.refresh()
                worth = true_worth(project, rating_session.gallery.pictures, score)
                rows = [rating_session.gallery.row_of[int(source.rpartition("/")[2])] for source in shown]
                page.keyboard.press(key_of(worth[rows], args.mode, rng))
            rating_seconds = time.monotonic() - began
            live = rating_session.opinion("beauty")
            while live.measured < args.ratings:
                time.sleep(0.5)
            worth = true_worth(project, rating_session.gallery.pictures, score)
            rated = {
                rating_session.gallery.row_of[picture] for rating in live.ratings for picture in (rating.first, rating.second) if picture
            }
            rest = np.array([row for row in range(live.taste.size if live.taste else 0) if row not in rated])
            found: dict[str, Any] = {
                "score": score,
                "seed": seed,
                "mode": args.mode,
                "ratings": args.ratings,
                "calibrate": recipe.slider["monitor"]["calibrate"],
                "rating_seconds": round(rating_seconds, 1),
                "page": live.progress.to_dict(),
                "true_srcc_of_unrated": rank_correlation(live.worths()[0][rest], worth[rest]),
            }
            page.goto(f"{address}/#train")
            page.get_by_role("button", name="Train", exact=True).click()
            seen = ""
            while seen not in ("done", "failed", "stopped"):
                page.wait_for_timeout(3000)
                run = rating_session.runs.latest(live.opinion)
                seen = (
                    ""
                    if run is None
                    else json.loads((run / "progress.json").read_text())["state"]
                    if (run / "progress.json").exists()
                    else ""
                )
                if run is not None and args.shots and list((run / "slider" / "sample").glob("*.png")):
                    page.screenshot(path=args.shots / "train_running.png")
            page.wait_for_timeout(3000)
            if args.shots:
                for width in (1440, 1024, 390):
                    page.set_viewport_size({"width": width, "height": 900 if width > 400 else 844})
                    page.wait_for_timeout(500)
                    page.screenshot(path=args.shots / f"train_{width}.png")
            browser.close()
        assert seen == "done", (folder, seen)
        run = rating_session.runs.latest(live.opinion)
    unrated = [rating_session.gallery.pictures[row] for row in rest]
    found["true_srcc_of_file"] = rank_correlation(file_worth(run / "scorer" / "scorer.safetensors", project, unrated), worth[rest])
    found["description"] = json.loads((run / "slider" / "slider.json").read_text())["description"]
    measured = json.loads((run / "check" / "evaluation.json").read_text())["sliders"][0]
    for name, response in measured["responses"].items():
        found[name] = (
            response["gains_std"] if response["role"] != "share" and "obeyed" not in name else [mean[0] for mean in response["means"]]
        )
    said, true = (within_prompts(measured["responses"][name]["values"], args.weights.index(0)) for name in ("scorer", score))
    found |= {"weights": args.weights, "correlation_within_prompts": float(np.corrcoef(said, true)[0, 1])}
    return found | {"minutes": round((time.monotonic() - started) / 60, 1)}


def curves(score: str, seed: int, project: Project) -> list[dict[str, Any]]:
    """True rank correlation on 300 pictures that are never asked about, at SIZES answers, in each order and mode."""
    pictures = project.pictures()
    space, worth = FeatureSpace(np.stack([picture.features for picture in pictures])), true_worth(project, pictures, score)
    order = np.random.default_rng(seed).permutation(len(worth))
    asked_of, test = order[:-300], order[-300:]
    rows = []
    for pairs in (False, True):
        for at_random in (True, False):
            rng = np.random.default_rng([seed, pairs])
            answers: list[tuple[Any, ...]] = []
            reasons: list[bool] = []
            seen: set[int] = set()
            taste = Taste(space, Answers.of())
            while len(answers) < SIZES[-1]:
                fresh = np.array([row for row in asked_of if row not in seen])
                questions = choose(
                    taste, fresh, len(worth), LEARN_EVERY, pairs=pairs, rng=rng, at_random=at_random or len(answers) < FIRST_BY_CHANCE
                )
                if not questions:
                    break
                for question in questions:
                    seen.update(question.pictures)
                    felt = worth[list(question.pictures)] + NOISE * rng.normal(size=len(question.pictures))
                    value = choice_of(felt) if pairs else float(np.clip(round(1.2 * felt[0] + 3), 1, 5))
                    answers.append((*question.pictures, value))
                    reasons.append(question.reason == "random")
                learned = Answers.of(pairs=answers) if pairs else Answers.of(answers)
                taste = Taste(space, learned, near=taste.choices if len(answers) > 4 * LEARN_EVERY else None)
                if len(answers) in SIZES:
                    row = {
                        "score": score,
                        "seed": seed,
                        "mode": "pairs" if pairs else "stars",
                        "order": "random" if at_random else "chosen",
                    }
                    row |= {"answers": len(answers), "true_srcc": rank_correlation(taste.means(test), worth[test])}
                    if not pairs:  # what the page says of itself, and the same figure on new answers of this person
                        page = measure_progress(
                            space,
                            learned,
                            taste.choices,
                            at_random=np.array(reasons),
                            ahead=np.full(len(answers), np.nan),
                            repeats=np.zeros((0, 2)),
                        )
                        new = np.clip(np.round(1.2 * (worth[test] + NOISE * rng.normal(size=len(test))) + 3), 1, 5)
                        row |= {"page": None if page.held_out is None else page.held_out.to_list()}
                        row |= {"on_new_answers": rank_correlation(taste.means(test), new)}
                    rows.append(row)
    return rows


def curve_table(rows: Sequence[dict[str, Any]]) -> str:
    """Mean of the true rank correlation over scores and seeds, and a 95 % interval of that mean."""
    lines = []
    for mode in ("stars", "pairs"):
        for order in ("random", "chosen"):
            cells = []
            for size in SIZES:
                values = [r["true_srcc"] for r in rows if (r["mode"], r["order"], r["answers"]) == (mode, order, size)]
                half = 1.96 * np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
                cells.append(f"{np.mean(values):.3f} ± {half:.3f}" if values else "")
            lines.append([mode, order, *cells])
    honest = [r["page"][1] <= r["on_new_answers"] <= r["page"][2] for r in rows if r.get("page")]
    said = f"\n\nThe page's interval holds the figure on new answers in {sum(honest)} of {len(honest)} cases." if honest else ""
    return markdown_table(["mode", "order", *SIZES], lines) + said


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("part", choices=("session", "curves"))
    parser.add_argument("--scores", nargs="+", choices=list(SCORES), default=["brightness", "size", "warmth"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--mode", choices=("stars", "pairs"), default="stars", help="of a session's answers")
    parser.add_argument("--ratings", type=int, default=60)
    parser.add_argument("--pictures", type=int, default=160, help="that a session waits for; of curves, those of the project in --folder")
    parser.add_argument("--scorer_steps", type=int, default=None)
    parser.add_argument("--train_steps", type=int, default=None)
    parser.add_argument("--weights", nargs="+", type=float, default=[-1.0, 0.0, 1.0], help="that a session measures the slider at")
    parser.add_argument("--folder", type=Path, default=ROOT / "output" / "rating_benchmark")
    parser.add_argument("--chromium", default=CHROMIUM)
    parser.add_argument("--output", type=Path, default=None, help="JSON file of the results; not set: in benchmarks/results")
    parser.add_argument("--shots", type=Path, default=None, help="folder for screenshots of a session")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for score in args.scores:
        for seed in args.seeds:
            rows += [session(score, seed, args)] if args.part == "session" else curves(score, seed, Project(args.folder))
            (args.output or RESULTS / f"rating_{args.part}.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
            print(json.dumps(rows[-1]), flush=True)
    if args.part == "curves":
        print(curve_table(rows))


if __name__ == "__main__":
    main()
