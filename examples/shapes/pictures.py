"""Pictures of the shapes world as tensors."""

import random

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from examples.shapes.world import RESOLUTIONS, Scene, draw, random_scene


def to_pixels(pictures: list[Image.Image]) -> Tensor:
    """RGB images of one size to pixels [B, 3, H, W] in -1..1."""
    array = np.stack([np.asarray(picture) for picture in pictures])  # [B, H, W, 3]
    return torch.from_numpy(array).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def draw_batch(count: int, rng: random.Random, resolution: tuple[int, int] | None = None, **fixed: str) -> tuple[Tensor, list[Scene]]:
    """Draw `count` random scenes of one resolution: pixels [B, 3, H, W] in -1..1, and the scenes."""
    resolution = resolution or rng.choices(RESOLUTIONS, weights=(0.6, 0.2, 0.2))[0]
    scenes = [random_scene(rng, resolution, **fixed) for _ in range(count)]
    return to_pixels([draw(scene) for scene in scenes]), scenes
