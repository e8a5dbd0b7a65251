"""Prompts for pictures of several aspect ratios."""

from collections.abc import Sequence
from dataclasses import replace

from library.scorer_data.buckets import BucketConfig, bucket_sizes
from library.types import PromptSpec


def with_aspect_buckets(prompts: Sequence[PromptSpec], resolution: tuple[int, int]) -> list[PromptSpec]:
    """Every prompt without a size of its own once for each bucket of sd-scripts, which share its weight; the others as they are.

    Args:
        resolution: (height, width) in pixels; no bucket is larger in area. Sides go from 3/4 to 4/3 of it, which is 9 : 16 to 16 : 9, in
            steps of 64, or of an eighth of a small resolution.
    """
    height, width = resolution
    config = BucketConfig(
        resolution=f"{width},{height}",
        min_bucket_reso=min(height, width) * 3 // 4,
        max_bucket_reso=max(height, width) * 4 // 3,
        bucket_reso_steps=max(8, min(64, min(height, width) // 64 * 8)),
    )
    sizes = bucket_sizes(config)
    result: list[PromptSpec] = []
    for prompt in prompts:
        if prompt.width is not None or prompt.height is not None:
            result.append(prompt)
        else:
            share = prompt.weight / len(sizes)
            result += [replace(prompt, width=own_width, height=own_height, weight=share) for own_width, own_height in sizes]
    return result
