"""train_leco_score.py with each term, alone and mixed, on tiny models: it runs, it learns, it resumes to the bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from library.errors import UserError
from library.training.tracking import read_metrics
from tests.helpers.pictures import save_picture
from tests.helpers.tiny_leco_run import make_workplace, run

# The shapes of sections 2.1 and 2.2 of sd-scripts' docs/train_leco.md, at a tiny model's size.
LECO_FILES = {
    "erase": """
[[prompts]]
target = "a red circle"
positive = "a red circle"
unconditional = ""
neutral = ""
action = "erase"
guidance_scale = 1.0
resolution = 64
batch_size = 1
multiplier = 1.0
weight = 1.0
""",
    "slider": """
guidance_scale = 1.5
resolution = 64
neutrals = ["", "a photo of a circle"]

[[targets]]
target_class = "a circle"
positive = "a big circle"
negative = "a small circle"
multiplier = 1.0
weight = 1.0
""",
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_workplace(tmp_path_factory.mktemp("terms"))
    for name, text in LECO_FILES.items():
        (folder / f"{name}.toml").write_text(text, encoding="utf-8")
    (folder / "anchors.txt").write_text("a tree\n", encoding="utf-8")
    for seed, side in enumerate(("positive", "negative")):
        save_picture(folder / "pairs" / side / "one.png", seed=seed)
    save_picture(folder / "pictures" / "one.png")
    return folder


def run_terms(workplace: Path, output_dir: Path, **changes: Any) -> Path:
    return run(workplace, output_dir, **{"scorer": [], "prompts_file": "", "network_alpha": 2.0, **changes})


def trained(path: Path) -> float:
    """How far the LoRA's outer matrices are from the zeros that they began at."""
    return max(tensor.abs().max().item() for name, tensor in load_file(path).items() if "lora_up" in name)


def numbers(output_dir: Path) -> list[dict[str, float]]:
    return [{name: value for name, value in line.items() if value is not None} for line in read_metrics(output_dir / "tiny.metrics.jsonl")]


@pytest.mark.parametrize("name", list(LECO_FILES))
def test_a_leco_file_runs_unchanged_without_a_scorer(workplace: Path, tmp_path: Path, name: str) -> None:
    """Nothing but prompts_file says that it is LECO, as with train_leco.py."""
    path = run_terms(workplace, tmp_path, prompts_file=str(workplace / f"{name}.toml"))
    assert trained(path) > 0
    last = numbers(tmp_path)[-1]
    assert last["mse"] > 0 and last["shift"] > 0


def test_every_term_in_one_run(workplace: Path, tmp_path: Path) -> None:
    path = run_terms(
        workplace,
        tmp_path,
        objective=["score", "leco", "image_pairs", "images"],
        scorer=[str(workplace / "scorer.safetensors")],
        prompts_file=str(workplace / "prompts.txt"),
        leco_prompts_file=str(workplace / "slider.toml"),
        image_pairs=str(workplace / "pairs"),
        images_dir=str(workplace / "pictures"),
        anchor_prompts_file=str(workplace / "anchors.txt"),
        objective_weights=["images=0.5", "leco=2"],
        resolution=[64],
    )
    assert trained(path) > 0
    for metrics in numbers(tmp_path):
        losses = {name: metrics[f"{name}/loss"] for name in ("score", "leco", "image_pairs", "images", "anchors")}
        expected = losses["score"] + 2 * losses["leco"] + losses["image_pairs"] + 0.5 * losses["images"] + losses["anchors"]
        assert metrics["loss"] == pytest.approx(expected, rel=1e-5)


def test_pictures_alone(workplace: Path, tmp_path: Path) -> None:
    for objective, source in (("images", {"images_dir": "pictures"}), ("image_pairs", {"image_pairs": "pairs"})):
        settings = {name: str(workplace / folder) for name, folder in source.items()}
        path = run_terms(
            workplace, tmp_path / objective, objective=[objective], eval_prompts_file=str(workplace / "prompts.txt"), **settings
        )
        assert trained(path) > 0


def test_a_mixed_run_resumes_to_the_bit(workplace: Path, tmp_path: Path) -> None:
    settings = {
        "objective": ["score", "leco"],
        "scorer": [str(workplace / "scorer.safetensors")],
        "prompts_file": str(workplace / "prompts.txt"),
        "leco_prompts_file": str(workplace / "slider.toml"),
        "anchor_prompts_file": str(workplace / "anchors.txt"),
        "resolution": [64],
    }
    whole = run_terms(workplace, tmp_path / "whole", max_train_steps=3, save_every_n_steps=1, save_state=True, **settings)
    state = next(path for path in sorted((tmp_path / "whole").iterdir()) if path.is_dir() and "step00000001" in path.name)
    resumed = run_terms(workplace, tmp_path / "resumed", max_train_steps=3, resume=str(state), **settings)
    first, second = load_file(whole), load_file(resumed)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": ["leco"]}, "leco"),
        ({"objective": ["images"]}, "set images_dir"),
        ({"objective": ["image_pairs"]}, "set image_pairs"),
        ({"objective": ["leco"], "prompts_file": "prompts.txt"}, "ends in '.txt'; tables of prompts end in .toml"),
    ],
)
def test_a_term_without_what_it_learns_from_is_refused(workplace: Path, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    if "prompts_file" in settings:
        settings = settings | {"prompts_file": str(workplace / settings["prompts_file"])}
    with pytest.raises(UserError, match=message):
        run_terms(workplace, tmp_path, **settings)
