"""Pictures in place of prompts: the adapter, what it is fitted and trained to, whom it refuses, and a run from end to end."""

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig

from library.errors import UserError
from library.models.clip_tokenizer import build_clip_tokenizer
from library.rollouts.prompt_encoder import PromptEncoder
from library.rollouts.sample import SamplingConfig, sample
from library.scorers.image_models.preprocessing import Preprocessing
from library.settings.options import build_config
from library.text_free.adapter import (
    Fingerprint,
    ImagePromptAdapter,
    check_adapter_fits,
    load_adapter,
    perturb,
    save_adapter,
    text_encoder_fingerprint,
)
from library.text_free.adapter_training import (
    AdapterRecipe,
    encode_first_chunk,
    hidden_error,
    new_adapter,
    train_adapter,
    trajectories,
    validation_errors,
)
from library.text_free.clip_pair import ClipPair, find_pictures
from library.text_free.image_prompts import ImagePromptEncoder, TextFreeConfig, encoder_and_prompts
from library.types import PromptSpec
from networks.lora import create_network
from tests.helpers import tiny_leco_run
from tests.helpers.tiny_leco_run import tiny_scorer
from tests.helpers.tiny_models import tiny_model, tiny_text_config
from tools.train_image_prompt_adapter import AdapterConfig, TrainImagePromptAdapterConfig, train

COLOURS, SHAPES, PLACES = ("red", "blue", "green", "black"), ("circle", "square", "star"), ("left", "right")
PROMPTS = [f"a {colour} {shape} on the {place}" for colour in COLOURS for shape in SHAPES for place in PLACES]
RECIPE = AdapterRecipe(
    adapter_width=32,
    max_train_steps=12,
    train_batch_size=3,
    text_batch_size=8,
    learning_rate=3e-3,
    max_denoising_steps=3,
    guidance_scale=3.0,
)
SIZE = (64, 64)


def tiny_clip(seed: int = 0) -> ClipPair:
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16, projection_dim=24
    )
    text: dict[str, Any] = tiny_text_config(32, {"vocab_size": 49408, "eos_token_id": 49407, "bos_token_id": 49406}, layers=2).to_dict()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision.to_dict(), projection_dim=24))
    return ClipPair(clip, build_clip_tokenizer(), Preprocessing(size=32))


def fitted(kind: str = "sd1", **changes: Any) -> tuple[ImagePromptAdapter, Any, ClipPair]:
    model, clip = tiny_model(kind), tiny_clip()
    torch.manual_seed(0)
    return new_adapter(model, clip, PROMPTS, replace(RECIPE, **changes), torch.Generator().manual_seed(0)), model, clip


def draw_pictures(folder: Path, count: int = 3) -> Path:
    folder.mkdir()
    for index in range(count):
        Image.new("RGB", (40 + 8 * index, 30), (80 * index, 200 - 60 * index, 40)).save(folder / f"{index}.png")
    return folder


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_an_adapter_answers_in_the_shape_of_the_text_encoders(kind: str) -> None:
    adapter, model, clip = fitted(kind)
    wanted = encode_first_chunk(model, PROMPTS[:2])
    answered = adapter(adapter.of_texts(clip.embed_texts(PROMPTS[:2])))
    assert answered.text.shape == wanted.text.shape
    assert (answered.pooled is None) == (wanted.pooled is None)
    if wanted.pooled is not None:
        assert answered.pooled.shape == wanted.pooled.shape


def test_the_fit_without_noise_is_the_least_squares_answer() -> None:
    adapter, model, clip = fitted(adapter_noise=0.0)
    points = adapter.of_texts(clip.embed_texts(PROMPTS))
    wanted = encode_first_chunk(model, PROMPTS).text.flatten(1)
    inputs = torch.cat([points, torch.ones(len(points), 1)], dim=1).double()
    expected = inputs @ torch.linalg.lstsq(inputs, wanted.double(), driver="gelsd").solution
    residual, best = (adapter(points).text.flatten(1) - wanted).square().mean(), (expected - wanted).square().mean()
    variance = (wanted - wanted.mean(0)).square().mean()
    assert residual < best + 0.02 * variance  # the damping costs a little
    assert best < 0.8 * variance  # or the comparison would say nothing


