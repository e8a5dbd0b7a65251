"""Training a scorer: the parts against analytic answers, and the whole script on a handful of pictures."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.training_utils import EMAModel
from scipy import stats
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

import train_latent_scorer
from examples.shapes.pictures import to_pixels
from examples.shapes.scores import brightness
from examples.shapes.world import draw, random_scene
from library.cli import run_main
from library.config import build
from library.errors import UserError
from library.scorer_losses import CRITERIA, classification_metrics, criteria_of, regression_metrics, score_scale
from library.scorer_training import (
    TABLE_SIGMAS,
    Classifier,
    add_noise,
    averaged,
    check_loss,
    draw_sigmas,
    format_table,
    make_optimizer,
    selection_value,
    standard_schedule,
    validate,
)
from library.scorers.io import load_scorer
from library.scorers.latent_resnet import LatentResNet
from library.tracking import read_metrics
from tests.tiny_models import tiny_vae

SCHEDULE = standard_schedule()


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- criteria ------------------------------------------------------------------------------------------------------------


def test_losses_equal_torchs() -> None:
    outputs, targets = torch.randn(8, generator=rng()) * 3, torch.randn(8, generator=rng(1)) * 3
    mse, huber = (CRITERIA[name].loss(outputs, targets, 2.0) for name in ("mse", "huber"))
    torch.testing.assert_close(mse, nn.MSELoss(reduction="none")(outputs / 2, targets / 2))
    torch.testing.assert_close(huber, nn.HuberLoss(reduction="none")(outputs / 2, targets / 2))
    logits, classes = torch.randn(8, 3, generator=rng()), torch.arange(8) % 3
    smoothed = nn.CrossEntropyLoss(reduction="none", label_smoothing=0.1)(logits, classes)
    torch.testing.assert_close(CRITERIA["classification"].loss(logits, classes, 1.0), smoothed)


@pytest.mark.parametrize("name", CRITERIA)
def test_every_criterion_gives_one_loss_a_picture_and_its_selection_metric(name: str) -> None:
    criterion = CRITERIA[name]
    outputs = torch.randn(6, generator=rng()) if criterion.target == "score" else torch.randn(6, 4, generator=rng())
    targets = torch.randn(6, generator=rng(1)) if criterion.target == "score" else torch.arange(6) % 4
    assert criterion.loss(outputs, targets, 1.5).shape == (6,)
    assert criterion.selection in criterion.metrics(outputs, targets)
    assert name in criteria_of(criterion.target)


def test_regression_metrics_equal_scipys_with_ties() -> None:
    outputs, targets = torch.randn(200, generator=rng()), torch.randint(0, 5, (200,), generator=rng(1)).float()
    outputs += targets
    metrics = regression_metrics(outputs, targets)
    assert metrics["srcc"] == pytest.approx(np.asarray(stats.spearmanr(outputs.numpy(), targets.numpy()))[0])
    assert metrics["plcc"] == pytest.approx(np.asarray(stats.pearsonr(outputs.numpy(), targets.numpy()))[0], rel=1e-5)
    assert metrics["rmse"] == pytest.approx(nn.MSELoss()(outputs, targets).sqrt().item(), rel=1e-5)
    assert regression_metrics(torch.ones(4), torch.arange(4.0))["srcc"] == 0


def test_classification_metrics() -> None:
    outputs = torch.tensor([[6.0, 5, 4, 3, 2, 1, 0]] * 4)
    assert classification_metrics(outputs, torch.tensor([0, 0, 4, 6])) == {"top1": 0.5, "top5": 0.75}
    assert classification_metrics(outputs[:, :2], torch.tensor([0, 1, 1, 1])) == {"top1": 0.25, "top5": 1.0}


def test_score_scale() -> None:
    assert score_scale(torch.tensor([1.0, 3.0])) == (2.0, 1.0)
    with pytest.raises(UserError, match="all 3 training scores are 7"):
        score_scale(torch.tensor([7.0, 7.0, 7.0]))


# -- noise ---------------------------------------------------------------------------------------------------------------


def test_sigmas_are_clean_in_the_given_share_and_else_at_uniform_timesteps() -> None:
    sigmas = draw_sigmas(4000, 0.25, SCHEDULE, rng())
    assert (sigmas == 0).sum() == 1000
    timesteps = SCHEDULE.timesteps_of(sigmas[sigmas > 0])
    counts = torch.histc(timesteps, bins=10, min=0, max=1000)
    assert counts.min() >= 295 and counts.max() <= 305  # stratified: a plain draw would spread by 16
    assert sigmas.max() <= SCHEDULE.sigmas(torch.tensor([999]))[0]
    assert (draw_sigmas(64, 1.0, SCHEDULE, rng()) == 0).all() and (draw_sigmas(64, 0.0, SCHEDULE, rng()) > 0).all()
    assert not torch.equal(sigmas, sigmas.sort().values)


def test_noise_is_the_schedules() -> None:
    latents, timesteps = torch.randn(3, 4, 8, 8, generator=rng(1)), torch.tensor([0, 500, 999])
    noise = torch.randn(latents.shape, generator=rng())
    noisy = add_noise(latents, SCHEDULE.sigmas(timesteps), rng())
    torch.testing.assert_close(noisy, SCHEDULE.add_noise(latents, noise, timesteps), rtol=1e-4, atol=1e-5)
    assert torch.equal(add_noise(latents, torch.zeros(3), rng()), latents)


# -- the loop's parts ----------------------------------------------------------------------------------------------------


def test_norms_and_biases_do_not_decay() -> None:
    backbone = LatentResNet(in_channels=4, channels=[8, 16], blocks=1, norm_groups=4)
    optimizer, lr_scheduler = make_optimizer(Classifier(backbone, 3), 1e-3, 0.05, 2, 10)
    decayed, spared = optimizer.param_groups
    norms = [module for module in backbone.modules() if isinstance(module, (nn.GroupNorm, nn.LayerNorm))]
    spared_ids = {id(parameter) for parameter in spared["params"]}
    assert decayed["weight_decay"] == 0.05 and spared["weight_decay"] == 0
    assert norms and all(id(norm.weight) in spared_ids and id(norm.bias) in spared_ids for norm in norms)
    assert all(parameter.ndim > 1 for parameter in decayed["params"])
    assert len(decayed["params"]) + len(spared["params"]) == len(list(Classifier(backbone, 3).parameters()))


def test_averaged_weights_are_lent_for_the_block_only() -> None:
    model = nn.Linear(2, 1)
    ema = EMAModel(model.parameters(), decay=0.5)
    before = model.weight.detach().clone()
    with torch.no_grad():
        model.weight += 1
    with pytest.raises(RuntimeError), averaged(model, ema):
        assert torch.equal(model.weight, before) and not model.training
        raise RuntimeError
    assert torch.equal(model.weight, before + 1) and model.training


class FewLatents:
    """Stands in for a LatentDataset: the score is the mean of the latents."""

    def __init__(self, count: int = 64) -> None:
        self.latents = torch.randn(count, 4, 8, 8, generator=rng(5)) * 0.3 + torch.linspace(-1, 1, count).view(-1, 1, 1, 1)

    def in_order(self, batch_size: int):  # noqa: ANN201
        from library.scorer_data.batches import LatentBatch

        for latents in self.latents.split(batch_size):
            yield LatentBatch(latents, latents.mean((1, 2, 3)), torch.ones(len(latents)))


def predict_mean(latents: Tensor, sigmas: Tensor) -> Tensor:
    return latents.mean((1, 2, 3)) * (1 + sigmas**2).sqrt()


def test_validation_measures_each_noise_level_with_the_same_noise() -> None:
    data = FewLatents()
    table = validate(predict_mean, data, CRITERIA["mse"], batch_size=10)  # type: ignore[arg-type]
    assert [row["sigma"] for row in table] == list(TABLE_SIGMAS)
    assert table[0]["srcc"] == pytest.approx(1) and table[0]["rmse"] == pytest.approx(0, abs=1e-6)
    for row in table[1:]:  # the mean of 256 values with noise of standard deviation sigma
        assert row["rmse"] == pytest.approx(row["sigma"] / 16, rel=0.3)
    assert table == validate(predict_mean, data, CRITERIA["mse"], batch_size=10)  # type: ignore[arg-type]
    assert "RMSE" in format_table(table) and len(format_table(table).splitlines()) == 1 + len(TABLE_SIGMAS)


def test_the_best_is_good_on_clean_and_on_noisy_latents() -> None:
    table = [{"sigma": 0.0, "srcc": 0.8}, {"sigma": 1.0, "srcc": 0.6}, {"sigma": 5.0, "srcc": 0.2}]
    assert selection_value(table, CRITERIA["mse"]) == pytest.approx(0.5 * 0.8 + 0.5 * 0.4)


def test_a_loss_that_is_not_finite_names_its_step() -> None:
    check_loss(torch.tensor(1.0), 3)
    with pytest.raises(UserError, match="step 4: the loss is nan"):
        check_loss(torch.tensor(float("nan")), 3)


# -- the script ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random VAE, 96 small pictures with their brightness and their background."""
    folder = tmp_path_factory.mktemp("scorer")
    draws, rows = random.Random(0), []
    for index in range(96):
        scene = random_scene(draws, (64, 64))
        picture = draw(scene).resize((32, 32))
        picture.save(folder / f"{index}.png")
        score = brightness((to_pixels([picture]) + 1) / 2).item()
        rows.append(f"{index}.png,{score},{scene.background},{'val' if index % 4 == 0 else 'train'}")
    (folder / "ratings.csv").write_text("\n".join(["path,score,label,split", *rows]), encoding="utf-8")
    tiny_vae().save_pretrained(folder / "vae")
    return folder


