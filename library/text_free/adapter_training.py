"""Train an adapter from prompts alone: the frozen diffusion model must do with it what it does with the prompt."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor

from library.diffusion.solvers import ddim_step
from library.models.base import DiffusionModel
from library.rollouts.prompt_encoder import Size
from library.rollouts.sample import model_autocast, predict_branches
from library.settings.options import check_above, check_at_least, option
from library.text_free.adapter import AdapterSpec, ImagePromptAdapter, perturb, text_encoder_fingerprint
from library.text_free.clip_pair import ClipPair
from library.types import Conditioning

NOISY_COPIES = 8  # of each prompt's point in the least-squares fit


@dataclass(frozen=True, kw_only=True)
class AdapterRecipe:
    """How an adapter is built and trained. The learning rate rises in the first twentieth of the steps and falls to 0 along a cosine."""

    adapter_width: int = option(1024, help="Width of the network that corrects points.")
    adapter_noise: float = option(0.5, help="How far the prompts' embeddings are pushed at random; see docs/text_free.md.")
    max_train_steps: int = option(5000, help="Updates after the least-squares fit; 0 for the fit alone, which takes a minute.")
    train_batch_size: int = option(8, help="Trajectories on which the U-Net's outputs are compared.")
    text_batch_size: int = option(32, help="Prompts whose encodings are compared in the same update.")
    hidden_weight: float = option(1.0, help="Weight of the encodings' error beside the U-Net's.")
    learning_rate: float = option(3e-4, help="Learning rate of AdamW.")
    max_denoising_steps: int = option(20, help="Steps of the sampler that makes the trajectories.")
    guidance_scale: float = option(5.0, help="Its classifier-free guidance.")

    def __post_init__(self) -> None:
        check_at_least(self, 1, "adapter_width", "train_batch_size", "text_batch_size", "max_denoising_steps")
        check_at_least(self, 0, "adapter_noise", "hidden_weight", "max_train_steps")
        check_above(self, 0, "learning_rate", "guidance_scale")


@dataclass(frozen=True)
class Errors:
    """How far the adapter is from the prompt itself.

    Attributes:
        eps: of the U-Net's output, as a share of what the prompt changes in it: 0 is the prompt itself, 1 is as bad as no prompt.
        hidden: of the encodings, as a share of their variance: 1 is as bad as the average prompt.
    """

    eps: Tensor
    hidden: Tensor


@dataclass(frozen=True)
class TeacherBatch:
    """What the frozen model says of B trajectories, each at its own step: see `trajectories`."""

    prompts: list[str]
    latents: Tensor
    timesteps: Tensor
    cond: Conditioning
    cond_eps: Tensor
    uncond_eps: Tensor


@torch.no_grad()
def new_adapter(
    model: DiffusionModel, clip: ClipPair, prompts: Sequence[str], recipe: AdapterRecipe, generator: torch.Generator
) -> ImagePromptAdapter:
    """An adapter on the model's device whose linear map is fitted to these prompts, and whose correction is still nothing.

    The fit is the least-squares map from perturbed points to encodings: with noise on the inputs, that is ridge regression
    (Bishop 1995, "Training with noise is equivalent to Tikhonov regularization"). The correction's weights come from the global generator.
    """
    example = encode_first_chunk(model, prompts[:1])
    spec = AdapterSpec(
        embedding_dim=clip.dim,
        num_tokens=example.text.shape[1],
        token_dim=example.text.shape[2],
        pooled_dim=0 if example.pooled is None else example.pooled.shape[1],
        width=recipe.adapter_width,
        text_encoder=text_encoder_fingerprint(model),
        clip=clip.fingerprint(),
        training={"prompts": len(prompts), "steps": recipe.max_train_steps, "noise": recipe.adapter_noise},
    )
    adapter = ImagePromptAdapter(spec).to(model.device)
    embeddings = torch.cat([clip.embed_texts(batch) for batch in _chunks(prompts, 64)])
    adapter.text_mean.copy_(embeddings.mean(0))
    points = adapter.of_texts(embeddings)
    origin = _flat(example)[0]  # encodings are large and nearly constant in places: sums of their differences are exact enough
    gram, cross = points.new_zeros(clip.dim, clip.dim), points.new_zeros(clip.dim, len(origin))
    point_sum, target_sum = points.new_zeros(clip.dim), torch.zeros_like(origin)
    for start, batch in zip(range(0, len(prompts), 64), _chunks(prompts, 64), strict=True):
        targets = _flat(encode_first_chunk(model, batch)) - origin
        target_sum += targets.sum(0)
        for _ in range(NOISY_COPIES):
            pushed = perturb(points[start : start + 64], recipe.adapter_noise, generator)
            gram += pushed.T @ pushed
            cross += pushed.T @ targets
            point_sum += pushed.sum(0)
    count = NOISY_COPIES * len(prompts)
    point_mean, target_mean = point_sum / count, target_sum / len(prompts)
    gram, cross = gram / count - torch.outer(point_mean, point_mean), cross / count - torch.outer(point_mean, target_mean)
    damping = 1e-4 * gram.diagonal().mean() * torch.eye(clip.dim, device=gram.device)  # for directions that no prompt has
    weight = torch.linalg.solve(gram + damping, cross)  # [P, T * D + pooled]
    adapter.decode.weight.copy_(weight.T)
    adapter.decode.bias.copy_(origin + target_mean - point_mean @ weight)
    return adapter


def encode_first_chunk(model: DiffusionModel, prompts: Sequence[str], size: Size | None = None) -> Conditioning:
    """Conditioning of prompts up to their 75th word piece: what CLIP's text tower sees of them, too."""
    cond = model.encode_prompts(prompts, size)
    return replace(cond, text=cond.text[:, : model.text_encoders[0].config.max_position_embeddings])


