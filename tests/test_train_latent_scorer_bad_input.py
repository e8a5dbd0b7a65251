"""How train_latent_scorer.py refuses bad input, and what it does about what cannot be learned from."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import train_latent_scorer
from library.errors import UserError
from library.scorer_training.criteria.regression import SquaredError
from library.scorers.heads import HeadSpec
from library.scorers.io import load_scorer
from library.training.output_files import only_process
from tests.helpers.tiny_scorer_run import make_workplace, train, write_mixture


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("scorer"))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"learning_rate": 1e20, "max_grad_norm": 0, "lr_warmup_steps": 0}, "training pictures are not finite; lower learning_rate"),
        (
            {"learning_rate": 1e20, "max_grad_norm": 0, "lr_warmup_steps": 0, "max_train_steps": 20, "validate_every_n_steps": 20},
            r"step \d+: the score loss of picture .*\.png was not finite, .* no scorer was written; lower learning_rate",
        ),
        ({"validation_folds": 1}, "validation_folds is 1, but it must be 0 for none, or 2 at least"),
        ({"validation_folds": 50}, "has 96 pictures that can be used, which are too few to learn from; rate 100 at least"),
        ({"marks_worth": (0.8, 0.6)}, "marks_worth is 0.8 0.6, but it is a correlation and the ends of its interval"),
        ({"marks_worth": (0.5, 0.6, 0.9)}, "marks_worth is 0.5 0.6 0.9"),
        ({"image_dir": "."}, r"dataset score has no picture that can be used \(.*there is no picture"),
        ({"vae": "no/such/folder"}, "no/such/folder"),
        ({"train_data_file": "none.csv"}, "none.csv"),
        ({"scorer_size": "huge"}, "no size 'huge'"),
        ({"scorer_kind": "latent_mlp"}, "scorer_kind is 'latent_mlp'"),
        ({"criterion": "clasification"}, "criterion is 'clasification'"),
        ({"criterion": "pairwise"}, "pair"),
        ({"criterion": "emd"}, "votes"),
        ({"scorer_args": ["colour=blue"]}, "no 'colour'"),
        ({"scorer_args": ["dropout=0,1"]}, "scorer_args is dropout=0,1, of which no latent_resnet can be built .*give other values"),
        ({"scorer_args": ["norm_groups=-1"]}, "scorer_args is norm_groups=-1, of which no latent_resnet can be built .*give other values"),
        ({"scorer_kind": "latent_vit", "scorer_args": ["patch=0"]}, "scorer_args is patch=0, of which no latent_vit can be built"),
        ({"optimizer_type": "Adamm"}, "optimizer_type is 'Adamm'"),
        ({"dataset_config": "d.toml"}, "both set"),
        ({"target_class": "red", "criterion": "classification"}, "red"),
        ({"backbone_weights": "none.safetensors"}, "there is no scorer file"),
        ({"validation_split": 0}, "validation_split is 0"),
        ({"clean_fraction": 1.5}, "clean_fraction is 1.5"),
        ({"vae": None}, "pretrained_model_name_or_path is not set"),
        ({"train_data_file": None}, "train_data_file is not set"),
        ({"train_data_file": None, "dataset_config": "d.toml", "criterion": "mse"}, "criterion is set, but the mixture"),
        ({"criterion": "masked"}, "masked gives no score"),
        ({"pretrain_steps": 2000}, "pretrain_steps is set, but nothing is pretrained"),
        ({"pretrain_criterion": "classification"}, "pretrain_criterion is set, but nothing is pretrained"),
        ({"pretrain_data_file": "d.toml", "pretrain_criterion": "mse"}, "pretrain_criterion is set, but the mixture"),
        ({"score_head": "score"}, "unknown option 'score_head'"),
    ],
)
def test_bad_input_is_one_sentence(workplace: Path, tmp_path: Path, changes: dict, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint) as caught:
        train(workplace, tmp_path, **changes)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_constant_score_and_a_folder_that_is_none(workplace: Path, tmp_path: Path) -> None:
    rows = [f"{index}.png,5,{'val' if index % 4 == 0 else 'train'}" for index in range(96)]
    (workplace / "constant.csv").write_text("\n".join(["path,score,split", *rows]), encoding="utf-8")
    with pytest.raises(UserError, match="all 72 training scores of dataset score are 5"):
        train(workplace, tmp_path, train_data_file=workplace / "constant.csv")
    rows = [f"{index}.png,{index % 4},{'val' if index % 4 == 0 else 'train'}" for index in range(96)]
    (workplace / "constant.csv").write_text("\n".join(["path,score,split", *rows]), encoding="utf-8")
    with pytest.raises(UserError, match="all 24 validation scores of dataset score are 0, so no state of the scorer can be told"):
        train(workplace, tmp_path, train_data_file=workplace / "constant.csv")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not be written .*file is a file"):
        train(workplace, tmp_path / "file")


def test_a_table_without_rows_and_one_without_scores(workplace: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for rows, why in (("", "its source is empty"), ("0.png,good", "line 2: score 'good' is not a finite number")):
        (tmp_path / "ratings.csv").write_text(f"path,score\n{rows}\n", encoding="utf-8")
        with pytest.raises(UserError, match=rf"dataset score has no picture that can be used \(.*{why}\)"):
            train(workplace, tmp_path, train_data_file=tmp_path / "ratings.csv", image_dir=workplace, validation_split=0.3)
    assert "validation_split" not in caplog.text


def test_a_folder_that_cannot_be_made_is_named_with_the_result(workplace: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="scorer.safetensors could not be written"):
        train(workplace, tmp_path / "file" / "out")


def test_a_second_training_of_the_same_name_is_refused(workplace: Path, tmp_path: Path) -> None:
    with only_process(tmp_path / ".scorer.lock", "it"), pytest.raises(UserError, match="scorer in .* is trained by process"):
        train(workplace, tmp_path)


def test_the_command_ends_with_two_and_one_line(refused: Callable[..., str]) -> None:
    assert "learning_rate" in refused(train_latent_scorer.main, *["--vae", "x", "--train_data_file", "y.csv", "--learning_rat", "1"])


def test_a_picture_that_gives_no_finite_loss_does_not_count(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    losses, ratings = SquaredError.losses, (workplace / "ratings.csv").read_text(encoding="utf-8").splitlines()[1:]
    high = sorted(float(row.split(",")[1]) for row in ratings)[-10]

    def broken(self: SquaredError, outputs: Tensor, targets: Tensor, head: HeadSpec) -> Tensor:
        return torch.where(targets >= high, torch.inf, 1.0) * losses(self, outputs, targets, head)

    monkeypatch.setattr(SquaredError, "losses", broken)
    scorer = load_scorer(train(workplace, tmp_path))
    assert all(tensor.isfinite().all() for tensor in scorer.state_dict().values())
    said = [record.getMessage() for record in caplog.records if "is not finite, so" in record.getMessage()]
    assert 1 <= len(said) <= 6
    pattern = r"step \d: the score loss of picture .*\.png is not finite, so (this|\d) samples? do(es)? not count"
    assert all(re.fullmatch(pattern, text) for text in said)


def test_a_dataset_from_which_nothing_can_be_learned_is_left_out_unless_it_is_the_score(
    workplace: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one_class = ('criterion = "classification"\ntarget_class = "dark"', 'criterion = "classification"\ntarget_class = "green"')
    mixture = write_mixture(workplace, tmp_path / "mixture.toml", one_class)
    settings = {"train_data_file": None, "dataset_config": mixture, "max_train_steps": 1}
    scorer = load_scorer(train(workplace, tmp_path, **settings))
    assert [head.name for head in scorer.spec.heads] == ["bright", "words", "pairs"]
    assert "dataset backdrop is left out" in caplog.text and "green" in caplog.text
