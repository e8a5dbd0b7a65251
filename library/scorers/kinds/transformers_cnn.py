"""The convolutional networks of transformers, ResNet and ConvNeXt V2, over latents."""

from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig

from library.errors import UserError
from library.scorers.base import SCORER_KINDS, Backbone, ModelSource
from library.scorers.conditioning import FiLM, SigmaEmbedding
from library.scorers.convolutional import adapt_first_weights, first_convolution, pad_before_halving, set_stem_stride
from library.types import Conditioning

SIGMA_FEATURES, SIGMA_WIDTH = 64, 256
# What of a transformers config makes the network; the rest is about labels, pictures and training.
_CONFIG_KEYS = MappingProxyType(
    {
        "resnet": ("embedding_size", "hidden_sizes", "depths", "layer_type", "hidden_act", "downsample_in_bottleneck"),
        "convnextv2": ("hidden_sizes", "depths", "hidden_act"),
    }
)


def _resnet(layer_type: str, hidden_sizes: Sequence[int], depths: Sequence[int], embedding_size: int = 64) -> dict[str, Any]:
    config = {"layer_type": layer_type, "hidden_sizes": list(hidden_sizes), "depths": list(depths), "embedding_size": embedding_size}
    return {"model_type": "resnet", "config": config}


def _convnextv2(hidden_sizes: Sequence[int], depths: Sequence[int]) -> dict[str, Any]:
    return {"model_type": "convnextv2", "config": {"hidden_sizes": list(hidden_sizes), "depths": list(depths)}}


def _make_config(model_type: str, num_channels: int, config: dict[str, Any], drop_path: float) -> PreTrainedConfig:
    if model_type not in _CONFIG_KEYS:
        raise UserError(f"scorer_args: model_type is {model_type!r}, but it must be one of {', '.join(_CONFIG_KEYS)}")
    unknown = set(config) - set(_CONFIG_KEYS[model_type])
    if unknown:
        raise UserError(f"scorer_args: config has {min(unknown)!r}, but it can have {', '.join(_CONFIG_KEYS[model_type])}")
    own = {"num_stages": len(config["depths"]), "drop_path_rate": drop_path} if model_type == "convnextv2" else {}
    return AutoConfig.for_model(model_type, num_channels=num_channels, **config, **own)


def _pretrained_config(folder: str) -> PreTrainedConfig:
    """The configuration of a saved model. Raises UserError if there is none, or none of a type that we can build."""
    if not (Path(folder) / "config.json").is_file():
        raise UserError(
            f"scorer_args: pretrained is {folder}, but there is no config.json in it; give the folder of a model of transformers"
        )
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (ValueError, OSError) as error:
        raise UserError(f"{folder}/config.json cannot be read ({error}); give the folder of a model of transformers") from error
    if config.model_type not in _CONFIG_KEYS:
        raise UserError(f"the model in {folder} is a {config.model_type}, but it must be one of {', '.join(_CONFIG_KEYS)}")
    return config


def _plain(value: Any) -> Any:
    """As JSON has it: a tuple is a list."""
    return list(value) if isinstance(value, tuple) else value