def _flat(cond: Conditioning) -> Tensor:
    """Encodings [B, T * D + pooled] float32."""
    parts = [cond.text.flatten(1)] if cond.pooled is None else [cond.text.flatten(1), cond.pooled]
    return torch.cat(parts, dim=1).float()


def train_adapter(
    adapter: ImagePromptAdapter,
    model: DiffusionModel,
    clip: ClipPair,
    prompts: Sequence[str],
    recipe: AdapterRecipe,
    generator: torch.Generator,
    size: Size,
    log: Callable[[int, Errors], object],
) -> None:
    """Train in place; `log` is called after each update with its number and the errors of its batch (with noise).

    The loss is the U-Net's error under the adapter against the same U-Net's under the real encoding, on latents that it sampled
    itself (so that it is measured where it will be used), plus the error of the encodings, which is cheap and sees more prompts.
    """
    from transformers import get_cosine_schedule_with_warmup

    optimizer = torch.optim.AdamW(adapter.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, recipe.max_train_steps // 20, recipe.max_train_steps)
    effects: list[float] = []  # so far: a batch of nearly finished pictures, which prompts hardly change, must not weigh more
    adapter.train()
    teacher = trajectories(model, prompts, recipe, generator, size)
    for step, batch in zip(range(1, recipe.max_train_steps + 1), teacher, strict=False):
        error, effect = eps_error(adapter, model, clip, batch, recipe.adapter_noise, generator)
        effects.append(float(effect))
        errors = Errors(
            eps=error * len(effects) / max(sum(effects), 1e-12),
            hidden=hidden_error(adapter, model, clip, _drawn(prompts, recipe.text_batch_size, generator), recipe.adapter_noise, generator),
        )
        optimizer.zero_grad()
        (errors.eps + recipe.hidden_weight * errors.hidden).backward()
        torch.nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        log(step, Errors(errors.eps.detach(), errors.hidden.detach()))
    adapter.eval()


@torch.no_grad()
def validation_errors(
    adapter: ImagePromptAdapter,
    model: DiffusionModel,
    clip: ClipPair,
    prompts: Sequence[str],
    recipe: AdapterRecipe,
    generator: torch.Generator,
    size: Size,
) -> Errors:
    """Errors on prompts that were not trained on, without noise, over as many batches as a trajectory has steps."""
    teacher = trajectories(model, prompts, recipe, generator, size)
    pairs = [eps_error(adapter, model, clip, batch, 0.0, generator) for batch in islice(teacher, recipe.max_denoising_steps)]
    error, effect = torch.tensor(pairs).sum(0)
    return Errors(error / effect.clamp_min(1e-12), hidden_error(adapter, model, clip, prompts[:256], 0.0, generator))


def eps_error(
    adapter: ImagePromptAdapter, model: DiffusionModel, clip: ClipPair, batch: TeacherBatch, noise: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Mean squared distance of the U-Net's eps under the adapter from that under the prompt, and of that from no prompt's."""
    answered = adapter(perturb(adapter.of_texts(clip.embed_texts(batch.prompts)), noise, generator))
    cond = Conditioning(answered.text, answered.pooled, batch.cond.time_ids)
    with model_autocast(model):
        eps = model.predict_eps(batch.latents, batch.timesteps, cond)
    return (eps - batch.cond_eps).square().mean(), (batch.cond_eps - batch.uncond_eps).square().mean()


def hidden_error(
    adapter: ImagePromptAdapter, model: DiffusionModel, clip: ClipPair, prompts: Sequence[str], noise: float, generator: torch.Generator
) -> Tensor:
    """Squared distance of the adapter's encodings from the text encoders', over the variance of these; the pooled ones count as much."""
    with torch.no_grad():
        wanted = encode_first_chunk(model, prompts)
    answered = adapter(perturb(adapter.of_texts(clip.embed_texts(prompts)), noise, generator))
    error = _unexplained(answered.text, wanted.text.float())
    if answered.pooled is None or wanted.pooled is None:
        return error
    return (error + _unexplained(answered.pooled, wanted.pooled.float())) / 2


def _unexplained(answers: Tensor, wanted: Tensor) -> Tensor:
    """Share of the variance between the rows of `wanted` that `answers` leave."""
    return (answers - wanted).square().mean() / (wanted - wanted.mean(0)).square().mean().clamp_min(1e-12)


@torch.no_grad()
def trajectories(
    model: DiffusionModel, prompts: Sequence[str], recipe: AdapterRecipe, generator: torch.Generator, size: Size
) -> Iterator[TeacherBatch]:
    """Without end, B sampling trajectories of the frozen model, spread over the schedule: every step of the sampler is a batch.

    A finished trajectory makes room for another prompt. The first ones end early, which spreads the places over the schedule.
    """
    count, scale = recipe.train_batch_size, model.spec.vae_scale_factor
    shape = (model.spec.latent_channels, size[0] // scale, size[1] // scale)
    grid = model.schedule.inference_timesteps(recipe.max_denoising_steps).to(model.device)
    uncond = encode_first_chunk(model, [""], size).repeat(count)
    latents = torch.randn(count, *shape, generator=generator).to(model.device)
    texts = _drawn(prompts, count, generator)
    conds = list(_rows(encode_first_chunk(model, texts, size)))
    steps, ends = [0] * count, [max(1, (place + 1) * recipe.max_denoising_steps // count) for place in range(count)]
    while True:
        at = torch.tensor(steps, device=model.device)
        now, after = grid[at], grid[at + 1]
        cond = Conditioning.cat(conds)
        with model_autocast(model):
            cond_eps, uncond_eps = predict_branches(model, latents, now, cond, uncond)
        assert uncond_eps is not None, "it was asked for"
        yield TeacherBatch(list(texts), latents, now, cond, cond_eps, uncond_eps)
        guided = uncond_eps + recipe.guidance_scale * (cond_eps - uncond_eps)
        latents = ddim_step(latents, guided, model.schedule.abar(now), model.schedule.abar(after))
        for place in range(count):
            steps[place] += 1
            if steps[place] == ends[place]:
                [texts[place]] = _drawn(prompts, 1, generator)
                conds[place] = encode_first_chunk(model, [texts[place]], size)
                latents[place] = torch.randn(shape, generator=generator).to(model.device)
                steps[place], ends[place] = 0, recipe.max_denoising_steps


def _drawn(prompts: Sequence[str], count: int, generator: torch.Generator) -> list[str]:
    return [prompts[int(row)] for row in torch.randint(len(prompts), (count,), generator=generator)]


def _rows(cond: Conditioning) -> Iterator[Conditioning]:
    for row in range(len(cond)):
        yield cond[row : row + 1]


def _chunks(items: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
