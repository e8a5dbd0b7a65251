"""What the Train button of the page writes is what the three scripts read: for stars, for pairs and for both, on two models."""

from pathlib import Path

import pytest

from library.errors import UserError
from library.rating import runs
from library.rating.runs import Runs
from library.rating.store import Rating
from library.scorer_data.records import RatedImage, RatedPair
from library.scorer_training.config import LatentScorerConfig
from library.scorer_training.dataset_config import Dataset
from library.settings.cli import parse_config
from tests.helpers.rating_project import drawn_project
from tools.evaluate_slider import EvaluateSliderConfig
from tools.rate import RateConfig, make_recipe
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
    with pytest.raises(UserError, match="has 0 answers; give at least 20"):
        Runs(project, recipe).start(beauty)
    answers = [Rating(token=f"s{n}", mode="stars", first=n, value=1 + n % 5) for n in range(1, 25) if "stars" in modes]
    answers += [Rating(token=f"p{n}", mode="pair", first=n, second=n + 1, value=n % 3 / 2) for n in range(1, 25) if "pair" in modes]
    project.add_ratings(beauty, answers)
    folder = Runs(project, recipe).start(beauty)
    assert folder.name == "my-beauty-1"

    scorer = parse_config(LatentScorerConfig, ["--config_file", str(folder / "scorer.toml")])
    datasets = scorer.data.datasets()
    assert [dataset.criterion for dataset in datasets] == [{"stars": "ordinal", "pair": "pairwise"}[mode] for mode in modes]
    assert [count_of(dataset) for dataset in datasets] == [24] * len(modes)
    slider = parse_config(leco_score_config(), ["--config_file", str(folder / "slider.toml")])
    assert slider.saving.save_state and str(slider.saving.resume) == "auto"
    check = parse_config(EvaluateSliderConfig, ["--config_file", str(folder / "check.toml")])
    assert check.evaluation.network_weights == (str(folder / "slider" / "slider.safetensors"),)


def count_of(dataset: Dataset) -> int:
    from library.scorer_training.criteria.base import CRITERIA
    from library.scorer_training.tasks import _records

    [subset] = dataset.subsets
    records = list(_records(subset, CRITERIA[dataset.criterion].target))
    assert all(isinstance(record, (RatedImage, RatedPair)) for record in records)
    return len(records)