def test_the_u_net_learns_to_obey_the_adapter() -> None:
    adapter, model, clip = fitted()
    for parameter in (adapter.decode.weight, adapter.decode.bias):
        torch.nn.init.zeros_(parameter)  # as bad as can be
    before = validation_errors(adapter, model, clip, PROMPTS, RECIPE, torch.Generator().manual_seed(1), SIZE)
    seen = []
    recipe = replace(RECIPE, max_train_steps=30, learning_rate=1e-2)
    train_adapter(adapter, model, clip, PROMPTS, recipe, torch.Generator().manual_seed(2), SIZE, lambda step, errors: seen.append(step))
    after = validation_errors(adapter, model, clip, PROMPTS, RECIPE, torch.Generator().manual_seed(1), SIZE)
    assert seen == list(range(1, 31))
    assert after.hidden < 0.5 * before.hidden
    assert after.eps < 0.5 * before.eps


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_trajectories_are_the_samplers(kind: str) -> None:
    model = tiny_model(kind)
    generator = torch.Generator().manual_seed(0)
    recipe = replace(RECIPE, train_batch_size=1)
    batches = list(islice(trajectories(model, PROMPTS, recipe, generator, SIZE), recipe.max_denoising_steps + 1))
    expected = sample(
        model,
        None,
        [PromptSpec(prompt=batches[0].prompts[0])],
        [0],
        sampling=SamplingConfig(num_steps=3, guidance_scale=3.0, size=SIZE),
    )
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator("cpu").manual_seed(0))
    assert torch.equal(batches[0].latents, noise)  # the generators agree in their first draw, so this is sample's trajectory
    last = batches[2]
    guided = last.uncond_eps + 3.0 * (last.cond_eps - last.uncond_eps)
    abar, end = model.schedule.abar(last.timesteps), model.schedule.abar(torch.tensor([-1]))
    x0 = (last.latents - (1 - abar).sqrt().view(-1, 1, 1, 1) * guided) / abar.sqrt().view(-1, 1, 1, 1)
    finished = end.sqrt() * x0 + (1 - end).sqrt() * guided
    assert torch.allclose(finished, expected, atol=2e-4)
    assert not torch.equal(batches[3].latents, finished)  # another has begun


def test_a_first_chunk_is_what_a_short_prompt_is() -> None:
    model = tiny_model()
    long = "a red circle " * 40
    both = encode_first_chunk(model, ["a red circle", long]).text
    assert both.shape[1] == 77
    assert torch.allclose(both[:1], model.encode_prompts(["a red circle"]).text, atol=1e-6)


def test_perturb_keeps_the_length_and_bounds_the_angle() -> None:
    points = F.normalize(torch.randn(200, 24, generator=torch.Generator().manual_seed(0)), dim=-1)
    pushed = perturb(points, 0.5, torch.Generator().manual_seed(1))
    cosines = (points * pushed).sum(-1)
    assert torch.allclose(pushed.norm(dim=-1), torch.ones(200))
    assert cosines.min() >= (1 - 0.5**2) ** 0.5 - 1e-5  # Lafite's bound
    assert cosines.max() < 0.999
    assert torch.allclose(perturb(points, 0.0, torch.Generator()), points, atol=1e-6)


def test_saved_and_loaded_it_answers_the_same(tmp_path: Path) -> None:
    adapter, _, clip = fitted("sdxl")
    adapter.image_mean.copy_(torch.randn(24))
    save_adapter(tmp_path / "a.safetensors", adapter)
    loaded = load_adapter(tmp_path / "a.safetensors")
    embeddings = clip.embed_texts(PROMPTS)
    assert loaded.spec == adapter.spec and loaded.knows_pictures
    before, after = adapter(adapter.of_pictures(embeddings)), loaded(loaded.of_pictures(embeddings))
    assert (after.text - before.text).square().mean() < 1e-4 * before.text.square().mean()  # half precision
    assert after.pooled is not None and before.pooled is not None
    assert (after.pooled - before.pooled).square().mean() < 1e-4 * before.pooled.square().mean()


def test_other_files_are_no_adapters(tmp_path: Path) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="not a readable"):
        load_adapter(tmp_path / "broken.safetensors")
    with pytest.raises(UserError, match="there is no image_prompt_adapter"):
        load_adapter(tmp_path / "absent.safetensors")


