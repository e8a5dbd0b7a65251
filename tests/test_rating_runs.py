"""What the Train button of the page writes is what the three scripts read: for stars, for pairs and for both, on two models."""

from pathlib import Path

import pytest

from library.errors import UserError
from library.rating import runs
from library.rating.live import Gallery, LiveOpinion
from library.rating.runs import Runs
from library.rating.store import Rating
from library.scorer_data.readers.base import ReaderOptions
from library.scorer_data.readers.recognition import read_records
from library.scorer_training.config import LatentScorerConfig
from library.settings.cli import parse_config
from tests.helpers.rating_project import drawn_project
from tools.evaluate_slider import EvaluateSliderConfig
from tools.rate import EMBEDDED, RateConfig, chosen_model, found_judges, make_recipe
from train_leco_score import leco_score_config


@pytest.mark.parametrize("model", [None, "sd15.safetensors"])
@pytest.mark.parametrize("modes", [("stars",), ("pair",), ("stars", "pair")])
def test_the_written_files_are_read_by_the_scripts(modes: tuple[str, ...], model: str | None, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(runs, "launch", lambda folder: None)
    project, _ = drawn_project(tmp_path, 30)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n")
    recipe = make_recipe(RateConfig(pretrained_model_name_or_path=model, prompts_file=prompts), model or "model", prompts)
    beauty = project.add_opinion("My beauty")
    gallery = Gallery(project)
    gallery.refresh()
    with pytest.raises(UserError, match="has 0 answers; give at least 20"):
        Runs(project, recipe).start(LiveOpinion(project, gallery, beauty))
    answers = [Rating(token=f"s{n}", mode="stars", first=n, value=1 + n % 5) for n in range(1, 25) if "stars" in modes]
    answers += [Rating(token=f"p{n}", mode="pair", first=n, second=n + 1, value=n % 3 / 2) for n in range(1, 25) if "pair" in modes]
    project.add_ratings(beauty, answers)
    live = LiveOpinion(project, gallery, beauty)
    folder = Runs(project, recipe).start(live)
    assert folder.name == "my-beauty-1"

    scorer = parse_config(LatentScorerConfig, ["--config_file", str(folder / "scorer.toml")])
    [dataset] = scorer.data.datasets()
    [subset] = dataset.subsets
    marks = list(read_records(subset.path, subset.reader, ReaderOptions(target="score", image_dir=subset.image_dir)))
    assert [mark.score for mark in marks] == pytest.approx(list(live.worths()[0]), abs=1e-5) and len(marks) == 30
    assert {path.name for path in folder.glob("*.csv")} == {"marks.csv"} | {
        {"stars": "ratings.csv", "pair": "pairs.csv"}[mode] for mode in modes
    }
    assert scorer.data.marks_worth == (0, -1, 1)  # all these pictures were picked, so nothing says how well others are known
    slider = parse_config(leco_score_config(), ["--config_file", str(folder / "slider.toml")])
    assert slider.training.seed == 1  # of this run's number: the file trains the same slider again
    assert slider.saving.save_state and str(slider.saving.resume) == str(scorer.output.resume) == "auto"
    check = parse_config(EvaluateSliderConfig, ["--config_file", str(folder / "check.toml")])
    assert check.evaluation.network_weights == (str(folder / "slider" / "slider.safetensors"),)


def test_files_are_found_where_the_page_was_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("my.safetensors", "prompts.txt", "my.py"):
        Path(name).write_text("def sharp(pixels): return pixels.mean((1, 2, 3))\n")
    given = {"prompts_file": Path("prompts.txt")}
    assert chosen_model(RateConfig(pretrained_model_name_or_path="my.safetensors", **given)) == str(tmp_path / "my.safetensors")
    assert chosen_model(RateConfig(pretrained_model_name_or_path="owner/name", **given)) == "owner/name"
    assert chosen_model(RateConfig()) == str(EMBEDDED)
    assert found_judges(["my.py:sharp=stay"]) == [f"{tmp_path}/my.py:sharp=stay"]
    with pytest.raises(UserError, match="no function 'dull'"):
        found_judges(["my.py:dull"])
