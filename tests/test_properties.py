"""What holds for all numbers: conversions have inverses, buckets keep their bounds, and no two modules of a U-Net have one name."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given
from hypothesis import strategies as st

from library.diffusion.noise_schedule import (
    abar_to_sigma,
    eps_to_v,
    eps_to_x0,
    sigma_to_abar,
    v_to_eps,
)
from library.scorer_data.buckets import BucketConfig, bucket_sizes, choose_bucket, crop_share
from networks.lora_targets import find_targets
from tests.helpers.fuzzing import fuzzed

ABARS = st.floats(1e-3, 1 - 1e-3)


@fuzzed()
@given(abar=ABARS, seed=st.integers(0, 2**32))
def test_eps_v_and_x0_say_the_same(abar: float, seed: int) -> None:
    """In float64, so that the tolerance is that of the formulas and not of small sqrt(abar)."""
    generator = torch.Generator().manual_seed(seed)
    x0, eps = torch.randn(2, 1, 4, 2, 2, generator=generator, dtype=torch.float64)
    level = torch.tensor([abar], dtype=torch.float64)
    latents = abar**0.5 * x0 + (1 - abar) ** 0.5 * eps
    v = eps_to_v(latents, eps, level)
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(eps_to_x0(latents, eps, level), x0, **close)
    torch.testing.assert_close(v, abar**0.5 * eps - (1 - abar) ** 0.5 * x0, **close)  # arXiv 2202.00512, appendix D
    torch.testing.assert_close(v_to_eps(latents, v, level), eps, **close)
    torch.testing.assert_close(sigma_to_abar(abar_to_sigma(level)), level, **close)


@fuzzed()
@given(width=st.integers(1, 20_000), height=st.integers(1, 20_000), resolution=st.sampled_from(["512", "1024", "640,960"]))
def test_no_bucket_cuts_less_off_and_none_is_larger_than_the_resolution(width: int, height: int, resolution: str) -> None:
    config = BucketConfig(resolution=resolution)
    sizes = bucket_sizes(config)
    chosen = choose_bucket(width, height, config)
    assert chosen in sizes and chosen[0] * chosen[1] <= config.width * config.height
    assert crop_share(width, height, chosen) <= min(crop_share(width, height, size) for size in sizes) + 1e-9
    assert crop_share(height, width, choose_bucket(height, width, config)) == pytest.approx(crop_share(width, height, chosen)) or (
        config.width != config.height
    )


@fuzzed(0.05)
@given(crossing=st.lists(st.booleans(), min_size=1, max_size=4), layers=st.integers(1, 3), depth=st.integers(1, 3), sdxl=st.booleans())
def test_a_name_of_any_style_is_one_module_of_a_unet(crossing: list[bool], layers: int, depth: int, sdxl: bool) -> None:
    """Whatever its blocks: so a file's names are the modules, one to one, and a name in another program's style means no other."""
    down = ["CrossAttnDownBlock2D" if cross else "DownBlock2D" for cross in crossing]
    up = ["CrossAttnUpBlock2D" if cross else "UpBlock2D" for cross in reversed(crossing)]
    more = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 16} if sdxl else {}
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(8,) * len(crossing),
            down_block_types=tuple(down),
            up_block_types=tuple(up),
            layers_per_block=layers,
            transformer_layers_per_block=depth,
            attention_head_dim=4,
            norm_num_groups=4,
            cross_attention_dim=8,
            **more,
        )
    targets = list(find_targets(None, unet, with_convs=True))
    paths = {name: target.path for target in targets for name in {target.name, *target.aliases}}
    assert len({target.name for target in targets}) == len({target.path for target in targets}) == len(targets)
    assert all(paths[name] == target.path for target in targets for name in (target.name, *target.aliases))
