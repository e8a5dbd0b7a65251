"""Image models: their scores against a plain computation with transformers, their files, and pictures that no part of is cut off."""

import sys
import textwrap
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ConvNextV2Config, ConvNextV2Model

from library.errors import UserError
from library.models.clip_tokenizer import build_clip_tokenizer
from library.scorers.image_models import metric_packages
from library.scorers.image_models.base import IMAGE_MODELS, ImageModel, build_image_model, parse_specification, read_image_model
from library.scorers.image_models.preprocessing import CLIP_MEAN, CLIP_STD, Preprocessing, even_starts, resized
from tests.helpers.tiny_image_models import PROJECTION, SIDE, save_head, tiny_classifier, tiny_clip, tiny_siglip

DEEP = (1024, 128, 64, 16, 1)
PROMPTS = ["a red circle", "two blue squares on a green table"]


def make(text: str) -> ImageModel:
    loaded = read_image_model(text)
    model = build_image_model(loaded.architecture)
    model.load_state_dict(loaded.weights)
    return model.eval().requires_grad_(False)


def some_pixels(height: int = 48, width: int = 72, rows: int = 2) -> Tensor:
    """Smooth colours and noise."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(rows, 3, 6, 6, generator=generator)
    smooth = F.interpolate(coarse, (height, width), mode="bilinear")
    return (0.8 * smooth + 0.2 * torch.rand(rows, 3, height, width, generator=generator)).clamp(0, 1)


def prepared(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """What a square of the network's size should be: PIL's bicubic resizing, channel by channel, and the usual normalisation."""
    rows = [
        [np.asarray(Image.fromarray(channel.numpy(), "F").resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for channel in picture]
        for picture in pixels
    ]
    squares = torch.from_numpy(np.array(rows))
    return (squares - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


# -- preprocessing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(32, 32), (20, 90), (100, 24)])
def test_resizing_is_pils(size: tuple[int, int]) -> None:
    pixels = some_pixels()
    pictures = [Image.fromarray(channel.numpy(), "F").resize(size[::-1], Image.Resampling.BICUBIC) for channel in pixels[0]]
    expected = torch.from_numpy(np.array([np.asarray(picture) for picture in pictures]))
    torch.testing.assert_close(resized(pixels, *size)[0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("resize", ["square", "pad", "tiles"])
@pytest.mark.parametrize("size", [(48, 72), (16, 100)])
def test_every_pixel_has_a_gradient(resize: str, size: tuple[int, int]) -> None:
    pixels = some_pixels(*size).requires_grad_()
    views = Preprocessing(size=SIDE, resize=resize)(pixels)
    assert views.shape[0] == 2 and views.shape[2:] == (3, SIDE, SIDE)
    weights = torch.rand(views.shape, generator=torch.Generator().manual_seed(1)) + 0.5
    (gradient,) = torch.autograd.grad((views * weights).sum(), pixels)
    assert (gradient != 0).all()


def test_padding_keeps_proportions_and_is_0_after_normalisation() -> None:
    [views] = Preprocessing(size=32, resize="pad", mean=CLIP_MEAN, std=CLIP_STD)(some_pixels(20, 40, rows=1))
    assert (views[0][:, :8] == 0).all() and (views[0][:, -8:] == 0).all() and (views[0][:, 8:24] != 0).any(dim=(0, 2)).all()


def test_tiles_cover_the_picture_evenly() -> None:
    assert even_starts(96, 32) == [0, 32, 64]
    assert even_starts(80, 32) == [0, 24, 48]
    assert even_starts(32, 32) == [0]
    views = Preprocessing(size=32, resize="tiles", mean=(0.0,) * 3, std=(1.0,) * 3)(some_pixels(32, 80, rows=1))
    torch.testing.assert_close(views[0, 1], some_pixels(32, 80, rows=1)[0, :, :, 24:56])


def test_bytes_and_blue_first() -> None:
    pixels = some_pixels()
    views = Preprocessing(mean=(0.5, 0.25, 0.0), std=(1.0,) * 3, multiply=255, bgr=True)(pixels)
    torch.testing.assert_close(views[:, 0, 0], pixels[:, 2] * 255)
    torch.testing.assert_close(views[:, 0, 2], (pixels[:, 0] - 0.5) * 255)


# -- aesthetic predictors ------------------------------------------------------------------------------------------------


def through(tensors: dict[str, Tensor], embedding: Tensor) -> Tensor:
    """Linear layers one after the other, in the order in which a file has them."""
    for name in [name for name in tensors if name.endswith("weight")]:
        embedding = embedding @ tensors[name].T + tensors[name.replace("weight", "bias")]
    return embedding


@pytest.mark.parametrize(
    ("family", "widths", "name", "places"),
    [
        ("laion_v1", (PROJECTION, 1), "", (0,)),
        ("laion_v2", (PROJECTION, *DEEP), "layers.{}.", (0, 2, 4, 6, 7)),
    ],
)
def test_laion_heads(tmp_path: Path, family: str, widths: tuple[int, ...], name: str, places: tuple[int, ...]) -> None:
    clip = tiny_clip()
    clip.save_pretrained(tmp_path / "clip")
    tensors = save_head(tmp_path / "head.pth", widths, name, places)
    pixels = some_pixels()

    features = clip.get_image_features(pixel_values=prepared(pixels, CLIP_MEAN, CLIP_STD))
    embedding = features if isinstance(features, Tensor) else features.pooler_output
    expected = through(tensors, embedding / embedding.norm(dim=-1, keepdim=True))

    scores = make(f"{family}:{tmp_path}/head.pth?clip={tmp_path}/clip")(pixels)
    torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-3)
    assert scores[0] != scores[1]


def test_aesthetic_v2_5(tmp_path: Path) -> None:
    siglip = tiny_siglip()
    siglip.save_pretrained(tmp_path / "siglip")
    tensors = save_head(tmp_path / "head.pth", (32, *DEEP), "scoring_head.{}.", (0, 2, 4, 6, 8))
    pixels = some_pixels()
    embedding = siglip(prepared(pixels, (0.5,) * 3, (0.5,) * 3)).pooler_output
    expected = through(tensors, embedding / embedding.norm(dim=-1, keepdim=True))
    torch.testing.assert_close(make(f"aesthetic_v2_5:{tmp_path}/head.pth?siglip={tmp_path}/siglip")(pixels), expected, rtol=1e-3, atol=1e-3)


def test_a_head_for_another_embedding_is_refused(tmp_path: Path) -> None:
    tiny_clip().save_pretrained(tmp_path / "clip")
    save_head(tmp_path / "head.pth", (768, 1), "", (0,))
    with pytest.raises(UserError, match="another embedding"):
        read_image_model(f"laion_v1:{tmp_path}/head.pth?clip={tmp_path}/clip")
    with pytest.raises(UserError, match="clip is not given"):
        read_image_model(f"laion_v1:{tmp_path}/head.pth")


def test_layers_are_ordered_by_number_and_not_as_the_file_has_them(tmp_path: Path) -> None:
    tiny_clip().save_pretrained(tmp_path / "clip")
    tensors = save_head(tmp_path / "head.pth", (PROJECTION, *DEEP), "layers.{}.", (0, 2, 4, 10, 12))
    expected = make(f"laion_v2:{tmp_path}/head.pth?clip={tmp_path}/clip")(some_pixels())
    save_file(dict(reversed(tensors.items())), tmp_path / "head.safetensors")
    torch.testing.assert_close(make(f"laion_v2:{tmp_path}/head.safetensors?clip={tmp_path}/clip")(some_pixels()), expected)


# -- classifiers ---------------------------------------------------------------------------------------------------------


def test_classifier(tmp_path: Path) -> None:
    network = tiny_classifier()
    network.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        '{"size": {"height": 32}, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}'
    )
    pixels = some_pixels()
    logits = network(prepared(pixels, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))).logits
    probability = make(f"classifier:{tmp_path}?class=NSFW&score=probability")(pixels)
    torch.testing.assert_close(probability[:, 0], logits.softmax(-1)[:, 1], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(make(f"classifier:{tmp_path}?class=nsfw")(pixels)[:, 0], logits[:, 1] - logits[:, 0], rtol=1e-3, atol=1e-3)


def test_classes_that_do_not_exclude_each_other_have_their_own_odds(tmp_path: Path) -> None:
    network = tiny_classifier(("a", "b", "c"), "multi_label_classification")
    network.save_pretrained(tmp_path)
    pixels = some_pixels()
    imagenet = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    logits = network(prepared(pixels, *imagenet)).logits
    torch.testing.assert_close(make(f"classifier:{tmp_path}?class=1")(pixels)[:, 0], logits[:, 1], rtol=1e-3, atol=1e-3)


def test_log_odds_have_a_gradient_where_the_probability_has_none(tmp_path: Path) -> None:
    network = tiny_classifier()
    nn.init.constant_(network.classifier.bias[1:], 200.0)
    network.save_pretrained(tmp_path)
    for score, is_flat in (("probability", True), ("log_odds", False)):
        pixels = some_pixels().requires_grad_()
        (gradient,) = torch.autograd.grad(make(f"classifier:{tmp_path}?class=nsfw&score={score}")(pixels).sum(), pixels)
        assert bool((gradient == 0).all()) is is_flat


def test_an_unknown_class_and_a_folder_without_weights_are_named(tmp_path: Path) -> None:
    tiny_classifier().save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="normal, nsfw"):
        read_image_model(f"classifier:{tmp_path}/model?class=cat")
    with pytest.raises(UserError, match="NAME, one of normal, nsfw"):
        read_image_model(f"classifier:{tmp_path}/model")
    with pytest.raises(UserError, match="no config.json"):
        read_image_model(f"classifier:{tmp_path}?class=nsfw")
    tiny_clip().save_pretrained(tmp_path / "clip")
    with pytest.raises(UserError, match="lacks .* weights|cannot be loaded"):
        read_image_model(f"classifier:{tmp_path}/clip?class=0")


# -- picture and prompt --------------------------------------------------------------------------------------------------


def test_pickscore_and_hpsv2(tmp_path: Path) -> None:
    clip = tiny_clip()
    clip.save_pretrained(tmp_path)
    pixels = some_pixels()
    tokens = build_clip_tokenizer("!")(PROMPTS, padding=True, return_tensors="pt")  # as open_clip pads
    outputs = clip(**tokens, pixel_values=prepared(pixels, CLIP_MEAN, CLIP_STD))
    pickscore, hps = make(f"pickscore:{tmp_path}"), make(f"hpsv2:{tmp_path}")
    torch.testing.assert_close(pickscore(pixels, PROMPTS)[:, 0], outputs.logits_per_image.diagonal(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(hps(pixels, PROMPTS)[:, 0], (outputs.image_embeds * outputs.text_embeds).sum(-1), rtol=1e-3, atol=1e-4)
    assert pickscore.uses_prompt and not torch.equal(pickscore(pixels, PROMPTS), pickscore(pixels, PROMPTS[::-1]))


def test_prompts_go_with_all_tiles_of_their_picture(tmp_path: Path) -> None:
    tiny_clip().save_pretrained(tmp_path)
    model = make(f"hpsv2:{tmp_path}?resize=tiles")
    pixels = some_pixels(32, 72)
    alone = torch.cat([model(pixels[row : row + 1], PROMPTS[row : row + 1]) for row in range(2)])
    torch.testing.assert_close(model(pixels, PROMPTS), alone)


# -- networks in files, Python -------------------------------------------------------------------------------------------


class TwoNumbers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 2, 3)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.convolution(pixels).mean((2, 3)).softmax(-1)


def test_torchscript(tmp_path: Path) -> None:
    network = TwoNumbers().eval()
    torch.jit.script(network).save(tmp_path / "network.pt")
    pixels = some_pixels()
    torch.testing.assert_close(make(f"torchscript:{tmp_path}/network.pt?class=1")(pixels)[:, 0], network(pixels)[:, 1])
    squares = prepared(pixels, (0.0,) * 3, (1.0,) * 3)
    odds = make(f"torchscript:{tmp_path}/network.pt?class=1&size={SIDE}&score=log_odds")(pixels)
    torch.testing.assert_close(odds[:, 0], network(squares)[:, 1].logit(), rtol=1e-3, atol=1e-4)
    with pytest.raises(UserError, match="puts out 2 numbers"):
        make(f"torchscript:{tmp_path}/network.pt?class=2")(pixels)
    (tmp_path / "nothing.pt").write_bytes(b"nothing")
    with pytest.raises(UserError, match="no TorchScript"):
        read_image_model(f"torchscript:{tmp_path}/nothing.pt")


OWN_MODULE = """
    import torch
    from torch import nn

    class Redness(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.rand(3))
        def forward(self, pixels):
            return (pixels.mean((2, 3)) * self.weight).sum(1)

    class Wrong(nn.Module):
        def forward(self, pixels):
            return pixels

    def length(pixels, prompts):
        return pixels.mean((1, 2, 3)) * torch.tensor([float(len(prompt)) for prompt in prompts])

    class NoModule:
        pass

    class NotMade(nn.Module):
        def __init__(self):
            raise KeyError("weights")

    def fails(pixels):
        raise ValueError("no\\nreason")
