"""Training a scorer: the parts against analytic answers, and the whole script on a handful of pictures."""

import logging
import os
import random
import re
import signal
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

import train_latent_scorer
from examples.shapes.pictures import to_pixels
from examples.shapes.scores import brightness
from examples.shapes.world import draw, random_scene
from library.atomic_files import only_process
from library.errors import UserError
from library.scorer_data import encoding
from library.scorer_data.batches import LatentBatch
from library.scorer_data.splits import assign_folds
from library.scorer_training.balancing import Balance, parameter_groups
from library.scorer_training.config import LatentScorerConfig, ScorerTrainingConfig
from library.scorer_training.criteria.base import get_criterion
from library.scorer_training.criteria.regression import SquaredError
from library.scorer_training.dataset_config import Dataset, Subset, read_dataset_config
from library.scorer_training.noise import add_noise, draw_sigmas, standard_schedule
from library.scorer_training.run import share_out
from library.scorer_training.stages import Stage
from library.scorer_training.tasks import PackedTags, Task
from library.scorer_training.trainer import PATIENCE
from library.scorer_training.validation import TABLE_SIGMAS, AveragedWeights, BestState, format_table, selection_value, table_of, validate
from library.scorers.base import BackboneScorer, ScorerSpec
from library.scorers.heads import HeadSpec
from library.scorers.io import load_scorer
from library.scorers.kinds.latent_resnet import LatentResNet
from library.settings.cli import parse_config, run_main
from library.settings.options import build
from library.training.finite_losses import FiniteLosses
from library.training.tracking import Tracker, read_metrics
from library.types import LossOutput
from tests.helpers.golden_scorer import GOLDEN_FILE, golden_losses
from tests.helpers.processes import run_processes
from tests.helpers.scorers import VAE
from tests.helpers.tiny_models import tiny_vae

SCHEDULE = standard_schedule()


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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
    noisy = add_noise(latents, SCHEDULE.sigmas(timesteps), noise)
    torch.testing.assert_close(noisy, SCHEDULE.add_noise(latents, noise, timesteps), rtol=1e-4, atol=1e-5)
    assert torch.equal(add_noise(latents, torch.zeros(3), noise), latents)


# -- the loop's parts ----------------------------------------------------------------------------------------------------


def tiny_scorer(*heads: str) -> BackboneScorer:
    torch.manual_seed(0)
    backbone = LatentResNet(in_channels=4, channels=[8, 16], blocks=1, norm_groups=4)
    spec = ScorerSpec(
        kind="latent_resnet", architecture={}, vae=VAE, heads=tuple(HeadSpec(name=name) for name in heads), score_head=heads[0]
    )
    return BackboneScorer(spec, backbone)


def task_of(name: str, weight: float = 1.0) -> Task:
    dataset = Dataset(name=name, criterion="mse", subsets=(Subset(path=Path("x")),), weight=weight)
    return Task(dataset, get_criterion("mse"), HeadSpec(name=name), None, None, torch.zeros(0))  # type: ignore[arg-type]


def test_a_batch_is_shared_out_by_proportions() -> None:
    assert share_out(64, [1, 1, 2]) == [16, 16, 32]
    assert share_out(7, [1, 1, 1]) in ([3, 2, 2], [2, 3, 2], [2, 2, 3])
    assert share_out(8, [1000, 1]) == [7, 1] and sum(share_out(61, [0.3, 0.5, 2, 7])) == 61
    with pytest.raises(UserError, match="train_batch_size is 2"):
        share_out(2, [1, 1, 1])


def test_norms_and_biases_do_not_decay() -> None:
    scorer = tiny_scorer("score", "other")
    groups = parameter_groups(scorer, ["score"], 0.05)
    decays = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    assert all(decays[id(parameter)] == (0.05 if parameter.ndim > 1 else 0) for parameter in scorer.backbone.parameters())
    assert len(decays) == len(list(scorer.backbone.parameters())) + 2
    assert not any(id(parameter) in decays for parameter in scorer.heads["other"].parameters())


