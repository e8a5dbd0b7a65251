"""Learning from pictures and from pairs of them: what is read, the losses, and which way the LoRA goes."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from library.errors import UserError
from library.models.loading import load_model
from library.objectives.base import TrainingContext
from library.objectives.known_noise import buckets_around, draw_alike
from library.objectives.terms.image_pairs import EncodedPair, ImagePairsConfig, ImagePairsTerm, PicturePair, find_pairs
from library.objectives.terms.images import EncodedPicture, ImagesConfig, ImagesTerm
from library.scorer_data.buckets import bucket_sizes
from library.scorer_data.records import Skipped
from tests.helpers.context import assert_resumes, make_context, part_settings, train_steps
from tests.helpers.pictures import save_picture


def latents(seed: int, size: tuple[int, int] = (8, 8)) -> Tensor:
    return torch.randn(4, *size, generator=torch.Generator().manual_seed(seed))


def images_term(context: TrainingContext, size: tuple[int, int] = (8, 8)) -> ImagesTerm:
    pictures = [EncodedPicture(latents(seed, size), f"picture {seed}", str(seed)) for seed in range(4)]
    return ImagesTerm(context, pictures)


def pairs_term(context: TrainingContext, size: tuple[int, int] = (8, 8)) -> ImagePairsTerm:
    pairs = [EncodedPair(latents(seed, size), latents(seed + 10, size), "a pair", str(seed)) for seed in range(3)]
    return ImagePairsTerm(context, pairs)


class Calls:
    """What the U-Net was asked: latents, timesteps, conditioning and the multipliers in force."""

    def __init__(self, context: TrainingContext, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[Tensor, Tensor, object, Tensor]] = []
        original = type(context.model).predict_eps

        def predict_eps(model, noisy: Tensor, timesteps: Tensor, cond) -> Tensor:
            self.seen.append((noisy, timesteps, cond, torch.as_tensor(context.network.multiplier)))
            return original(model, noisy, timesteps, cond)

        monkeypatch.setattr(type(context.model), "predict_eps", predict_eps)


@pytest.mark.parametrize(("kind", "gamma"), [("sd1", None), ("sd1", 5.0), ("sd2_v", None), ("sd2_v", 5.0), ("sdxl", None)])
def test_the_images_loss_is_the_error_in_the_known_noise(kind: str, gamma: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against diffusers' training recipe: MSE of the raw output to the noise or the velocity, weighted with Min-SNR (1e-5)."""
    context = make_context(kind, gamma=gamma)
    term = images_term(context, size=(16, 16))
    calls = Calls(context, monkeypatch)
    out = term()
    ((noisy, timesteps, cond, multipliers),) = calls.seen
    assert torch.equal(multipliers, torch.ones(3))
    abar = context.model.schedule.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    clean = torch.stack([latents(int(sample.split()[1]), (16, 16)) for sample in out.samples])
    noise = (noisy - abar.sqrt() * clean) / (1 - abar).sqrt()
    raw = context.model.unet(noisy, timesteps, cond.text, added_cond_kwargs=context.model._added_cond(cond)).sample  # pyright: ignore
    is_v = context.model.spec.prediction_type == "v_prediction"
    target = abar.sqrt() * noise - (1 - abar).sqrt() * clean if is_v else noise
    expected = torch.nn.functional.mse_loss(raw, target, reduction="none").mean((1, 2, 3))
    if gamma is not None:
        snr = (abar / (1 - abar)).flatten()
        expected = expected * torch.minimum(snr, torch.tensor(gamma)) / (snr + 1 if is_v else snr)
    torch.testing.assert_close(out.sample_losses, expected.detach(), rtol=2e-4, atol=1e-6)
    assert abs(noise.std().item() - 1) < 0.1
    assert context.model.num_unet_evaluations == 9


