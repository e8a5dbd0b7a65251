"""Judges are found, named and kept apart from what training follows."""

from pathlib import Path

import pytest
import torch

from library.errors import UserError
from library.measuring.judges import load_judges
from library.scorers.io import save_scorer
from tests.helpers.tiny_leco_run import foreign_vae_fingerprint, tiny_scorer
from tests.helpers.tiny_models import tiny_model

SOURCE = "def redness(pixels):\n    return pixels[:, 0].mean((1, 2))\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("judges")
    (folder / "opinions.py").write_text(SOURCE, encoding="utf-8")
    (folder / "more_opinions.py").write_text(SOURCE, encoding="utf-8")
    fingerprint = tiny_model().vae_fingerprint()
    for name in ("followed", "truth"):
        save_scorer(folder / f"{name}.safetensors", tiny_scorer(fingerprint))
    save_scorer(folder / "foreign.safetensors", tiny_scorer(foreign_vae_fingerprint()))
    return folder


def load(folder: Path, functions: list[str], files: list[str], training: tuple[str, ...] = ("followed",)):
    return load_judges(
        [str(folder / name) for name in functions],
        [str(folder / f"{name}.safetensors") for name in files],
        training_files=[str(folder / f"{name}.safetensors") for name in training],
    ).on(tiny_model())


def test_functions_and_scorers_are_found(folder: Path) -> None:
    judges = load(folder, ["opinions.py:redness"], ["truth"])
    assert judges.names == ("redness", "truth")
    pixels = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(judges.functions["redness"](pixels, ["a", "b"]), pixels[:, 0].mean((1, 2)))
    assert judges.scorers["truth"](torch.randn(2, 4, 8, 8), torch.zeros(2)).shape == (2,)


def test_a_function_that_has_a_training_scores_name_is_called_by_all_of_its_word(folder: Path) -> None:
    """As in the demonstration: the true score judges what the scorer of that name learned."""
    assert load(folder, ["opinions.py:redness"], [], ("redness",)).names == (f"{folder / 'opinions.py'}:redness",)


@pytest.mark.parametrize("path", ["followed.safetensors", "./sub/../followed.safetensors"])
def test_a_score_does_not_judge_itself(folder: Path, path: str) -> None:
    (folder / "sub").mkdir(exist_ok=True)
    with pytest.raises(UserError, match="cannot judge itself"):
        load_judges([], [f"{folder}/{path}"], training_files=[str(folder / "followed.safetensors")])


@pytest.mark.parametrize(
    ("functions", "files", "training", "message"),
    [
        (["opinions.py:redness", "more_opinions.py:redness"], [], ("followed",), "'redness' as another judge"),
        ([], ["foreign"], ("followed",), "another VAE"),
        (["opinions.py:blueness"], [], ("followed",), "blueness"),
    ],
)
def test_judges_that_cannot_be(folder: Path, functions: list[str], files: list[str], training: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(folder, functions, files, training)
