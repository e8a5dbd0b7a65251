"""Families by flow matching: their schedules and solvers against diffusers', and Z-Image from its files to a slider."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from library.diffusion.noise_schedule import ABAR_FLOOR, NoiseSchedule, eps_to_flow, eps_to_x0, flow_scale, flow_to_eps, sigma_to_abar
from library.diffusion.solvers import get_solver
from library.errors import UserError
from library.models.loading import load_model
from library.models.packed import PackedLinear, pack_unet
from library.models.registry import FAMILIES
from library.rollouts.few_step import detect
from library.rollouts.sample import SamplingConfig, initial_noise, sample
from library.scorers.io import save_scorer
from library.settings.shared import NetworkConfig
from library.slider_training.network import build_network
from library.types import Conditioning, PromptSpec
from networks.lora import create_network, create_network_from_weights
from networks.lora_targets import find_targets
from tests.helpers.tiny_flow_models import tiny_flux_vae, z_image_folder, z_image_pipeline
from tests.helpers.tiny_leco_run import run, tiny_scorer
from tests.helpers.tiny_models import tiny_vae

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
    ours = NoiseSchedule.from_config(FLOW | config)
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
    schedule, solver, num_steps = NoiseSchedule.from_config(FLOW | {"shift": 3.0}), get_solver(name), 6
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


@pytest.mark.parametrize("change", [{"invert_sigmas": True}, {"use_karras_sigmas": True}, {"shift": -1}])
def test_other_flows_are_refused(change):
    with pytest.raises(UserError, match=next(iter(change))):
        NoiseSchedule.from_config(FLOW | change)


def test_a_flow_ends_in_pure_noise():
    schedule = NoiseSchedule.from_config(FLOW)
    assert schedule.alphas_cumprod[-1] == schedule.abar(torch.tensor([999.0])) == ABAR_FLOOR
    assert schedule.with_zero_terminal_snr() is schedule


# ---- Z-Image ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return z_image_folder(tmp_path_factory.mktemp("z_image") / "model")


def ours_and_theirs(folder: Path, **options: Any) -> tuple[Tensor, Tensor]:
    model = load_model(folder)
    pipeline: Any = ZImagePipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    sampling = SamplingConfig(num_steps=4, guidance_scale=4.0, size=SIZE, sampler="euler", **options)
    ours = sample(model, None, [PromptSpec(prompt=prompt) for prompt in PROMPTS], [1, 2], sampling=sampling)
    noise, _ = initial_noise([1, 2], (16, 8, 12))
    arguments = {"height": SIZE[0], "width": SIZE[1], "num_inference_steps": 4, "output_type": "latent"}
    return ours, pipeline(list(PROMPTS), guidance_scale=3.0, latents=noise, **arguments).images  # theirs is ours less 1


def test_full_size_structure():
    config = FAMILIES["z_image"].config["transformer"]
    with torch.device("meta"):
        transformer = ZImageTransformer2DModel(**config)
    assert sum(parameter.numel() for parameter in transformer.parameters()) == 6_154_908_736
    targets = list(find_targets(None, transformer, with_convs=False))
    assert len({target.name for target in targets}) == len(targets) == 30 * 7
    assert targets[0].dotted == "diffusion_model.layers.0.attention.to_q"
    assert "lora_unet_layers_29_feed_forward_w3" in {target.name for target in targets}


def test_pictures_equal_the_pipeline(folder):
    ours, theirs = ours_and_theirs(folder)
    torch.testing.assert_close(ours, theirs, **START)


def test_one_prediction_equals_the_transformer(folder):
    model = load_model(folder)
    assert (model.spec.family, model.spec.prediction_type, model.spec.resolution) == ("z_image", "flow", 64)
    model.expect_prompts(PROMPTS)
    cond = model.encode_prompts(PROMPTS)
    joined = Conditioning.cat([model.encode_prompts(PROMPTS[:1]), model.encode_prompts(PROMPTS[1:])])
    torch.testing.assert_close(joined.text, cond.text)
    assert cond.lengths is not None and cond.lengths[0] < cond.lengths[1] == cond.text.shape[1]
    latents, share = torch.randn(2, 16, 8, 12, generator=torch.Generator().manual_seed(0)), torch.tensor([0.9, 0.3])
    abar = sigma_to_abar(share / (1 - share))
    eps = model.predict_eps(latents / flow_scale(abar)[:, None, None, None], 1000 * share - 1, cond)
    texts = [row[:length] for row, length in zip(cond.text, cond.lengths.tolist(), strict=True)]
    output = -torch.stack(model.unet(list(latents[:, :, None]), 1 - share, texts, return_dict=False)[0])[:, :, 0]
    torch.testing.assert_close(eps, latents + (1 - share[:, None, None, None]) * output, atol=1e-5, rtol=1e-5)


def original_names(transformer: nn.Module) -> dict[str, Tensor]:
    """As the published single files have them: q, k and v in one matrix."""
    tensors = dict(transformer.state_dict())
    found = {}
    for name, tensor in tensors.items():
        if ".to_q." in name:
            tensor = torch.cat([tensors[name.replace(".to_q.", f".to_{letter}.")] for letter in "qkv"])
        if ".to_k." not in name and ".to_v." not in name:
            name = name.replace(".to_q.", ".qkv.").replace(".to_out.0.", ".out.").replace("all_x_embedder.2-1", "x_embedder")
            name = re.sub(r"\.norm_([qk])\.", r".\1_norm.", name).replace("all_final_layer.2-1", "final_layer")
            found[name] = tensor.clone()
    return found


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_single_file_is_the_same_model(folder, tmp_path, prefix):
    pipeline = z_image_pipeline()
    tensors = {prefix + name: tensor for name, tensor in original_names(pipeline.transformer).items()}
    language = {f"model.{name}": tensor for name, tensor in pipeline.text_encoder.state_dict().items()}
    options: dict[str, Any] = {"vae": folder / "vae", "tokenizer": [folder / "tokenizer"]}
    if prefix:  # ComfyUI's checkpoints of everything
        tensors |= {f"text_encoders.qwen3_4b.transformer.{name}": tensor for name, tensor in language.items()}
    else:
        save_file(language, tmp_path / "qwen.safetensors")
        options["text_encoder"] = tmp_path / "qwen.safetensors"
    save_file(tensors, tmp_path / "z_image.safetensors")
    model, expected = load_model(tmp_path / "z_image.safetensors", **options), load_model(folder)
    for ours, theirs in ((model.unet, expected.unet), (model.text_encoders[0], expected.text_encoders[0])):
        assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in ours.state_dict().items())
    torch.testing.assert_close(model.encode_prompts(PROMPTS).text, expected.encode_prompts(PROMPTS).text)
    assert model.unet.config["axes_dims"] == expected.unet.config["axes_dims"] and model.schedule.shift == 3.0
    with pytest.raises(UserError, match="no tokenizer; give --tokenizer"):
        load_model(tmp_path / "z_image.safetensors", **{**options, "tokenizer": ()})
    if not prefix:
        with pytest.raises(UserError, match="no text encoder; give --text_encoder"):
            load_model(tmp_path / "z_image.safetensors", vae=folder / "vae")
        by_folder = load_model(tmp_path / "z_image.safetensors", vae=folder / "vae", text_encoder=folder)
        assert by_folder.tokenizers[0].chat_template == expected.tokenizers[0].chat_template


def test_what_does_not_fit_is_said(folder, tmp_path):
    tiny_vae(0.13025).save_pretrained(tmp_path / "vae")
    with pytest.raises(UserError, match="makes SDXL latents, of 4 channels, and model takes 16"):
        load_model(folder, vae=tmp_path / "vae")
    with pytest.raises(UserError, match="v_parameterization .* flow matching"):
        load_model(folder, v_parameterization=True)
    with pytest.raises(UserError, match="clip_skip"):
        load_model(folder, clip_skip=2)
    with pytest.raises(UserError, match="multiples of 16 pixels; 72 x 64 is none"):
        sample(
            load_model(folder), None, [PromptSpec(prompt="")], [1], sampling=SamplingConfig(num_steps=1, guidance_scale=1, size=(64, 72))
        )


def test_turbo_is_known_by_its_name(folder, tmp_path):
    (tmp_path / "Z-Image-Turbo").symlink_to(folder)
    base = detect(load_model(tmp_path / "Z-Image-Turbo"))
    assert base is not None and (base.name, base.num_steps, base.guidance_scale) == ("Z-Image-Turbo", 8, 1.0)
    assert detect(load_model(folder)) is None


def test_a_slider_is_trained_and_diffusers_applies_it_as_we_mean_it(folder, tmp_path):
    pytest.importorskip("peft")
    model = load_model(folder)
    save_scorer(tmp_path / "scorer.safetensors", tiny_scorer(model.vae_fingerprint(), channels=16))
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    (tmp_path / "model").symlink_to(folder)
    run(tmp_path, tmp_path, gradient_checkpointing=True, network_alpha=1.0, max_denoising_steps=2)
    file = load_file(tmp_path / "tiny.safetensors")
    assert len(file) == 2 * 2 * 7 and {name.partition(".")[0] for name in file} == {"diffusion_model"}

    network, _ = create_network_from_weights(1.0, tmp_path / "tiny.safetensors", None, None, model.unet, for_inference=True)
    pipeline: Any = ZImagePipeline.from_pretrained(folder)
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
    assert moved == len(network.loras) == 14


def test_files_of_other_programs_are_read(folder):
    model = load_model(folder)
    state = create_network(1.0, 2, 1.0, None, None, model.unet).state_dict()
    generator = torch.Generator().manual_seed(0)
    state = {name: tensor if name.endswith("alpha") else torch.randn(tensor.shape, generator=generator) for name, tensor in state.items()}
    expected, _ = create_network_from_weights(1.0, None, None, None, model.unet, weights_sd=state)
    renamed = {}
    for lora in expected.loras:
        own = {part: state[f"{lora.name}.{part}"] for part in ("lora_down.weight", "lora_up.weight", "alpha")}
        renamed |= {f"transformer.{lora.path}.{part}": tensor for part, tensor in own.items()}
    found, _ = create_network_from_weights(1.0, None, None, None, model.unet, weights_sd=renamed)
    assert found.state_dict().keys() == expected.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in found.state_dict().items())
    assert tiny_flux_vae().config["shift_factor"] == 0.1159


def test_options_of_a_u_net_are_refused(folder):
    with pytest.raises(UserError, match="block_dims is of a U-Net"):
        create_network(1.0, 2, 1.0, None, None, load_model(folder).unet, block_dims="1,2")


@pytest.mark.parametrize("precision", ["int8", None])
def test_blocks_are_packed_and_swapped(folder, precision):
    model, latents = load_model(folder), torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    cond, time = model.encode_prompts(PROMPTS[:1]), torch.tensor([500.0])
    expected = model.predict_eps(latents, time, cond)
    assert pack_unet(model.unet, precision, 1, "cpu") == 1
    packed = sum(isinstance(module, PackedLinear) for module in model.unet.modules())
    assert packed == (4 * 8 - 1 if precision else 8)  # context refiners have no modulation
    assert (model.predict_eps(latents, time, cond) - expected).norm() < (0.05 if precision else 1e-6) * expected.norm()


def test_no_lora_on_the_language_model(folder, tmp_path):
    model = load_model(folder)
    config = NetworkConfig(network_train_unet_only=False)
    with pytest.raises(UserError, match="language model"):
        build_network(config, model, torch.Generator(), gradient_checkpointing=False)
