"""The parts of a scorer's training against analytic answers: noise, balancing, averages, validation, folds."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from library.errors import UserError
from library.scorer_data.batches import LatentBatch
from library.scorer_data.splits import assign_folds
from library.scorer_training.balancing import Balance, parameter_groups
from library.scorer_training.config import ScorerTrainingConfig
from library.scorer_training.criteria.base import get_criterion
from library.scorer_training.dataset_config import Dataset, Subset
from library.scorer_training.noise import add_noise_at, draw_sigmas, standard_schedule
from library.scorer_training.run import share_out
from library.scorer_training.stages import Stage
from library.scorer_training.tasks import PackedTags, Task
from library.scorer_training.validation import TABLE_SIGMAS, AveragedWeights, BestState, format_table, selection_value, table_of, validate
from library.scorers.base import BackboneScorer, ScorerSpec
from library.scorers.heads import HeadSpec
from library.scorers.kinds.latent_resnet import LatentResNet
from library.training.finite_losses import FiniteLosses
from library.types import LossOutput
from tests.helpers.scorers import VAE

SCHEDULE = standard_schedule()


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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
    noisy = add_noise_at(latents, SCHEDULE.sigmas(timesteps), noise)
    torch.testing.assert_close(noisy, SCHEDULE.add_noise(latents, noise, timesteps), rtol=1e-4, atol=1e-5)
    assert torch.equal(add_noise_at(latents, torch.zeros(3), noise), latents)


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
    return (add_noise_at(batch.latents, sigmas, noise).mean((1, 2, 3)) * (1 + sigmas**2).sqrt())[:, None]


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


def test_every_fold_has_its_share_and_a_name_is_in_one() -> None:
    names = [f"{index // 2}.png" for index in range(48)]
    folds = assign_folds(names, torch.arange(48.0), 4, seed=0)
    assert torch.equal(folds[0::2], folds[1::2])
    for fold in range(4):  # one of each four neighbours
        assert ((folds[0::2] == fold).nonzero().flatten() // 4).tolist() == list(range(6))
    assert not torch.equal(folds, assign_folds(names, torch.arange(48.0), 4, seed=1))
    assert assign_folds(names, None, 5, seed=0).unique().tolist() == list(range(5))


def test_an_average_that_goes_on_from_a_state_keeps_its_own_decay() -> None:
    model = torch.nn.Linear(1, 1)
    saved, resumed = AveragedWeights(model, 0.9), AveragedWeights(model, 0.5)
    resumed.load_state_dict(saved.state_dict())
    assert resumed.state_dict()["decay"] == 0.5
