"""Few-step bases: told by what the published ones are, left alone where nothing says so, and warned about in words."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel

from library.diffusion.solvers import SOLVERS
from library.errors import UserError
from library.models.base import DiffusionModel
from library.models.loading import load_model
from library.rollouts.config import RolloutConfig
from library.rollouts.few_step import (
    DMD2,
    FLASH,
    HYPER,
    LCM,
    LIGHTNING,
    PCM,
    TURBO,
    choose_sampling,
    detect,
    resolve_sampling,
)
from library.rollouts.sample import SamplingConfig, sample
from library.types import PromptSpec
from tests.helpers.tiny_models import save_folder, tiny_model, tiny_unet_config

SIZE = (64, 64)


@pytest.fixture(scope="module")
def model() -> DiffusionModel:
    return tiny_model("sdxl")


def described(model: DiffusionModel, spacing: str = "leading", **spec) -> DiffusionModel:
    """The same model with another description."""
    other = object.__new__(type(model))
    vars(other).update(vars(model), spec=replace(model.spec, **spec), schedule=replace(model.schedule, timestep_spacing=spacing))
    return other


@pytest.mark.parametrize(
    ("name", "base", "num_steps"),
    [
        ("sd_xl_turbo_1.0_fp16.safetensors", TURBO, 4),
        ("sd-turbo", TURBO, 4),
        ("DreamShaperXL_v21TurboDPMSDE.safetensors", TURBO, 4),
        ("LCM_Dreamshaper_v7", LCM, 4),
        ("deliberate-lcm.safetensors", LCM, 4),
        ("sdxl_lightning_8step.safetensors", LIGHTNING, 8),
        ("realvisxlV40_lightning.safetensors", LIGHTNING, 4),
        ("Hyper-SDXL-4steps.safetensors", HYPER, 4),
        ("juggernautXL_v9Hyper.safetensors", HYPER, 8),
        ("realisticVisionV60B1_v51HyperVAE.safetensors", HYPER, 8),
        ("pcm_sdxl_smallcfg_2step.safetensors", PCM, 2),
        ("realvis_PCM.safetensors", PCM, 4),
        ("anything_dmd2.safetensors", DMD2, 4),
        ("sdxl-DMD2-4step", DMD2, 4),
    ],
)
def test_names(model, name, base, num_steps):
    found = detect(described(model, name=name))
    assert found is not None
    assert (found.name, found.num_steps, found.sampler, found.spacing) == (base.name, num_steps, base.sampler, base.spacing)
    assert found.guidance_scale == 1 and name in found.note


@pytest.mark.parametrize(
    "name",
    [
        "sd_xl_base_1.0.safetensors",
        "hyperrealism_v3.safetensors",
        "HyperRealism_v3.safetensors",
        "hyper-realistic-mix",
        "helcmix.safetensors",
        "HyperVividXL.safetensors",
        "photoflashXL.safetensors",
        "dpcmix.safetensors",
        "v1-5-pruned.ckpt",
    ],
)
def test_other_names_are_left_alone(model, name):
    assert detect(described(model, name=name)) is None


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def test_hyper_with_guidance_keeps_it(model, caplog):
    hyper = described(model, name="Hyper-SDXL-8steps-CFG.safetensors")
    found = detect(hyper)
    assert found is not None and (found.num_steps, found.guidance_scale) == (8, 5.0)
    assert choose_sampling(hyper, SIZE, guidance_scale=7.0).guidance_scale == 7.0 and warnings_of(caplog) == []


def test_pcm_and_flash_with_guidance(model):
    found = detect(described(model, name="pcm_sdxl_normalcfg_8step.safetensors"))
    assert found is not None and (found.name, found.num_steps, found.guidance_scale) == (PCM.name, 8, 7.5)
    for name in ("sdxl-flash", "SDXLFlash.safetensors", "sdxl-flash-mini"):
        found = detect(described(model, name=name))
        assert found is not None and (found.name, found.num_steps, found.guidance_scale) == (FLASH.name, 7, 3.0)


@pytest.mark.parametrize("name", ["sdxl_lightning_1step_x0.safetensors", "Hyper-SDXL-1step.safetensors"])
def test_one_step_checkpoints_are_refused(model, name):
    with pytest.raises(UserError, match="one-step checkpoint"):
        detect(described(model, name=name))


@pytest.mark.parametrize("scheduler", ["EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler"])  # of SDXL-Turbo, of SD-Turbo
def test_turbo_by_its_scheduler(model, scheduler):
    found = detect(described(model, name="model", scheduler=scheduler, spacing="trailing", resolution=512))
    assert found is not None and found.name == "Turbo" and scheduler in found.note


@pytest.mark.parametrize(
    "changes",
    [
        {"spacing": "leading"},  # Animagine and the like
        {"resolution": 1024},
        {"prediction_type": "v_prediction"},
        {"family": "sd1"},
        {"scheduler": "DDIMScheduler"},
        {"scheduler": "PNDMScheduler"},  # most of SD1's folders
    ],
)
def test_what_is_not_turbo(model, changes):
    turbo = {"name": "model", "scheduler": "EulerAncestralDiscreteScheduler", "spacing": "trailing", "resolution": 512}
    assert detect(described(model, **turbo | changes)) is None


def test_a_folder_of_a_latent_consistency_model(tmp_path, caplog):
    """As LCM_Dreamshaper_v7 lies in Hugging Face's cache: its own pipeline class, its own scheduler, a U-Net that takes guidance."""
    original = tiny_model("sd1")
    unet = UNet2DConditionModel.from_config(tiny_unet_config("sd1") | {"time_cond_proj_dim": 16})
    assert isinstance(unet, UNet2DConditionModel)
    original.unet = unet
    folder = save_folder(original, tmp_path / "models--someone--Dream_v7" / "snapshots" / "4589b3f")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "LatentConsistencyModelPipeline"}))
    scheduler_file = folder / "scheduler" / "scheduler_config.json"
    scheduler_file.write_text(json.dumps(json.loads(scheduler_file.read_text()) | {"_class_name": "LCMScheduler"}))

    loaded = load_model(folder)
    assert (loaded.spec.name, loaded.spec.scheduler) == ("Dream_v7", "LCMScheduler")
    base = detect(loaded)
    assert base is not None and base.name == "LCM" and base.embedded_guidance == 8.0
    choice = choose_sampling(loaded, SIZE, guidance_scale=6.0)
    assert (choice.guidance_scale, loaded.embedded_guidance, warnings_of(caplog)) == (1.0, 6.0, [])
    assert sample(loaded, None, [PromptSpec(prompt="a cat")], [1], sampling=choice).isfinite().all()
    ordinary_unet = replace(loaded.spec, name="model")
    loaded.spec, loaded.unet = ordinary_unet, tiny_model("sd1").unet
    found = detect(loaded)  # an LCM-LoRA merged into a model: only the scheduler says so
    assert found is not None and (found.name, found.embedded_guidance) == ("LCM", None)