def train(workplace: Path, output_dir: Path, **changes: object) -> Path:
    values = {
        "vae": workplace / "vae",
        "train_data_file": workplace / "ratings.csv",
        "output_dir": output_dir,
        "cache_dir": workplace / "cache",
        "resolution": 32,
        "enable_bucket": False,
        "scorer_size": "tiny",
        "max_train_steps": 6,
        "train_batch_size": 8,
        "lr_warmup_steps": 2,
        "validate_every_n_steps": 3,
        **changes,
    }
    return train_latent_scorer.train(build(train_latent_scorer.LatentScorerConfig, values))


def pool(_vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Latents that hold the colours, which those of a random VAE hardly do."""
    return torch.cat([avg_pool2d(pixels, 8), torch.zeros(len(pixels), 1, pixels.shape[2] // 8, pixels.shape[3] // 8)], dim=1)


def test_it_learns_and_the_file_says_how_well(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train_latent_scorer, "encode_images", pool)
    path = train(workplace, tmp_path, cache_dir=None, max_train_steps=60, train_batch_size=16, validate_every_n_steps=30)
    scorer = load_scorer(path)
    table = scorer.spec.training["validation"]
    assert [row["sigma"] for row in table] == list(TABLE_SIGMAS)
    assert table[0]["srcc"] > 0.8 and table[0]["srcc"] > table[-1]["srcc"]
    assert scorer.spec.noise_aware and scorer.spec.training["pictures"] == {"train": 72, "validation": 24}
    assert format_table(table) in capsys.readouterr().out
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == list(range(60))


def test_the_same_seed_gives_the_same_bits(workplace: Path, tmp_path: Path) -> None:
    first, second, other = (load_scorer(train(workplace, tmp_path / name, seed=seed)) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    weights, again, different = (scorer.state_dict() for scorer in (first, second, other))
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert not all(torch.equal(weights[name], different[name]) for name in weights)
    assert first.spec.training["validation"] == second.spec.training["validation"]


def test_labels_first_and_a_backbone_to_start_from(workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = train(workplace, tmp_path / "a", pretrain_data_file=workplace / "ratings.csv", pretrain_steps=4, output_name="bright")
    pretraining = load_scorer(path).spec.training["pretraining"]
    assert set(pretraining["validation"][0]) == {"sigma", "top1", "top5"} and pretraining["steps"] == 4
    assert "TOP5" in capsys.readouterr().out
    assert [record["step"] for record in read_metrics(tmp_path / "a" / "metrics.jsonl")] == list(range(10))

    still = {"learning_rate": 1e-12, "weight_decay": 0.0}
    start = load_scorer(train(workplace, tmp_path / "b", backbone_weights=path.with_name("bright-backbone.safetensors"), **still))
    other = load_scorer(train(workplace, tmp_path / "c", **still))
    from safetensors.torch import load_file

    backbone = load_file(path.with_name("bright-backbone.safetensors"))
    assert all(torch.allclose(start.state_dict()[f"backbone.{name}"], tensor, atol=1e-5) for name, tensor in backbone.items())
    assert not torch.allclose(other.state_dict()["backbone.stem.weight"], backbone["stem.weight"], atol=1e-5)


def test_a_scorer_that_saw_no_noise_says_so(workplace: Path, tmp_path: Path) -> None:
    assert load_scorer(train(workplace, tmp_path, clean_fraction=1.0)).spec.noise_aware is False


def test_a_picture_weighs_what_its_row_says(workplace: Path, tmp_path: Path) -> None:
    lines = (workplace / "ratings.csv").read_text(encoding="utf-8").splitlines()
    (workplace / "weighted.csv").write_text("\n".join([lines[0] + ",weight", *(line + ",3" for line in lines[1:])]), encoding="utf-8")
    plain, weighted = (
        load_scorer(train(workplace, tmp_path / name, train_data_file=workplace / f"{name}.csv", max_grad_norm=0, max_train_steps=1))
        for name in ("ratings", "weighted")
    )
    # AdamW does not feel a common factor, but for its epsilon: the same weights in the end, through another loss
    close = [torch.allclose(plain.state_dict()[name], tensor, atol=1e-4) for name, tensor in weighted.state_dict().items()]
    assert all(close)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"learning_rate": 1e20, "max_grad_norm": 0, "lr_warmup_steps": 0}, r"step \d+: the loss is (nan|inf)"),
        ({"vae": "no/such/folder"}, "no/such/folder"),
        ({"train_data_file": "none.csv"}, "there is no data file none.csv"),
        ({"scorer_size": "huge"}, "no size 'huge'"),
        ({"scorer_kind": "latent_mlp"}, "no scorer kind 'latent_mlp'"),
        ({"criterion": "classification"}, "criterion is 'classification'"),
        ({"backbone_weights": "none.safetensors"}, "there is no scorer file"),
        ({"validation_split": 0}, "validation_split is 0"),
        ({"clean_fraction": 1.5}, "clean_fraction is 1.5"),
        ({"vae": None}, "pretrained_model_name_or_path is not set"),
        ({"train_data_file": None}, "train_data_file is not set"),
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
    with pytest.raises(UserError, match="all 72 training scores are 5"):
        train(workplace, tmp_path, train_data_file=workplace / "constant.csv")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written to"):
        train(workplace, tmp_path / "file")


def test_the_command_ends_with_two_and_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["train_latent_scorer.py", "--vae", "x", "--train_data_file", "y.csv", "--learning_rat", "1"])
    with pytest.raises(SystemExit) as caught:
        run_main(train_latent_scorer.main)
    assert caught.value.code == 2 and "learning_rate" in capsys.readouterr().err
