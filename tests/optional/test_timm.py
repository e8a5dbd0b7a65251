"""timm's models over latents."""

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn

from library.errors import UserError
from library.models.vae import VaeFingerprint
from library.scorers.base import ModelSource, ScorerSpec, build_scorer
from library.scorers.convolutional import adapt_first_weights
from library.scorers.io import load_scorer, save_scorer
from library.scorers.kinds.timm import TimmBackbone
from library.scorers.optional_packages import import_timm
from tests.helpers.scorers import noise

VIT = {"model": "test_vit", "stem_stride": 0, "model_args": {"dynamic_img_size": True, "dynamic_img_pad": True, "patch_size": 2}}
SWIN = {"model": "swin_tiny_patch4_window7_224", "stem_stride": 0}
SWIN |= {"model_args": {"strict_img_size": False, "patch_size": 1, "embed_dim": 24, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]}}
MODELS: dict[str, dict[str, Any]] = {
    "resnet": {"model": "test_resnet"},
    "resnet_group_norm": {"model": "test_resnet", "model_args": {"norm_layer": "groupnorm1"}},
    "convnext": {"model": "test_convnext"},
    "efficientnet": {"model": "test_efficientnet"},
    "vit": VIT,  # tokens [B, N, C]
    "swin": SWIN,  # maps [B, h, w, C]
}


def make(name: str, seed: int = 0) -> TimmBackbone:
    torch.manual_seed(seed)
    return TimmBackbone(in_channels=4, **MODELS[name]).eval()


def no_model() -> Any:
    raise AssertionError("timm does not need the diffusion model")


@pytest.fixture(scope="module")
def source() -> ModelSource:
    return ModelSource(no_model, AutoencoderKL(block_out_channels=(4,), latent_channels=4, norm_num_groups=2))


@pytest.mark.parametrize("size", [(4, 4), (5, 7), (8, 12), (64, 40)])
@pytest.mark.parametrize("name", MODELS)
def test_latents_of_any_size_have_features_and_gradients(name: str, size: tuple[int, int]) -> None:
    backbone, latents = make(name), noise(2, 4, *size).requires_grad_()
    features = backbone(latents, torch.tensor([0.0, 3.0]))
    assert features.shape == (2, backbone.feature_width) and features.isfinite().all()
    (features * noise(*features.shape, seed=2)).sum().backward()
    assert latents.grad is not None and latents.grad.isfinite().all() and latents.grad.ne(0).any()
    assert all(parameter.grad is not None for parameter in backbone.parameters())  # nothing is carried along unused


