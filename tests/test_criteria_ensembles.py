"""Ensembles: the weights of their members against their distribution, their mean against the score that is read from them."""

import pytest
import torch
from scipy import stats

from library.scorer_training.criteria.ensembles import bootstrap_weights, mean_outputs, member_losses
from library.scorer_training.criteria.metrics import pearson
from library.scorers.heads import READOUTS, HeadSpec, score_and_uncertainty
from tests.helpers.toy_targets import WITH_SCORES, randn, toy


def test_bootstrap_weights_are_exponential_and_belong_to_the_picture() -> None:
    indices = torch.arange(20_000)
    weights = bootstrap_weights(4, indices, seed=3)
    assert weights.shape == (20_000, 4) and weights.dtype == torch.float32
    for member in weights.T:
        assert stats.kstest(member.numpy(), "expon").pvalue > 0.001  # type: ignore[attr-defined]
    assert (torch.corrcoef(weights.T) - torch.eye(4)).abs().max() < 0.03
    assert abs(pearson(weights[1:, 0], weights[:-1, 0])) < 0.03
    some = torch.tensor([77, 5, 19_999])
    assert torch.equal(bootstrap_weights(4, some, seed=3), weights[some])
    assert torch.equal(bootstrap_weights(2, some, seed=3), weights[some, :2])
    other = bootstrap_weights(4, indices, seed=4)
    assert abs(pearson(weights[:, 0], other[:, 0])) < 0.03 and abs(pearson(weights[:, 1], other[:, 0])) < 0.03
    assert torch.equal(bootstrap_weights(1, some, seed=3), torch.ones(3, 1))


@pytest.mark.parametrize("name", WITH_SCORES)
def test_member_losses_average_what_each_member_loses(name: str) -> None:
    criterion, _, _, targets, spec = toy(name, members=3)
    outputs = randn(len(targets), *([2] if criterion.target == "pair" else []), 3, spec.outputs, seed=1).requires_grad_()
    weights = bootstrap_weights(3, torch.arange(len(targets)), seed=0)
    each = [criterion.losses(outputs[..., member, :], targets, spec) for member in range(3)]
    torch.testing.assert_close(member_losses(criterion, outputs, targets, spec), sum(each) / 3)
    weighted = sum(losses * weights[:, member] for member, losses in enumerate(each)) / 3
    torch.testing.assert_close(member_losses(criterion, outputs, targets, spec, weights), weighted)
    assert member_losses(criterion, outputs.bfloat16(), targets, spec, weights).dtype == torch.float32
    weights[:, 1] = 0
    [gradient] = torch.autograd.grad(member_losses(criterion, outputs, targets, spec, weights).sum(), outputs)
    assert gradient[..., 1, :].abs().max() == 0 and gradient[..., 0, :].abs().max() > 0


@pytest.mark.parametrize("name", WITH_SCORES)
def test_the_mean_of_the_members_reads_as_the_score(name: str) -> None:
    *_, spec = toy(name, members=3)
    if spec.readout == "class":
        spec = HeadSpec(readout="class", outputs=2, classes=("bad", "good"), target_class="good", members=3)
    outputs = 2 * randn(50, 3, spec.outputs, seed=1)
    scores, uncertainty = score_and_uncertainty(outputs, spec)
    read, stated = READOUTS[spec.readout](mean_outputs(outputs, spec), spec)
    torch.testing.assert_close(read, scores, rtol=1e-4, atol=1e-4)
    if stated is not None:
        torch.testing.assert_close(stated, uncertainty, rtol=1e-4, atol=1e-4)
    pairs = mean_outputs(outputs.view(25, 2, 3, spec.outputs), spec)  # [B, 2, members, K], as pairs have them
    torch.testing.assert_close(pairs.flatten(0, 1), mean_outputs(outputs, spec))
    alike = outputs[:, :1].expand(-1, 3, -1)
    torch.testing.assert_close(READOUTS[spec.readout](mean_outputs(alike, spec), spec)[0], READOUTS[spec.readout](outputs[:, 0], spec)[0])


def test_the_mean_of_many_classes_reads_as_the_score_where_members_nearly_agree() -> None:
    *_, spec = toy("classification", members=3)
    centre, spread = randn(50, 1, 3), randn(50, 3, 3, seed=1)

    def gap(disagreement: float) -> float:
        outputs = centre + disagreement * spread
        return (READOUTS["class"](mean_outputs(outputs, spec), spec)[0] - score_and_uncertainty(outputs, spec)[0]).abs().max().item()

    assert 0 < gap(0.1) < gap(1.0) / 30  # second order: a tenth of the disagreement is a hundredth of the gap