def test_both_signs_of_a_pair_share_noise_and_timestep(monkeypatch: pytest.MonkeyPatch) -> None:
    context = make_context(train_batch_size=5)
    term = pairs_term(context)
    calls = Calls(context, monkeypatch)
    out = term()
    ((noisy, timesteps, _, multipliers),) = calls.seen
    assert multipliers.tolist() == [1, 1, -1, -1]
    assert torch.equal(timesteps[:2], timesteps[2:])
    abar = context.model.schedule.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    seeds = [int(sample.split()[2]) for sample in out.samples[:2]]
    clean = torch.stack([latents(seed + side) for side in (0, 10) for seed in seeds])
    noise = (noisy - abar.sqrt() * clean) / (1 - abar).sqrt()
    torch.testing.assert_close(noise[:2], noise[2:], rtol=1e-3, atol=1e-3)
    assert len(set(seeds)) == 2  # no pair twice before each came once


class ErrorInNoise:
    """How far the embedded model is from the known noise in a noised picture, at noise that was never trained on, by multiplier."""

    def __init__(self, context: TrainingContext, prompt: str) -> None:
        self.context = context
        self.noise = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(99))
        self.timesteps = torch.tensor([301, 501, 701, 901])
        self.cond = context.encoder.encode([prompt] * 4, (128, 128))

    @torch.no_grad()
    def __call__(self, clean: Tensor, multiplier: float) -> float:
        self.context.network.set_multiplier(multiplier)
        noisy = self.context.model.schedule.add_noise(clean.expand_as(self.noise), self.noise, self.timesteps)
        return (self.context.model.predict_eps(noisy, self.timesteps, self.cond) - self.noise).square().mean().item()


def test_a_pair_moves_the_lora_towards_one_picture_and_away_from_the_other() -> None:
    """At +1 the noise of the positive picture is predicted better than at 0 and at -1; that of the negative the other way round."""
    context = make_context(model=load_model("examples/shapes/model"), strength=0.0, train_batch_size=4)
    flat = torch.ones(4, 16, 16)
    term = ImagePairsTerm(context, [EncodedPair(flat, -flat, "a pair", "0")])
    error = ErrorInNoise(context, "a pair")
    train_steps(term, context, 12, learning_rate=1e-3)
    assert error(flat, 1.0) < error(flat, 0.0) < error(flat, -1.0)
    assert error(-flat, -1.0) < error(-flat, 0.0) < error(-flat, 1.0)


def test_images_alone_lower_their_error() -> None:
    context = make_context(model=load_model("examples/shapes/model"), strength=0.0, train_batch_size=4)
    flat = torch.ones(4, 16, 16)
    term = ImagesTerm(context, [EncodedPicture(flat, "a picture", "0")])
    error = ErrorInNoise(context, "a picture")
    train_steps(term, context, 12, learning_rate=2e-3)
    assert error(flat, 1.0) < 0.9 * error(flat, 0.0)


@pytest.mark.parametrize("make", [images_term, pairs_term])
def test_a_term_goes_on_where_it_was_put_away(make) -> None:
    assert_resumes(make)


def test_text_encoder_modules_are_trained_by_pictures() -> None:
    from networks.lora import create_network
    from tests.helpers.tiny_models import tiny_model

    model = tiny_model("sd1")
    network = create_network(1.0, 2, 2.0, model.vae, model.text_encoders, model.unet, generator=torch.Generator().manual_seed(0))
    network.apply_to(model.text_encoders, model.unet)
    context = make_context(model=model, network=network)
    images_term(context)().loss.backward()
    gradients = [lora.lora_up.weight.grad for lora in network.text_encoder_loras]
    assert gradients and any(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)


def test_pictures_are_encoded_at_sizes_that_are_multiples_of_64(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_picture(tmp_path / "square.png", (150, 150))
    save_picture(tmp_path / "wide.png", (300, 100))
    save_picture(tmp_path / "line.png", (1000, 20))
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    (tmp_path / "wide.txt").write_text("a wide\npicture\n", encoding="utf-8")
    context = make_context(resolution=(128,))
    with caplog.at_level(logging.WARNING):
        term = ImagesTerm.build(context, ImagesConfig(images_dir=tmp_path, images_prompt="a picture"))
    found = {picture.name: (tuple(picture.latents.shape), picture.prompt) for picture in term.pictures}
    assert found == {"square.png": ((4, 16, 16), "a picture"), "wide.png": ((4, 8, 24), "a wide picture")}
    assert "line.png" in caplog.text and "broken.jpg" in caplog.text
    assert torch.isfinite(term().loss)


def test_a_picture_is_what_the_vae_makes_of_it(tmp_path: Path) -> None:
    path = save_picture(tmp_path / "picture.png")
    context = make_context()
    term = ImagesTerm.build(context, ImagesConfig(images_dir=tmp_path))
    pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None].float() / 127.5 - 1
    torch.testing.assert_close(term.pictures[0].latents, context.model.encode_images(pixels)[0], rtol=1e-4, atol=1e-5)


