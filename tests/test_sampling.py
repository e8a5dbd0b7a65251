"""Sampling against diffusers' pipelines, and against itself: batches, seeds and multipliers must not leak into each other."""

from dataclasses import replace
from itertools import pairwise, product

import pytest
import torch
import torch._dynamo
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    UNet2DConditionModel,
)
from torch import nn

from library.diffusion.solvers import ddim_step
from library.errors import UserError
from library.models.single_file import bundled_config
from library.rollouts.prompt_encoder import PromptEncoder
from library.rollouts.sample import SamplingConfig, decode, initial_noise, sample
from library.types import PromptSpec
from networks.lora import LoRANetwork, create_network
from networks.lora_module import LoRAModule, Strength
from networks.lora_options import Dropouts
from networks.lora_targets import TargetModule
from tests.helpers.tiny_models import pipeline_of, tiny_model, tiny_unet_config

PROMPTS = [PromptSpec(prompt="a red circle", negative_prompt="blurry"), PromptSpec(prompt="a blue star"), PromptSpec(prompt="a cat")]
SEEDS = [11, 12, 13]
ROUNDING = {"atol": 2e-4, "rtol": 2e-4}  # float32 over a trajectory; another batch size rounds otherwise
SAMPLING = SamplingConfig(num_steps=3, guidance_scale=4.0, size=(64, 64), batch_size=8)


