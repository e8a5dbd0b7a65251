"""Families by flow matching: their schedules and solvers against diffusers', and Z-Image and Anima from their files to a slider."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import CosmosTransformer3DModel, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
from diffusers.models.transformers import transformer_cosmos
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.diffusion.flow import FlowSchedule
from library.diffusion.noise_schedule import ABAR_FLOOR, eps_to_flow, eps_to_x0, flow_scale, flow_to_eps, sigma_to_abar
from library.diffusion.solvers import SOLVERS
from library.errors import UserError
from library.models.flow_model import FlowFamily
from library.models.loading import load_model, load_vae
from library.models.packed import PackedLinear, pack_unet
from library.models.registry import FAMILIES
from library.models.textual_inversion import load_embeddings
from library.models.vae import VaeFingerprint
from library.objectives.regression import as_output, min_snr_weights, squared_errors
from library.rating.features import PictureFeatures
from library.rollouts.few_step import detect
from library.rollouts.sample import SamplingConfig, initial_noise, sample
from library.scorers.base import SCORER_KINDS, ModelSource
from library.scorers.io import save_scorer
from library.settings.options import build_config
from library.settings.shared import NetworkConfig
from library.slider_training.estimate import estimate
from library.slider_training.network import build_network
from library.text_free.adapter import text_encoder_fingerprint
from library.types import Conditioning, PromptSpec
from networks.lora import create_network, create_network_from_weights
from networks.lora_targets import find_targets
from tests.helpers.tiny_flow_models import PIPELINES, original_names, wan_vae_names
from tests.helpers.tiny_leco_run import run, settings, tiny_scorer
from tests.helpers.tiny_models import tiny_vae, vae_to_ldm
from train_leco_score import leco_score_config

FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}
SHIFTS: list[dict[str, Any]] = [{"shift": 3.0}, {"shift": 1.0}, {"shift": 6.0}, {"use_dynamic_shifting": True}]
PROMPTS = ["a red circle", "a small blue square on the left, and under it one more, much larger and much greener than it"]
SIZE = (64, 96)
# Sampling begins at sigma 4096 in place of infinity, which costs 1 / 4096 of the velocity; guidance multiplies it.
START: Any = {"atol": 3e-3, "rtol": 3e-3}


# ---- schedule and solvers ----


@pytest.mark.parametrize("config", SHIFTS)
@pytest.mark.parametrize("num_steps", [1, 4, 9, 50])
def test_timesteps_and_sigmas_equal_diffusers(config, num_steps):
    """float32 rounding of s: 1e-6."""
    theirs: Any
    theirs, mu = FlowMatchEulerDiscreteScheduler.from_config(FLOW | config), 0.5 + 0.65 * (8 * 12 / 4 - 256) / (4096 - 256)
    theirs.set_timesteps(sigmas=torch.linspace(1, 1 / num_steps, num_steps).tolist(), mu=mu)
    ours = FlowSchedule.from_config(FLOW | config)
    timesteps = ours.inference_timesteps(num_steps, size=(8, 12))
    torch.testing.assert_close((timesteps[:-1] + 1) / 1000, theirs.sigmas[:-1], atol=1e-6, rtol=0)
    assert timesteps[-1] == -1 and ours.abar(timesteps[-1:]).item() == 1
    share = theirs.sigmas[1:-1].double()
    torch.testing.assert_close(ours.sigmas(timesteps)[1:-1].double(), share / (1 - share), rtol=1e-4, atol=0)
    torch.testing.assert_close(ours.timesteps_of(ours.sigmas(timesteps[1:-1])), timesteps[1:-1], atol=2e-3, rtol=0)


def test_a_velocity_is_eps_less_x0():
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 5, 4, 8, 8, generator=generator)
    share = torch.tensor([0.001, 0.2, 0.5, 0.9, 0.999])
    abar = sigma_to_abar(share / (1 - share))
    mixed = (1 - share[:, None, None, None]) * x0 + share[:, None, None, None] * eps
    latents = mixed / flow_scale(abar)[:, None, None, None]
    torch.testing.assert_close(latents.square().mean(), torch.tensor(1.0), atol=0.1, rtol=0)
    torch.testing.assert_close(flow_to_eps(latents, eps - x0, abar), eps, atol=5e-4, rtol=0)  # 1 - abar is rounded
    torch.testing.assert_close(eps_to_flow(latents, eps, abar), eps - x0, atol=2e-3, rtol=0)
    torch.testing.assert_close(eps_to_x0(latents, eps, abar), x0, atol=2e-3, rtol=0)


def moved_by(theirs: Any, start: Tensor, velocity: Any) -> Tensor:
    latents = start.clone()
    for time in theirs.timesteps:
        latents = theirs.step(velocity(latents, time / 1000), time, latents, return_dict=False)[0]
    return latents


@pytest.mark.parametrize("name", ["euler", "ddim", "dpmpp_2m"])
def test_solvers_equal_diffusers(name):
    """From s = 0.999 on, where nothing stands in for infinity: float32 rounding."""
    schedule, solver, num_steps = FlowSchedule.from_config(FLOW | {"shift": 3.0}), SOLVERS[name], 6
    start = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))

    def velocity(latents: Tensor, share: Tensor) -> Tensor:
        return torch.tanh(latents) * (1 + share) - 0.3

    if name == "dpmpp_2m":
        theirs: Any = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
        theirs.set_timesteps(num_steps)
    else:
        theirs = FlowMatchEulerDiscreteScheduler(shift=3.0)
        theirs.set_timesteps(sigmas=torch.linspace(0.997, 1 / num_steps, num_steps).tolist())
    sigmas = theirs.sigmas.clone()
    theirs.timesteps = sigmas[:-1] * 1000  # which DPMSolverMultistepScheduler rounds to whole numbers
    timesteps = torch.cat([1000 * sigmas[:-1] - 1, torch.tensor([-1.0])])
    abars = schedule.abar(timesteps)
    latents, history = start / flow_scale(abars[0]), None
    for time, abar, next_abar in zip(timesteps[:-1], abars[:-1], abars[1:], strict=True):
        at, after = abar.expand(2), next_abar.expand(2)
        eps = flow_to_eps(latents, velocity(latents * flow_scale(abar), (time + 1) / 1000), at)
        moved = solver.step(latents, eps, at, after, None, history)
        latents, history = moved, solver.remember(latents, eps, at)
    torch.testing.assert_close(latents, moved_by(theirs, start, velocity), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize(
    "change",
    [{"invert_sigmas": True}, {"use_karras_sigmas": True}, {"shift": -1}, {"shift": 0}, {"shift": 1000}, {"shift": 5000}, {"shift": "3"}],
)
def test_other_flows_are_refused(change):
    with pytest.raises(UserError, match=next(iter(change))):
        FlowSchedule.from_config(FLOW | change)


def test_a_flow_ends_in_pure_noise():
    schedule = FlowSchedule.from_config(FLOW)
    assert schedule.alphas_cumprod[-1] == schedule.abar(torch.tensor([999.0])) == ABAR_FLOOR
    assert schedule.with_zero_terminal_snr() is schedule


# ---- the families ----


@pytest.fixture(scope="module", params=PIPELINES)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(kind) / "model"
    PIPELINES[kind]().save_pretrained(str(path))
    return path


@pytest.fixture
def no_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    """What diffusers' own transformer of Anima takes of torchvision, for a mask of zeros."""
    functional = SimpleNamespace(resize=lambda mask, size, **_: mask.new_zeros(*mask.shape[:2], *size))
    mode = SimpleNamespace(NEAREST=None)
    monkeypatch.setattr(transformer_cosmos, "transforms", SimpleNamespace(functional=functional, InterpolationMode=mode), raising=False)


