"""Scorers of pixels: decoding, memory, gradients; trained ones and ready-made ones, and their files."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from library.errors import UserError
from library.models.vae import VaeFingerprint, decode_latents
from library.objectives.reward_config import RewardConfig, load_reward
from library.scorer_training.config import VaeConfig
from library.scorers.base import BackboneScorer, ModelSource, ScorerSpec, build_scorer
from library.scorers.image_models.base import Loaded, read_image_model
from library.scorers.io import load_scorer, save_scorer
from library.scorers.kinds.pixel import PixelBackbone, measure_gradient, ready_made
from library.scorers.pixel_decoder import PixelDecoder, blend, decoder_config, load_tiny_autoencoder, tile_starts
from library.types import PromptSpec
from tests.helpers.tiny_image_models import SIDE, save_head, tiny_classifier, tiny_clip, tiny_taesd
from tests.helpers.tiny_leco_run import run
from tests.helpers.tiny_models import FULL_VAE, tiny_model, tiny_vae
from tools import make_pixel_scorer


def source(vae: AutoencoderKL) -> ModelSource:
    return ModelSource(model=tiny_model, vae=vae)


def trained_scorer(size: str = "tiny", vae: AutoencoderKL | None = None, **options) -> BackboneScorer:
    """With random weights where it would be trained."""
    vae = vae or tiny_vae()
    architecture = json.loads(json.dumps(PixelBackbone.architecture_for(size, source(vae), **options)))
    torch.manual_seed(0)
    scorer = build_scorer(ScorerSpec(kind="pixel", architecture=architecture, vae=VaeFingerprint.of(vae)))
    scorer.backbone.initialise(source(vae))
    return scorer.eval()


def some_latents(rows: int = 2, height: int = 8, width: int = 12) -> Tensor:
    return torch.randn(rows, 4, height, width, generator=torch.Generator().manual_seed(1))


def half(vae: AutoencoderKL) -> AutoencoderKL:
    """The VAE with its weights rounded as a scorer's file stores them."""
    for parameter in vae.parameters():
        parameter.data = parameter.half().float()
    return vae


def decoder_of(vae, **options) -> PixelDecoder:  # noqa: ANN001 - either autoencoder
    decoder = PixelDecoder(decoder_config(vae), **options)
    decoder.take_weights(vae)
    return decoder


# -- decoding ------------------------------------------------------------------------------------------------------------


def test_it_decodes_as_the_vae_does() -> None:
    latents, vae = some_latents(), half(tiny_vae())
    torch.testing.assert_close(decoder_of(vae)(latents), decode_latents(vae, latents) / 2 + 0.5)


def test_a_tiny_autoencoder_takes_scaled_latents(tmp_path: Path) -> None:
    taesd = tiny_taesd()
    taesd.save_pretrained(tmp_path)
    latents = some_latents()
    with torch.no_grad():
        expected = half(taesd).decode(latents).sample / 2 + 0.5  # type: ignore[arg-type]
    torch.testing.assert_close(decoder_of(load_tiny_autoencoder(str(tmp_path)))(latents), expected)


def test_portions_change_nothing() -> None:
    latents, vae = some_latents(5), tiny_vae()
    torch.testing.assert_close(decoder_of(vae, batch=2)(latents), decoder_of(vae, batch=0)(latents))


@pytest.mark.parametrize(("length", "tile"), [(16, 8), (17, 8), (64, 32), (9, 8), (8, 8), (100, 24)])
def test_tiles_cover_and_overlap(length: int, tile: int) -> None:
    starts = tile_starts(length, tile)
    assert starts[0] == 0 and starts[-1] == length - tile
    assert all(after - before <= tile - round(tile / 4) for before, after in zip(starts, starts[1:], strict=False))


