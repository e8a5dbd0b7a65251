"""The U-Net as a backbone: it computes what diffusers' whole U-Net computes, holds half of it, and trains what it was told to."""

import dataclasses
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor

from library.errors import UserError
from library.models.base import DiffusionModel
from library.models.single_file import bundled_config
from library.scorers.base import BackboneScorer, ModelSource
from library.scorers.io import check_scorer_fits, load_backbone_weights, load_scorer, save_backbone, save_scorer
from library.scorers.kinds.unet_encoder import UNetEncoder
from library.scorers.unet_taps import build_first_half, distinctive_config, outputs_of, tap_names
from library.types import Conditioning
from tests.helpers.tiny_models import tiny_model
from tests.helpers.unet_encoders import make_scorer, shared_model, source_of

SIGMAS = torch.tensor([0.0, 0.7, 100.0])  # clean, within the schedule, beyond it


def encoder_of(scorer: BackboneScorer) -> UNetEncoder:
    assert isinstance(scorer.backbone, UNetEncoder)
    return scorer.backbone


def some_latents(rows: int = 3, height: int = 8, width: int = 8) -> Tensor:
    return torch.randn(rows, 4, height, width, generator=torch.Generator().manual_seed(1))


def taps_of(encoder: UNetEncoder, latents: Tensor, sigmas: Tensor, cond: Conditioning | None = None) -> list[Tensor]:
    """What the readout is given."""
    taps: list[Tensor] = []
    handle = encoder.readout.register_forward_pre_hook(lambda _module, args: taps.extend(args[0]))
    encoder(latents, sigmas, cond)
    handle.remove()
    return taps


# -- what it computes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
@pytest.mark.parametrize("size", [(8, 12)])
def test_taps_are_those_of_the_whole_unet(kind: str, size: tuple[int, int]) -> None:
    model = tiny_model(kind)
    model.unet.half().float()  # as the encoder holds them
    encoder, latents = encoder_of(make_scorer(model=model, tuning="frozen")), some_latents(3, *size)
    timesteps = model.schedule.timesteps_of(SIGMAS)
    assert timesteps[0] == 0 and timesteps[2] == 999
    with outputs_of([*model.unet.down_blocks, model.unet.mid_block]) as expected:
        model.predict_eps(latents, timesteps, model.encode_prompts([""]).repeat(3))
    taps = taps_of(encoder, latents, SIGMAS)
    assert len(taps) == len(expected) == len(model.unet.down_blocks) + 1
    for tap, wanted in zip(taps, expected, strict=True):
        assert torch.equal(tap, wanted)


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_prompts_reach_the_unet_as_they_do_in_the_model(kind: str) -> None:
    model = tiny_model(kind)
    model.unet.half().float()
    encoder, latents = encoder_of(make_scorer(model=model, tuning="frozen", use_prompt=True)), some_latents(2)
    cond = model.encode_prompts(["a red circle", "blue"])
    with outputs_of([model.unet.mid_block]) as expected:
        model.predict_eps(latents, model.schedule.timesteps_of(SIGMAS[:2]), cond)
    assert torch.equal(taps_of(encoder, latents, SIGMAS[:2], cond)[-1], expected[0])


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_the_prompt_counts_only_where_it_is_used(kind: str) -> None:
    model = shared_model(kind)
    circle, square = (model.encode_prompts([prompt] * 3) for prompt in ("a circle", "a square"))
    without = make_scorer(model=model)
    assert torch.equal(without(some_latents(), SIGMAS, circle), without(some_latents(), SIGMAS, square))
    using = make_scorer(model=model, use_prompt=True)
    assert not torch.equal(using(some_latents(), SIGMAS, circle), using(some_latents(), SIGMAS, square))
    torch.testing.assert_close(using(some_latents(), SIGMAS, model.encode_prompts([""] * 3)), without(some_latents(), SIGMAS))
    with pytest.raises(AssertionError, match="reads the conditioning"):
        using(some_latents(), SIGMAS, prompts=["a circle"] * 3)


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
@pytest.mark.parametrize("size", [(5, 7)])
def test_one_score_per_picture_at_any_size(kind: str, size: tuple[int, int]) -> None:
    scorer, latents = make_scorer(kind), some_latents(3, *size)
    scores = scorer(latents, SIGMAS)
    assert scores.shape == (3,) and scores.dtype == torch.float32 and scores.isfinite().all()
    alone = torch.cat([scorer(latents[row : row + 1], SIGMAS[row : row + 1]) for row in range(3)])
    torch.testing.assert_close(scores, alone, rtol=1e-3, atol=1e-4)


