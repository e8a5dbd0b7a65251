"""dataset.toml, and the data that the command line names."""

from pathlib import Path

import pytest

from library.errors import UserError
from library.scorer_training.config import LatentScorerConfig
from library.scorer_training.dataset_config import Subset, read_dataset_config
from library.settings.cli import parse_config
from tests.helpers.tiny_scorer_run import write_mixture


def test_a_mixture_is_read_with_its_defaults(tmp_path: Path) -> None:
    first, second, *_ = read_dataset_config(write_mixture(Path("x"), tmp_path / "d.toml"))
    assert (first.name, first.criterion, first.proportion, first.weight, first.validation_split) == ("bright", "huber", 3, 1.0, 0.25)
    assert first.subsets == (Subset(path=Path("x/ratings.csv"), num_repeats=2),)
    assert (second.weight, second.target_class) == (0.5, "dark")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (('criterion = "huber"', 'criterion = "hubber"'), "dataset 1: criterion is 'hubber'"),
        (("proportion = 3", "propotion = 3"), "dataset 1: there is no key 'propotion' .did you mean 'proportion'"),
        (("proportion = 3", "proportion = 0"), "proportion is 0, but it must be above 0"),
        (("proportion = 3", "proportion = inf"), "proportion is inf, but it must be above 0 and finite"),
        (("proportion = 3", "max_tags = 2.5"), "max_tags is 2.5, but it must be a whole number"),
        (("weight = 0.5", 'weight = "much"'), "dataset 2: weight is 'much', but it must be a number"),
        (('name = "words"', 'name = "bright"'), "two datasets have the name 'bright'"),
        (('name = "words"', 'name = "my.words"'), "name is 'my.words'"),
        (('path = "{folder}/pairs.csv"', 'paths = "{folder}/pairs.csv"'), "dataset 4, subset 1 has no path"),
        (("num_repeats = 2", "num_repeats = 0"), "num_repeats is 0"),
        (("[general]", "[generl]"), "generl is not a table"),
        (("[general]", "[general"), "is not valid TOML"),
    ],
)
def test_a_bad_mixture_is_one_sentence(tmp_path: Path, change: tuple[str, str], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint) as caught:
        read_dataset_config(write_mixture(Path("x"), tmp_path / "d.toml", change))
    assert "\n" not in str(caught.value).strip()


@pytest.mark.parametrize(("in_file", "on_command_line"), [("train_data_file", "dataset_config"), ("dataset_config", "train_data_file")])
def test_the_command_lines_data_beat_the_files(tmp_path: Path, in_file: str, on_command_line: str) -> None:
    (tmp_path / "run.toml").write_text(f'vae = "x"\n{in_file} = "old.toml"\n', encoding="utf-8")
    config = parse_config(LatentScorerConfig, ["--config_file", str(tmp_path / "run.toml"), f"--{on_command_line}", "new.toml"])
    assert config.data.train_data_file == Path("new.toml")


def test_columns_are_named_on_the_command_line(tmp_path: Path) -> None:
    config = parse_config(
        LatentScorerConfig, ["--vae", "x", "--train_data_file", "x.csv", "--path_column", "file", "--score_column", "mos"]
    )
    assert config.data.datasets()[0].subsets[0].reader_options == {"path_column": "file", "score_column": "mos"}