def test_tiles_of_one_picture_blend_to_that_picture() -> None:
    picture = torch.rand(2, 3, 40, 56, generator=torch.Generator().manual_seed(0))
    corners = [(top, left) for top in tile_starts(20, 8) for left in tile_starts(28, 8)]
    tiles = torch.stack([picture[..., 2 * top : 2 * top + 16, 2 * left : 2 * left + 16] for top, left in corners])
    torch.testing.assert_close(blend(tiles, corners, ratio=2), picture)


def test_a_tiled_picture_is_nearly_the_whole_one() -> None:
    """Where the decoder has no group norms, whose statistics would be the tile's: as TAESD."""
    taesd, latents = tiny_taesd(), some_latents(1, 32, 24)
    whole, tiled = decoder_of(taesd)(latents), decoder_of(taesd, tile=16, batch=1)(latents)
    assert tiled.shape == whole.shape
    difference = (tiled - whole).abs().mean(1) / whole.std()
    assert difference.mean() < 0.01
    assert difference[:, :64, :64].max() < 1e-5  # only the first tile shows it, and its edges are far


def held_by_backward(decoder: PixelDecoder, latents: Tensor) -> int:
    """Bytes of the tensors that autograd keeps for the backward pass, the decoder's weights apart."""
    weights = {parameter.data_ptr() for parameter in decoder.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in weights:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        pixels = decoder(latents.requires_grad_())
    assert pixels.requires_grad
    return sum(kept.values())


def test_checkpointing_and_tiles_keep_less_and_leave_the_gradient_alone() -> None:
    vae = tiny_vae()
    kept, gradients = {}, {}
    for checkpointing in (False, True):
        decoder = decoder_of(vae, batch=1, checkpointing=checkpointing)
        kept[checkpointing] = held_by_backward(decoder, some_latents())
        latents = some_latents().requires_grad_()
        (gradients[checkpointing],) = torch.autograd.grad(decoder(latents).square().sum(), latents)
    assert kept[True] < kept[False] / 20
    torch.testing.assert_close(gradients[True], gradients[False])


# -- trained ones --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["tiny", "resnet-18"])
@pytest.mark.parametrize("latent_size", [(8, 8), (9, 13)])
def test_one_score_for_each_picture_at_any_size_and_noise(size: str, latent_size: tuple[int, int]) -> None:
    scorer = trained_scorer(size)
    sigmas = torch.tensor([0.0, 1.0, float("inf")])
    scores = scorer(some_latents(1, *latent_size).expand(3, -1, -1, -1), sigmas)
    assert scores.shape == (3,) and scores.isfinite().all() and scores.unique().numel() == 3


def test_a_row_is_scored_alone() -> None:
    scorer, latents, sigmas = trained_scorer(), some_latents(3), torch.tensor([0.0, 1.0, 10.0])
    alone = torch.cat([scorer(latents[row : row + 1], sigmas[row : row + 1]) for row in range(3)])
    torch.testing.assert_close(scorer(latents, sigmas), alone, rtol=1e-4, atol=1e-5)


def assert_gradient_is_right(scorer: BackboneScorer, latents: Tensor) -> None:
    """It equals the finite difference along itself."""
    scorer, sigmas = scorer.double(), torch.zeros(1).double()
    latents = latents.double().requires_grad_()
    (gradient,) = torch.autograd.grad(scorer(latents, sigmas).sum(), latents)
    direction, step = gradient / gradient.norm(), 2e-2
    difference = (scorer(latents + step * direction, sigmas) - scorer(latents - step * direction, sigmas)) / (2 * step)
    assert gradient.norm() > 1e-4
    torch.testing.assert_close(difference.double(), gradient.norm().view(1), rtol=3e-2, atol=0)


def test_gradient_equals_finite_difference() -> None:
    assert_gradient_is_right(trained_scorer(), some_latents(1))


def test_only_the_image_model_is_trained() -> None:
    scorer = trained_scorer("small").train()
    trainable = [parameter for parameter in scorer.backbone.parameters() if parameter.requires_grad]
    in_layers = [id(parameter) for layer in scorer.backbone.layers() for parameter in layer if parameter.requires_grad]
    assert sorted(map(id, trainable)) == sorted(in_layers)
    assert not any(parameter.requires_grad for parameter in scorer.backbone.decoder.parameters())
    assert not any(module.training for module in scorer.backbone.decoder.modules())
    scorer(some_latents(), torch.ones(2)).sum().backward()
    assert all(parameter.grad is not None for parameter in trainable)


@pytest.mark.parametrize("trained", [True, False])
def test_gradient_checkpointing_changes_no_gradient(trained: bool, nsfw: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        scorer = trained_scorer() if trained else make(tiny_vae(), nsfw)
        if checkpointing:
            scorer.backbone.enable_gradient_checkpointing()
        latents = some_latents().requires_grad_()
        gradients.append(torch.autograd.grad(scorer(latents, torch.zeros(2)).sum(), latents)[0])
    torch.testing.assert_close(gradients[1], gradients[0])


def test_a_trained_one_survives_its_file(tmp_path: Path) -> None:
    scorer = trained_scorer(decode_tile=8, decode_batch=2)
    save_scorer(tmp_path / "scorer.safetensors", scorer)
    loaded = load_scorer(tmp_path / "scorer.safetensors")
    sigmas = torch.tensor([0.0, 3.0])
    assert torch.equal(loaded(some_latents(), sigmas), scorer(some_latents(), sigmas))
    assert loaded.spec == scorer.spec
    with safe_open(tmp_path / "scorer.safetensors", framework="pt") as file:
        assert file.get_tensor("backbone.decoder.decoder.conv_in.weight").dtype == torch.float16


def test_pretrained_weights_and_a_tiny_decoder(tmp_path: Path) -> None:
    tiny_taesd().save_pretrained(tmp_path / "taesd")
    tiny_classifier().save_pretrained(tmp_path / "vit")
    scorer = trained_scorer("tiny", decoder=str(tmp_path / "taesd"), pretrained=str(tmp_path / "vit"))
    assert isinstance(scorer.backbone, PixelBackbone) and scorer.spec.architecture["decoder"]["_class_name"] == "AutoencoderTiny"
    assert scorer.backbone.image_model.preprocessing.size == SIDE
    state = scorer.backbone.image_model.state_dict()
    for name, tensor in tiny_classifier().vit.state_dict().items():
        torch.testing.assert_close(state[f"network.{name}"], tensor)
    save_scorer(tmp_path / "scorer.safetensors", scorer)
    torch.testing.assert_close(
        load_scorer(tmp_path / "scorer.safetensors")(some_latents(), torch.zeros(2)), scorer(some_latents(), torch.zeros(2))
    )


@pytest.mark.parametrize(
    ("size", "options", "message"),
    [
        ("huge", {}, "tiny, small"),
        ("tiny", {"depth": 3}, "no 'depth'"),
        ("tiny", {"decoder": "nowhere"}, "no config.json"),
        ("tiny", {"pretrained": "nowhere"}, "no config.json"),
    ],
)
def test_what_cannot_be_built_is_said(size: str, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        PixelBackbone.architecture_for(size, source(tiny_vae()), **options)


def test_a_decoder_for_other_latents_is_refused(tmp_path: Path) -> None:
    tiny_taesd(latent_channels=16).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="16 channels"):
        PixelBackbone.architecture_for("tiny", source(tiny_vae()), decoder=str(tmp_path))


# -- ready-made ones -----------------------------------------------------------------------------------------------------


def make(vae: AutoencoderKL, image_model: str, **changes) -> BackboneScorer:
    settings = make_pixel_scorer.PixelScorerConfig(image_model=image_model, output=Path("x.safetensors"))
    return make_pixel_scorer.make_scorer(vae, dataclasses.replace(settings, **changes), 64)


@pytest.fixture
def nsfw(tmp_path: Path) -> str:
    """A classifier, as a user names it."""
    tiny_classifier().save_pretrained(tmp_path / "nsfw")
    return f"classifier:{tmp_path}/nsfw?class=nsfw"


def test_a_ready_made_score_is_that_of_the_decoded_picture(tmp_path: Path, nsfw: str) -> None:
    vae = half(tiny_vae())
    scorer = make(vae, nsfw)
    latents = some_latents()
    pixels = (decode_latents(vae, latents) / 2 + 0.5).clamp(0, 1)
    squares = nn.functional.interpolate(pixels, (SIDE, SIDE), mode="bicubic", antialias=True)
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    logits = tiny_classifier()((squares - mean) / std).logits
    torch.testing.assert_close(scorer(latents, torch.zeros(2)), logits[:, 1] - logits[:, 0], rtol=1e-3, atol=1e-3)

    save_scorer(tmp_path / "scorer.safetensors", scorer)
    loaded = load_scorer(tmp_path / "scorer.safetensors")
    assert torch.equal(loaded(latents, torch.zeros(2)), scorer(latents, torch.zeros(2)))
    assert loaded.spec == scorer.spec and not loaded.spec.noise_aware
    assert loaded.spec.training["gradient"]["reaches_latents"]


def test_its_gradient_equals_finite_difference(nsfw: str) -> None:
    assert_gradient_is_right(make(tiny_vae(channels=FULL_VAE), nsfw), some_latents(1))


def test_its_gradient_reaches_every_part_of_a_picture(nsfw: str) -> None:
    vae = tiny_vae()
    for resize in ("square", "pad", "tiles"):
        scorer = make(vae, f"{nsfw}&resize={resize}")
        latents = some_latents(1, 8, 16).requires_grad_()
        (gradient,) = torch.autograd.grad(scorer(latents, torch.zeros(1)).sum(), latents)
        assert (gradient.abs().sum(1) > 0).all()
        assert min(scorer.spec.training["gradient"]["regions"].values()) > 0


def custom(tmp_path: Path, body: str) -> Loaded:
    """A function of pixels as an image model."""
    file = tmp_path / "own.py"
    file.write_text(f"def score(pixels):\n    return {body}\n")
    return read_image_model(f"python:{file}:score")


@pytest.mark.parametrize(
    ("body", "reaches", "blind"),
    [
        ("pixels.mean((1, 2, 3))", True, []),
        ("pixels[..., 16:-16].mean((1, 2, 3))", True, ["top left", "top right", "bottom left", "bottom right"]),
        ("pixels[..., :32, :].mean((1, 2, 3))", True, ["bottom left", "bottom right"]),
        ("pixels.detach().mean((1, 2, 3))", False, []),
        ("pixels.round().mean((1, 2, 3))", False, []),
        ("pixels.mean((1, 2, 3)) * float('nan')", False, []),
    ],
)
def test_where_there_is_no_gradient_is_found_out(tmp_path: Path, body: str, reaches: bool, blind: list[str]) -> None:
    vae = tiny_vae()
    _, backbone = ready_made(custom(tmp_path, body), vae, vae)
    report = measure_gradient(backbone.requires_grad_(False), some_latents(1, 8, 16))
    assert report.reaches_latents is reaches
    assert [name for name, share in report.regions.items() if share == 0] == blind
    assert report.is_everywhere is (reaches and not blind)
    assert ("blind" in str(report)) is bool(blind)


def test_white_and_black_keep_a_gradient_but_gain_nothing_beyond(tmp_path: Path) -> None:
    vae = tiny_vae()
    _, backbone = ready_made(custom(tmp_path, "pixels.mean((1, 2, 3))"), vae, vae)
    nn.init.constant_(backbone.decoder.decoder.conv_out.bias, 50.0)
    latents = some_latents(1).requires_grad_()
    score = backbone(latents, torch.zeros(1))
    (gradient,) = torch.autograd.grad(score.sum(), latents)
    assert score == 1 and gradient.abs().max() > 0


def test_a_score_of_picture_and_prompt_is_given_the_prompts(tmp_path: Path) -> None:
    tiny_clip().save_pretrained(tmp_path / "clip")
    vae = tiny_vae()
    save_scorer(tmp_path / "pick.safetensors", make(vae, f"pickscore:{tmp_path}/clip"))
    reward = load_reward(RewardConfig(scorer=(str(tmp_path / "pick.safetensors"),)), VaeFingerprint.of(vae), needs_noise_aware=False)
    latents = some_latents(1).expand(2, -1, -1, -1)
    first, second = reward(latents, torch.zeros(2), None, [PromptSpec(prompt="a red circle"), PromptSpec(prompt="a ship")]).total
    assert first != second
    with pytest.raises(AssertionError, match="needs the prompts"):
        reward.scorers[0](latents, torch.zeros(2))


def test_it_is_refused_for_noisy_latents_and_for_another_vae(tmp_path: Path, nsfw: str) -> None:
    vae = tiny_vae()
    path = str(tmp_path / "nsfw.safetensors")
    save_scorer(path, make(vae, nsfw))
    own = VaeFingerprint.of(vae)
    with pytest.raises(UserError, match="clean latents only"):
        load_reward(RewardConfig(scorer=(path,)), own, needs_noise_aware=True)
    assert load_reward(RewardConfig(scorer=(path,), force_scorer=True), own, needs_noise_aware=True).scorers
    with pytest.raises(UserError, match="another VAE"):
        load_reward(RewardConfig(scorer=(path,)), VaeFingerprint.of(tiny_vae(seed=5)), needs_noise_aware=False)


@pytest.mark.slow
def test_a_slider_is_trained_with_it(workplace: Path, tmp_path: Path) -> None:
    """train_leco_score.py takes the file as it is, with score_estimator x0, and refuses it with prev."""
    tiny_clip().save_pretrained(tmp_path / "clip")
    save_scorer(tmp_path / "pick.safetensors", make(tiny_model("sd1").vae, f"pickscore:{tmp_path}/clip"))
    changes = {"scorer": [str(tmp_path / "pick.safetensors")]}
    with pytest.raises(UserError, match="clean latents only"):
        run(workplace, tmp_path / "prev", score_estimator="prev", **changes)
    slider = load_file(run(workplace, tmp_path / "x0", score_estimator="x0", **changes))
    assert any(tensor.abs().max() > 0 for name, tensor in slider.items() if "lora_up" in name)


# -- the tool ------------------------------------------------------------------------------------------------------------


def write_pictures(folder: Path, count: int) -> None:
    from PIL import Image

    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for index in range(count):
        colour = tuple((torch.rand(3, generator=generator) * 255).int().tolist())
        Image.new("RGB", (96 if index % 2 else 48, 64), colour).save(folder / f"{index}.png")


def test_the_tool(tmp_path: Path, nsfw: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    tiny_vae().save_pretrained(tmp_path / "vae")
    tiny_taesd().save_pretrained(tmp_path / "taesd")
    write_pictures(tmp_path / "pictures", 5)
    arguments = {
        "vae": tmp_path / "vae",
        "image_model": nsfw,
        "decoder": tmp_path / "taesd",
        "reference_dir": tmp_path / "pictures",
        "num_reference": 4,
        "resolution": 64,
        "decode_tile": 8,
        "output": tmp_path / "out.safetensors",
    }
    words = [word for key, value in arguments.items() for word in (f"--{key}", str(value))]
    monkeypatch.setattr(sys, "argv", ["make_pixel_scorer.py", *words])
    make_pixel_scorer.main()
    printed = capsys.readouterr().out
    assert "the gradient reaches the latents" in printed and "scores of 4 pictures" in printed
    scorer = load_scorer(tmp_path / "out.safetensors")
    assert isinstance(scorer, BackboneScorer) and isinstance(scorer.backbone, PixelBackbone)
    assert isinstance(scorer.backbone.decoder.post_quant, nn.Identity)
    assert scorer.spec.std != 1 and scorer.spec.training["reference_pictures"] == 4
    assert scorer.spec.vae == VaeFingerprint.of(tiny_vae())
    content = (tmp_path / "out.safetensors").read_bytes()
    make_pixel_scorer.main()
    assert (tmp_path / "out-1.safetensors").read_bytes() == content and (tmp_path / "out.safetensors").is_file()


def test_damaged_reference_pictures_are_left_out_and_counted(tmp_path: Path, nsfw: str, caplog: pytest.LogCaptureFixture) -> None:
    write_pictures(tmp_path / "pictures", 5)
    whole = make(tiny_vae(), nsfw, reference_dir=tmp_path / "pictures")
    for number in (5, 6):
        (tmp_path / "pictures" / f"{number}.png").write_bytes(b"cut")
    scorer = make(tiny_vae(), nsfw, reference_dir=tmp_path / "pictures")
    assert scorer.spec.training["reference_pictures"] == 5 and scorer.spec.std == whole.spec.std
    (said,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "left out: 2" in said and "5.png cannot be read" in said
    for number in range(4):
        (tmp_path / "pictures" / f"{number}.png").write_bytes(b"cut")
    with pytest.raises(UserError, match=r"of 7 pictures of reference_dir, 1 have a score; give at least two \(.*0.png cannot be read"):
        make(tiny_vae(), nsfw, reference_dir=tmp_path / "pictures")
    (tmp_path / "pictures" / "4.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match="caption .*4.txt cannot be read as UTF-8"):
        make(tiny_vae(), nsfw, reference_dir=tmp_path / "pictures")


def test_the_unit_is_the_spread_over_the_reference_pictures(tmp_path: Path, nsfw: str) -> None:
    vae = tiny_vae()
    write_pictures(tmp_path / "pictures", 6)
    settings = make_pixel_scorer.PixelScorerConfig(image_model=nsfw, reference_dir=tmp_path / "pictures")
    scorer = make_pixel_scorer.make_scorer(vae, settings, 64)
    scores = torch.tensor(list(make_pixel_scorer.reference_scores(vae, scorer.backbone, settings, 64)))
    assert len(scores) == 6
    torch.testing.assert_close(torch.tensor([scorer.spec.mean, scorer.spec.std]), torch.stack([scores.mean(), scores.std(correction=0)]))


def test_the_reference_is_scored_at_the_models_size(tmp_path: Path) -> None:
    tiny_vae().save_pretrained(tmp_path / "model" / "vae")
    (tmp_path / "model" / "unet").mkdir()
    (tmp_path / "model" / "unet" / "config.json").write_text('{"sample_size": 96}', encoding="utf-8")
    model = VaeConfig(pretrained_model_name_or_path=str(tmp_path / "model"))
    assert make_pixel_scorer.native_size(model, tiny_vae()) == 768
    vae = VaeConfig(vae=tmp_path / "model" / "vae")
    assert make_pixel_scorer.native_size(vae, tiny_vae()) == tiny_vae().config["sample_size"]
    (tmp_path / "model" / "unet" / "config.json").write_text("[]", encoding="utf-8")
    with pytest.raises(UserError, match="holds a list where a table of settings is expected"):
        make_pixel_scorer.native_size(model, tiny_vae())


def test_pictures_that_all_score_alike_are_no_reference(tmp_path: Path) -> None:
    write_pictures(tmp_path / "pictures", 3)
    (tmp_path / "own.py").write_text("def score(pixels):\n    return 0 * pixels.mean((1, 2, 3)) + 4\n")
    with pytest.raises(UserError, match="have the score 4"):
        make(tiny_vae(), f"python:{tmp_path}/own.py:score", reference_dir=tmp_path / "pictures")


def test_reference_pictures_without_a_finite_score_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_pictures(tmp_path / "pictures", 5)
    text = "calls = []\ndef score(pixels):\n    calls.append(1)\n    return pixels.mean((1, 2, 3)) / (len(calls) % {} > 0)\n"
    (tmp_path / "own.py").write_text(text.format(3))  # the first call is for the gradient
    scorer = make(tiny_vae(), f"python:{tmp_path}/own.py:score", reference_dir=tmp_path / "pictures")
    assert scorer.spec.training["reference_pictures"] == 3 and scorer.spec.std > 0
    assert "2: picture has no finite score" in caplog.text
    (tmp_path / "never.py").write_text(text.format("2 * (len(calls) == 1)"))
    with pytest.raises(UserError, match=r"of 5 pictures of reference_dir, 0 have a score; give at least two \(.*0.png: its score is inf"):
        make(tiny_vae(), f"python:{tmp_path}/never.py:score", reference_dir=tmp_path / "pictures")


def test_a_function_that_gives_one_number_for_all_pictures_is_refused(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("def score(pixels):\n    return pixels.mean()\n")
    with pytest.raises(UserError, match=r"returned shape \[\] for 1 pictures; it must return one number for each"):
        make(tiny_vae(), f"python:{tmp_path}/own.py:score")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_model": None}, "image_model is not set"),
        ({"output": Path("x.pt")}, "safetensors"),
        ({"decode_tile": 4}, "at least 8"),
        ({"num_reference": 5}, "num_reference is set, but there is no reference_dir"),
    ],
)
def test_settings_that_cannot_be(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_pixel_scorer.PixelScorerConfig(**{"image_model": "classifier:x?class=1", **changes})


def test_laion_v2_as_a_scorer_file(tmp_path: Path) -> None:
    tiny_clip().save_pretrained(tmp_path / "clip")
    save_head(tmp_path / "head.pth", (24, 1024, 128, 64, 16, 1), "layers.{}.", (0, 2, 4, 6, 7))
    scorer = make(tiny_vae(), f"laion_v2:{tmp_path}/head.pth?clip={tmp_path}/clip")
    save_scorer(tmp_path / "laion.safetensors", scorer)
    (tmp_path / "head.pth").unlink()  # it is all in the file
    assert torch.equal(load_scorer(tmp_path / "laion.safetensors")(some_latents(), torch.zeros(2)), scorer(some_latents(), torch.zeros(2)))


def test_the_tool_refuses_what_nothing_can_be_learned_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_vae().save_pretrained(tmp_path / "vae")
    (tmp_path / "mine.py").write_text("def mean(pixels):\n    return pixels.detach().mean((1, 2, 3))\n", encoding="utf-8")
    argv = ["--vae", str(tmp_path / "vae"), "--image_model", f"python:{tmp_path / 'mine.py'}:mean", "--resolution", "64"]
    monkeypatch.setattr(sys, "argv", ["make_pixel_scorer.py", *argv, "--output", str(tmp_path / "out.safetensors")])
    with pytest.raises(
        UserError, match="has no gradient that reaches the latents, so nothing can be trained with it and no file is written"
    ):
        make_pixel_scorer.main()
    assert not (tmp_path / "out.safetensors").exists()


def test_a_reference_dir_that_is_no_folder_is_refused_before_a_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--pretrained_model_name_or_path", "nowhere", "--image_model", "clip_aesthetic:x", "--output", f"{tmp_path}/x.safetensors"]
    monkeypatch.setattr("sys.argv", ["make_pixel_scorer.py", *words, "--reference_dir", f"{tmp_path}/pictures"])
    with pytest.raises(UserError, match="reference_dir .*pictures is not a folder"):
        make_pixel_scorer.main()