FULL_SIZE: Any = {  # class, parameters of the transformer, modules of its LoRA
    "z_image": (ZImageTransformer2DModel, 6_154_908_736, 30 * 7, "lora_unet_layers_29_feed_forward_w3"),
    "anima": (CosmosTransformer3DModel, 1_956_405_248, 28 * 10, "lora_unet_blocks_0_self_attn_q_proj"),
}


@pytest.mark.parametrize("family", FULL_SIZE)
def test_full_size_structure(family):
    make, size, modules, name = FULL_SIZE[family]
    with torch.device("meta"):
        transformer = make(**FAMILIES[family].config["transformer"])
    assert sum(parameter.numel() for parameter in transformer.parameters()) == size
    targets = list(find_targets(None, transformer, with_convs=False))
    assert len({target.name for target in targets}) == len(targets) == modules
    assert name in {target.name for target in targets}
    assert all(target.dotted and target.name == "lora_unet" + target.dotted[15:].replace(".", "_") for target in targets)


def test_pictures_equal_the_pipeline(kind, folder, no_torchvision):
    model, pipeline = load_model(folder), PIPELINES[kind]()
    sampling = SamplingConfig(num_steps=4, guidance_scale=4.0, size=SIZE, sampler="euler")
    ours = sample(model, None, [PromptSpec(prompt=prompt) for prompt in PROMPTS], [1, 2], sampling=sampling)
    noise, _ = initial_noise([1, 2], (16, 8, 12))
    arguments = {"prompt": list(PROMPTS), "height": SIZE[0], "width": SIZE[1], "num_inference_steps": 4}
    if kind == "z_image":  # whose scale is ours less 1
        theirs = pipeline(**arguments, guidance_scale=3.0, latents=noise, output_type="latent").images
    else:
        theirs = pipeline(**arguments, latents=noise[:, :, None], output="latents")[:, :, 0]
    torch.testing.assert_close(ours, theirs, **START)


