"""Prompts for pictures of several aspect ratios."""

from collections.abc import Sequence
from dataclasses import replace

from library.scorer_data.buckets import BucketConfig, bucket_sizes
from library.types import PromptSpec


def with_aspect_buckets(
    prompts: Sequence[PromptSpec],
    resolution: tuple[int, int],
    *,
    min_side: int | None = None,
    max_side: int | None = None,
    step: int = 64,
) -> list[PromptSpec]:
    """Every prompt without a size of its own once for each bucket of sd-scripts, which share its weight; the others as they are.

    Args:
        resolution: (height, width) in pixels; no bucket is larger in area.
        min_side, max_side: of a bucket; None is 3/4 and 4/3 of the resolution, which goes to 9 : 16 and 16 : 9.
        step: sides are multiples of it, and it of 8.

    Raises:
        UserError: a limit that leaves out the resolution itself, or a step that is no multiple of 8.
    """
    height, width = resolution
    config = BucketConfig(
        resolution=f"{width},{height}",
        min_bucket_reso=min(height, width) * 3 // 4 if min_side is None else min_side,
        max_bucket_reso=max(height, width) * 4 // 3 if max_side is None else max_side,
        bucket_reso_steps=step,
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
