"""A backbone that imitates a network of photographs, and heads that are fitted at once."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from examples.shapes.draw_pictures import write_ratings
from library.errors import UserError
from library.scorer_training.closed_form import PENALTIES, ridge
from library.scorer_training.config import LatentScorerConfig
from library.scorer_training.criteria.imitation import ImitationPretraining
from library.scorers.base import ModelSource
from library.scorers.efficientnet_lite import EfficientNetLite0, load_efficientnet_lite0
from library.scorers.io import load_scorer
from library.scorers.kinds.efficientnet_lite import EfficientNetLite
from library.settings.options import build_config
from tests.helpers.tiny_models import tiny_vae
from train_latent_scorer import train


def test_the_head_is_the_ridge_regression_whose_left_out_error_is_least():
    draw = np.random.default_rng(0)
    x = draw.normal(size=(14, 30)) * draw.uniform(0.5, 2, 30) + 3
    y = x[:, 0] - x[:, 1] + draw.normal(size=14)
    weights = draw.integers(1, 3, 14).astype(float)

    def solve(x, y, w, strength):
        """By the normal equations of the augmented problem."""
        centre, level = np.average(x, 0, w), np.average(y, weights=w)
        inner = (x - centre).T * w @ (x - centre) + strength * np.eye(x.shape[1])
        weight = np.linalg.solve(inner, (x - centre).T * w @ (y - level))
        return weight, level - centre @ weight

    w = weights / weights.mean()
    scale = (w[:, None] * (x - np.average(x, 0, w)) ** 2).sum() / len(x)
    candidates = [solve(x, y, w, penalty * scale) for penalty in PENALTIES]
    weight, bias = ridge(torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy(weights))
    errors = [np.abs(weight.numpy() - own[0]).max() + abs(bias - own[1]) for own in candidates]
    chosen = int(np.argmin(errors))
    assert errors[chosen] < 1e-8

    def left_out(penalty):
        others = [np.arange(14) != number for number in range(14)]
        fits = [solve(x[o], y[o], w[o], penalty * scale) for o in others]
        return sum(w[n] * (y[n] - x[n] @ own[0] - own[1]) ** 2 for n, own in enumerate(fits))

    brute = [left_out(penalty) for penalty in PENALTIES]
    assert brute[chosen] <= 1.02 * min(brute)  # the formula keeps the others' mean as it was


def test_weights_of_another_network_are_refused(tmp_path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="does not hold the weights of EfficientNet-Lite0"):
        load_efficientnet_lite0(str(tmp_path / "other.pth"))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A VAE, drawings that are rated and the same without ratings, and a network of random weights."""
    folder = tmp_path_factory.mktemp("imitation")
    tiny_vae().save_pretrained(folder / "vae")
    write_ratings(folder / "pictures", 40, "brightness", seed=0)
    torch.manual_seed(0)
    network = EfficientNetLite0()
    assert sum(weight.numel() for weight in network.parameters()) == 3_371_008
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0  # statistics of one batch
    network.last(network.lower(torch.rand(16, 3, 64, 64), 7))
    torch.save(network.state_dict(), folder / "network.pth")
    return folder


def settings(folder, **given):
    shared = {"vae": folder / "vae", "train_data_file": folder / "pictures" / "ratings.csv", "cache_dir": folder / "cache"}
    sizes = {
        "resolution": "64",
        "enable_bucket": False,
        "train_batch_size": 10,
        "num_threads": 1,
        "validation_split": 0.3,
        "scorer_kind": "efficientnet_lite",
    }
    return build_config(LatentScorerConfig, {**shared, **sizes, **given})


def test_imitation_finds_in_latents_what_the_network_sees_in_pixels(workplace):
    torch.manual_seed(0)
    backbone = EfficientNetLite(in_channels=4, channels=32, blocks=1, pretrained=str(workplace / "network.pth"))
    backbone.initialise(ModelSource(model=lambda: pytest.fail("no model is needed"), vae=tiny_vae()))
    latents = torch.randn(6, 4, 8, 8)
    teaching = ImitationPretraining(backbone, lambda latents: F.interpolate(latents[:, :3], scale_factor=8).sigmoid())
    backbone.train()
    optimizer = torch.optim.Adam([weight for layer in backbone.layers() for weight in layer], lr=3e-3)
    losses = []
    for _ in range(20):
        loss = teaching(latents, torch.zeros(6), latents, None).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    seen = backbone.picture_features(teaching.decode(latents))
    torch.testing.assert_close(seen.features.mean(0), torch.zeros(backbone.feature_width), atol=1e-3, rtol=0)


@pytest.mark.slow
def test_pictures_teach_it_to_see_and_few_ratings_give_it_a_head(workplace):
    network = [f"pretrained={workplace / 'network.pth'}", "channels=16", "blocks=1"]
    teaching = {"pretrain_data_file": workplace / "pictures" / "images", "pretrain_criterion": "imitation", "pretrain_steps": 2}
    path = train(settings(workplace, output_dir=workplace / "out", scorer_args=network, **teaching))
    scorer = load_scorer(path)
    record = scorer.spec.training
    assert record["head"] == "ridge" and record["worth"]["in_folds"]
    assert [row["sigma"] for row in record["validation"]][:2] == [0, 0.25]

    latents = torch.randn(2, 4, 8, 12, requires_grad=True)
    scorer(latents, torch.tensor([0.0, 2.0])).sum().backward()
    assert latents.grad is not None and (latents.grad.flatten(1).norm(dim=1) > 0).all()

    backbone = {"backbone_weights": workplace / "out" / "scorer-backbone.safetensors", "scorer_args": network[1:]}
    again = train(settings(workplace, output_dir=workplace / "again", **backbone))
    with torch.no_grad():
        both = [load_scorer(file)(latents, torch.zeros(2)) for file in (path, again)]
    torch.testing.assert_close(*both)

    other = train(
        settings(workplace, output_dir=workplace / "other", criterion="ordinal", max_train_steps=2, validation_folds=0, **backbone)
    )
    for name, weight in load_scorer(other).backbone.state_dict().items():
        assert torch.equal(weight, scorer.backbone.state_dict()[name]), f"ratings moved {name}, which they are too few for"


def test_a_backbone_that_cannot_see_yet_is_refused(workplace, monkeypatch):
    monkeypatch.setattr("library.scorers.kinds.efficientnet_lite.installed_weights", lambda: "")
    with pytest.raises(UserError, match="has not learned to see"):
        train(settings(workplace, output_dir=workplace / "blind"))
    with pytest.raises(UserError, match="needs a network that has learned to see"):
        train(
            settings(
                workplace,
                output_dir=workplace / "blind",
                pretrain_data_file=workplace / "pictures" / "images",
                pretrain_criterion="imitation",
            )
        )