def test_one_prediction_equals_the_transformer(kind, folder):
    model = load_model(folder)
    assert (model.spec.family, model.spec.prediction_type) == (kind, "flow")
    model.expect_prompts(PROMPTS)
    cond = model.encode_prompts(PROMPTS)
    joined = Conditioning.cat([model.encode_prompts(PROMPTS[:1]), model.encode_prompts(PROMPTS[1:])])
    torch.testing.assert_close(joined.text, cond.text)
    assert model.encode_prompts(["", *PROMPTS]).text.isfinite().all()
    latents, share = torch.randn(2, 16, 8, 12, generator=torch.Generator().manual_seed(0)), torch.tensor([0.9, 0.3])
    abar = sigma_to_abar(share / (1 - share))
    eps = model.predict_eps(latents / flow_scale(abar)[:, None, None, None], 1000 * share - 1, cond)
    if kind == "z_image":
        assert cond.lengths is not None and cond.lengths[0] < cond.lengths[1] == cond.text.shape[1]
        texts = [row[:length] for row, length in zip(cond.text, cond.lengths, strict=True)]
        velocity = -torch.stack(model.unet(list(latents[:, :, None]), 1 - share, texts, return_dict=False)[0])[:, :, 0]
    else:
        zeros = torch.zeros(2, 1, 1, 8, 12)
        velocity = model.unet(latents[:, :, None], share, cond.text, condition_mask=zeros, return_dict=False)[0][:, :, 0]
    torch.testing.assert_close(eps, latents + (1 - share[:, None, None, None]) * velocity, atol=1e-5, rtol=1e-5)


def test_a_prediction_reads_nothing_back_from_the_device(kind, folder):
    """On one without values, where asking for any fails; on a GPU it would wait."""
    model = load_model(folder)
    cond = model.encode_prompts(PROMPTS)
    cond = Conditioning.cat([cond.repeat(2)[torch.tensor([0, 3])], cond[1:]]).to("meta")
    model.to("meta")
    eps = model.predict_eps(torch.empty(3, 16, 8, 12, device="meta"), torch.empty(3, device="meta"), cond)
    assert eps.shape == (3, 16, 8, 12)
    assert cond.lengths is None or (cond.lengths[0] < cond.lengths[1] == cond.lengths[2] == cond.text.shape[1])


