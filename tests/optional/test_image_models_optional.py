"""Image models that need timm."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from library.errors import UserError
from library.models.loading import load_vae
from library.models.vae import VaeFingerprint
from library.scorers.base import ModelSource, ScorerSpec, build_scorer
from library.scorers.image_models.base import build_image_model, read_image_model
from library.scorers.io import load_scorer, save_scorer
from library.scorers.kinds.pixel import PixelBackbone

timm = pytest.importorskip("timm", reason="needs timm; see requirements-optional.txt")

SHAPES_MODEL = Path(__file__).resolve().parents[2] / "examples/shapes/model"
IMAGENET = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def some_pixels() -> Tensor:
    return torch.rand(2, 3, 100, 140, generator=torch.Generator().manual_seed(0))


def prepared(pixels: Tensor) -> Tensor:
    return (F.interpolate(pixels, (224, 224), mode="bicubic", antialias=True) - IMAGENET[0]) / IMAGENET[1]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A classifier of three classes, as a user's own training leaves it."""
    torch.manual_seed(0)
    torch.save({"state_dict": timm.create_model("resnet18", num_classes=3).state_dict()}, tmp_path / "own.pth")
    return tmp_path / "own.pth"


def test_a_class_of_a_timm_model(checkpoint: Path) -> None:
    network = timm.create_model("resnet18", num_classes=3).eval()
    network.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
    logits = network(prepared(some_pixels()))
    loaded = read_image_model(f"timm:resnet18?checkpoint={checkpoint}&classes=3&class=2&score=probability")
    model = build_image_model(loaded.architecture).eval()
    model.load_state_dict(loaded.weights)
    torch.testing.assert_close(model(some_pixels())[:, 0], logits.softmax(-1)[:, 2])


def test_what_does_not_fit_is_said(checkpoint: Path) -> None:
    with pytest.raises(UserError, match="3 classes"):
        read_image_model(f"timm:resnet18?checkpoint={checkpoint}&classes=3&class=3")
    with pytest.raises(UserError, match="does not hold the weights"):
        read_image_model(f"timm:resnet34?checkpoint={checkpoint}&classes=3")
    with pytest.raises(UserError, match="timm cannot make"):
        read_image_model("timm:resnet1?weights=random")


def test_timm_features_are_trained_on(tmp_path: Path) -> None:
    vae = load_vae(SHAPES_MODEL)
    source = ModelSource(model=lambda: pytest.fail("the model is not needed"), vae=vae)
    architecture = PixelBackbone.architecture_for("timm:resnet18", source, image_size=64)
    scorer = build_scorer(ScorerSpec(kind="pixel", architecture=architecture, vae=VaeFingerprint.of(vae)))
    scorer.backbone.initialise(source)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert scorer.backbone.feature_width == 512
    scorer(latents, torch.ones(2)).sum().backward()
    without = [name for name, one in scorer.backbone.named_parameters() if one.requires_grad and one.grad is None]
    assert without == []
    save_scorer(tmp_path / "scorer.safetensors", scorer.eval())
    assert torch.equal(load_scorer(tmp_path / "scorer.safetensors")(latents, torch.ones(2)), scorer(latents, torch.ones(2)))


def test_weights_to_start_from(tmp_path: Path) -> None:
    weights = timm.create_model("resnet18", num_classes=1000).state_dict()
    torch.save(weights, tmp_path / "resnet18.pth")
    source = ModelSource(model=lambda: pytest.fail("the model is not needed"), vae=load_vae(SHAPES_MODEL))
    architecture = PixelBackbone.architecture_for("timm:resnet18", source, pretrained=str(tmp_path / "resnet18.pth"))
    backbone = PixelBackbone(**architecture)
    backbone.initialise(source)
    assert torch.equal(backbone.image_model.state_dict()["network.layer1.0.conv1.weight"], weights["layer1.0.conv1.weight"])