def loss_of(loss: Tensor) -> LossOutput:
    return LossOutput(loss, loss.detach()[None], ["a picture"])


def step_once(tasks: list[Task], scale: float, **settings: object) -> Tensor:
    """One step on two opposite wishes for a weight of the backbone, the second `scale` times as loud; how far it moved."""
    config = ScorerTrainingConfig(
        optimizer_type="Lion", weight_decay=0, max_grad_norm=0, lr_warmup_steps=0, lr_scheduler="constant", **settings
    )
    scorer = tiny_scorer("score", "other")
    balance = Balance(Accelerator(), scorer, Stage("training", tasks, ["score"], 10, config.optimizer_config()), config, FiniteLosses(10))
    weight = scorer.backbone.stem.weight
    before = weight.detach().clone()
    balance.step({"score": lambda: [loss_of(weight.sum())], "other": lambda: [loss_of(-scale * weight.sum())]}, 0)
    return weight.detach() - before


@pytest.mark.parametrize("scale", [0.5, 100.0])
def test_independent_lions_do_not_mind_the_scale_of_a_loss_and_a_sum_does(scale: float) -> None:
    tasks = [task_of("score"), task_of("other")]
    assert step_once(tasks, scale, balancing="independent").abs().max() < 1e-7
    assert (step_once(tasks, scale).sign() == (1 if scale > 1 else -1)).all()  # the louder wins


def test_weights_of_the_sum_are_the_datasets() -> None:
    assert (step_once([task_of("score", 10.0), task_of("other")], 5.0) < 0).all()


def test_averaged_weights_are_lent_for_the_block_only_and_the_best_come_back() -> None:
    model = nn.Linear(2, 1)
    average = AveragedWeights(model, decay=0.5)
    before = model.weight.detach().clone()
    with torch.no_grad():
        model.weight += 1
    with pytest.raises(RuntimeError), average.applied():
        assert torch.equal(model.weight, before) and not model.training
        raise RuntimeError
    assert torch.equal(model.weight, before + 1) and model.training
    best = BestState()
    for step, value in ((1, 0.5), (2, 0.9), (3, 0.7)):
        average.step()
        with average.applied():
            best.consider(step, {"t": [{"sigma": 0.0, "srcc": value}]}, value, model)
            if step == 2:
                chosen = model.weight.detach().clone()
        with torch.no_grad():
            model.weight += 1
    best.restore(model)
    assert best.step == 2 and best.value == 0.9 and torch.equal(model.weight, chosen)


class FewLatents:
    """Stands in for a LatentDataset: the score is the mean of the latents."""

    def __init__(self, count: int = 64) -> None:
        self.latents = torch.randn(count, 4, 8, 8, generator=rng(5)) * 0.3 + torch.linspace(-1, 1, count).view(-1, 1, 1, 1)

    def in_order(self, batch_size: int):  # noqa: ANN201
        for latents in self.latents.split(batch_size):
            count = len(latents)
            yield LatentBatch(latents=latents, targets=latents.mean((1, 2, 3)), weights=torch.ones(count), indices=torch.arange(count))