@pytest.mark.parametrize("whole", [False, True])
def test_a_single_file_is_the_same_model(kind, folder, tmp_path, whole):
    pipeline, family = PIPELINES[kind](), FAMILIES[kind]
    assert isinstance(family, FlowFamily)
    prefix = "model.diffusion_model." if whole else "net." if kind == "anima" else ""
    tensors = {prefix + name: tensor for name, tensor in original_names(kind, pipeline).items()}
    language = {f"model.{name}": tensor for name, tensor in pipeline.text_encoder.state_dict().items()}
    options: dict[str, Any] = {"vae": folder / "vae", "tokenizer": [folder / "tokenizer"] * len(family.tokenizers)}
    if whole:  # ComfyUI's checkpoints of everything
        tensors |= {family.text_prefix + name: tensor for name, tensor in language.items()}
    else:
        save_file(language, tmp_path / "qwen.safetensors")
        options["text_encoder"] = tmp_path / "qwen.safetensors"
    file = tmp_path / "model.safetensors"
    save_file(tensors, file)
    model, expected = load_model(file, **options), load_model(folder)
    for ours, theirs in zip((model.unet, *model.text_encoders), (expected.unet, *expected.text_encoders), strict=True):
        assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in ours.state_dict().items())
    torch.testing.assert_close(model.encode_prompts(PROMPTS).text, expected.encode_prompts(PROMPTS).text)
    assert model.schedule.shift == 3.0
    same = ("axes_dims", "n_heads", "num_attention_heads", "mlp_ratio", "rope_scale")
    assert all(model.unet.config.get(name) == expected.unet.config.get(name) for name in same)
    with pytest.raises(UserError, match="no tokenizer; give --tokenizer"):
        load_model(file, **{**options, "tokenizer": ()})
    with pytest.raises(UserError, match="tokenizer has 3 folders"):
        load_model(file, **{**options, "tokenizer": [folder] * 3})
    assert load_model(file, **options, device="meta").text_encoders[0].device.type == "meta"
    if not whole:
        if kind == "z_image":  # diffusers' own names are read too
            save_file(pipeline.transformer.state_dict(), tmp_path / "names.safetensors")
            assert load_model(tmp_path / "names.safetensors", **options).unet.config == model.unet.config
        with pytest.raises(UserError, match="no text encoder; give --text_encoder"):
            load_model(file, vae=folder / "vae")
        by_folder = load_model(file, vae=folder / "vae", text_encoder=folder)
        assert by_folder.tokenizers[0].chat_template == expected.tokenizers[0].chat_template


def test_flux_vae_of_a_single_file(tmp_path):
    """ae.safetensors, as ComfyUI has it."""
    pipeline = PIPELINES["z_image"]()
    save_file({name: tensor.clone() for name, tensor in vae_to_ldm(pipeline.vae).items()}, tmp_path / "ae.safetensors")
    vae = load_vae(tmp_path / "ae.safetensors", family="z_image")
    assert VaeFingerprint.of(vae).matches(own := VaeFingerprint.of(pipeline.vae)) and own.name == "FLUX.1 latents"
    with pytest.raises(UserError, match="of Stable Diffusion's or FLUX's kind, and Anima has another"):
        load_vae(tmp_path / "ae.safetensors", family="anima")


