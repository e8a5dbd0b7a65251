"""Criteria against torch, scipy and what can be computed by hand; every one of them learns a toy problem."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F

from library.errors import UserError
from library.scorer_training.criteria.base import CRITERIA, get_criterion
from library.scorer_training.criteria.ensembles import mean_outputs, member_losses
from library.scorer_training.criteria.metrics import spearman
from library.scorer_training.criteria.preference import outcome_shares
from library.scorers.heads import READOUTS, Head, HeadSpec, score_and_uncertainty
from tests.helpers.toy_targets import WITH_SCORES, randn, rng, toy

# -- every criterion -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WITH_SCORES)
def test_it_learns_a_toy_problem_and_the_reading_has_the_right_order(name: str) -> None:
    criterion, features, scores, targets, spec = toy(name, members=2)
    torch.manual_seed(0)
    head = Head(6, spec)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)

    def outputs() -> Tensor:
        flat = head(features.flatten(0, -2))  # [B, members, K]
        return flat.unflatten(0, features.shape[:-1])

    losses = []
    for _ in range(150):
        loss = member_losses(criterion, outputs(), targets, spec).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.75 * losses[0]
    reading, uncertainty = score_and_uncertainty(outputs().detach().flatten(0, -3), spec)
    assert spearman(reading, scores.flatten()) > 0.94
    assert uncertainty.isfinite().all()
    metrics = criterion.metrics(mean_outputs(outputs().detach(), spec), targets, spec)
    assert metrics[criterion.selection] > 0.85 and all(math.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("name", WITH_SCORES)
@pytest.mark.parametrize("size", [1e4, -1e4, 0.0])
def test_extreme_outputs_have_finite_losses_and_gradients(name: str, size: float) -> None:
    criterion, _, _, targets, spec = toy(name, members=2)
    signs = randn(len(targets), *([2] if criterion.target == "pair" else []), 2, spec.outputs, seed=3).sign()
    for outputs in (size * signs, torch.full_like(signs, size)):
        outputs.requires_grad_()
        losses = member_losses(criterion, outputs, targets, spec)
        assert losses.shape == (len(targets),) and losses.isfinite().all()
        [gradient] = torch.autograd.grad(losses.sum(), outputs)
        assert gradient.isfinite().all()
        assert all(math.isfinite(value) for value in criterion.metrics(mean_outputs(outputs.detach(), spec), targets, spec).values())
        assert all(part.isfinite().all() for part in score_and_uncertainty(outputs.detach().flatten(0, -3), spec))


@pytest.mark.parametrize("name", WITH_SCORES)
def test_a_head_says_what_it_was_made_from(name: str) -> None:
    criterion, _, _, _, spec = toy(name, members=3)
    assert (spec.name, spec.criterion, spec.members) == ("toy", name, 3)
    assert criterion.name == name
    assert {"label": "good", "tags": "sharp"}.get(criterion.target, "") == spec.target_class
    assert spec.values == () or spec.values == tuple(sorted(spec.values))
    scores, stated = READOUTS[spec.readout](randn(5, spec.outputs), spec)
    assert scores.shape == (5,) and (stated is None or (stated > 0).all())


# -- regression ----------------------------------------------------------------------------------------------------------


def test_regression_losses_equal_torchs_in_standard_deviations() -> None:
    targets = 3 + 2 * randn(8, seed=1)
    heads = {name: get_criterion(name).make_head("score", targets, (), {}) for name in ("mse", "huber")}
    outputs, wanted = 2 * randn(8, 1), (targets - targets.mean()) / targets.std(correction=0)
    mse, huber = (get_criterion(name).losses(outputs, targets, head) for name, head in heads.items())
    torch.testing.assert_close(mse, nn.MSELoss(reduction="none")(outputs[:, 0], wanted))
    torch.testing.assert_close(huber, nn.SmoothL1Loss(reduction="none")(outputs[:, 0], wanted))
    exact, _ = READOUTS["value"](wanted.unsqueeze(1), heads["mse"])
    torch.testing.assert_close(exact, targets)  # what has no loss reads as the score itself


def test_gaussian_loss_is_torchs_weighted_by_the_variance_to_the_half() -> None:
    criterion, targets = get_criterion("gaussian"), randn(8, seed=1)
    head = HeadSpec(readout="gaussian", outputs=2)
    outputs = randn(8, 2).requires_grad_()
    variances = outputs[:, 1].exp()
    plain = nn.GaussianNLLLoss(reduction="none")(outputs[:, 0], targets, variances)
    losses = criterion.losses(outputs, targets, head)
    torch.testing.assert_close(losses, variances.detach().sqrt() * plain)
    [gradient] = torch.autograd.grad(losses.sum(), outputs)
    torch.testing.assert_close(gradient[:, 0], (outputs[:, 0] - targets) / variances.sqrt())
    nll = criterion.metrics(outputs.detach(), targets, head)["nll"]
    means, stds = READOUTS["gaussian"](outputs.detach(), head)
    assert stds is not None
    assert nll == pytest.approx(-stats.norm.logpdf(targets.numpy(), means.numpy(), stds.numpy()).mean(), rel=1e-5)


def test_a_variance_out_of_range_is_led_back() -> None:
    outputs = torch.tensor([[0.0, 50.0], [0.0, -50.0]], requires_grad=True)
    [gradient] = torch.autograd.grad(get_criterion("gaussian").losses(outputs, torch.zeros(2), HeadSpec(outputs=2)).sum(), outputs)
    assert gradient[:, 1].tolist() == [1, -1]


# -- votes ---------------------------------------------------------------------------------------------------------------


def test_earth_movers_distance() -> None:
    criterion = get_criterion("emd")
    votes = torch.randint(0, 30, (16, 10), generator=rng()).float()
    head, outputs = criterion.make_head("votes", votes, (), {}), randn(16, 10, seed=1)
    guessed, given = outputs.softmax(-1).double().numpy(), (votes / votes.sum(1, keepdim=True)).double().numpy()
    squared = [np.mean([(p[: k + 1].sum() - q[: k + 1].sum()) ** 2 for k in range(10)]) for p, q in zip(guessed, given, strict=True)]
    torch.testing.assert_close(criterion.losses(outputs, votes, head), torch.tensor(squared).float())
    torch.testing.assert_close(criterion.losses(outputs, 7 * votes, head), criterion.losses(outputs, votes, head))

    bins = np.arange(1, 11)
    metrics = criterion.metrics(outputs, votes, head)
    distances = [stats.wasserstein_distance(bins, bins, p, q) / 10 for p, q in zip(guessed, given, strict=True)]
    assert metrics["emd"] == pytest.approx(np.mean(distances), rel=1e-5)
    spreads = [[math.sqrt(np.average((bins - p @ bins) ** 2, weights=p)) for p in shares] for shares in (guessed, given)]
    assert metrics["srcc_std"] == pytest.approx(np.asarray(stats.spearmanr(spreads[0], spreads[1]))[0])
    assert metrics["rmse"] == pytest.approx(math.sqrt(np.mean((guessed @ bins - given @ bins) ** 2)), rel=1e-5)
    exact = criterion.metrics((votes / votes.sum(1, keepdim=True)).log(), votes, head)  # bins without votes are -inf
    assert exact["emd"] == pytest.approx(0, abs=1e-6) and exact["srcc"] == pytest.approx(1)


# -- classes and tags ----------------------------------------------------------------------------------------------------


def test_classification_smooths_labels() -> None:
    criterion, head = get_criterion("classification"), HeadSpec(outputs=3)
    logits, labels = randn(8, 3), torch.arange(8) % 3
    by_hand = -(0.9 * logits.log_softmax(-1)[torch.arange(8), labels] + 0.1 * logits.log_softmax(-1).mean(-1))
    torch.testing.assert_close(criterion.losses(logits, labels, head), by_hand)


def test_asymmetric_loss_by_hand() -> None:
    criterion, head = get_criterion("multilabel_asl"), HeadSpec(outputs=4)
    chances = torch.tensor([[0.3, 0.04, 0.9, 0.6]])
    by_hand = (-0.7 * math.log(0.3) + 0 - 0.85**4 * math.log(0.15) - 0.4 * math.log(0.6)) / 4
    losses = criterion.losses(chances.logit(), torch.tensor([[1.0, 0, 0, 1]]), head)
    assert losses.item() == pytest.approx(by_hand, rel=1e-5)
    bce = nn.BCEWithLogitsLoss()(chances.logit(), torch.tensor([[1.0, 0, 0, 1]]))
    assert get_criterion("multilabel").losses(chances.logit(), torch.tensor([[1.0, 0, 0, 1]]), head).item() == pytest.approx(bce.item())


# -- levels --------------------------------------------------------------------------------------------------------------


def test_ordinal_asks_whether_a_score_is_above_each_level() -> None:
    criterion = get_criterion("ordinal")
    scores = torch.tensor([1.0, 2, 2, 5, 10])
    head = criterion.make_head("stars", scores, (), {})
    assert head.values == (1, 2, 5, 10) and head.outputs == 3
    steps = torch.tensor([[0.0, 0, 0], [1, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1]])
    outputs = randn(5, 3)
    torch.testing.assert_close(criterion.losses(outputs, scores, head), nn.BCEWithLogitsLoss(reduction="none")(outputs, steps).mean(1))
    sure = 40 * (2 * steps - 1)
    assert criterion.losses(sure, scores, head).max() < 1e-6
    torch.testing.assert_close(READOUTS["ordinal"](sure, head)[0], scores)
    assert criterion.metrics(sure, scores, head) == {"srcc": pytest.approx(1), "plcc": pytest.approx(1), "mae": 0}
    assert criterion.metrics(sure, torch.tensor([2.0, 2, 5, 5, 1]), head)["mae"] == pytest.approx((1 + 0 + 1 + 0 + 3) / 5)
    between = criterion.losses(outputs[:1], torch.tensor([3.0]), head)  # no level of training, but above 2 and not above 5
    torch.testing.assert_close(between, nn.BCEWithLogitsLoss(reduction="none")(outputs[:1], steps[3:4]).mean(1))


# -- preferences ---------------------------------------------------------------------------------------------------------


def test_pairs_without_ties_are_bradley_terrys() -> None:
    criterion, scores = get_criterion("pairwise"), randn(6, 2, 1)
    head = criterion.make_head("pairs", torch.tensor([1.0, 0, 1, 1]), (), {})
    assert (head.outputs, head.mean, head.std) == (1, 0, 1)
    strengths = scores[..., 0].exp()
    first = strengths[:, 0] / strengths.sum(1)
    torch.testing.assert_close(criterion.losses(scores, torch.ones(6), head), -first.log())
    torch.testing.assert_close(criterion.losses(scores, torch.zeros(6), head), -(1 - first).log())
    torch.testing.assert_close(criterion.losses(scores, torch.full((6,), 0.5), head), -(first.log() + (1 - first).log()) / 2)


def test_ties_are_davidsons() -> None:
    criterion, outputs = get_criterion("pairwise"), randn(6, 2, 2)
    head = criterion.make_head("pairs", torch.tensor([1.0, 0.5]), (), {})
    strengths, nu = outputs[..., 0].exp(), outputs[..., 1].mean(1).exp()
    even = nu * strengths.prod(1).sqrt()
    total = strengths.sum(1) + even
    torch.testing.assert_close(criterion.losses(outputs, torch.full((6,), 0.5), head), -(even / total).log())
    torch.testing.assert_close(criterion.losses(outputs, torch.ones(6), head), -(strengths[:, 0] / total).log())
    torch.testing.assert_close(criterion.losses(outputs.flip(1), torch.zeros(6), head), criterion.losses(outputs, torch.ones(6), head))
    wanted = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0.5, 0.5, 0]])
    torch.testing.assert_close(outcome_shares(torch.tensor([1.0, 0.5, 0.0, 0.75])), wanted)


def test_pairs_are_counted_without_ties() -> None:
    outputs = torch.tensor([[[2.0], [1.0]], [[0.0], [3.0]], [[1.0], [1.0]], [[5.0], [0.0]]])
    metrics = get_criterion("pairwise").metrics(outputs, torch.tensor([1.0, 1.0, 0.0, 0.5]), HeadSpec())
    assert metrics["accuracy"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert metrics["log_loss"] == pytest.approx(sum(math.log1p(math.exp(-lead)) for lead in (1, -3, 0)) / 3)
    chance = get_criterion("pairwise").metrics(outputs, torch.full((4,), 0.5), HeadSpec())
    assert chance == {"accuracy": 0.5, "log_loss": pytest.approx(math.log(2))}


def test_ranking_is_the_mean_over_a_pictures_pairs() -> None:
    criterion, head = get_criterion("rank"), HeadSpec()
    outputs, targets = randn(6, 1), torch.tensor([1.0, 2, 2, 3, 1, 5])
    expected = []
    for one in range(6):
        others = [other for other in range(6) if targets[other] != targets[one]]
        leads = [(outputs[one] - outputs[other]) * (1 if targets[one] > targets[other] else -1) for other in others]
        expected.append(torch.cat([F.softplus(-lead) for lead in leads]).mean())
    torch.testing.assert_close(criterion.losses(outputs, targets, head), torch.stack(expected))
    assert criterion.losses(outputs[:1], targets[:1], head).tolist() == [0]
    assert criterion.losses(outputs[1:3], targets[1:3], head).tolist() == [0, 0]


# -- what cannot be learned ----------------------------------------------------------------------------------------------

SCORED, NOT_FINITE = torch.arange(4.0), torch.tensor([1.0, float("nan"), 2])
TAGS = torch.tensor([[1.0, 0], [0, 1]])
OF_SCORES = [name for name in WITH_SCORES if CRITERIA[name].target == "score"]


@pytest.mark.parametrize(
    ("name", "targets", "classes", "target_class", "message"),
    [
        *((name, torch.full((3,), 7.0), (), "", "all 3 training scores of dataset mine are 7") for name in OF_SCORES),
        *((name, NOT_FINITE, (), "", "not finite") for name in OF_SCORES),
        ("mse", SCORED, (), "cat", "target_class 'cat', but mse learns no classes"),
        ("pairwise", torch.tensor([1.0, 0]), (), "cat", "learns no classes"),
        ("ordinal", torch.arange(101.0), (), "", "101 different scores, but ordinal takes 100 at most; use criterion mse"),
        ("emd", torch.ones(3, 10), (), "", "all 3 training pictures of dataset mine have the same votes"),
        ("emd", torch.cat([torch.eye(10), torch.zeros(1, 10)]), (), "", "votes are missing or negative"),
        ("emd", -torch.eye(10), (), "", "votes are missing or negative"),
        ("emd", torch.full((2, 10), float("nan")), (), "", "votes are missing or negative"),
        ("classification", torch.tensor([0, 0]), ("cat",), "", "all 2 training pictures of dataset mine are of class 'cat'"),
        ("classification", torch.tensor([1, 1]), ("cat", "dog"), "", "are of class 'dog'"),
        ("classification", torch.tensor([0, 1]), ("cat", "dog"), "dig", r"no target_class 'dig' \(did you mean 'dog'\?\); it has cat, dog"),
        ("classification", torch.arange(20), tuple(f"c{n:02}" for n in range(20)), "zebra", "it has c00, c01.* c07 and 12 more"),
        ("multilabel", torch.zeros(3, 0), (), "", "no tags"),
        ("multilabel", torch.tensor([[1.0, 0], [1, 0]]), ("a", "b"), "", "the same tags"),
        ("multilabel_asl", TAGS, ("a", "b"), "x", "no target_class 'x'; it has a, b"),
        ("pairwise", torch.full((4,), 0.5), (), "", "all 4 training pairs of dataset mine are ties"),
        ("pairwise", torch.tensor([1.0, 2.0]), (), "", "preferences outside 0 to 1"),
        ("pairwise", NOT_FINITE, (), "", "preferences outside 0 to 1"),
    ],
)
def test_what_teaches_nothing_is_refused(name: str, targets: Tensor, classes: tuple[str, ...], target_class: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        get_criterion(name).make_head("mine", targets, classes, {"target_class": target_class})


def test_the_first_class_is_the_score_if_none_is_asked_for() -> None:
    assert get_criterion("classification").make_head("mine", torch.tensor([1, 0]), ("cat", "dog"), {}).target_class == "cat"
    assert get_criterion("multilabel").make_head("mine", TAGS, ("a", "b"), {"target_class": ""}).target_class == "a"
