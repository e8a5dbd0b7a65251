"""Latent augmentation against numpy's reflection and statistics; mixup against the mixture computed by hand."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from library.errors import UserError
from library.scorer_data.batches import LatentBatch
from library.scorer_training.augmentation import LatentAugmentation, augment, mixup, shift_and_crop
from library.scorer_training.criteria.base import CRITERIA
from library.scorers.heads import HeadSpec
from tests.helpers.toy_targets import randn, rng, toy

ALL = LatentAugmentation(latent_shift=2, latent_crop=0.7)


def batch_of(latents: Tensor, targets: Tensor | None = None, second: Tensor | None = None) -> LatentBatch:
    targets = torch.zeros(len(latents)) if targets is None else targets
    return LatentBatch(
        latents=latents, targets=targets, weights=torch.ones(len(latents)), indices=torch.arange(len(latents)), second=second
    )


def test_shifts_are_windows_onto_the_reflected_picture() -> None:
    latents, seen = randn(64, 4, 5, 7), set()
    shifted = shift_and_crop(latents, 2, 1.0, rng())
    assert shifted.shape == latents.shape
    for before, after in zip(latents.numpy(), shifted.numpy(), strict=True):
        padded = np.pad(before, ((0, 0), (2, 2), (2, 2)), mode="reflect")
        windows = {(y, x): padded[:, y : y + 5, x : x + 7] for y in range(5) for x in range(5)}
        [offset] = [key for key, window in windows.items() if np.array_equal(window, after)]
        seen.add(offset)
    assert {y for y, _ in seen} == {x for _, x in seen} == set(range(5)) and len(seen) > 15  # every shift, and the sides independently
    assert (shift_and_crop(latents[:, :, :1, :1], 3, 1.0, rng()) == latents[:, :, :1, :1]).all()


def test_crops_are_parts_of_the_picture_and_of_one_size_in_a_batch() -> None:
    latents, generator, sizes, corners = torch.arange(80.0).view(1, 1, 8, 10).expand(16, 1, 8, 10), rng(), set(), set()
    for _ in range(60):
        cropped = shift_and_crop(latents, 0, 0.5, generator)
        height, width = cropped.shape[2:]
        sizes.add((height, width))
        for picture in cropped[:, 0]:
            top, left = divmod(int(picture[0, 0]), 10)
            corners.add((top, left))
            assert torch.equal(picture, latents[0, 0, top : top + height, left : left + width])
    assert {height for height, _ in sizes} == {4, 5, 6, 7, 8} and {width for _, width in sizes} == set(range(5, 11))
    assert all(abs(height / 8 - width / 10) <= 0.12 for height, width in sizes)  # the picture keeps its proportions but for rounding
    assert {0, 4} <= {top for top, _ in corners} <= set(range(5)) and {0, 5} <= {left for _, left in corners} <= set(range(6))


def test_off_by_default_and_the_same_seed_gives_the_same_bits() -> None:
    batch = batch_of(randn(4, 4, 8, 8))
    generator = rng()
    before = generator.get_state()
    assert augment(batch, LatentAugmentation(), generator) is batch and torch.equal(generator.get_state(), before)
    first, again, other = (augment(batch, ALL, rng(seed)).latents for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert first.shape != other.shape or not torch.equal(first, other)
    generator = rng()
    assert not torch.equal(augment(batch, LatentAugmentation(latent_shift=3), generator).latents,
                           augment(batch, LatentAugmentation(latent_shift=3), generator).latents)  # fmt: skip


def test_pairs_are_varied_alike() -> None:
    latents = randn(6, 4, 16, 16)
    varied = augment(batch_of(latents, second=latents), ALL, rng())
    assert varied.second is not None and torch.equal(varied.latents, varied.second) and varied.latents.shape[2] < 16
    wider = augment(batch_of(latents, second=randn(6, 4, 16, 32)), LatentAugmentation(latent_crop=0.5), rng())
    assert wider.second is not None and wider.second.shape[2] == wider.latents.shape[2]
    assert wider.second.shape[3] / 32 == pytest.approx(wider.latents.shape[3] / 16, abs=0.04)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"latent_shift": -1}, "latent_shift is -1, but it must be at least 0"),
        ({"latent_crop": 0.0}, "latent_crop is 0.0, but it must be above 0"),
        ({"latent_crop": 1.5}, "latent_crop is 1.5"),
    ],
)
def test_settings_that_mean_nothing_are_refused(setting: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        LatentAugmentation(**setting)


# -- mixup ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, criterion in CRITERIA.items() if criterion.mixes])
def test_a_mixture_has_the_mixture_of_the_targets_and_a_loss(name: str) -> None:
    criterion, _, _, targets, head = toy(name, count=32)
    latents = torch.eye(32).view(32, 1, 4, 8)  # says which pictures are in a mixture
    mixed = mixup(batch_of(latents, targets), 0.4, head, rng())
    shares = mixed.latents.flatten(1)
    torch.testing.assert_close(shares.sum(1), torch.ones(32))
    assert (shares.diagonal() >= 0.5).all() and ((shares > 0).sum(1) <= 2).all() and (shares > 0).sum(1).double().mean() > 1.5
    torch.testing.assert_close(mixed.targets, shares @ criterion.mixable(targets, head))
    assert criterion.losses(randn(32, head.outputs), mixed.targets, head).isfinite().all()


def test_mixed_votes_do_not_count_a_popular_picture_more() -> None:
    votes = torch.zeros(2, 10)
    votes[0, 0], votes[1, 9] = 1000, 10
    latents = torch.eye(2).view(2, 1, 1, 2)
    for seed in range(8):
        mixed = mixup(batch_of(latents, votes), 1.0, HeadSpec(criterion="emd", outputs=10), rng(seed))
        torch.testing.assert_close(mixed.targets[:, [0, 9]], mixed.latents.view(2, 2))


@pytest.mark.parametrize("alpha", [0.4, 1.0, 4.0])
def test_shares_are_beta_distributed(alpha: float) -> None:
    latents = torch.cat([torch.zeros(4000), torch.ones(4000)]).view(-1, 1, 1, 1)
    mixed = mixup(batch_of(latents), alpha, HeadSpec(), rng()).latents.flatten()
    shares = mixed[(mixed > 0) & (mixed < 1)]  # of pictures whose partner is from the other half
    own = torch.maximum(shares, 1 - shares).double().numpy()
    folded = stats.beta(alpha, alpha)
    assert len(own) > 3000
    assert stats.kstest(own, lambda share: 2 * folded.cdf(share) - 1).pvalue > 0.001  # type: ignore[attr-defined]


def test_what_does_not_mix_is_not_mixed() -> None:
    assert {name for name, criterion in CRITERIA.items() if not criterion.mixes} == {"gaussian", "masked", "ordinal", "rank", "pairwise"}
    with pytest.raises(AssertionError, match="ordinal does not mix"):
        mixup(batch_of(randn(2, 4, 8, 8)), 0.4, HeadSpec(criterion="ordinal"), rng())