def network_for(model, with_text_encoder: bool = False, size: float = 0.1) -> LoRANetwork:
    """A LoRA that changes pictures visibly."""
    text_encoder = model.text_encoders if with_text_encoder else None
    network = create_network(1.0, 4, 4.0, model.vae, text_encoder, model.unet, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_up" in name:
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    network.apply_to(text_encoder, model.unet)
    return network


@pytest.mark.parametrize(("kind", "guidance_scale", "size"), [("sd1", 1.0, (64, 96)), ("sd2_v", 5.0, (64, 96)), ("sdxl", 5.0, (96, 64))])
def test_equals_diffusers(kind, guidance_scale, size):
    model = tiny_model(kind)
    pipeline = pipeline_of(model)
    expected = their_latents(pipeline, 4, size, guidance_scale=guidance_scale)
    ours = sample(model, None, PROMPTS, SEEDS, sampling=replace(SAMPLING, num_steps=4, guidance_scale=guidance_scale, size=size))
    torch.testing.assert_close(ours, expected, **ROUNDING)
    pixels = pipeline.image_processor.denormalize(
        pipeline.vae.decode(expected / model.spec.latent_space.scaling_factor, return_dict=False)[0]
    )
    torch.testing.assert_close(decode(model, ours).clamp(0, 1), pixels.clamp(0, 1), atol=1e-3, rtol=0)


def test_a_part_of_the_steps_and_of_the_unconditional_branch() -> None:
    """Against the steps by hand; and as many rows as it says."""
    model, cond = tiny_model(), [PROMPTS[0]]
    sampling = replace(SAMPLING, num_steps=6, guidance_scale=4.0, size=(64, 64), stride=2, guidance_every=2)
    encoder, (latents, _) = PromptEncoder(model, None), initial_noise(SEEDS[:1], (4, 8, 8))
    asked, empty = encoder.cond(cond, (64, 64), [0.0]), encoder.uncond(cond, (64, 64), [0.0])
    timesteps = [*model.schedule.inference_timesteps(6)[:6:2], torch.tensor(-1)]
    with torch.no_grad():
        for call, (now, after) in enumerate(pairwise(timesteps)):
            eps = model.predict_eps(latents, now[None], asked)
            if call != 1:
                difference = eps - model.predict_eps(latents, now[None], empty)
            abar, next_abar = model.schedule.abar(now[None]), model.schedule.abar(after[None])
            latents = ddim_step(latents, eps + 3.0 * difference, abar, next_abar)
    before = model.num_unet_evaluations
    torch.testing.assert_close(sample(model, None, cond, SEEDS[:1], sampling=sampling), latents, **ROUNDING)
    assert model.num_unet_evaluations - before == sampling.num_evaluations == 5 and sampling.num_calls == 3


def their_latents(pipeline, num_steps: int, size: tuple[int, int], **arguments):
    """What a pipeline makes of PROMPTS and SEEDS, each row drawing from its own generator, as `sample` does."""
    noise, generators = initial_noise(SEEDS, (4, size[0] // 8, size[1] // 8))
    return pipeline(
        prompt=[prompt.prompt for prompt in PROMPTS],
        negative_prompt=[prompt.negative_prompt for prompt in PROMPTS],
        latents=noise,
        generator=generators,
        height=size[0],
        width=size[1],
        num_inference_steps=num_steps,
        output_type="latent",
        **arguments,
    ).images


@pytest.mark.parametrize(
    ("kind", "solver", "scheduler", "spacing", "guidance_rescale"),
    [
        ("sd1", "dpmpp_2m", DPMSolverMultistepScheduler, "trailing", 0.0),
        ("sd1", "euler", EulerDiscreteScheduler, "leading", 0.0),
        ("sd1", "euler_a", EulerAncestralDiscreteScheduler, "leading", 0.7),
        ("sd1", "lcm", LCMScheduler, "lcm", 0.0),
        ("sd2_v", "dpmpp_2m", DPMSolverMultistepScheduler, "trailing", 0.7),
        ("sd2_v", "euler_a", EulerAncestralDiscreteScheduler, "leading", 0.0),
    ],
)
def test_samplers_equal_diffusers(kind, solver, scheduler, spacing, guidance_rescale):
    """The family's own configs have set_alpha_to_one = false, which only DDIM heeds.

    Three steps, of which the multistep solver takes one with a history: these random networks turn 1e-6 of noise into 3e-3 in five.
    Where spacings have one name diffusers' schedulers do not all have one meaning: these are those that DDIM's agree with.
    """
    model = tiny_model(kind)
    config = bundled_config(model.spec.family)["scheduler"] | {"prediction_type": model.spec.prediction_type, "clip_sample": False}
    if spacing != "lcm":
        config["timestep_spacing"] = spacing
    expected = their_latents(
        pipeline_of(model, scheduler.from_config(config)), 3, (64, 64), guidance_scale=3.0, guidance_rescale=guidance_rescale
    )
    sampling = replace(SAMPLING, guidance_scale=3.0, sampler=solver, spacing=spacing, guidance_rescale=guidance_rescale)
    torch.testing.assert_close(sample(model, None, PROMPTS, SEEDS, sampling=sampling), expected, atol=1e-3, rtol=1e-3)


def guidance_distilled_model():
    model = tiny_model()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel.from_config(tiny_unet_config("sd1") | {"time_cond_proj_dim": 16})
    assert isinstance(unet, UNet2DConditionModel)
    model.unet = unet
    return model.freeze()


def test_a_guidance_distilled_u_net_is_told_the_scale():
    model = guidance_distilled_model()
    assert model.embeds_guidance and not tiny_model().embeds_guidance
    config = bundled_config("sd1")["scheduler"]
    pictures = {}
    for scale in (8.0, 3.0):
        model.embedded_guidance = scale
        pictures[scale] = sample(model, None, PROMPTS, SEEDS, sampling=replace(SAMPLING, sampler="lcm", spacing="lcm", guidance_scale=1.0))
        expected = their_latents(pipeline_of(model, LCMScheduler.from_config(config)), 3, (64, 64), guidance_scale=scale)
        torch.testing.assert_close(pictures[scale], expected, **ROUNDING)
    assert (pictures[8.0] - pictures[3.0]).abs().max() > 0.01


@pytest.mark.parametrize(("prompt", "scale"), [(PromptSpec(prompt="a cat"), 4.0), (PromptSpec(prompt="a cat", guidance_scale=7.5), 1.0)])
def test_a_guidance_distilled_u_net_refuses_guidance_on_top(prompt, scale):
    with pytest.raises(UserError, match="takes its guidance scale as an input"):
        sample(guidance_distilled_model(), None, [prompt], [1], sampling=replace(SAMPLING, guidance_scale=scale))


@pytest.mark.parametrize("solver", ["ddim", "euler_a", "dpmpp_2m"])
def test_a_seed_is_a_picture_whatever_the_batch(solver):
    model = tiny_model()
    together = sample(model, None, PROMPTS, SEEDS, sampling=replace(SAMPLING, sampler=solver))
    alone = sample(model, None, PROMPTS[2:], SEEDS[2:], sampling=replace(SAMPLING, sampler=solver))
    small = sample(model, None, PROMPTS, SEEDS, sampling=replace(SAMPLING, sampler=solver, batch_size=2))
    torch.testing.assert_close(together[2:], alone, **ROUNDING)
    torch.testing.assert_close(together, small, **ROUNDING)
    other = sample(model, None, PROMPTS, [1, 2, 3], sampling=replace(SAMPLING, sampler=solver))
    assert (other - together).abs().max() > 0.1


@pytest.mark.parametrize(
    ("size", "free_gib", "expected"),
    [((64, 64), None, 64), ((512, 512), None, 8), ((1024, 1024), None, 2), ((4096, 4096), None, 1)]
    + [((512, 512), 20.0, 8), ((512, 512), 1.1, 4), ((512, 512), 0.1, 1), ((64, 64), 0.1, 25)],
)
def test_pictures_in_a_call_suit_their_size_and_the_memory_that_is_free(size, free_gib, expected, monkeypatch):
    """A bf16 model; on a GPU, whose memory torch keeps some of for tensors to come, 0.25 GiB a picture of 512 x 512."""
    model = tiny_model().to(dtype=torch.bfloat16)
    if free_gib is not None:
        free = int(free_gib * 2**30)
        monkeypatch.setattr(type(model), "device", torch.device("cuda"))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free // 2, 2**40))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2**20 + free // 2)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2**20)
    assert replace(SAMPLING, batch_size=None).pictures_at_once(model, size) == expected
    assert SAMPLING.pictures_at_once(model, size) == 8


def test_one_batch_holds_different_multipliers():
    model = tiny_model()
    plain = sample(model, None, PROMPTS, SEEDS, sampling=SAMPLING)
    network = network_for(model)
    mixed = sample(model, network, PROMPTS, SEEDS, torch.tensor([-1.0, 0.0, 1.0]), sampling=SAMPLING)
    for row, multiplier in enumerate([-1.0, 0.0, 1.0]):
        own = sample(model, network, PROMPTS, SEEDS, multiplier, sampling=SAMPLING)
        torch.testing.assert_close(mixed[row], own[row], **ROUNDING)
    assert torch.equal(sample(model, network, PROMPTS, SEEDS, 0.0, sampling=SAMPLING), plain)
    assert (mixed[0] - plain[0]).abs().max() > 0.01 and (mixed[2] - plain[2]).abs().max() > 0.01
    assert network.multiplier == 1.0


def test_the_multiplier_is_put_back_after_an_error():
    model = tiny_model()
    network = network_for(model)
    with pytest.raises(RuntimeError, match="stop"):

        def stop(count: int) -> None:
            raise RuntimeError("stop")

        sample(model, network, PROMPTS, SEEDS, -0.5, progress=stop, sampling=SAMPLING)
    assert network.multiplier == 1.0


def test_no_unconditional_branch_at_guidance_1(monkeypatch):
    model, rows, steps = tiny_model(), [], []
    predict = model.predict_eps
    monkeypatch.setattr(model, "predict_eps", lambda latents, *rest: (rows.append(len(latents)), predict(latents, *rest))[1])
    sample(model, None, PROMPTS, SEEDS, progress=steps.append, sampling=replace(SAMPLING, guidance_scale=1.0))
    assert rows == [3, 3, 3] and sum(steps) == 9
    rows.clear()
    sample(model, None, PROMPTS, SEEDS, sampling=SAMPLING)
    assert rows == [6, 6, 6]


def test_two_graphs_serve_any_number_of_rows_of_a_size():
    """As training makes them: with gradient and without, and a multiplier for each row."""

    class Network(nn.Module):  # torch's own containers are looked at otherwise
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x):
            return self.layer(x)

    model, graphs, strength = tiny_model(), [], Strength(1.0)
    model.unet = Network()
    target = TargetModule("", (), "unet", "layer", model.unet.layer)
    LoRAModule(target, strength, rank=2, alpha=2.0, dropouts=Dropouts()).attach(target.base)
    patched = {"force_nn_module_property_static_shapes": True, "recompile_limit": 3}  # put back after the test
    with torch._dynamo.config.patch(patched):
        model.compile(backend=lambda graph, _: graphs.append(graph) or graph.forward)
        for size in (5, 6, 7):
            for rows, gradient in product((6, 4, 9), (False, True)):
                strength.multiplier = torch.ones(rows)
                with torch.set_grad_enabled(gradient):
                    model.unet(torch.randn(rows, size, 8))
            assert len(graphs) == 2 * (size - 4)
    for graph in graphs:
        inputs = [node.meta["example_value"] for node in graph.graph.find_nodes(op="placeholder")]
        [(rows, *sizes)] = [value.shape for value in inputs if isinstance(value, torch.Tensor) and value.ndim == 3]
        assert isinstance(rows, torch.SymInt) and all(type(size) is int for size in sizes)


def test_pictures_are_sampled_without_torch_compile():
    """A network is compiled for training; measurements come in many sizes."""
    model, compilations = tiny_model("sd1"), []
    model.unet.compile(backend=lambda graph, _: compilations.append(graph) or graph.forward)
    compiled = model.unet._compiled_call_impl
    sample(model, None, PROMPTS[:1], SEEDS[:1], sampling=replace(SAMPLING, num_steps=1))
    assert not compilations and model.unet._compiled_call_impl is compiled is not None


def test_a_prompt_brings_its_own_guidance_and_size():
    model = tiny_model()
    own = PromptSpec(prompt="a cat", guidance_scale=7.0, width=96, height=64)
    expected = sample(model, None, [PromptSpec(prompt="a cat")], [5], sampling=replace(SAMPLING, guidance_scale=7.0, size=(64, 96)))
    assert expected.shape == (1, 4, 8, 12)
    assert torch.equal(sample(model, None, [own], [5], sampling=SAMPLING), expected)


def test_texts_are_encoded_once(monkeypatch):
    model, seen = tiny_model(), []
    encode = model.encode_prompts
    monkeypatch.setattr(model, "encode_prompts", lambda texts, size=None: (seen.extend(texts), encode(texts, size))[1])
    encoder = PromptEncoder(model, network_for(model))
    first = sample(model, None, PROMPTS, SEEDS, encoder=encoder, sampling=SAMPLING)
    assert sorted(seen) == sorted({"a red circle", "a blue star", "a cat", "blurry", ""})
    model.free_text_encoders()
    assert torch.equal(sample(model, None, PROMPTS, SEEDS, encoder=encoder, sampling=SAMPLING), first)


def test_a_text_encoder_lora_encodes_at_each_multiplier():
    model = tiny_model()
    plain = model.encode_prompts(["a cat"]).text
    network = network_for(model, with_text_encoder=True)
    encoder = PromptEncoder(model, network)
    texts = encoder.encode(["a cat", "a cat", "a cat"], (64, 64), [0.0, 1.0, -1.0]).text
    torch.testing.assert_close(texts[:1], plain)
    assert (texts[1] - texts[0]).abs().max() > 1e-3 and (texts[1] - texts[2]).abs().max() > 1e-3
    mixed = sample(model, network, PROMPTS[:2], SEEDS[:2], [1.0, -1.0], sampling=SAMPLING)
    down = sample(model, network, PROMPTS[:2], SEEDS[:2], -1.0, sampling=SAMPLING)
    torch.testing.assert_close(mixed[1], down[1], **ROUNDING)


def test_texts_encoded_ahead_outlive_the_text_encoders():
    model = tiny_model()
    prompts = [PromptSpec(prompt="a cat", negative_prompt="bad"), PromptSpec(prompt="a dog", width=128)]
    expected = model.encode_prompts(["a dog", ""], (64, 128)).text
    encoder = PromptEncoder(model)
    encoder.encode_ahead(prompts, (64, 64), batch_size=1)
    model.free_text_encoders()
    assert torch.allclose(encoder.encode(["a dog", ""], (64, 128)).text, expected, atol=1e-5)
    assert encoder.encode(["a cat", "bad"], (64, 64)).text.shape[0] == 2