@pytest.mark.parametrize("name", MODELS)
def test_a_picture_is_seen_alone(name: str) -> None:
    backbone, latents, sigmas = make(name), noise(3, 4, 8, 12), torch.tensor([0.0, 1.0, float("inf")])
    alone = torch.cat([backbone(latents[i : i + 1], sigmas[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(backbone(latents, sigmas), alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_sigma_modulates_every_stage(name: str) -> None:
    backbone, latents = make(name), noise(1, 4, 8, 8)
    plain = backbone(latents, torch.zeros(1))
    assert (backbone(latents, torch.ones(1)) - plain).abs().max() > 1e-5
    for film in backbone.films:
        assert isinstance(film.projection, nn.Linear)
        before = film.projection.bias.detach().clone()
        nn.init.constant_(film.projection.bias, 0.5)
        assert (backbone(latents, torch.zeros(1)) - plain).abs().max() > 1e-5
        with torch.no_grad():
            film.projection.bias.copy_(before)
    torch.testing.assert_close(backbone(latents, torch.zeros(1)), plain)


def test_films_that_do_nothing_leave_the_model_as_it_is() -> None:
    backbone, latents = make("convnext"), noise(2, 4, 8, 8)
    for film in backbone.films:
        nn.init.zeros_(film.projection.weight)
    torch.testing.assert_close(backbone(latents, torch.ones(2)), backbone.norm(backbone.model(latents)))


@pytest.mark.parametrize("name", MODELS)
def test_layers_hold_every_parameter_once(name: str) -> None:
    backbone = make(name)
    numbers = [id(parameter) for layer in backbone.layers() for parameter in layer]
    assert sorted(numbers) == sorted(id(parameter) for parameter in backbone.parameters())
    assert all(backbone.layers())


def test_a_file_brings_it_back(tmp_path: Any, source: ModelSource) -> None:
    architecture = TimmBackbone.architecture_for("test_resnet", source, dropout=0.1)
    scorer = build_scorer(ScorerSpec(kind="timm", architecture=architecture, vae=VaeFingerprint(1.0, (0.5,))))
    latents, sigmas = noise(4, 4, 8, 8), torch.tensor([0.0, 1.0, 2.0, 5.0])
    scorer(2 * latents + 1, sigmas)  # in training mode: batch norms take the statistics of these
    save_scorer(tmp_path / "s.safetensors", scorer)
    assert torch.equal(load_scorer(tmp_path / "s.safetensors")(latents, sigmas), scorer.eval()(latents, sigmas))


def test_the_stem_keeps_the_size_of_latents() -> None:
    backbone = make("resnet")
    sizes = {}
    for name in ("layer1", "layer4"):
        backbone.model.get_submodule(name).register_forward_hook(lambda _, __, output, name=name: sizes.update({name: output.shape[2:]}))
    backbone(noise(1, 4, 16, 24), torch.zeros(1))
    assert sizes == {"layer1": (16, 24), "layer4": (2, 3)}


def test_pretrained_weights_are_taken_and_their_first_convolution_is_adapted(tmp_path: Any, source: ModelSource) -> None:
    torch.manual_seed(7)
    photographs = import_timm().create_model("test_convnext")
    torch.save(photographs.state_dict(), tmp_path / "weights.pth")
    backbone = TimmBackbone(**TimmBackbone.architecture_for("test_convnext", source, pretrained=str(tmp_path / "weights.pth"))).eval()
    backbone.initialise(source)
    first = next(module for module in backbone.model.modules() if isinstance(module, nn.Conv2d))
    torch.testing.assert_close(first.weight, adapt_first_weights(photographs.stem[0].weight, 4))
    assert torch.equal(backbone.model.stages[-1].blocks[0].mlp.fc1.weight, photographs.stages[-1].blocks[0].mlp.fc1.weight)


def test_latents_that_are_too_small_name_the_smallest() -> None:
    backbone = TimmBackbone(in_channels=4, model="test_resnet", model_args={"norm_layer": "batchnorm"})
    assert backbone.smallest == 4
    backbone = TimmBackbone(in_channels=4, model="densenet121", model_args={"growth_rate": 8, "block_config": [1, 1, 1, 1]})
    assert backbone.smallest == 8
    with pytest.raises(UserError, match=r"latents of 8x4: .* must be 8 \(64 pixels\)"):
        backbone(noise(1, 4, 4, 8), torch.zeros(1))


@pytest.mark.parametrize(
    ("size", "options", "complaint"),
    [
        ("test_resnot", {}, "has no model 'test_resnot'.*close to it are .*test_resnet"),
        ("test_resnet", {"width": 3}, "timm has no 'width'"),
        ("test_resnet", {"model_args": {"no_such": 3}}, "timm's model_args has no_such"),
        (
            "vit_tiny_patch16_224",
            {"stem_stride": 0, "model_args": {"depth": 1}},
            "reads no latents of 4 to 64 cells.*dynamic_img_size=True",
        ),
        ("hrnet_w18_small", {}, "does not say what its stages are"),
    ],
)
def test_what_cannot_be_is_named(size: str, options: dict[str, Any], complaint: str, source: ModelSource) -> None:
    with pytest.raises(UserError, match=complaint):
        TimmBackbone(**TimmBackbone.architecture_for(size, source, **options))


def test_pretrained_must_be_a_file(source: ModelSource) -> None:
    backbone = TimmBackbone(**TimmBackbone.architecture_for("test_resnet", source, pretrained="nowhere.safetensors"))
    with pytest.raises(UserError, match="no such file"):
        backbone.initialise(source)