def test_the_noise_level_counts_within_and_beyond_the_schedule() -> None:
    scores = make_scorer()(some_latents(1).expand(4, -1, -1, -1), torch.tensor([0.0, 1.0, 100.0, float("inf")]))
    assert scores.isfinite().all() and scores.unique().numel() == 4


def test_gradient_equals_finite_difference() -> None:
    backbone = make_scorer(tuning="frozen").backbone.double()
    latents, sigmas = some_latents(1, 16, 16).double().requires_grad_(), torch.tensor([0.5])
    (gradient,) = torch.autograd.grad(backbone(latents, sigmas).sum(), latents)
    step = 1e-6 * gradient / gradient.norm()
    difference = (backbone(latents + step, sigmas) - backbone(latents - step, sigmas)).sum() / 2e-6
    torch.testing.assert_close(difference, gradient.norm(), rtol=1e-4, atol=0)


# -- what it holds -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_there_is_nothing_after_the_last_tap(kind: str) -> None:
    model = tiny_model(kind, full=True)
    whole = {name for name, _ in model.unet.named_parameters()}
    late = ("up_blocks.", "conv_norm_out.", "conv_out.")
    base = {name for name, _ in encoder_of(make_scorer(model=model)).unet.named_parameters()}
    assert base == {name for name in whole if not name.startswith(late)}
    third = {name for name, _ in encoder_of(make_scorer(model=model, size="first_third")).unet.named_parameters()}
    last = f"down_blocks.{len(model.unet.down_blocks) - 1}."
    assert third == {name for name in base if not name.startswith((last, "mid_block."))}


@pytest.mark.parametrize(
    ("family", "whole", "half", "third"),
    [("sd1", 859_520_964, 348_712_960, 189_397_760), ("sdxl", 2_567_463_684, 1_243_367_040, 72_845_440)],
)
def test_parameters_of_the_published_models(family: str, whole: int, half: int, third: int) -> None:
    with torch.device("meta"):  # where nothing takes memory
        unet = UNet2DConditionModel.from_config(bundled_config(family)["unet"])
        assert isinstance(unet, UNet2DConditionModel)
        config = distinctive_config(unet)
        parts = [unet, *(build_first_half(config, tap_names(taps, config)[-1]) for taps in ("all", "first_third"))]
    assert [sum(parameter.numel() for parameter in part.parameters()) for part in parts] == [whole, half, third]
    assert all(parameter.is_meta for part in parts for parameter in part.parameters())


def test_random_weights_are_drawn_from_the_global_generator_and_finite() -> None:
    config = distinctive_config(shared_model("sd1").unet)
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append(build_first_half(config, "mid_block").state_dict())
    assert all(tensor.isfinite().all() for tensor in states[0].values())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["conv_in.weight"], states[2]["conv_in.weight"])


def test_taps_by_name() -> None:
    sd1, sdxl = ({"down_block_types": ["DownBlock2D"] * count} for count in (4, 3))
    assert tap_names("first_third", sd1) == ["down_blocks.0", "down_blocks.1", "down_blocks.2"]
    assert tap_names("first_third", sdxl) == ["down_blocks.0", "down_blocks.1"]
    assert tap_names("all", sdxl) == ["down_blocks.0", "down_blocks.1", "down_blocks.2", "mid_block"]
    for wrong in ("up_blocks.0", ["down_blocks.1"]):
        with pytest.raises(UserError, match="taps is .*; it can be all or first_third"):
            tap_names(wrong, sd1)


# -- what it trains ------------------------------------------------------------------------------------------------------


def gradients(scorer: BackboneScorer, rows: int = 2) -> dict[str, Tensor]:
    """Of the scores' squares towards the parameters, and the latents."""
    latents = some_latents(rows).requires_grad_()
    scorer(latents, SIGMAS[:rows]).square().sum().backward()
    assert latents.grad is not None
    return {
        "latents": latents.grad,
        **{name: parameter.grad for name, parameter in scorer.named_parameters() if parameter.grad is not None},
    }


