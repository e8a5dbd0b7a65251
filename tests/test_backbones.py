"""Backbones over latents: what each must do, and of the convolutional ones stems, norms and pretrained weights."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn
from transformers import AutoModel, ConvNextV2Config, ResNetConfig

from library.errors import UserError
from library.models.vae import VaeFingerprint
from library.scorers.base import SCORER_KINDS, Backbone, ModelSource, ScorerSpec, build_scorer
from library.scorers.conditioning import DropPath, FiLM, SigmaEmbedding, drop_path_rates, noise_angle
from library.scorers.convolutional import PadToEven, adapt_first_weights, first_convolution, set_stem_stride
from library.scorers.io import load_scorer, save_scorer
from library.scorers.kinds.latent_resnet import LatentResNet
from library.scorers.kinds.latent_vit import LatentViT
from library.scorers.kinds.transformers_cnn import TransformersCnn
from tests.helpers.scorers import noise

RESNET: dict[str, Any] = TransformersCnn.presets["resnet-tiny"]
CONVNEXT: dict[str, Any] = TransformersCnn.presets["convnextv2-micro"]
VIT: dict[str, Any] = {"in_channels": 4, "width": 32, "depth": 2, "heads": 2}
CONVOLUTIONAL: dict[str, Callable[..., Backbone]] = {
    "latent_resnet": lambda **options: LatentResNet(in_channels=4, **LatentResNet.presets["tiny"], **options),
    "resnet": lambda **options: TransformersCnn(in_channels=4, **RESNET, **options),
    "resnet_stride_2": lambda **options: TransformersCnn(in_channels=4, **RESNET, stem_stride=2, **options),
    "convnextv2": lambda **options: TransformersCnn(in_channels=4, **CONVNEXT, **options),
    "convnextv2_stride_2": lambda **options: TransformersCnn(in_channels=4, **CONVNEXT, stem_stride=2, **options),
}
SMALL: dict[str, Callable[..., Backbone]] = CONVOLUTIONAL | {
    "latent_vit": lambda **options: LatentViT(**VIT, patch=2, **options),
    "latent_vit_plain": lambda **options: LatentViT(**VIT, patch=1, stem=0, registers=0, **options),
}


def make(name: str, seed: int = 0, **options: Any) -> Backbone:
    torch.manual_seed(seed)
    return SMALL[name](**options).eval()


def four_stages() -> Backbone:
    """Halves its maps three times: the smallest latents are down to one cell before the last stage."""
    torch.manual_seed(0)
    config = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
    return TransformersCnn(in_channels=4, model_type="convnextv2", config=config).eval()


def no_model() -> Any:
    raise AssertionError("these kinds do not need the diffusion model")


@pytest.fixture(scope="module")
def source() -> ModelSource:
    return ModelSource(no_model, AutoencoderKL(block_out_channels=(4,), latent_channels=4, norm_num_groups=2))


# -- what every kind must do ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(4, 4), (5, 7), (24, 40)])
@pytest.mark.parametrize("name", [*SMALL, "convnextv2_four_stages"])
def test_every_cell_of_latents_of_any_size_counts(name: str, size: tuple[int, int]) -> None:
    backbone = make(name) if name in SMALL else four_stages()
    latents = noise(2, 4, *size).requires_grad_()
    features = backbone(latents, torch.tensor([0.0, 3.0]))
    assert features.shape == (2, backbone.feature_width) and features.isfinite().all()
    (features * noise(*features.shape, seed=2)).sum().backward()
    assert latents.grad is not None and latents.grad.ne(0).all(1).all()  # at least one channel of every cell, and all are finite
    assert latents.grad.isfinite().all()


@pytest.mark.parametrize("name", SMALL)
def test_a_picture_is_seen_alone(name: str) -> None:
    backbone, latents, sigmas = make(name), noise(3, 4, 8, 12).requires_grad_(), torch.tensor([0.0, 1.0, 10.0])
    features, alone = backbone(latents, sigmas), torch.cat([backbone(latents[i : i + 1], sigmas[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(features, alone, rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(features[0].square().sum(), latents)
    assert not gradient[1:].any()


@pytest.mark.parametrize("name", SMALL)
def test_the_gradient_is_the_slope(name: str) -> None:
    backbone, latents, sigmas = make(name).double(), noise(1, 4, 8, 8).double().requires_grad_(), torch.tensor([0.5]).double()
    weights = noise(1, backbone.feature_width, seed=2).double()
    (gradient,) = torch.autograd.grad((backbone(latents, sigmas) * weights).sum(), latents)
    direction = gradient / gradient.norm()
    step = 1e-6
    ends = [(backbone(latents + sign * step * direction, sigmas) * weights).sum() for sign in (1, -1)]
    torch.testing.assert_close((ends[0] - ends[1]) / (2 * step), gradient.norm(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", SMALL)
def test_sigma_is_heard_up_to_infinity(name: str) -> None:
    features = make(name)(noise(1, 4, 8, 8).expand(3, -1, -1, -1), torch.tensor([0.0, 1.0, float("inf")]))
    assert features.isfinite().all()
    assert (features[0] - features[1]).abs().max() > 1e-4 and (features[1] - features[2]).abs().max() > 1e-4


@pytest.mark.parametrize("name", SMALL)
def test_a_seed_makes_the_same_network(name: str) -> None:
    latents, sigmas = noise(2, 4, 8, 8), torch.tensor([0.0, 1.0])
    assert torch.equal(make(name, 3)(latents, sigmas), make(name, 3)(latents, sigmas))
    assert not torch.equal(make(name, 3)(latents, sigmas), make(name, 4)(latents, sigmas))


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_half_precision_is_close(name: str) -> None:
    backbone, latents, sigmas = make(name), noise(2, 4, 16, 16), torch.tensor([0.0, 14.6])
    expected = backbone(latents, sigmas)
    features = backbone.half()(latents, sigmas)
    assert features.dtype == torch.float16
    torch.testing.assert_close(features.float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", SMALL)
def test_checkpointing_changes_no_gradient(name: str) -> None:
    gradients = []
    for recompute in (False, True):
        backbone, latents = make(name), noise(2, 4, 8, 8).requires_grad_()
        if recompute:
            backbone.enable_gradient_checkpointing()
        backbone(latents, torch.tensor([0.0, 1.0])).square().sum().backward()
        gradients.append([latents.grad, *(parameter.grad for parameter in backbone.parameters())])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind,size", [(kind, size) for kind in (LatentResNet, LatentViT, TransformersCnn) for size in kind.presets])
def test_layers_hold_every_parameter_once(kind: type[Backbone], size: str, source: ModelSource) -> None:
    with torch.device("meta"):
        backbone = kind(**kind.architecture_for(size, source))
    layers = backbone.layers()
    numbers = [id(parameter) for layer in layers for parameter in layer]
    assert sorted(numbers) == sorted(id(parameter) for parameter in backbone.parameters())
    assert all(layers)


@pytest.mark.parametrize("name", ["latent_resnet", "convnextv2"])
def test_stochastic_depth_is_for_training(name: str) -> None:
    backbone, latents, sigmas = make(name, drop_path=0.5), noise(8, 4, 8, 8), torch.zeros(8)
    assert torch.equal(backbone(latents, sigmas), backbone(latents, sigmas))
    assert torch.equal(backbone(latents, sigmas), make(name)(latents, sigmas))  # it has no weights, so the seed gives the same network
    backbone.train()
    assert not torch.equal(backbone(latents, sigmas), backbone(latents, sigmas))


@pytest.mark.parametrize(("preset", "options"), [("resnet-tiny", {"dropout": 0.1}), ("convnextv2-micro", {"drop_path": 0.1})])
def test_a_file_brings_it_back(preset: str, options: dict[str, Any], tmp_path: Path, source: ModelSource) -> None:
    architecture = TransformersCnn.architecture_for(preset, source, **options)
    scorer = build_scorer(ScorerSpec(kind="transformers_cnn", architecture=architecture, vae=VaeFingerprint(1.0, (0.5,))))
    latents, sigmas = noise(4, 4, 8, 8), torch.tensor([0.0, 1.0, 2.0, 5.0])
    scorer(2 * latents + 1, sigmas)  # in training mode: batch norms take the statistics of these
    save_scorer(tmp_path / "s.safetensors", scorer)
    assert torch.equal(load_scorer(tmp_path / "s.safetensors")(latents, sigmas), scorer.eval()(latents, sigmas))


# -- conditioning --------------------------------------------------------------------------------------------------------------


def test_film_is_a_scale_and_a_shift_of_each_channel() -> None:
    film, embedding, x = FiLM(6, 3), noise(2, 6), noise(2, 3, 4, 5, seed=2)
    a, b = film.projection(nn.functional.silu(embedding)).chunk(2, dim=1)
    torch.testing.assert_close(film(x, embedding), x * (1 + a[:, :, None, None]) + b[:, :, None, None])
    torch.testing.assert_close(film(x, embedding), x, rtol=0.5, atol=0.2)  # near the identity


def test_film_of_tokens_is_film_of_maps() -> None:
    maps, tokens = FiLM(6, 3), FiLM(6, 3, channel_dim=-1)
    tokens.load_state_dict(maps.state_dict())
    x, embedding = noise(2, 3, 4, 5), noise(2, 6, seed=2)
    expected = maps(x, embedding).flatten(2).transpose(1, 2)
    torch.testing.assert_close(tokens(x.flatten(2).transpose(1, 2), embedding), expected)


def test_the_sigma_embedding_is_diffusers_timestep_embedding_of_the_angle() -> None:
    embedding, sigmas = SigmaEmbedding(16, 32), torch.tensor([0.0, 1.0, float("inf")])
    expected = nn.functional.silu(embedding.linear_1(embedding.sinusoids(noise_angle(sigmas))))
    torch.testing.assert_close(embedding(sigmas), embedding.linear_2(expected))
    assert embedding.half()(sigmas).dtype == torch.float16


def test_drop_path_keeps_the_mean() -> None:
    torch.manual_seed(0)
    dropped = DropPath(0.25).train()(torch.ones(20_000, 2, 1))
    assert torch.equal(dropped[:, 0], dropped[:, 1])  # a picture is kept or left out as a whole
    assert dropped.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.02)
    assert drop_path_rates(0.3, 4) == pytest.approx([0.0, 0.1, 0.2, 0.3]) and drop_path_rates(0.3, 1) == [0.0]


# -- stems -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [3, 4, 7])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_stem_gives_a_share_of_any_side(kernel: int, stride: int) -> None:
    stem = nn.Sequential(nn.Conv2d(4, 2, kernel, 4))
    set_stem_stride(stem, stride)
    for side in range(3, 10):
        assert stem(torch.zeros(1, 4, side, 8)).shape == (1, 2, -(-side // stride), 8 // stride)


def test_odd_sides_are_filled_up_with_their_border() -> None:
    padded = PadToEven()(torch.arange(6.0).view(1, 1, 2, 3))
    assert padded.tolist() == [[[[0, 1, 2, 2], [3, 4, 5, 5]]]]
    assert PadToEven()(torch.ones(1, 1, 1, 1)).shape == (1, 1, 2, 2)


# -- the networks of transformers ------------------------------------------------------------------------------------------------


def test_sizes_are_those_of_transformers() -> None:
    expected = {"resnet-50": ResNetConfig(), "convnextv2-tiny": ConvNextV2Config()}  # what the defaults of transformers are
    for size, config in expected.items():
        for key, value in TransformersCnn.presets[size]["config"].items():
            default = getattr(config, key)
            assert (list(default) if isinstance(default, tuple) else default) == value


def pretrained_model(model_type: str, folder: Path) -> nn.Module:
    """A small model for photographs, saved as transformers saves it."""
    torch.manual_seed(5)
    if model_type == "resnet":
        config = ResNetConfig(**{**RESNET["config"], "hidden_act": "gelu"})
    else:
        config = ConvNextV2Config(**CONVNEXT["config"], num_stages=2)
    model = AutoModel.from_config(config)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize(("model_type", "size"), [("resnet", "resnet-tiny"), ("convnextv2", "convnextv2-micro")])
def test_pretrained_weights_compute_what_they_computed(model_type: str, size: str, tmp_path: Path, source: ModelSource) -> None:
    model: Any = pretrained_model(model_type, tmp_path)
    architecture = TransformersCnn.architecture_for(size, source, pretrained=str(tmp_path), stem_stride=2)
    backbone = TransformersCnn(**architecture).eval()
    backbone.initialise(source)
    conv = first_convolution(backbone.stem)
    original = first_convolution(model).weight
    torch.testing.assert_close(conv.weight, torch.cat([original, original[:, :1]], dim=1) * 0.75)

    hidden = backbone.stem(noise(2, 4, 16, 16))
    expected = model.encoder(hidden).last_hidden_state
    for stage in backbone.stages:
        hidden = stage(hidden)
    torch.testing.assert_close(hidden, expected)
    if model_type == "resnet":
        assert architecture["config"]["hidden_act"] == "gelu"


def test_pretrained_must_be_of_that_size(tmp_path: Path, source: ModelSource) -> None:
    with pytest.raises(UserError, match=r"no config\.json"):
        TransformersCnn.architecture_for("resnet-tiny", source, pretrained=str(tmp_path))
    pretrained_model("resnet", tmp_path)
    with pytest.raises(UserError, match="no resnet-18, by its"):
        TransformersCnn.architecture_for("resnet-18", source, pretrained=str(tmp_path))
    with pytest.raises(UserError, match="no convnextv2-micro, by its model_type"):
        TransformersCnn.architecture_for("convnextv2-micro", source, pretrained=str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="is a bert"):
        TransformersCnn.architecture_for("resnet-tiny", source, pretrained=str(tmp_path))


def test_first_weights_repeat_and_keep_their_size() -> None:
    weight = noise(5, 3, 7, 7)
    adapted = adapt_first_weights(weight, 16)
    assert adapted.shape == (5, 16, 7, 7)
    torch.testing.assert_close(adapted[:, 3], weight[:, 0] * 3 / 16)


@pytest.mark.parametrize(
    ("preset", "options", "complaint"),
    [
        ("resnet-tiny", {"stem_stride": 4}, "stem_stride is 4"),
        ("resnet-tiny", {"norm": "group"}, "has no 'norm'"),
        ("resnet-tiny", {"drop_path": 0.1}, "has no drop_path"),
        ("resnet-tiny", {"model_type": "vit"}, "model_type is 'vit'"),
        ("convnextv2-micro", {"config": {"depths": [1], "heads": 2}}, "config has 'heads'"),
        ("convnextv2-micro", {"width": 3}, "has no 'width'"),
        ("resnet-19", {}, "has no size 'resnet-19'"),
    ],
)
def test_what_cannot_be_is_named(preset: str, options: dict[str, Any], complaint: str, source: ModelSource) -> None:
    with pytest.raises(UserError, match=complaint):
        TransformersCnn(**TransformersCnn.architecture_for(preset, source, **options))


@pytest.mark.skipif(importlib.util.find_spec("timm") is not None, reason="timm is installed; tests/optional/test_timm.py tests it")
def test_without_timm_its_package_is_named() -> None:
    with pytest.raises(UserError, match="pip install"):
        SCORER_KINDS["timm"](in_channels=4, model="resnet18")