def test_an_ordinary_model_takes_what_is_set_and_the_defaults(model):
    ordinary = described(model, name="model")
    assert choose_sampling(ordinary, SIZE) == SamplingConfig(num_steps=20, guidance_scale=5.0, size=SIZE)
    given = {"num_steps": 30, "guidance_scale": 1.0, "sampler": "dpmpp_2m", "spacing": "karras"}
    assert choose_sampling(ordinary, SIZE, **given) == SamplingConfig(size=SIZE, **given)
    assert choose_sampling(ordinary, SIZE, ordinary={"num_steps": 3, "guidance_scale": 2.0}, num_steps=None).num_steps == 3


@pytest.mark.parametrize(
    ("base", "name"), [(LCM, "an-lcm"), (DMD2, "x-dmd2"), (TURBO, "x-turbo"), (LIGHTNING, "x_lightning"), (HYPER, "Hyper-SDXL")]
)
def test_a_base_takes_its_own_values_and_does_not_warn_of_them(base, name, model, caplog):
    assert base.sampler in base.samplers and all(SOLVERS[name].name == name for name in base.samplers)
    own = {"num_steps": base.num_steps, "guidance_scale": 1.0, "sampler": base.sampler, "spacing": base.spacing}
    assert choose_sampling(described(model, name=name), SIZE) == SamplingConfig(size=SIZE, **own)
    assert choose_sampling(described(model, name=name), SIZE, **own) == SamplingConfig(size=SIZE, **own) and warnings_of(caplog) == []


def test_what_does_not_fit_is_kept_and_said(model, caplog):
    turbo = described(model, name="x-turbo")
    given = {"num_steps": 20, "guidance_scale": 5.0, "sampler": "dpmsolver++", "spacing": "leading"}
    assert choose_sampling(turbo, SIZE, **given) == SamplingConfig(size=SIZE, **given)
    assert warnings_of(caplog) == [
        "The base is Turbo, distilled to draw in 1 to 4 steps, not 20: use 4.",
        "The base is Turbo, distilled to draw without guidance: a guidance scale of 5 burns its pictures; use 1.",
        "The base is Turbo, which is not made for the sampler dpmsolver++: use euler_a.",
        "The base is Turbo, distilled at trailing timesteps, not leading: use trailing.",
    ]
    caplog.clear()
    choose_sampling(turbo, SIZE, sampler="k_euler_a", guidance_scale=1.5)
    assert warnings_of(caplog) == []


def test_dmd2_gets_the_timesteps_that_it_was_distilled_at(model):
    """Its page: LCMScheduler with timesteps=[999, 749, 499, 249]."""
    timesteps = model.schedule.inference_timesteps(DMD2.num_steps, DMD2.spacing)
    assert torch.equal(timesteps, torch.tensor([999, 749, 499, 249, -1]))


def test_what_equals_an_ordinary_models_value_is_kept_when_it_was_set(model, caplog):
    """ddim, 20 steps and guidance 5 on an LCM base, as they were given: with a warning each; unset, the base's own."""
    base = described(model, name="some-lcm.safetensors")
    given = RolloutConfig(sampler="ddim", max_denoising_steps=20, leco_denoise_guidance_scale=5.0, train_batch_size=3)
    found = resolve_sampling(given, base)
    assert (found.sampler, found.num_steps, found.guidance_scale, found.batch_size) == ("ddim", 20, 5.0, 3)
    assert sum("The base is LCM" in record.message for record in caplog.records) == 3
    unset = resolve_sampling(RolloutConfig(), base)
    assert (unset.sampler, unset.num_steps, unset.guidance_scale, unset.spacing) == ("lcm", 4, 1.0, "lcm")
    ordinary = resolve_sampling(RolloutConfig(), described(model, name="model"))
    assert (ordinary.sampler, ordinary.num_steps, ordinary.guidance_scale, ordinary.spacing) == ("ddim", 20, 5.0, None)