def test_a_foreign_adapter_is_refused() -> None:
    adapter, model, clip = fitted()
    own, own_clip = text_encoder_fingerprint(model), clip.fingerprint()
    check_adapter_fits(adapter, own, own_clip)
    check_adapter_fits(adapter, text_encoder_fingerprint(tiny_model().to(dtype=torch.bfloat16)), own_clip)
    for other in (tiny_model(seed=5), tiny_model("sdxl")):
        with pytest.raises(UserError, match="another text encoder"):
            check_adapter_fits(adapter, text_encoder_fingerprint(other), own_clip)
    skipping = tiny_model()
    skipping.set_clip_skip(2)
    with pytest.raises(UserError, match="clip_skip"):
        check_adapter_fits(adapter, text_encoder_fingerprint(skipping), own_clip)
    with pytest.raises(UserError, match="another CLIP"):
        check_adapter_fits(adapter, own, tiny_clip(seed=1).fingerprint())


def test_fingerprints_survive_json() -> None:
    first = Fingerprint.of(torch.randn(7, 300))
    assert len(first.values) == 256
    assert first.matches(Fingerprint(tuple(json.loads(json.dumps(first.values)))))
    assert not first.matches(Fingerprint.of(torch.randn(7, 300)))


def test_pictures_and_their_pixels_are_embedded_alike(tmp_path: Path) -> None:
    clip, folder = tiny_clip(), draw_pictures(tmp_path / "pictures")
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("no picture either")
    found = list(clip.embed_pictures(find_pictures(folder, 10), batch_size=2))
    assert [Path(picture.key).name for picture, _ in found] == ["0.png", "1.png", "2.png"]
    flat = torch.tensor([80, 140, 40]).view(1, 3, 1, 1).expand(1, 3, 20, 50) / 127.5 - 1.0
    assert torch.allclose(found[1][1], clip.embed_pixels(flat)[0], atol=1e-4)
    assert len(find_pictures(folder, 2)) == 2
    with pytest.raises(UserError, match="no pictures"):
        find_pictures(tmp_path / "absent", 2)


def test_a_clip_folder_is_read_as_it_was_written(tmp_path: Path) -> None:
    clip = tiny_clip()
    clip.clip.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": 32}))
    assert ClipPair.load(tmp_path).fingerprint().matches(clip.fingerprint())
    with pytest.raises(UserError, match="config.json"):
        ClipPair.load(tmp_path / "absent")


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_pictures_are_answered_by_the_adapter_and_texts_as_ever(kind: str) -> None:
    adapter, model, _ = fitted(kind)
    points = F.normalize(torch.randn(2, 24), dim=-1)
    long_name = "image:" + "/a very long path of a picture" * 30  # must not count as a prompt of many chunks
    encoder, plain = ImagePromptEncoder(model, None, adapter, {"image:a": points[0], long_name: points[1]}), PromptEncoder(model)
    texts = ["a red circle", long_name, "", "image:a"]
    encoder.encode_ahead([PromptSpec(prompt=text) for text in texts], SIZE)
    model.text_encoders, kept = [], model.text_encoders
    mixed = encoder.encode(texts, (64, 96))
    model.text_encoders = kept
    written, shown = plain.encode(["a red circle", ""], (64, 96)), adapter(points)
    assert mixed.text.shape[1] == 77
    assert torch.equal(mixed.text[[0, 2]], written.text)
    assert torch.allclose(mixed.text[[3, 1]], shown.text, atol=1e-5)
    if kind == "sdxl":
        assert mixed.pooled is not None and shown.pooled is not None and mixed.time_ids is not None
        assert torch.allclose(mixed.pooled[[3, 1]], shown.pooled, atol=1e-5)
        assert mixed.time_ids[1].tolist() == [64, 96, 0, 0, 64, 96]


def test_pictures_are_as_long_as_long_prompts() -> None:
    adapter, model, _ = fitted()
    encoder = ImagePromptEncoder(model, None, adapter, {"image:a": F.normalize(torch.randn(24), dim=0)})
    long = PromptSpec(prompt="image:a", negative_prompt="blurry and ugly " * 40)
    cond, uncond = encoder.cond([long], SIZE), encoder.uncond([long], SIZE)
    assert cond.text.shape == uncond.text.shape and cond.text.shape[1] > 77


