"""The diffusion model's own U-Net as a backbone: its down and mid blocks have seen latents at every noise level already."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from library.diffusion.noise_schedule import NoiseSchedule
from library.errors import UserError
from library.models.unet_model import check_unet
from library.scorers.base import SCORER_KINDS, Backbone, ModelSource, check_scorer_args
from library.scorers.conditioning import FiLM, SigmaEmbedding
from library.scorers.unet_taps import build_first_half, distinctive_config, outputs_of, tap_channels, tap_names
from library.types import Conditioning
from networks.lora import create_network

TUNINGS = ("frozen", "lora", "full")
FROM_THE_MODEL = ("unet", "prompt_tokens", "num_timesteps")  # arguments that are not the user's to choose
WIDEST = 768  # of the features, as in LRM
SIGMA_FEATURES, SIGMA_WIDTH = 64, 256


@SCORER_KINDS.register("unet_encoder")
class UNetEncoder(Backbone):
    """Features of latents from the blocks of a U-Net before its up blocks, which are neither built nor loaded; LRM, arXiv 2502.01051.

    The U-Net is fed what it was trained on: variance-preserving latents, the timestep of their sigma and a prompt, the empty one
    unless `use_prompt`. A sigma beyond its schedule counts as the schedule's end; the readout is told it as it is. SDXL is always told
    its native size and no crop.

    Args:
        unet: values of diffusers' UNet2DConditionModel config that differ from its defaults.
        prompt_tokens: length of the empty prompt's embedding.
        num_timesteps: length of the noise schedule.
        width: of the features.
        taps: see `tap_names`.
        tuning: "frozen" trains only the readout of the taps, "lora" also a LoRA beside the attention layers, "full" all weights.
        lora_rank: of the LoRA; its alpha is the rank.
        use_prompt: whether the U-Net is given the picture's prompt.
        dropout: on the features.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {"base": {"taps": "all"}, "first_third": {"taps": "first_third"}}
    alphas_cumprod: Tensor
    null_text: Tensor
    null_pooled: Tensor
    time_ids: Tensor

    def __init__(
        self,
        *,
        unet: Mapping[str, Any],
        prompt_tokens: int,
        num_timesteps: int,
        width: int,
        taps: str = "all",
        tuning: str = "lora",
        lora_rank: int = 16,
        use_prompt: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if tuning not in TUNINGS:
            raise UserError(f"scorer_args: tuning is {tuning!r}; it can be {', '.join(TUNINGS)}")
        if lora_rank < 1:
            raise UserError(f"scorer_args: lora_rank is {lora_rank}; it must be 1 or more, such as 16")
        self.tuning, self.use_prompt, self.feature_width = tuning, use_prompt, width
        self.taps = tap_names(taps, unet)
        self.unet = build_first_half(unet, self.taps[-1])
        self.readout = TapReadout(channels=tap_channels(self.taps, unet), width=width, dropout=dropout)
        if tuning != "full":
            self.unet.requires_grad_(False)
        if tuning == "lora":
            self.lora = create_network(1.0, lora_rank, lora_rank, None, None, self.unet)
            self.lora.apply_to(None, self.unet)

        self.register_buffer("alphas_cumprod", torch.linspace(0.999, 0.005, num_timesteps))
        self.register_buffer("null_text", torch.zeros(1, prompt_tokens, unet["cross_attention_dim"]))
        self._takes_sizes = unet.get("addition_embed_type") == "text_time"  # SDXL
        if self._takes_sizes:
            num_sizes = 6  # (h, w, top, left, h, w)
            pooled_width = unet["projection_class_embeddings_input_dim"] - num_sizes * unet["addition_time_embed_dim"]
            self.register_buffer("null_pooled", torch.zeros(1, pooled_width))
            self.register_buffer("time_ids", torch.zeros(1, num_sizes))

    @classmethod
    def architecture_for(cls, size: str, source: ModelSource, **options: Any) -> dict[str, Any]:
        preset, parameters = cls.preset(size), inspect.signature(cls.__init__).parameters
        known = [name for name in parameters if name != "self" and name not in FROM_THE_MODEL]
        check_scorer_args("unet_encoder", options, known)
        model = source.model()
        check_unet(model, "scorer kind unet_encoder")
        values: dict[str, Any] = {
            "unet": distinctive_config(model.unet),
            "prompt_tokens": model.encode_prompts([""]).text.shape[1],
            "num_timesteps": len(model.schedule),
            **{name: parameters[name].default for name in known if parameters[name].default is not inspect.Parameter.empty},
            **preset,
            **options,
        }
        values.setdefault("width", min(WIDEST, sum(tap_channels(tap_names(values["taps"], values["unet"]), values["unet"]))))
        return values

    @torch.no_grad()
    def initialise(self, source: ModelSource) -> None:
        """Take the U-Net's weights, its noise schedule and the empty prompt's embedding.

        What stays frozen is rounded to fp16 here, as its file will hold it: the loaded scorer is the trained one to the last bit.
        """
        model = source.model()
        weights = model.unet.state_dict()
        names = [name for name, _ in self.unet.named_parameters()]
        self.unet.load_state_dict({name: weights[name] if self.tuning == "full" else weights[name].half() for name in names})
        self.alphas_cumprod.copy_(model.schedule.alphas_cumprod)
        null = model.encode_prompts([""])
        for name, value in (("null_text", null.text), ("null_pooled", null.pooled), ("time_ids", null.time_ids)):
            if value is not None:
                self.get_buffer(name).copy_(value)

    def forward(self, latents: Tensor, sigmas: Tensor, cond: Conditioning | None = None, prompts: Sequence[str] | None = None) -> Tensor:
        text, added = self._text_conditioning(cond, latents.shape[0])
        with outputs_of([self.unet.get_submodule(name) for name in self.taps]) as taps:
            self.unet(latents.to(self.unet.dtype), self._timesteps(sigmas), text, added_cond_kwargs=added, return_dict=False)
        return self.readout(taps, sigmas)

    def train(self, mode: bool = True) -> "UNetEncoder":
        super().train(mode)
        if self.tuning != "full":
            self.unet.eval()
        return self

    def saved_state(self) -> dict[str, Tensor]:
        """Frozen weights in fp16, in which checkpoints come; trained ones and buffers as they are."""
        state = self.state_dict()
        if self.tuning == "full":
            return state
        return {name: tensor.half() if name.startswith("unet.") else tensor for name, tensor in state.items()}

    def enable_gradient_checkpointing(self) -> None:
        self.unet.enable_gradient_checkpointing()
        if self.tuning == "lora":
            self.lora.enable_gradient_checkpointing()

    def _timesteps(self, sigmas: Tensor) -> Tensor:
        assert self.alphas_cumprod.dtype in (torch.float32, torch.float64), (
            "half precision cannot tell noise levels apart: keep the scorer in float32 and use autocast, or cast only its `unet`"
        )
        return NoiseSchedule(alphas_cumprod=self.alphas_cumprod).timesteps_of(sigmas)

    def _text_conditioning(self, cond: Conditioning | None, rows: int) -> tuple[Tensor, dict[str, Tensor] | None]:
        """The U-Net's text embeddings [B, T, D] and its added_cond_kwargs."""
        if self.use_prompt:
            assert cond is not None and len(cond) == rows, "a scorer with use_prompt reads the conditioning of its pictures"
            text, pooled = cond.text, cond.pooled
        else:
            text = self.null_text.expand(rows, -1, -1)
            pooled = self.null_pooled.expand(rows, -1) if self._takes_sizes else None
        if not self._takes_sizes:
            return text.to(self.unet.dtype), None
        assert pooled is not None, "conditioning of another family"
        return text.to(self.unet.dtype), {
            "text_embeds": pooled.to(self.unet.dtype),
            "time_ids": self.time_ids.float().expand(rows, -1),  # sinusoids of sizes are taken in float32
        }


class TapReadout(nn.Module):
    """Taps and their sigma to features: each tap's mean over space normalised, all projected to `width` and modulated by sigma.

    Args:
        channels: of each tap.
        width: of the features.
        dropout: on the features.
    """

    def __init__(self, *, channels: Sequence[int], width: int, dropout: float) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(count) for count in channels)
        self.projection = nn.Linear(sum(channels), width)
        self.sigma_embedding = SigmaEmbedding(SIGMA_FEATURES, SIGMA_WIDTH)
        self.film = FiLM(SIGMA_WIDTH, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, taps: Sequence[Tensor], sigmas: Tensor) -> Tensor:  # [B, C, h, w] each, [B] -> [B, width]
        dtype = self.projection.weight.dtype  # the U-Net's may be half
        pooled = [norm(tap.to(dtype).mean((2, 3))) for tap, norm in zip(taps, self.norms, strict=True)]
        features = self.film(self.projection(torch.cat(pooled, dim=1)), self.sigma_embedding(sigmas))
        return self.dropout(nn.functional.silu(features))