def test_qwen_vae_of_a_single_file(tmp_path):
    """qwen_image_vae.safetensors, as ComfyUI has it."""
    pipeline = PIPELINES["anima"]()
    save_file(wan_vae_names(pipeline.vae), tmp_path / "qwen_image_vae.safetensors")
    vae = load_vae(tmp_path / "qwen_image_vae.safetensors", family="anima")
    assert all(torch.equal(tensor, pipeline.vae.state_dict()[name]) for name, tensor in vae.state_dict().items())
    assert VaeFingerprint.of(vae).matches(own := VaeFingerprint.of(pipeline.vae)) and own.name == "Qwen-Image and Wan latents"
    with pytest.raises(UserError, match="a VAE of Qwen-Image or Wan, and Z-Image has another"):
        load_vae(tmp_path / "qwen_image_vae.safetensors", family="z_image")


def test_what_does_not_fit_is_said(kind, folder, tmp_path):
    tiny_vae(0.13025).save_pretrained(tmp_path / "vae")
    other = PIPELINES["anima" if kind == "z_image" else "z_image"]().vae
    other.save_pretrained(tmp_path / "other")
    names = {"z_image": "FLUX.1", "anima": "Qwen-Image and Wan"}
    with pytest.raises(UserError, match=rf"makes SDXL latents \(4 channels\), and model draws {names[kind]} latents"):
        load_model(folder, vae=tmp_path / "vae")
    with pytest.raises(UserError, match=rf"latents \(16 channels\), and model draws {names[kind]} latents"):
        load_model(folder, vae=tmp_path / "other")
    with pytest.raises(UserError, match="v_parameterization .* flow matching"):
        load_model(folder, v_parameterization=True)
    with pytest.raises(UserError, match="clip_skip"):
        load_model(folder, clip_skip=2)
    with pytest.raises(UserError, match="brings its own text encoder and tokenizer"):
        load_model(folder, tokenizer=[folder / "tokenizer"])
    model = load_model(folder)
    with pytest.raises(UserError, match="multiples of 16 pixels; 72 x 64 is none"):
        sampling = SamplingConfig(num_steps=1, guidance_scale=1, size=(64, 72))
        sample(model, None, [PromptSpec(prompt="")], [1], sampling=sampling)
    with pytest.raises(UserError, match="block_dims is of a U-Net"):
        create_network(1.0, 2, 1.0, None, None, model.unet, block_dims="1,2")
    with pytest.raises(UserError, match="unet_encoder needs a model with a U-Net"):
        SCORER_KINDS["unet_encoder"].architecture_for("base", ModelSource(lambda: model, model.vae))
    with pytest.raises(UserError, match="running scorer of the page needs a model with a U-Net"):
        PictureFeatures(model)
    with pytest.raises(UserError, match="image_prompts needs a model with a U-Net"):
        text_encoder_fingerprint(model)
    with pytest.raises(UserError, match="textual_inversion_embeddings are for CLIP"):
        load_embeddings(model, [tmp_path / "word.safetensors"])
    with pytest.raises(UserError, match="language model"):
        config = NetworkConfig(network_train_unet_only=False)
        build_network(config, model, torch.Generator(), gradient_checkpointing=False)


def test_turbo_is_known_by_its_name(folder, tmp_path):
    (tmp_path / "Z-Image-Turbo").symlink_to(folder)
    base = detect(load_model(tmp_path / "Z-Image-Turbo"))
    assert base is not None and (base.name, base.num_steps, base.guidance_scale) == ("Z-Image-Turbo", 8, 1.0)
    assert detect(load_model(folder)) is None