def workplace(tmp_path: Path) -> TextFreeConfig:
    adapter, _, clip = fitted()
    folder = draw_pictures(tmp_path / "pictures")
    clip.clip.save_pretrained(tmp_path / "clip")
    (tmp_path / "clip" / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    adapter.image_mean.copy_(torch.stack([embedding for _, embedding in clip.embed_pictures(find_pictures(folder, 3))]).mean(0))
    save_adapter(tmp_path / "adapter.safetensors", adapter)
    return TextFreeConfig(image_prompts=folder, image_prompt_adapter=tmp_path / "adapter.safetensors", clip_model=tmp_path / "clip")


def prepare(
    config: TextFreeConfig, prompts: list[PromptSpec], *, with_text_encoder: bool = False
) -> tuple[PromptEncoder, list[PromptSpec]]:
    model = tiny_model()
    network = create_network(1.0, 2, 2.0, model.vae, model.text_encoders if with_text_encoder else None, model.unet)
    return encoder_and_prompts(config, model, network, [tiny_scorer(model.vae_fingerprint())], prompts)


def test_prompts_come_from_pictures(tmp_path: Path) -> None:
    encoder, prompts = prepare(workplace(tmp_path), [PromptSpec(prompt="a", weight=3.0), PromptSpec(prompt="b")])
    assert [Path(prompt.prompt).name for prompt in prompts] == ["0.png", "1.png", "2.png"]
    shown = encoder.encode([prompt.prompt for prompt in prompts], SIZE).text
    assert (shown[0] - shown[1]).abs().max() > 1e-3


def test_without_pictures_nothing_changes() -> None:
    written = [PromptSpec(prompt="a")]
    encoder, prompts = prepare(TextFreeConfig(), written)
    assert type(encoder) is PromptEncoder and prompts == written


def test_what_cannot_work_is_said(tmp_path: Path) -> None:
    config = workplace(tmp_path)
    with pytest.raises(UserError, match="needs image_prompt_adapter"):
        TextFreeConfig(image_prompts=tmp_path)
    with pytest.raises(UserError, match="network_train_unet_only"):
        prepare(config, [], with_text_encoder=True)
    adapter = load_adapter(tmp_path / "adapter.safetensors")
    adapter.image_mean.zero_()
    save_adapter(tmp_path / "adapter.safetensors", adapter)
    with pytest.raises(UserError, match="train it with --pictures"):
        prepare(config, [])


def test_hidden_error_is_nothing_for_the_encodings_themselves() -> None:
    adapter, model, clip = fitted(adapter_noise=0.0)
    average = encode_first_chunk(model, PROMPTS).text.mean(0)
    torch.nn.init.zeros_(adapter.decode.weight)
    adapter.decode.bias.data.copy_(average.flatten())
    assert hidden_error(adapter, model, clip, PROMPTS, 0.0, torch.Generator()).item() == pytest.approx(1.0, rel=1e-3)


def test_from_prompts_to_a_slider_that_saw_none(tmp_path: Path) -> None:
    place = tiny_leco_run.make_workplace(tmp_path / "place")
    pictures = draw_pictures(tmp_path / "pictures")
    tiny_clip().clip.save_pretrained(tmp_path / "clip")
    (tmp_path / "many.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    settings = {
        "pretrained_model_name_or_path": str(place / "model"),
        "prompts_file": str(tmp_path / "many.txt"),
        "clip_model": str(tmp_path / "clip"),
        "pictures": str(pictures),
        "output": str(tmp_path / "adapter.safetensors"),
        "adapter_width": 16,
        "max_train_steps": 2,
        "train_batch_size": 2,
        "text_batch_size": 4,
        "max_denoising_steps": 2,
        "num_threads": 1,
    }
    Path(settings["output"]).write_bytes(b"an earlier one")
    train(build_config(TrainImagePromptAdapterConfig, settings))
    assert (tmp_path / "adapter-1.safetensors").read_bytes() == b"an earlier one"
    changes = {"image_prompts": str(pictures), "image_prompt_adapter": settings["output"], "clip_model": settings["clip_model"]}
    changes["max_train_steps"] = 1
    written = tiny_leco_run.run(place, tmp_path / "measured by words", **changes)
    alone = tiny_leco_run.run(place, tmp_path / "no words at all", **changes, prompts_file="")
    assert load_file(written).keys() == load_file(alone).keys()
    ordinary = tiny_leco_run.run(place, tmp_path / "ordinary", max_train_steps=1)
    assert any(not torch.equal(tensor, load_file(ordinary)[name]) for name, tensor in load_file(written).items())


def test_settings_that_make_no_adapter_are_refused(tmp_path: Path) -> None:
    given: dict[str, Any] = {"prompts_file": tmp_path / "p.txt", "clip_model": tmp_path}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"clip_model": None}, "must both be set"),
        ({"output": Path("a.bin")}, "safetensors"),
        ({"resolution": 65}, "multiple of 8"),
    ]
    for wrong, message in cases:
        with pytest.raises(UserError, match=message):
            AdapterConfig(**(given | wrong))
