"""Any image model of timm over latents, by its name."""

import contextlib
import difflib
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.errors import UserError
from library.models.vae import LatentSpace
from library.scorers.base import SCORER_KINDS, Backbone, ModelSource, check_scorer_args
from library.scorers.conditioning import FiLM, SigmaEmbedding
from library.scorers.convolutional import pad_before_halving, set_stem_stride
from library.scorers.optional_packages import import_timm
from library.types import Conditioning

SIGMA_FEATURES, SIGMA_WIDTH = 64, 256
PROBED_SIDES = (4, 8, 16, 32, 64)  # of square latents, when a model's smallest input is looked for
STEM_POOLS = ("maxpool", "stem.pool", "stem_pool", "features.pool0")  # where the ResNet and DenseNet families have theirs

# Of `timm.create_model` and the models behind it: shapes and layers. Nothing that opens, fetches or registers is among them.
MODEL_ARGS = (
    *("act_layer", "attn_drop_rate", "aa_layer", "block_config", "block_type", "channels", "class_token", "conv_mlp", "depth", "depths"),
    *("dims", "drop_path_rate", "drop_rate", "dynamic_img_pad", "dynamic_img_size", "embed_dim", "global_pool", "growth_rate", "head_dim"),
    *("img_size", "init_values", "kernel_sizes", "layers", "ls_init_value", "mlp_ratio", "no_embed_class", "norm_layer", "num_heads"),
    *("output_stride", "patch_size", "pool_type", "pos_drop_rate", "proj_drop_rate", "qk_norm", "qkv_bias", "reg_tokens", "stem_type"),
    *("stem_width", "strict_img_size", "use_grn", "width", "window_size"),
)