def test_a_slider_is_trained_and_diffusers_applies_it_as_we_mean_it(kind, folder, tmp_path):
    pytest.importorskip("peft")
    model, pipeline = load_model(folder), PIPELINES[kind]()
    save_scorer(tmp_path / "scorer.safetensors", tiny_scorer(model.vae_fingerprint(), channels=16))
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    (tmp_path / "model").symlink_to(folder)
    run(tmp_path, tmp_path, gradient_checkpointing=True, network_alpha=1.0, max_denoising_steps=2, resolution=[64])
    count = len(list(find_targets(None, model.unet, with_convs=False)))
    file = load_file(tmp_path / "tiny.safetensors")
    assert len(file) == 2 * count and {name.partition(".")[0] for name in file} == {"diffusion_model"}

    network, _ = create_network_from_weights(1.0, tmp_path / "tiny.safetensors", None, None, model.unet, for_inference=True)
    pipeline.load_lora_weights(str(tmp_path), weight_name="tiny.safetensors")
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    before, moved = model.unet.state_dict(), 0
    deltas = {f"{lora.path}.weight": lora.delta() for lora in network.loras}
    for name, tensor in pipeline.transformer.state_dict().items():
        change = tensor - before[name.replace(".base_layer", "")]
        expected = deltas.get(name.replace(".base_layer", ""), torch.zeros(()))
        torch.testing.assert_close(change, expected.expand_as(change), atol=1e-6, rtol=0)
        moved += int(bool(expected.any()))
    assert moved == len(network.loras) == count


def test_files_of_other_programs_are_read(folder):
    """kohya's names, which are those in memory, and diffusers' own."""
    model = load_model(folder)
    state = create_network(1.0, 2, 1.0, None, None, model.unet).state_dict()
    generator = torch.Generator().manual_seed(0)
    state = {name: tensor if name.endswith("alpha") else torch.randn(tensor.shape, generator=generator) for name, tensor in state.items()}
    kohya, _ = create_network_from_weights(1.0, None, None, None, model.unet, weights_sd=state)
    renamed = {}
    for lora in kohya.loras:
        own = {part: state[f"{lora.name}.{part}"] for part in ("lora_down.weight", "lora_up.weight", "alpha")}
        renamed |= {f"transformer.{lora.path}.{part}": tensor for part, tensor in own.items()}
    diffusers, _ = create_network_from_weights(1.0, None, None, None, model.unet, weights_sd=renamed)
    for network in (kohya, diffusers):
        assert network.state_dict().keys() == state.keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("precision", ["int8", None])
def test_blocks_are_packed_and_swapped(kind, folder, precision):
    model, latents = load_model(folder), torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    cond, time = model.encode_prompts(PROMPTS[:1]), torch.tensor([500.0])
    expected = model.predict_eps(latents, time, cond)
    assert pack_unet(model.unet, precision, 1, "cpu") == 1
    assert sum(isinstance(module, PackedLinear) for module in model.unet.modules()) > 5
    assert (model.predict_eps(latents, time, cond) - expected).norm() < (0.05 if precision else 1e-6) * expected.norm()


@pytest.mark.slow
def test_memory_of_a_run_is_estimated(kind, folder, tmp_path):
    (tmp_path / "model").symlink_to(folder)
    save_scorer(tmp_path / "scorer.safetensors", tiny_scorer(load_model(folder).vae_fingerprint(), channels=16))
    (tmp_path / "prompts.txt").write_text(PROMPTS[0], encoding="utf-8")
    config = build_config(leco_score_config(), settings(tmp_path, tmp_path, resolution=[64], measure="full", quantize_base="int8"))
    found = estimate(config)
    assert found.weights["U-Net"] > 0 and all(peak > 0 for peak in found.peaks.values())


@torch.no_grad()
def test_min_snr_weighs_an_error_in_x0(folder):
    model, gamma = load_model(folder), 5.0
    eps, wrong, latents = torch.randn(3, 4, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([30.0, 300.0, 600.0, 900.0])
    abar = model.schedule.abar(timesteps)
    outputs, targets = (as_output(model, latents, part, timesteps) for part in (wrong, eps))
    weighed = min_snr_weights(model, timesteps, gamma) * squared_errors(outputs, targets)
    snr = abar / (1 - abar)
    of_x0 = squared_errors(eps_to_x0(latents, wrong, abar), eps_to_x0(latents, eps, abar))
    torch.testing.assert_close(weighed, snr.clamp(max=gamma) * of_x0, rtol=1e-3, atol=0)
