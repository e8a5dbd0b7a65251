"""What the parts of the objective are for: guards, directions of prompts, several scores, words, pictures in the place of captions."""

import subprocess
import sys

from benchmarks import ROOT
from benchmarks.proofs.runs import CAPTIONS, OUTPUT, PLAIN, Row, plain_prompts, prompts, row, scorer, slider, written
from benchmarks.shapes_runs import MODEL, drawn_pictures, independent_judge, learned_from_few

# What takes the guards away: the score pushes for ever, and nothing holds the model.
UNGUARDED: Row = {"reward_loss": "linear", "preserve_weight": 0.0, "learning_rate": 3e-4}


def hacking() -> list[Row]:
    """A scorer of 100 ratings, with and without the guards, watched by independent judges; nothing stops it."""
    run = {"scorer": [str(learned_from_few(OUTPUT, "size"))], "max_train_steps": 120, "calibrate": "off", "early_stop_gain": ""}
    run |= {"judge_scorers": [str(independent_judge(OUTPUT, "size"))], "judges": [CAPTIONS]}
    rows = []
    for name, changes in {"without guards": UNGUARDED, "default guards": {}}.items():
        rows.append(row(name, slider(f"hacking_{name.replace(' ', '_')}", **run, **changes), "size_shown"))
    return rows


def opposites() -> list[Row]:
    """One file with "large" at +1 and "small" at -1: at weight +1 what is to be large is larger, and what is to be small is smaller."""
    folder, (seen, held_out) = OUTPUT / "opposites", map(plain_prompts, prompts())
    lines = [f"{_sized(text, word)} --direction {sign}" for text in seen[:64] for word, sign in (("large", 1), ("small", -1))]
    path = slider("opposites", scorer=[str(scorer("size"))], prompts_file=str(written(folder / "prompts.txt", lines)), **PLAIN)
    rows = []
    for word in ("large", "small"):
        asked = written(folder / f"held_out_{word}.txt", [_sized(text, word) for text in held_out[:32]])
        rows.append(row(f"prompts that say {word}", path, "size", prompts_file=asked))
    return rows


def two_scores() -> list[Row]:
    """One score raised, another held, with and without the hold."""
    rows = []
    for raised, held in (("size", "brightness"), ("brightness", "size")):
        files = [str(scorer(raised)), str(scorer(held, name=f"{held}_held"))]
        arms: dict[str, Row] = {
            f"{raised} alone": {"scorer": files[:1]},
            f"{raised}, {held} held": {"scorer": files, "scorer_limits": ["none", "hold=0.1"]},
        }
        for name, changes in arms.items():
            path = slider(f"two_scores_{name.replace(', ', '_').replace(' ', '_')}", **PLAIN, **changes)
            rows.append(row(name, path, raised, other=held))
    return rows


def text_free() -> list[Row]:
    """A slider that learned on pictures without captions, and the same on written prompts."""
    clip, adapter = OUTPUT / "clip", OUTPUT / "text_free" / "adapter.safetensors"
    rated = scorer("brightness")
    pictures = drawn_pictures(OUTPUT / "pictures_brightness_0", 2000, "brightness", 0).parent / "images"
    if not (clip / "captions.txt").is_file():
        run("-m", "examples.shapes.train_clip", "--output_dir", clip)
    if not adapter.is_file():
        files = ["--pretrained_model_name_or_path", MODEL, "--clip_model", clip, "--prompts_file", clip / "captions.txt"]
        files += ["--pictures", pictures, "--num_pictures", 500, "--output", adapter, "--num_threads", 1]
        recipe = ["--adapter_width", 256, "--max_train_steps", 200, "--learning_rate", 5e-4, "--guidance_scale", 3]
        run("tools/train_image_prompt_adapter.py", *files, *recipe)
    seen: Row = {"image_prompts": str(pictures), "image_prompt_adapter": str(adapter), "clip_model": str(clip)}
    rows = []
    for name, changes in {"pictures without captions": seen, "written prompts": {}}.items():
        path = slider(f"text_free_{name.partition(' ')[0]}", scorer=[str(rated)], **PLAIN, **changes)
        rows.append(row(name, path, "brightness"))
    return rows


def run(*words: object) -> None:
    """Another program of the repository, with this Python."""
    subprocess.run([sys.executable, *map(str, words)], check=True, cwd=ROOT)


LECO_FILE = """# As in the documentation of sd-scripts' train_leco.py: a slider in words.
[[targets]]
target_class = "{target}"
positive = "{positive}"
negative = "{negative}"
guidance_scale = 1.5
resolution = 64
multiplier = 1.0
weight = 1.0
"""


def leco() -> list[Row]:
    """A slider from words alone (small against large), from a score alone, and from both at once, on the same prompts.

    The score's preserve_weight of 3 holds the model against the words, too, so the words are given a weight of 4 beside it.
    """
    folder, (seen, held_out) = OUTPUT / "leco", map(plain_prompts, prompts())
    file, asked = written(folder / "prompts.txt", seen[:24]), written(folder / "held_out.txt", held_out[:16])
    texts = [LECO_FILE.format(target=text, positive=_sized(text, "large"), negative=_sized(text, "small")) for text in seen[:24]]
    words = {"leco_prompts_file": str(written(folder / "size.toml", texts))}
    bright = {"scorer": [str(scorer("brightness"))], "prompts_file": str(file)}
    rows = []
    for name, changes in {
        "words: size": {"prompts_file": str(folder / "size.toml"), "objective": ["leco"], "scorer": []},
        "score: brightness": bright,
        "both": {**words, **bright, "objective": ["score", "leco"], "objective_weights": ["leco=4"]},
    }.items():
        path = slider(f"leco_{name.replace(': ', '_')}", **PLAIN, **changes)
        rows.append(row(name, path, "size", other="brightness", prompts_file=asked, count=16, seeds=4))
    return rows


def _sized(text: str, word: str) -> str:
    """ "a red circle" -> "a large red circle"; "red circle" -> "large red circle"."""
    article, _, rest = text.partition(" ")
    return f"a {word} {rest}" if article in ("a", "an") else f"{word} {text}"