@SCORER_KINDS.register("timm")
class TimmBackbone(Backbone):
    """Features of latents, from a model of timm up to and including its pooling.

    sigma modulates what comes out of every stage that the model lists in its `feature_info`, and nothing inside a stage. Latents
    are as small as the maps behind a photograph network's stem, so the first convolution's stride is lowered and a pooling after it
    left out; what the model halves after that, it still halves. Models with windows or patches of a fixed number take the
    arguments for that in `model_args`, such as dynamic_img_size and patch_size for a vision transformer.

    Args:
        in_channels: latent channels.
        model: its name in timm, without a tag for weights.
        model_args: keyword arguments of `timm.create_model`, such as drop_path_rate or norm_layer, of MODEL_ARGS.
        stem_stride: of the first convolution; 0 leaves the stem as it is.
        dropout: on the features.
        pretrained: checkpoint file of the model, or True for the weights that timm downloads; only read by `initialise`.

    Raises:
        UserError: timm is not installed, or the model cannot read latents.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        model: str,
        model_args: Mapping[str, Any] | None = None,
        stem_stride: int = 1,
        dropout: float = 0.0,
        pretrained: str | bool = False,
    ) -> None:
        super().__init__()
        if refused := sorted({*(model_args or {})} - {*MODEL_ARGS}):
            raise UserError(f"scorer_args: timm's model_args has {', '.join(refused)}; it can have {', '.join(MODEL_ARGS)}")
        self.name, self.in_channels, self.model_args = model, in_channels, dict(model_args or {})
        self.stem_stride, self.pretrained = stem_stride, pretrained
        self.model: Any = self._make_model()
        self.stages = self._find_stages()
        self.smallest, width = self._probe()

        self.sigma_embedding = SigmaEmbedding(SIGMA_FEATURES, SIGMA_WIDTH)
        self.films = nn.ModuleList(FiLM(SIGMA_WIDTH, channels) for channels in self.stages.values())
        self.feature_width = width
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, latents: Tensor, sigmas: Tensor, cond: Conditioning | None = None, prompts: Sequence[str] | None = None) -> Tensor:
        if min(latents.shape[2:]) < self.smallest:
            raise UserError(
                f"timm's {self.name} cannot read latents of {latents.shape[3]}x{latents.shape[2]}: their smallest side must be "
                f"{self.smallest} ({8 * self.smallest} pixels); take larger pictures, or the kind latent_resnet"
            )
        embedding = self.sigma_embedding(sigmas)
        channels_last = getattr(self.model, "output_fmt", "NCHW") == "NHWC"

        def modulate(film: nn.Module, output: Tensor) -> Tensor:
            if output.ndim == 4 and not channels_last:
                return film(output, embedding)
            return film(output.movedim(-1, 1), embedding).movedim(1, -1)  # tokens [B, N, C] or maps [B, h, w, C]

        with contextlib.ExitStack() as hooks:  # every model runs its stages in a way of its own, but each stage is a module
            for name, film in zip(self.stages, self.films, strict=True):
                stage = self.model.get_submodule(name)
                hooks.enter_context(stage.register_forward_hook(lambda module, inputs, output, film=film: modulate(film, output)))
            features = self.model(latents.to(self.norm.weight.dtype))
        return self.dropout(self.norm(features))

    @classmethod
    def architecture_for(cls, size: str, source: ModelSource, **options: Any) -> dict[str, Any]:
        known = [name for name in inspect.signature(cls.__init__).parameters if name not in ("self", "in_channels", "model")]
        check_scorer_args("timm", options, known)
        return {"in_channels": LatentSpace.of(source.vae).channels, "model": size, **options}

    def initialise(self, source: ModelSource) -> None:
        if self.pretrained:
            self.model.load_state_dict(self._make_model(pretrained=True).state_dict())

    def enable_gradient_checkpointing(self) -> None:
        self.model.set_grad_checkpointing()

    def _find_stages(self) -> dict[str, int]:
        """The modules that the model lists as its stages, and how many channels comes out of each."""
        info = getattr(self.model, "feature_info", [])
        stages = {stage["module"]: stage["num_chs"] for stage in getattr(info, "info", info)}  # a list, or timm's record around it
        if not stages or not set(stages) <= {name for name, _ in self.model.named_modules()}:
            raise UserError(f"timm's {self.name} does not say what its stages are, so sigma cannot enter there; take another model")
        return stages

    def _make_model(self, pretrained: bool = False) -> nn.Module:
        timm = import_timm()
        if not timm.is_model(self.name):
            close = difflib.get_close_matches(self.name, timm.list_models(), n=3)
            hint = f"; close to it are {', '.join(close)}" if close else ""
            raise UserError(f"timm {timm.__version__} has no model {self.name!r}, which scorer_size must name for the kind timm{hint}")
        weights: dict[str, Any] = {"pretrained": True} if pretrained else {}
        if isinstance(self.pretrained, str) and pretrained:
            if not Path(self.pretrained).is_file():
                raise UserError(f"scorer_args: pretrained is {self.pretrained}, but there is no such file")
            weights["pretrained_cfg_overlay"] = {"file": self.pretrained}
        try:
            model = timm.create_model(self.name, in_chans=self.in_channels, num_classes=0, **weights, **self.model_args)
        except TypeError as error:
            raise UserError(f"scorer_args: timm's {self.name} cannot be built with model_args {self.model_args}: {error}") from error
        pad_before_halving(model)
        if self.stem_stride:
            set_stem_stride(model, self.stem_stride)
            for name in set(STEM_POOLS) & {name for name, _ in model.named_modules()}:
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, nn.Identity())
        return model

    @torch.no_grad()
    def _probe(self) -> tuple[int, int]:
        """The smallest side that the model can read, of square latents, and the number of features."""
        self.model.eval()
        problem: Exception | None = None
        for side in PROBED_SIDES:
            try:
                width = self.model(torch.zeros(1, self.in_channels, side, side)).shape[1]
                self.model(torch.zeros(1, self.in_channels, side, side + side // 2))  # and another shape
            except (RuntimeError, AssertionError, ValueError) as error:
                problem = error
            else:
                self.model.train()
                return side, width
        raise UserError(
            f"timm's {self.name} with stem_stride {self.stem_stride} reads no latents of {PROBED_SIDES[0]} to {PROBED_SIDES[-1]} cells a "
            f"side ({problem}); try stem_stride=0, or model_args such as dict(dynamic_img_size=True, dynamic_img_pad=True, patch_size=2)"
        )
