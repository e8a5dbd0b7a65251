"""A network of timm trained on pixels or on latents, in the same few lines: what the scorers of the project are compared with."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from library.scorer_data.buckets import BucketConfig, choose_bucket, crop_share
from library.scorer_data.pictures import cover, read_picture, to_pixels
from library.scorer_data.records import FilePicture
from library.scorers.optional_packages import import_timm
from library.training.runtime import generator

WIDTHS = (32, 64, 128, 256)  # half of a ResNet-18's
BATCH_SIZE, LEARNING_RATE = 32, 1e-3


@dataclass(frozen=True)
class Stack:
    """Pictures of one size: inputs [N, C, h, w] and targets [N]."""

    inputs: Tensor
    targets: Tensor


def stacks(paths: Sequence[Path], targets: Tensor, encode: Callable[[Tensor], Tensor], buckets: Mapping[str, Any]) -> list[Stack]:
    """Pictures in their buckets; those that a bucket would cut apart are left out, as the script leaves them out."""
    config = BucketConfig(**buckets)
    found: dict[tuple[int, int], list[tuple[Image.Image, Tensor]]] = {}
    for path, target in zip(paths, targets, strict=True):
        picture = read_picture(FilePicture(path))
        bucket = choose_bucket(*picture.size, config)
        if crop_share(*picture.size, bucket) <= config.max_crop:
            found.setdefault(bucket, []).append((cover(picture, bucket), target))
    result = []
    for entries in found.values():
        pixels = to_pixels([picture for picture, _ in entries])
        inputs = torch.cat([encode(chunk) for chunk in pixels.split(32)])
        result.append(Stack(inputs, torch.stack([target for _, target in entries])))
    return result


def make_network(in_channels: int, num_outputs: int) -> nn.Module:
    """timm's ResNet-18 at half its width; on latents with a first convolution that keeps their size, and no pooling after it."""
    network = import_timm().create_model("resnet18", channels=WIDTHS, in_chans=in_channels, num_classes=num_outputs)
    if in_channels != 3:
        network.conv1.stride, network.maxpool = (1, 1), nn.Identity()
    return network


def fit(training: Sequence[Stack], num_outputs: int, loss: Callable[[Tensor, Tensor], Tensor], steps: int) -> tuple[nn.Module, float]:
    """Train a network; returns it and the CPU seconds."""
    torch.manual_seed(0)
    rng, started = generator(0, "network"), time.process_time()
    network = make_network(training[0].inputs.shape[1], num_outputs)
    optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    sizes = torch.tensor([float(len(stack.targets)) for stack in training])
    network.train()
    for _ in range(steps):
        stack = training[int(torch.multinomial(sizes, 1, generator=rng))]
        rows = torch.randint(len(stack.targets), (BATCH_SIZE,), generator=rng)
        value = loss(network(stack.inputs[rows]), stack.targets[rows])
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
    return network.eval(), time.process_time() - started


@torch.no_grad()
def outputs_of(network: Callable[[Tensor], Tensor], test: Sequence[Stack]) -> tuple[Tensor, Tensor]:
    """Outputs and targets of all test pictures."""
    outputs = [network(chunk) for stack in test for chunk in stack.inputs.split(32)]
    return torch.cat(outputs), torch.cat([stack.targets for stack in test])