def predict_mean(batch: LatentBatch, sigmas: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(batch.latents.shape, generator=generator)
    return (add_noise(batch.latents, sigmas, noise).mean((1, 2, 3)) * (1 + sigmas**2).sqrt())[:, None]


def test_validation_measures_each_noise_level_with_the_same_noise() -> None:
    data = FewLatents()
    table = table_of(validate(predict_mean, data, batch_size=10), get_criterion("mse"), HeadSpec())  # type: ignore[arg-type]
    assert [row["sigma"] for row in table] == list(TABLE_SIGMAS)
    assert table[0]["srcc"] == pytest.approx(1) and table[0]["rmse"] == pytest.approx(0, abs=1e-6)
    for row in table[1:]:  # the mean of 256 values with noise of standard deviation sigma
        assert row["rmse"] == pytest.approx(row["sigma"] / 16, rel=0.3)
    assert table == table_of(validate(predict_mean, data, batch_size=10), get_criterion("mse"), HeadSpec())  # type: ignore[arg-type]
    assert "RMSE" in format_table(table) and len(format_table(table).splitlines()) == 1 + len(TABLE_SIGMAS)


def test_the_best_is_good_on_clean_and_on_noisy_latents() -> None:
    table = [{"sigma": 0.0, "srcc": 0.8}, {"sigma": 1.0, "srcc": 0.6}, {"sigma": 5.0, "srcc": 0.2}]
    assert selection_value(table, "srcc") == pytest.approx(0.5 * 0.8 + 0.5 * 0.4)


def test_packed_tags_are_what_was_packed() -> None:
    tags = PackedTags([("a",), ("c", "b", "unknown"), ()], [*"abc", *(str(number) for number in range(9))])
    assert tags[torch.tensor([1, 0, 2, 1])][:, :3].tolist() == [[0, 1, 1], [1, 0, 0], [0, 0, 0], [0, 1, 1]]
    assert tags[:2].shape == (2, 12) and tags.take(torch.tensor([2, 0]))[torch.tensor([1])][0, 0] == 1 and len(tags) == 3


# -- dataset.toml --------------------------------------------------------------------------------------------------------

MIXTURE = """
[general]
validation_split = 0.25

[[datasets]]
name = "bright"
criterion = "huber"
proportion = 3
  [[datasets.subsets]]
  path = "{folder}/ratings.csv"
  num_repeats = 2

[[datasets]]
name = "backdrop"
criterion = "classification"
target_class = "dark"
weight = 0.5
  [[datasets.subsets]]
  path = "{folder}/ratings.csv"

[[datasets]]
name = "words"
criterion = "multilabel"
  [[datasets.subsets]]
  path = "{folder}/ratings.csv"

[[datasets]]
name = "pairs"
criterion = "pairwise"
  [[datasets.subsets]]
  path = "{folder}/pairs.csv"
"""


def write_mixture(workplace: Path, path: Path, *changes: tuple[str, str]) -> Path:
    text = MIXTURE
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path.write_text(text.replace("{folder}", workplace.as_posix()), encoding="utf-8")
    return path


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
        tags = f"{scene.shape} {scene.background} {scene.colour}"
        rows.append(f"{index}.png,{score},{scene.background},{'val' if index % 4 == 0 else 'train'},{tags}")
    (folder / "ratings.csv").write_text("\n".join(["path,score,label,split,tags", *rows]), encoding="utf-8")
    scores = [float(row.split(",")[1]) for row in rows]
    pairs = [f"{first}.png,{first + 1}.png,{float(scores[first] > scores[first + 1])}" for first in range(95)]
    (folder / "pairs.csv").write_text("\n".join(["path_a,path_b,label", *pairs]), encoding="utf-8")
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
    return train_latent_scorer.train(build(LatentScorerConfig, values))


def pool(_vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Latents that hold the colours, which those of a random VAE hardly do."""
    return torch.cat([avg_pool2d(pixels, 8), torch.zeros(len(pixels), 1, pixels.shape[2] // 8, pixels.shape[3] // 8)], dim=1)


def test_it_learns_and_the_file_says_how_well(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(encoding, "encode_images", pool)
    path = train(workplace, tmp_path, cache_dir=None, max_train_steps=40, train_batch_size=16, validate_every_n_steps=20)
    scorer = load_scorer(path)
    table = scorer.spec.training["validation"]
    assert [row["sigma"] for row in table] == list(TABLE_SIGMAS)
    assert table[0]["srcc"] > 0.8 and table[0]["srcc"] > table[-1]["srcc"]
    assert scorer.spec.noise_aware and scorer.spec.training["tasks"]["score"]["pictures"] == {"train": 72, "validation": 24}
    assert scorer.spec.std == pytest.approx(scorer.spec.head().std, rel=0.3)
    assert format_table(table) in capsys.readouterr().out
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == list(range(40))


def test_it_stops_when_validation_no_longer_improves(workplace: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    path = train(workplace, tmp_path, learning_rate=1e-12, max_train_steps=20, validate_every_n_steps=1)  # it learns nothing
    record = load_scorer(path).spec.training
    assert (record["best_step"], record["steps"]) == (1, 1 + PATIENCE)
    assert f"training ends after step {1 + PATIENCE}: {PATIENCE} validations in a row were no better than that of step 1" in caplog.text
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1 + PATIENCE


def test_the_golden_run(tmp_path: Path) -> None:
    """20 steps with the defaults. Vector units round in another order: latents in fp16 then differ by their last bit, losses by 3e-4."""
    expected = [float(line) for line in GOLDEN_FILE.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    assert golden_losses(tmp_path) == pytest.approx(expected, rel=2e-3)


def test_the_same_seed_gives_the_same_bits(workplace: Path, tmp_path: Path) -> None:
    first, second, other = (
        load_scorer(train(workplace, tmp_path / name, seed=seed, max_train_steps=3)) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    weights, again, different = (scorer.state_dict() for scorer in (first, second, other))
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert not all(torch.equal(weights[name], different[name]) for name in weights)
    assert first.spec.training["validation"] == second.spec.training["validation"]


def test_labels_first_and_a_backbone_to_start_from(workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = train(
        workplace, tmp_path / "a", pretrain_data_file=workplace / "ratings.csv", pretrain_steps=3, max_train_steps=2, output_name="bright"
    )
    pretraining = load_scorer(path).spec.training["pretraining"]
    assert {"sigma", "top1", "top5"} <= set(pretraining["validation_by_task"]["pretraining"][0]) and pretraining["steps"] == 3
    assert "TOP5" in capsys.readouterr().out
    assert [record["step"] for record in read_metrics(tmp_path / "a" / "metrics.jsonl")] == list(range(5))

    still = {"learning_rate": 1e-12, "weight_decay": 0.0, "max_train_steps": 1}
    start = load_scorer(train(workplace, tmp_path / "b", backbone_weights=path.with_name("bright-backbone.safetensors"), **still))
    other = load_scorer(train(workplace, tmp_path / "c", **still))
    backbone = load_file(path.with_name("bright-backbone.safetensors"))
    assert all(torch.allclose(start.state_dict()[f"backbone.{name}"], tensor, atol=1e-5) for name, tensor in backbone.items())
    assert not torch.allclose(other.state_dict()["backbone.stem.weight"], backbone["stem.weight"], atol=1e-5)


@pytest.mark.parametrize("balancing", ["sum", "independent"])
def test_several_things_at_once_each_with_its_head(workplace: Path, tmp_path: Path, balancing: str) -> None:
    changes = [("weight = 0.5\n", "")] if balancing == "independent" else []  # which sums no losses
    mixture = write_mixture(workplace, tmp_path / "mixture.toml", *changes)
    path = train(workplace, tmp_path, train_data_file=None, dataset_config=mixture, balancing=balancing, max_train_steps=2)
    scorer = load_scorer(path)
    assert [head.name for head in scorer.spec.heads] == ["bright", "backdrop", "words", "pairs"]
    assert scorer.spec.score_head == "bright" and scorer.spec.head("backdrop").target_class == "dark"
    record = scorer.spec.training
    assert set(record["validation_by_task"]) == {"backdrop", "bright", "words", "pairs"} and "srcc" in record["validation"][0]
    assert record["tasks"]["bright"]["pictures"]["train"] == 144  # repeated
    assert record["optimizer"] == ("Lion" if balancing == "independent" else "AdamW")
    metrics = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert all(f"loss/{name}" in metrics for name in ("backdrop", "bright", "words", "pairs"))
    scores, uncertainty = scorer.score_and_uncertainty(torch.randn(3, 4, 4, 4, generator=rng()), torch.zeros(3))
    assert scores.shape == (3,) and (uncertainty == 0).all()


def test_a_dataset_from_which_nothing_can_be_learned_is_left_out_unless_it_is_the_score(
    workplace: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one_class = ('criterion = "classification"\ntarget_class = "dark"', 'criterion = "classification"\ntarget_class = "green"')
    mixture = write_mixture(workplace, tmp_path / "mixture.toml", one_class)
    settings = {"train_data_file": None, "dataset_config": mixture, "max_train_steps": 1}
    scorer = load_scorer(train(workplace, tmp_path, **settings))
    assert [head.name for head in scorer.spec.heads] == ["bright", "words", "pairs"]
    assert "dataset backdrop is left out" in caplog.text and "green" in caplog.text


def test_an_ensemble_disagrees_and_says_so(workplace: Path, tmp_path: Path) -> None:
    scorer = load_scorer(train(workplace, tmp_path, head_members=4, max_train_steps=3))
    latents = torch.randn(5, 4, 4, 4, generator=rng())
    scores, uncertainty = scorer.score_and_uncertainty(latents, torch.zeros(5))
    assert (uncertainty > 0).all() and torch.equal(scores, scorer(latents, torch.zeros(5)))


def test_a_transformer_first_fills_in_pictures_that_nobody_rated(workplace: Path, tmp_path: Path) -> None:
    settings = {
        "pretrain_data_file": workplace,
        "pretrain_criterion": "masked",
        "pretrain_steps": 30,
        "learning_rate": 3e-3,
        "max_train_steps": 1,
    }
    scorer = load_scorer(train(workplace, tmp_path, scorer_kind="latent_vit", validate_every_n_steps=30, **settings))
    pretraining = scorer.spec.training["pretraining"]
    assert pretraining["tasks"]["pretraining"]["criterion"] == "masked"
    assert sum(pretraining["tasks"]["pretraining"]["pictures"].values()) == 96
    losses = [record["loss/pretraining"] for record in read_metrics(tmp_path / "metrics.jsonl")[:30]]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    with pytest.raises(UserError, match="scorer_kind to latent_vit"):
        train(workplace, tmp_path / "resnet", **settings)
    with pytest.raises(UserError, match="give a folder"):
        train(workplace, tmp_path / "table", scorer_kind="latent_vit", **{**settings, "pretrain_data_file": workplace / "ratings.csv"})


def test_a_scorer_that_saw_no_noise_says_so(workplace: Path, tmp_path: Path) -> None:
    assert load_scorer(train(workplace, tmp_path, clean_fraction=1.0, max_train_steps=1)).spec.noise_aware is False


def test_a_picture_weighs_what_its_row_says(workplace: Path, tmp_path: Path) -> None:
    lines = (workplace / "ratings.csv").read_text(encoding="utf-8").splitlines()
    (workplace / "weighted.csv").write_text("\n".join([lines[0] + ",weight", *(line + ",3" for line in lines[1:])]), encoding="utf-8")
    settings = {"optimizer_type": "torch.optim.SGD", "weight_decay": 0.0, "max_grad_norm": 0, "max_train_steps": 1}
    runs = [("weighted.csv", 0.1), ("ratings.csv", 0.3), ("ratings.csv", 0.1)]
    heavier, faster, plain = (
        load_scorer(train(workplace, tmp_path / f"{name} {rate}", train_data_file=workplace / name, learning_rate=rate, **settings))
        for name, rate in runs
    )
    weights, others = faster.state_dict(), plain.state_dict()
    for name, weight in heavier.state_dict().items():
        torch.testing.assert_close(weight, weights[name], rtol=0, atol=1e-6)
    assert not torch.allclose(weights["backbone.stem.weight"], others["backbone.stem.weight"], atol=1e-6)


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
        ({"vae": "no/such/folder"}, "no/such/folder"),
        ({"train_data_file": "none.csv"}, "none.csv"),
        ({"scorer_size": "huge"}, "no size 'huge'"),
        ({"scorer_kind": "latent_mlp"}, "scorer_kind is 'latent_mlp'"),
        ({"criterion": "clasification"}, "criterion is 'clasification'"),
        ({"criterion": "pairwise"}, "pair"),
        ({"criterion": "emd"}, "votes"),
        ({"scorer_args": ["colour=blue"]}, "no 'colour'"),
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
        ({"score_head": "score"}, "the first dataset of the mixture is the score"),
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


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="POSIX only")
def test_an_interrupted_run_saves_itself_and_goes_on_to_the_same_bits(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Once in the pretraining and once after it, with dropout, pairs, votes of several heads and what is saved on the way."""
    caplog.set_level(logging.INFO)
    settings = {
        "train_data_file": None,
        "dataset_config": write_mixture(workplace, tmp_path / "mixture.toml"),
        "pretrain_data_file": workplace / "ratings.csv",
        "pretrain_steps": 3,
        "scorer_args": ["dropout=0.1"],
        "head_members": 2,
        "validate_every_n_steps": 4,
        "save_every_n_steps": 7,
        "save_state": True,
    }
    train(workplace, tmp_path / "whole", **settings)
    log = Tracker.log

    def log_and_end(self: Tracker, metrics: dict, step: int) -> None:
        log(self, metrics, step)
        if step == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Tracker, "log", log_and_end)
    folder, parts = tmp_path / "parts", []
    for stop_after in (0, 4, -1):
        with pytest.raises(SystemExit) if stop_after >= 0 else nullcontext() as caught:
            train(workplace, folder, resume="auto", **settings)
        parts.append(sorted(path.name for path in folder.glob("scorer-step*")))
        assert caught is None or caught.value.code == 143
        assert not list(folder.glob(".*"))
    assert parts[0] == ["scorer-step00000002-state"]  # of the pretraining there is no scorer yet
    assert parts[1][1:] == ["scorer-step00000006-state", "scorer-step00000006.safetensors"]
    assert load_scorer(folder / "scorer-step00000006.safetensors").spec.training["steps"] == 3
    assert "the same command with --resume auto goes on from there" in caplog.text
    for name in ("scorer", "scorer-step00000007", "scorer-backbone"):
        whole, resumed = (load_file(tmp_path / own / f"{name}.safetensors") for own in ("whole", "parts"))
        assert all(torch.equal(resumed[key], tensor) for key, tensor in whole.items())
    whole, resumed = (load_scorer(tmp_path / own / "scorer.safetensors").spec for own in ("whole", "parts"))
    assert resumed == whole
    whole, resumed = ([record | {"time": 0} for record in read_metrics(tmp_path / own / "metrics.jsonl")] for own in ("whole", "parts"))
    assert resumed == whole

    with pytest.raises(UserError, match="was saved by another run: seed is 1 and was 0; give what it had, or --resume_with_changes"):
        train(workplace, folder, resume=folder / "scorer-state", seed=1, **settings)
    with pytest.raises(UserError, match="was saved after step 6 of 5 of the training; raise max_train_steps"):
        train(workplace, folder, resume=folder / "scorer-state", **{**settings, "max_train_steps": 5})
    train(
        workplace,
        folder,
        resume=folder / "scorer-state",
        resume_with_changes=True,
        **{**settings, "train_batch_size": 9, "max_train_steps": 7},
    )
    assert "resumed with a change: pictures in a step is 9 and was 8" in caplog.text


def test_every_fold_has_its_share_and_a_name_is_in_one() -> None:
    names = [f"{index // 2}.png" for index in range(48)]
    folds = assign_folds(names, torch.arange(48.0), 4, seed=0)
    assert torch.equal(folds[0::2], folds[1::2])
    for fold in range(4):  # one of each four neighbours
        assert ((folds[0::2] == fold).nonzero().flatten() // 4).tolist() == list(range(6))
    assert not torch.equal(folds, assign_folds(names, torch.arange(48.0), 4, seed=1))
    assert assign_folds(names, None, 5, seed=0).unique().tolist() == list(range(5))


def write_few(workplace: Path, count: int) -> Path:
    rows = (workplace / "ratings.csv").read_text(encoding="utf-8").splitlines()[1 : count + 1]
    path = workplace / f"{count}.csv"
    path.write_text("\n".join(["path,score", *(",".join(row.split(",")[:2]) for row in rows)]), encoding="utf-8")
    return path


@pytest.mark.slow
def test_few_ratings_are_validated_by_folds_and_all_are_trained_on(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(encoding, "encode_images", pool)
    few = {"train_data_file": write_few(workplace, 12), "cache_dir": None, "validate_every_n_steps": 3, "learning_rate": 3e-3}
    path = train(workplace, tmp_path, max_train_steps=6, **few)
    record = load_scorer(path).spec.training
    steps, worth = record["folds"]["steps"], record["worth"]
    assert record["steps"] == record["best_step"] == steps and steps in (3, 6) and record["folds"]["folds"] == [5, 2]
    assert record["tasks"]["score"]["pictures"] == {"train": 12, "validation": 0} and worth["pictures"] == 12
    assert record["validation"][0]["srcc"] == worth["srcc"] and worth["interval"][0] < worth["srcc"] < worth["interval"][1]
    assert f"rank correlation {worth['srcc']:.2f} (" in caplog.text and "on 12 pictures that it never saw: " in caplog.text
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == steps
    with pytest.raises(UserError, match="dataset score has 9 pictures that can be used, which are too few to learn from; rate 10 at least"):
        train(workplace, tmp_path / "9", **{**few, "train_data_file": write_few(workplace, 9)})


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


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="fork")
def test_a_batch_is_the_same_however_it_is_parted(workplace: Path, tmp_path: Path) -> None:
    """By two processes, which torchrun started on a machine without a GPU, or by accumulation: the weights of one process to 1e-6."""
    settings = {
        "optimizer_type": "torch.optim.SGD",
        "learning_rate": 0.1,
        "save_state_on_train_end": True,
        "head_members": 2,
        "cache_dir": None,
        "validate_every_n_steps": 6,  # the last step alone: of two that are nearly as good, the last digits would choose
    }
    whole = load_scorer(train(workplace, tmp_path / "whole", train_batch_size=8, **settings)).state_dict()
    path = train(workplace, tmp_path / "accumulated", train_batch_size=4, gradient_accumulation_steps=2, **settings)
    accumulated = load_scorer(path).state_dict()
    folder = tmp_path / "processes"
    run_processes(2, lambda: train(workplace, folder, train_batch_size=4, num_threads=1, **settings))
    processes = load_scorer(folder / "scorer.safetensors").state_dict()
    for parted in (accumulated, processes):
        for name, weight in whole.items():
            torch.testing.assert_close(parted[name], weight, rtol=0, atol=1e-6)
    assert len(list((folder / "latent_cache").glob("*/0032x0032*.safetensors"))) == 2  # each process encoded its share
    assert read_metrics(folder / "metrics.jsonl")[-1]["step"] == 5  # written by one of them
    # and a state of two processes is one that one process goes on from
    train(workplace, folder, train_batch_size=8, resume=folder / "scorer-state", **{**settings, "max_train_steps": 7})


def test_a_second_training_of_the_same_name_is_refused(workplace: Path, tmp_path: Path) -> None:
    with only_process(tmp_path / ".scorer.lock", "it"), pytest.raises(UserError, match="scorer in .* is trained by process"):
        train(workplace, tmp_path)


def test_the_command_ends_with_two_and_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["train_latent_scorer.py", "--vae", "x", "--train_data_file", "y.csv", "--learning_rat", "1"])
    with pytest.raises(SystemExit) as caught:
        run_main(train_latent_scorer.main)
    assert caught.value.code == 2 and "learning_rate" in capsys.readouterr().err


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
