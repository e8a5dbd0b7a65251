"""A DiffusionModel says what diffusers' pipelines say, for every family."""

import copy
import json

import pytest
import torch
from torch import Tensor

from library.diffusion.noise_schedule import v_to_eps
from library.diffusion.solvers import ddim_step
from library.errors import UserError
from library.models.clip_tokenizer import build_clip_tokenizer
from library.models.vae import VaeFingerprint, probe_picture
from library.types import Conditioning
from tests.helpers.tiny_models import FAMILY_NAMES, IMAGE_SIZE, KINDS, LATENT_SIZE, pipeline_of, tiny_model, tiny_vae

PROMPTS = ["a photo of a cat", "the night sky, oil on canvas"]


def noise(rows: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(rows, 4, LATENT_SIZE, LATENT_SIZE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", FAMILY_NAMES)
@torch.no_grad()
def test_prompts_are_encoded_as_by_the_pipeline(family):
    model = tiny_model(family)
    ours = model.encode_prompts(PROMPTS)
    theirs = pipeline_of(model).encode_prompt(PROMPTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    torch.testing.assert_close(ours.text, theirs[0], rtol=0, atol=1e-6)
    assert ours.text.shape == (2, 77, model.unet.config["cross_attention_dim"])
    assert not torch.allclose(ours.text[0], ours.text[1])
    if family == "sdxl":
        assert ours.pooled is not None
        torch.testing.assert_close(ours.pooled, theirs[2], rtol=0, atol=1e-6)


@torch.no_grad()
def test_sdxl_is_told_the_size():
    model = tiny_model("sdxl")
    theirs = pipeline_of(model)._get_add_time_ids(
        (832, 1216), (0, 0), (832, 1216), torch.float32, model.unet.config["cross_attention_dim"] - 32
    )
    time_ids = model.encode_prompts(PROMPTS, size=(832, 1216)).time_ids
    assert time_ids is not None and time_ids.equal(theirs.repeat(2, 1))
    native = model.encode_prompts(PROMPTS).time_ids
    assert native is not None and native[1].tolist() == [64, 64, 0, 0, 64, 64]


@pytest.mark.parametrize("family", ["sd1", "sd2"])
@torch.no_grad()
def test_clip_skip_leaves_out_layers(family):
    model = tiny_model(family)
    plain = model.encode_prompts(PROMPTS).text
    model.set_clip_skip(1)
    torch.testing.assert_close(model.encode_prompts(PROMPTS).text, plain)
    model.set_clip_skip(2)
    skipped = model.encode_prompts(PROMPTS).text
    shorter = tiny_model(family)
    core = getattr(shorter.text_encoders[0], "text_model", shorter.text_encoders[0])
    del core.encoder.layers[-1]
    torch.testing.assert_close(skipped, shorter.encode_prompts(PROMPTS).text)
    assert not torch.allclose(skipped, plain)


def test_clip_skip_that_cannot_be():
    with pytest.raises(UserError, match="from 1 to 3"):
        tiny_model("sd1").set_clip_skip(4)
    with pytest.raises(UserError, match="SDXL always takes the last hidden state but one"):
        tiny_model("sdxl").set_clip_skip(3)
    for clip_skip in (1, 2):
        tiny_model("sdxl").set_clip_skip(clip_skip)


def test_tokenizer_is_clips():
    tokenizer = build_clip_tokenizer()
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenizer("", padding="max_length").input_ids == [49406] + [49407] * 76
    assert build_clip_tokenizer("!")("", padding="max_length").input_ids == [49406, 49407] + [0] * 75
    assert tokenizer("Größe 例 🙂").input_ids == tokenizer("  größe   例 🙂 ").input_ids


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_sampling_equals_the_pipeline(kind):
    """Prompts, U-Net, v to eps, guidance, DDIM: the latents of three steps are diffusers' own.

    Through eps, where diffusers goes from v to x0, rounding is divided by sqrt(abar), 0.07 at first: 2e-4 were seen with SSE kernels.
    """
    model, guidance = tiny_model(kind), 3.0
    theirs = pipeline_of(model)(
        PROMPTS,
        negative_prompt=["blurry"] * 2,
        guidance_scale=guidance,
        num_inference_steps=3,
        height=IMAGE_SIZE,
        width=IMAGE_SIZE,
        latents=noise(),
        output_type="latent",
    ).images
    size = (IMAGE_SIZE, IMAGE_SIZE)
    cond = Conditioning.cat([model.encode_prompts(["blurry"] * 2, size), model.encode_prompts(PROMPTS, size)])
    latents = noise()
    timesteps = model.schedule.inference_timesteps(3)
    for timestep, next_timestep in zip(timesteps, timesteps[1:], strict=False):
        uncond_eps, cond_eps = model.predict_eps(latents.repeat(2, 1, 1, 1), timestep.repeat(4), cond).chunk(2)
        eps = uncond_eps + guidance * (cond_eps - uncond_eps)
        latents = ddim_step(latents, eps, model.schedule.abar(timestep.repeat(2)), model.schedule.abar(next_timestep.repeat(2)))
    atol = 1e-3 if model.spec.prediction_type == "v_prediction" else 1e-4
    torch.testing.assert_close(latents, theirs, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_each_row_has_its_own_timestep(kind):
    model = tiny_model(kind)
    cond, timesteps = model.encode_prompts(PROMPTS), torch.tensor([20, 800])
    together = model.predict_eps(noise(), timesteps, cond)
    for row in range(2):
        one = slice(row, row + 1)
        torch.testing.assert_close(together[one], model.predict_eps(noise()[one], timesteps[one], cond[one]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together, model.predict_eps(noise(), timesteps.float(), cond), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_v_prediction_is_turned_into_eps():
    eps_model, v_model = tiny_model("sd2"), tiny_model("sd2_v")  # the same seed: the same weights
    cond, timesteps = eps_model.encode_prompts(PROMPTS), torch.tensor([20, 800])
    output = eps_model.predict_eps(noise(), timesteps, cond)
    expected = v_to_eps(noise(), output, v_model.schedule.abar(timesteps))
    torch.testing.assert_close(v_model.predict_eps(noise(), timesteps, cond), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_changes_no_gradient(kind):
    model = tiny_model(kind)
    cond, timesteps = model.encode_prompts(PROMPTS), torch.tensor([20, 800])

    def gradient() -> Tensor:
        latents = noise().requires_grad_(True)
        eps = model.predict_eps(latents, timesteps, cond)
        return torch.autograd.grad((eps * noise(seed=1)).sum(), latents)[0]

    plain = gradient()
    model.enable_gradient_checkpointing()
    assert model.unet.is_gradient_checkpointing
    assert plain.abs().max() > 0
    torch.testing.assert_close(gradient(), plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILY_NAMES)
@torch.no_grad()
def test_half_precision_takes_and_gives_float32(family):
    model = tiny_model(family)
    cond, timesteps = model.encode_prompts(PROMPTS), torch.tensor([20, 800])
    exact = model.predict_eps(noise(), timesteps, cond)
    assert model.to(dtype=torch.bfloat16) is model
    assert model.dtype == torch.bfloat16 and model.text_encoders[0].dtype == torch.bfloat16
    rounded = model.predict_eps(noise(), timesteps, cond)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0, atol=0.1)
    assert model.encode_prompts(PROMPTS).text.dtype == torch.bfloat16


def test_vae_stays_in_float32_unless_it_is_safe():
    model = tiny_model("sdxl").to(dtype=torch.float16)
    assert model.vae.dtype == torch.float32 and model.unet.dtype == torch.float16
    model.vae.register_to_config(force_upcast=False)
    model.to(dtype=torch.float16)
    assert model.vae.dtype == torch.float16


@torch.no_grad()
def test_encoding_and_decoding_scale_latents_and_ignore_autocast():
    model = tiny_model("sdxl")
    pixels = probe_picture(IMAGE_SIZE).repeat(2, 1, 1, 1)
    latents = model.encode_images(pixels)
    assert latents.shape == (2, 4, LATENT_SIZE, LATENT_SIZE)
    torch.testing.assert_close(latents, model.vae.encode(pixels).latent_dist.mean * 0.13025)
    decoded = model.decode_latents(latents)
    assert decoded.shape == pixels.shape
    torch.testing.assert_close(decoded, model.vae.decode(latents / 0.13025).sample)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(model.decode_latents(latents), decoded)
        torch.testing.assert_close(model.encode_images(pixels), latents)


def test_decoding_is_differentiable():
    model = tiny_model("sd1")
    latents = noise(1).requires_grad_(True)
    (gradient,) = torch.autograd.grad(model.decode_latents(latents).square().sum(), latents)
    assert gradient.abs().max() > 0
    assert not model.decode_latents(noise(1)).requires_grad  # a frozen model carries none of its own


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fingerprint_of_rounded_weights_matches(dtype):
    vae = tiny_vae()
    rounded = copy.deepcopy(vae).to(dtype).to(torch.float32)
    assert VaeFingerprint.of(rounded).matches(VaeFingerprint.of(vae))
    assert VaeFingerprint.of(rounded.to(dtype)).matches(VaeFingerprint.of(vae))


def test_fingerprint_is_the_encoders():
    vae = tiny_vae()
    fingerprint = VaeFingerprint.of(vae)
    broken = copy.deepcopy(vae)
    broken.encoder.conv_in.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="the VAE makes NaN or infinity of a picture"):  # it would match nothing, not even itself
        VaeFingerprint.of(broken)
    narrow = copy.deepcopy(vae)
    narrow.encoder.conv_in.weight.mul_(1e5)
    expected = VaeFingerprint.of(narrow)
    assert VaeFingerprint.of(narrow.half()).matches(expected)  # whose activations half precision cannot hold
    other_decoder = copy.deepcopy(vae)
    other_decoder.decoder = tiny_vae(seed=1).decoder
    assert VaeFingerprint.of(other_decoder).probe == pytest.approx(fingerprint.probe, abs=2e-4)  # the last of 4 decimals may differ
    assert not VaeFingerprint.of(tiny_vae(seed=1)).matches(fingerprint)
    assert not VaeFingerprint.of(tiny_vae(scaling_factor=0.13025)).matches(fingerprint)
    assert VaeFingerprint.from_dict(json.loads(json.dumps(fingerprint.to_dict()))) == fingerprint
    assert tiny_model("sd1").vae_fingerprint().matches(fingerprint)


def test_freed_text_encoders_are_gone():
    model = tiny_model("sdxl")
    model.free_text_encoders()
    assert model.text_encoders == [] and model.tokenizers == []
    model.to(dtype=torch.bfloat16).freeze()
    with pytest.raises(AssertionError, match="freed"):
        model.encode_prompts(PROMPTS)


def test_attention_falls_back_to_sdpa(caplog):
    model = tiny_model("sd1")
    cond, timesteps = model.encode_prompts(PROMPTS), torch.tensor([5, 6])
    before = model.predict_eps(noise(), timesteps, cond)
    model.set_attention("xformers")  # no GPU here, whether or not it is installed
    assert "xformers cannot be used" in caplog.text
    torch.testing.assert_close(model.predict_eps(noise(), timesteps, cond), before)
    with pytest.raises(UserError, match="no attention 'flash'; use sdpa or xformers"):
        model.set_attention("flash")


@pytest.mark.parametrize(
    ("kind", "version", "architecture"),
    [
        ("sd1", "sd_v1", "stable-diffusion-v1/lora"),
        ("sd2", "sd_v2", "stable-diffusion-v2-512/lora"),
        ("sd2_v", "sd_v2_v", "stable-diffusion-v2-768-v/lora"),
        ("sdxl", "sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora"),
    ],
)
def test_spec_names_what_clients_look_for(kind, version, architecture):
    spec = tiny_model(kind).spec
    assert (spec.base_model_version, spec.architecture) == (version, architecture)
    assert (spec.family, spec.prediction_type) == KINDS[kind]
    assert (spec.latent_channels, spec.vae_scale_factor, spec.resolution) == (4, 8, IMAGE_SIZE)
    assert spec.latent_space.scaling_factor == (0.13025 if kind == "sdxl" else 0.18215)


@torch.no_grad()
def test_a_vae_that_overflows_in_half_precision_works_in_float32_from_then_on(caplog: pytest.LogCaptureFixture) -> None:
    latents = noise(1)
    model = tiny_model("sd1")
    model.vae.decoder.conv_in.weight *= 1e5
    expected = model.decode_latents(latents)
    model.vae.register_to_config(force_upcast=False)
    model.to(dtype=torch.float16)
    assert model.vae.dtype == torch.float16
    assert not model.decode_latents(latents * torch.nan).isfinite().any() and not caplog.records
    for _ in range(2):
        torch.testing.assert_close(model.decode_latents(latents), expected, rtol=0, atol=0.05)
    assert len(caplog.records) == 1 and "overflows in float16" in caplog.text
    assert model.to(dtype=torch.float16).vae.dtype == torch.float32


def test_attention_is_fused():
    """diffusers' own default processor is not: it holds a number for every pair of tokens."""
    model = tiny_model()
    model.set_attention("sdpa")
    assert {type(processor).__name__ for processor in model.unet.attn_processors.values()} == {"AttnProcessor2_0"}
