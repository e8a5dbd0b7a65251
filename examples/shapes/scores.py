"""True scores of the shapes world: opinions about pictures, as plain functions of pixels.

Each takes pixels [B, 3, H, W] in 0..1 and returns [B]. Because they read pixels, no training run ever sees them except
through the ratings of a picture set; whatever a slider does to please a learned scorer, these say what happened.
Name one as a judge with `examples.shapes.scores:brightness`.
"""

import torch
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


def brightness(pixels: Tensor) -> Tensor:
    """Mean luma, 0 (black) to 1 (white)."""
    return (pixels * pixels.new_tensor(LUMA).view(1, 3, 1, 1)).sum(1).mean((1, 2))


def colourfulness(pixels: Tensor) -> Tensor:
    """Colourfulness of Hasler and Suesstrunk (2003), for pixels in 0..1: 0 for greys, about 0.6 for vivid pictures."""
    red, green, blue = pixels.unbind(1)
    red_green, yellow_blue = red - green, (red + green) / 2 - blue
    spread = (red_green.var((1, 2), correction=0) + yellow_blue.var((1, 2), correction=0)).clamp_min(0).sqrt()
    centre = (red_green.mean((1, 2)) ** 2 + yellow_blue.mean((1, 2)) ** 2).sqrt()
    return spread + 0.3 * centre


def _foreground(pixels: Tensor) -> Tensor:
    """Where a picture differs from its border's median colour: weights [B, H, W] in 0..1."""
    edge = torch.cat([pixels[..., 0, :], pixels[..., -1, :], pixels[..., :, 0], pixels[..., :, -1]], dim=-1)  # [B, 3, 2(H+W)]
    backdrop = edge.median(dim=-1).values[..., None, None]
    distance = (pixels - backdrop).square().sum(1).sqrt()
    return ((distance - 0.12) / 0.12).clamp(0, 1)


def size(pixels: Tensor) -> Tensor:
    """Share of the picture that the object covers, 0..1."""
    return _foreground(pixels).mean((1, 2))


def centredness(pixels: Tensor) -> Tensor:
    """How near the object's centre of mass is to the middle: 1 in the middle, 0 at a corner."""
    weight = _foreground(pixels) + 1e-6
    ys = torch.linspace(-1, 1, pixels.shape[-2], device=pixels.device).view(1, -1, 1)
    xs = torch.linspace(-1, 1, pixels.shape[-1], device=pixels.device).view(1, 1, -1)
    total = weight.sum((1, 2))
    x, y = (weight * xs).sum((1, 2)) / total, (weight * ys).sum((1, 2)) / total
    return 1 - ((x.square() + y.square()) / 2).sqrt()


def contrast(pixels: Tensor) -> Tensor:
    """Standard deviation of luma over the picture: 0 for a plain one, at most 0.5."""
    luma = (pixels * pixels.new_tensor(LUMA).view(1, 3, 1, 1)).sum(1)
    return luma.flatten(1).std(1, correction=0)


def warmth(pixels: Tensor) -> Tensor:
    """Mean red minus mean blue, -1 (blue) to 1 (red or yellow)."""
    return (pixels[:, 0] - pixels[:, 2]).mean((1, 2))


SCORES = {
    "brightness": brightness,
    "colourfulness": colourfulness,
    "size": size,
    "centredness": centredness,
    "contrast": contrast,
    "warmth": warmth,
}
