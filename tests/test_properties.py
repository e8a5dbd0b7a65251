"""What holds for all numbers: conversions have inverses, buckets keep their bounds."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from library.diffusion.noise_schedule import (
    abar_to_sigma,
    eps_to_v,
    eps_to_x0,
    sigma_to_abar,
    v_to_eps,
    v_to_x0,
    x0_to_eps,
)
from library.scorer_data.buckets import BucketConfig, bucket_sizes, choose_bucket, crop_share
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
    torch.testing.assert_close(x0_to_eps(latents, x0, level), eps, **close)
    torch.testing.assert_close(v, abar**0.5 * eps - (1 - abar) ** 0.5 * x0, **close)  # arXiv 2202.00512, appendix D
    torch.testing.assert_close(v_to_eps(latents, v, level), eps, **close)
    torch.testing.assert_close(v_to_x0(latents, v, level), x0, **close)
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