@pytest.mark.parametrize(("kind", "tuning"), [("sd1", "frozen"), ("sdxl", "lora"), ("sd1", "full")])
def test_tuning_says_what_gets_a_gradient(kind: str, tuning: str) -> None:
    scorer = make_scorer(kind, tuning=tuning).train()
    found = gradients(scorer)
    assert found.pop("latents").abs().sum() > 0
    parts = {name.split(".")[1] for name in found if name.startswith("backbone.")}
    assert parts == {"frozen": {"readout"}, "lora": {"readout", "lora"}, "full": {"readout", "unet"}}[tuning]
    assert encoder_of(scorer).unet.training is (tuning == "full") and encoder_of(scorer).readout.training
    # The layers hold what is trained, once each.
    layers = [parameter for layer in scorer.backbone.layers() for parameter in layer if parameter.requires_grad]
    assert len({id(parameter) for parameter in layers}) == len(layers)
    assert {id(parameter) for parameter in layers} == {
        id(parameter) for parameter in scorer.backbone.parameters() if parameter.requires_grad
    }


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_a_lora_starts_as_the_frozen_unet_and_moves_away(kind: str) -> None:
    model = shared_model(kind)
    frozen, lora = make_scorer(model=model, tuning="frozen"), make_scorer(model=model, tuning="lora", lora_rank=3)
    lora.load_state_dict(frozen.state_dict(), strict=False)
    assert torch.equal(lora(some_latents(), SIGMAS), frozen(some_latents(), SIGMAS))
    branches = encoder_of(lora).lora.loras
    assert {branch.rank for branch in branches} == {3} and all(not branch.path.startswith("up_blocks") for branch in branches)
    with torch.no_grad():
        for branch in branches:
            branch.lora_up.weight.normal_(generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(lora(some_latents(), SIGMAS), frozen(some_latents(), SIGMAS), atol=1e-3)


@pytest.mark.parametrize("tuning", ["frozen", "lora", "full"])
def test_checkpointing_changes_no_gradient(tuning: str) -> None:
    model = shared_model("sd1")
    plain, checkpointed = (make_scorer(model=model, tuning=tuning).train() for _ in range(2))
    for scorer in (plain, checkpointed):
        if tuning == "lora":
            with torch.no_grad():
                for branch in encoder_of(scorer).lora.loras:
                    branch.lora_up.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    checkpointed.backbone.enable_gradient_checkpointing()
    calls = []
    encoder_of(checkpointed).unet.get_submodule("down_blocks.0.resnets.0").register_forward_pre_hook(lambda *_: calls.append(None))
    expected, found = gradients(plain), gradients(checkpointed)
    assert len(calls) == 2  # once more in the backward pass
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("tuning", ["frozen", "lora", "full"])
def test_it_computes_in_mixed_precision(tuning: str) -> None:
    scorer = make_scorer(tuning=tuning)
    expected = scorer(some_latents(), SIGMAS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = scorer(some_latents(), SIGMAS)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected, rtol=0.1, atol=0.05)
    encoder_of(scorer).unet.bfloat16()  # half the memory for what stays frozen
    torch.testing.assert_close(scorer(some_latents(), SIGMAS), expected, rtol=0.1, atol=0.05)
    with pytest.raises(AssertionError, match="half precision cannot tell noise levels apart"):
        scorer.to(torch.bfloat16)(some_latents(), SIGMAS)


# -- files ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "tuning"), [("sd2_v", "frozen"), ("sdxl", "lora"), ("sd2_v", "full")])
def test_a_saved_scorer_scores_the_same(kind: str, tuning: str, tmp_path: Path) -> None:
    scorer = make_scorer(kind, tuning=tuning)
    optimizer = torch.optim.SGD([parameter for parameter in scorer.parameters() if parameter.requires_grad], lr=0.01)
    gradients(scorer.train())
    optimizer.step()
    scorer.eval().requires_grad_(False)  # a kernel for convolutions without gradients rounds otherwise
    save_scorer(tmp_path / "unet.safetensors", scorer)
    loaded = load_scorer(tmp_path / "unet.safetensors")
    assert torch.equal(loaded(some_latents(), SIGMAS), scorer(some_latents(), SIGMAS))
    assert loaded.spec == scorer.spec
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.float32}
    latents = some_latents().requires_grad_()
    (gradient,) = torch.autograd.grad(loaded(latents, SIGMAS).sum(), latents)
    assert gradient.abs().sum() > 0
    stored = load_file(tmp_path / "unet.safetensors")
    unet = {tensor.dtype for name, tensor in stored.items() if name.startswith("backbone.unet.")}
    assert unet == {torch.float32 if tuning == "full" else torch.float16}
    assert {tensor.dtype for name, tensor in stored.items() if not name.startswith("backbone.unet.")} == {torch.float32}
    assert not any("up_blocks" in name or "conv_out" in name for name in stored)