@SCORER_KINDS.register("transformers_cnn")
class TransformersCnn(Backbone):
    """Features of latents of any size, from a ResNet or a ConvNeXt V2 as transformers has them.

    Latents are as small as the maps after a photograph network's stem, so the stem keeps their size and does not pool. sigma
    enters after the stem and after every stage; inside a stage there is nothing that knows it.

    Args:
        in_channels: latent channels.
        model_type: "resnet" or "convnextv2".
        config: keyword arguments of transformers' configuration of that type.
        stem_stride: of the first convolution: 1, or 2 where latents are large.
        dropout: on the features.
        drop_path: highest rate of stochastic depth; ConvNeXt V2 only.
        pretrained: folder of a model of transformers to start from; it is only read by `initialise`.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "resnet-tiny": _resnet("basic", (48, 96), (2, 2), 48),
        "resnet-18": _resnet("basic", (64, 128, 256, 512), (2, 2, 2, 2)),
        "resnet-26": _resnet("bottleneck", (256, 512, 1024, 2048), (2, 2, 2, 2)),
        "resnet-34": _resnet("basic", (64, 128, 256, 512), (3, 4, 6, 3)),
        "resnet-50": _resnet("bottleneck", (256, 512, 1024, 2048), (3, 4, 6, 3)),
        "convnextv2-micro": _convnextv2((64, 128), (2, 2)),
        "convnextv2-atto": _convnextv2((40, 80, 160, 320), (2, 2, 6, 2)),
        "convnextv2-femto": _convnextv2((48, 96, 192, 384), (2, 2, 6, 2)),
        "convnextv2-pico": _convnextv2((64, 128, 256, 512), (2, 2, 6, 2)),
        "convnextv2-nano": _convnextv2((80, 160, 320, 640), (2, 2, 8, 2)),
        "convnextv2-tiny": _convnextv2((96, 192, 384, 768), (3, 3, 9, 3)),
        "convnextv2-base": _convnextv2((128, 256, 512, 1024), (3, 3, 27, 3)),
    }

    def __init__(
        self,
        *,
        in_channels: int,
        model_type: str,
        config: dict[str, Any],
        stem_stride: int = 1,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        pretrained: str = "",
    ) -> None:
        super().__init__()
        if stem_stride not in (1, 2):
            raise UserError(f"scorer_args: stem_stride is {stem_stride}, but it must be 1 or 2")
        self.in_channels, self.stem_stride, self.pretrained = in_channels, stem_stride, pretrained
        if model_type == "resnet" and drop_path:
            raise UserError("scorer_args: a resnet of transformers has no drop_path; take a convnextv2, or the kind latent_resnet")
        self.config = _make_config(model_type, in_channels, config, drop_path)
        self.stem, self.stages = self._parts(AutoModel.from_config(self.config))

        widths = [first_convolution(self.stem).out_channels, *self.config.hidden_sizes]
        self.sigma_embedding = SigmaEmbedding(SIGMA_FEATURES, SIGMA_WIDTH)
        self.films = nn.ModuleList(FiLM(SIGMA_WIDTH, width) for width in widths)  # after the stem and after each stage
        self.feature_width = 2 * widths[-1]
        self.norm = nn.LayerNorm(self.feature_width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, latents: Tensor, sigmas: Tensor, cond: Conditioning | None = None, prompts: Sequence[str] | None = None) -> Tensor:
        embedding = self.sigma_embedding(sigmas)
        hidden = latents.to(self.norm.weight.dtype)
        for part, film in zip((self.stem, *self.stages), self.films, strict=True):
            hidden = film(self.run(part, hidden), embedding)
        pooled = torch.cat([hidden.mean((2, 3)), hidden.amax((2, 3))], dim=1)  # [B, feature_width]
        return self.dropout(self.norm(pooled))

    @classmethod
    def architecture_for(cls, size: str, source: ModelSource, **options: Any) -> dict[str, Any]:
        architecture = super().architecture_for(size, source, **options)
        if architecture.get("pretrained"):
            loaded = _pretrained_config(architecture["pretrained"])
            found = {key: _plain(getattr(loaded, key)) for key in _CONFIG_KEYS[loaded.model_type]}
            expected = {"model_type": architecture["model_type"], **architecture["config"]}
            wrong = [key for key, value in expected.items() if {"model_type": loaded.model_type, **found}.get(key) != value]
            if wrong:
                raise UserError(
                    f"the model in {architecture['pretrained']} is no {size}, by its {wrong[0]}; give the scorer_size that it is"
                )
            architecture["config"] = found
        return architecture

    def initialise(self, source: ModelSource) -> None:
        if not self.pretrained:
            return
        model = AutoModel.from_pretrained(self.pretrained, local_files_only=True)
        stem, stages = self._parts(model)
        conv = first_convolution(stem)
        conv.weight = nn.Parameter(adapt_first_weights(conv.weight.detach(), self.in_channels))
        self.stem.load_state_dict(stem.state_dict())
        self.stages.load_state_dict(stages.state_dict())

    def _parts(self, model: Any) -> tuple[nn.Module, nn.ModuleList]:
        """Stem and stages of a model of transformers, made fit for latents."""
        if self.config.model_type == "resnet":
            stem = model.embedder.embedder  # without the pooling that follows it
        else:
            stem = model.embeddings
            pad_before_halving(model.encoder)
        set_stem_stride(stem, self.stem_stride)
        return stem, model.encoder.stages