"""


def test_own_python(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(textwrap.dedent(OWN_MODULE))
    loaded = read_image_model(f"python:{tmp_path}/own.py:Redness")
    model = build_image_model(loaded.architecture)  # another draw of the weight
    model.load_state_dict(loaded.weights)
    pixels = some_pixels()
    torch.testing.assert_close(model(pixels)[:, 0], pixels.mean((2, 3)) @ loaded.weights["network.weight"])
    assert not model.uses_prompt
    length = make(f"python:{tmp_path}/own.py:length")
    assert length.uses_prompt
    torch.testing.assert_close(length(pixels, ["ab", "abcd"])[:, 0], pixels.mean((1, 2, 3)) * torch.tensor([2.0, 4.0]))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("NoModule", "no torch.nn.Module"),
        ("Absent", "Redness, Wrong, length"),
        ("Wrong", "one number for each"),
        ("NotMade", r"own.py:NotMade' failed with KeyError: 'weights' \(.*own.py, line \d+\)"),
        ("fails", r"own.py:fails' failed with ValueError: no reason \(.*own.py, line \d+\)"),
    ],
)
def test_own_python_that_cannot_score_is_refused(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "own.py").write_text(textwrap.dedent(OWN_MODULE))
    with pytest.raises(UserError, match=message):
        make(f"python:{tmp_path}/own.py:{name}")(some_pixels())


def test_a_backbone_from_a_folder(tmp_path: Path) -> None:
    network = ConvNextV2Model(ConvNextV2Config(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2)).eval()
    network.save_pretrained(tmp_path)
    model = make(f"backbone:{tmp_path}?size={SIDE}&mean=0.5&std=0.5")
    pixels = some_pixels()
    assert model.feature_width == 16
    torch.testing.assert_close(model(pixels), network(prepared(pixels, (0.5,) * 3, (0.5,) * 3)).pooler_output, rtol=1e-3, atol=1e-4)


# -- how they are written ------------------------------------------------------------------------------------------------


def test_specification() -> None:
    assert parse_specification("onnx:C:/nets/a+b.onnx?size=224&mean=1,2,3") == (
        "onnx",
        "C:/nets/a+b.onnx",
        {"size": "224", "mean": "1,2,3"},
    )
    assert parse_specification("python:own.py:Class")[1] == "own.py:Class"


@pytest.mark.parametrize("family", IMAGE_MODELS)
def test_every_family_shows_how_it_is_written(family: str) -> None:
    assert IMAGE_MODELS[family].example.startswith(f"{family}:")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("classifier", "not of the form"),
        (":x", "not of the form"),
        ("clasifier:x", "no family"),
        ("classifier:x?class", "key=value"),
        ("classifier:x?class=1&class=2", "key=value"),
        ("torchscript:none.pt", "no file"),
        ("laion_v1:none.pth", "clip is not given"),
        ("pyiqa:none", "pip install pyiqa|needs the Python module"),
        ("imscore:pickscore.PickScorer", "imscore|torchvision"),
        ("python:none.py:f", "no file"),
    ],
)
def test_what_is_wrong_is_said(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("size=big", "size"),
        ("mean=1,2", "mean"),
        ("std=0", "std"),
        ("resize=crop", "square, pad, tiles"),
        ("bgr=yes", "bgr"),
        ("layout=hwc", "nchw, nhwc"),
        ("score=logit", "value, log_odds"),
        ("class=-1", "class"),
        ("colour=red", "no option colour"),
    ],
)
def test_a_wrong_option_is_named(tmp_path: Path, options: str, message: str) -> None:
    torch.jit.script(TwoNumbers()).save(tmp_path / "network.pt")
    with pytest.raises(UserError, match=message):
        read_image_model(f"torchscript:{tmp_path}/network.pt?{options}")


class StandIn(nn.Module):
    """What pyiqa and imscore promise of their models."""

    lower_better = True

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels.mean((1, 2, 3))[:, None]

    def score(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        return torch.stack([pixels.mean((1, 2, 3)), torch.tensor([float(len(prompt)) for prompt in prompts])], 1)


def test_metrics_of_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against stand-ins: the packages are large, and fetch their weights from the network."""
    pyiqa = types.ModuleType("pyiqa")
    made = []
    vars(pyiqa).update(
        list_models=lambda metric_mode: ["niqe"] if metric_mode == "NR" else ["psnr"],
        create_metric=lambda name, as_loss, device: made.append((name, as_loss)) or StandIn(),
    )
    imscore = types.ModuleType("imscore.stand_in.model")
    vars(imscore).update(Scorer=StandIn)
    for name, module in (("pyiqa", pyiqa), ("imscore", imscore), ("imscore.stand_in", imscore), ("imscore.stand_in.model", imscore)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(metric_packages, "import_torchvision", lambda: None)

    pixels = some_pixels().requires_grad_()
    scores = make("pyiqa:niqe")(pixels)
    torch.testing.assert_close(scores[:, 0], -pixels.mean((1, 2, 3)))  # lower is better there, higher is better here
    assert made == [("niqe", True)] and torch.autograd.grad(scores.sum(), pixels)[0].abs().min() > 0
    with pytest.raises(UserError, match="it has niqe"):
        make("pyiqa:psnr")

    model = make("imscore:stand_in.Scorer?class=1")
    assert model.uses_prompt and model(pixels, ["ab", "abcd"]).tolist() == [[2.0], [4.0]]
    with pytest.raises(UserError, match="no scorer 'Other'"):
        make("imscore:stand_in.Other")


def test_a_file_with_code_in_it_is_not_read(tmp_path: Path) -> None:
    tiny_clip().save_pretrained(tmp_path / "clip")
    torch.save(TwoNumbers(), tmp_path / "head.pth")
    with pytest.raises(UserError, match="plain tensors alone"):
        read_image_model(f"laion_v1:{tmp_path}/head.pth?clip={tmp_path}/clip")