def test_a_backbone_carries_over_and_the_head_does_not(tmp_path: Path) -> None:
    model = shared_model("sd1")
    source = make_scorer(model=model, seed=1)
    save_backbone(tmp_path / "backbone.safetensors", source.backbone, source.spec)
    save_scorer(tmp_path / "scorer.safetensors", source)
    for name in ("backbone", "scorer"):
        target = make_scorer(model=model, seed=2)
        head = target.get_parameter("heads.score.members.0.weight").clone()
        assert not torch.equal(target.backbone(some_latents(), SIGMAS), source.backbone(some_latents(), SIGMAS))
        load_backbone_weights(tmp_path / f"{name}.safetensors", target.backbone, target.spec)
        assert torch.equal(target.backbone(some_latents(), SIGMAS), source.backbone(some_latents(), SIGMAS))
        assert torch.equal(target.get_parameter("heads.score.members.0.weight"), head)
    full = make_scorer(model=model, tuning="full")
    with pytest.raises(UserError, match='tuning is "lora" there and "full" here'):
        load_backbone_weights(tmp_path / "backbone.safetensors", full.backbone, full.spec)
    other = dataclasses.replace(source.spec, vae=shared_model("sdxl").vae_fingerprint())
    with pytest.raises(UserError, match="another VAE"):
        load_backbone_weights(tmp_path / "backbone.safetensors", source.backbone, other)


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    scorer, path = make_scorer(), tmp_path / "unet.safetensors"
    save_scorer(path, scorer)
    with pytest.raises(UserError, match="another VAE"):
        check_scorer_fits(load_scorer(path), shared_model("sdxl").vae_fingerprint())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="truncated"):
        load_scorer(path)


# -- options -------------------------------------------------------------------------------------------------------------


def test_options_that_do_not_exist_are_named() -> None:
    source = source_of(shared_model("sd1"))
    with pytest.raises(UserError, match="scorer_size can be base, first_third"):
        UNetEncoder.architecture_for("tiny", source)
    for name in ("channels", "unet", "pool"):
        with pytest.raises(UserError, match=rf"has no '{name}'; it has width, taps, tuning, lora_rank, use_prompt, dropout"):
            UNetEncoder.architecture_for("base", source, **{name: 3})
    with pytest.raises(UserError, match="tuning is 'half'; it can be frozen, lora, full"):
        make_scorer(tuning="half")
    with pytest.raises(UserError, match="lora_rank"):
        make_scorer(lora_rank=0)


def test_it_needs_more_than_a_vae() -> None:
    def only_a_vae() -> DiffusionModel:
        raise UserError("only a VAE was given")

    with pytest.raises(UserError, match="only a VAE"):
        UNetEncoder.architecture_for("base", ModelSource(model=only_a_vae, vae=shared_model("sd1").vae))


def test_its_options_arrive() -> None:
    scorer = make_scorer(model=tiny_model(full=True), size="first_third", width=24, tuning="frozen", dropout=0.5)
    encoder = encoder_of(scorer)
    assert encoder.feature_width == 24 and encoder.taps == ["down_blocks.0", "down_blocks.1", "down_blocks.2"]
    assert encoder.readout.projection.in_features == 32 + 32 + 64 and not hasattr(encoder, "lora")
    scorer.train()
    torch.manual_seed(0)
    assert not torch.equal(scorer(some_latents(), SIGMAS), scorer(some_latents(), SIGMAS))
    assert encoder_of(make_scorer(model=tiny_model("sdxl", full=True))).feature_width == 32 + 32 + 64 + 64