def test_pairs_are_told_by_their_names(tmp_path: Path) -> None:
    for side in ("positive", "negative"):
        save_picture(tmp_path / side / "first.png", (64, 64))
    save_picture(tmp_path / "positive" / "second.png", (128, 64))
    save_picture(tmp_path / "negative" / "second.jpg", (128, 64))
    save_picture(tmp_path / "positive" / "alone.png")
    (tmp_path / "positive" / "second.txt").write_text("a sea", encoding="utf-8")
    found = list(find_pairs(tmp_path, "a picture"))
    pairs = [pair for pair in found if isinstance(pair, PicturePair)]
    assert [(pair.positive.path.name, pair.negative.path.name, pair.prompt) for pair in pairs] == [
        ("first.png", "first.png", "a picture"),
        ("second.png", "second.jpg", "a sea"),
    ]
    (alone,) = [pair for pair in found if isinstance(pair, Skipped)]
    assert "alone" in alone.reason
    context = make_context(resolution=(128,), settings=part_settings(images_prompt="a picture"))
    term = ImagePairsTerm.build(context, ImagePairsConfig(image_pairs=tmp_path))
    assert [pair.prompt for pair in term.pairs] == ["a picture", "a sea"]
    for pair in term.pairs:
        assert pair.positive.shape == pair.negative.shape


def test_pairs_come_from_a_table(tmp_path: Path) -> None:
    save_picture(tmp_path / "a.png")
    save_picture(tmp_path / "deep" / "b.png")
    table = tmp_path / "pairs.csv"
    table.write_text("positive,negative,prompt\na.png,deep/b.png,a house\ndeep/b.png,a.png,\na.png,none.png,x\n", encoding="utf-8")
    found = list(find_pairs(table, "a picture"))
    pairs = [(pair.positive.path.name, pair.negative.path.name, pair.prompt) for pair in found if isinstance(pair, PicturePair)]
    assert pairs == [("a.png", "b.png", "a house"), ("b.png", "a.png", "a picture")]
    assert [skipped for skipped in found if isinstance(skipped, Skipped)]


@pytest.mark.parametrize("resolution", [(512, 512), (1024, 1024), (64, 64), (96, 128), (768, 512)])
def test_sizes_are_multiples_of_64_of_about_the_resolutions_area(resolution: tuple[int, int]) -> None:
    sizes = bucket_sizes(buckets_around(resolution))
    assert all(width % 64 == 0 and height % 64 == 0 and width * height <= resolution[0] * resolution[1] for width, height in sizes)


def test_batches_are_of_one_shape_and_every_picture_is_drawn_alike() -> None:
    shapes = [latents(0, (8, 8)), latents(1, (8, 16)), latents(2, (8, 8)), latents(3, (8, 8))]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.zeros(4)
    for _ in range(600):
        places = draw_alike(shapes, 2, generator)
        assert len({shapes[place].shape for place in places}) == 1
        for place in places:
            drawn[place] += 1
    assert ((drawn - 300).abs() < 60).all()


def test_what_cannot_be_used_is_a_users_error(tmp_path: Path) -> None:
    context = make_context()
    with pytest.raises(UserError, match="set images_dir"):
        ImagesTerm.build(context, ImagesConfig())
    with pytest.raises(UserError, match="set image_pairs"):
        ImagePairsTerm.build(context, ImagePairsConfig())
    with pytest.raises(UserError, match="nothing to read"):
        ImagesTerm.build(context, ImagesConfig(images_dir=tmp_path))
    with pytest.raises(UserError, match="no folder positive"):
        ImagePairsTerm.build(context, ImagePairsConfig(image_pairs=tmp_path))
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="no picture can be used; picture .*broken.png"):
        ImagesTerm.build(context, ImagesConfig(images_dir=tmp_path))
