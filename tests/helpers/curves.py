"""Response curves whose answer is known."""

import numpy as np

from library.measuring.response_curve import ResponseCurve, response_curve
from library.measuring.statistics import within_prompt_std

MULTIPLIERS = (-2.0, -1.5, -1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)


def curve(gain, drift=abs, clipped=None) -> ResponseCurve:
    return ResponseCurve(
        multipliers=MULTIPLIERS,
        gains=tuple(gain(value) for value in MULTIPLIERS),
        drifts=tuple(drift(value) for value in MULTIPLIERS),
        clipped=() if clipped is None else tuple(clipped(value) for value in MULTIPLIERS),
    )


def measured_at(multipliers: tuple[float, ...], gain, rng: np.random.Generator) -> ResponseCurve:
    """A curve of noisy scores with intervals, at these strengths and their opposites."""
    both = np.array([-multiplier for multiplier in multipliers[::-1]] + [0.0, *multipliers])
    base = np.random.default_rng(0).normal(size=(12, 4, 1))  # the same pictures every time
    base /= within_prompt_std(base[:, :, 0])
    scores = base + gain(both) + 0.005 * rng.normal(size=(12, 4, len(both))) * (both != 0)
    return response_curve(both, scores, np.abs(both) / 10, rng)


def scores_of(rng: np.random.Generator, num_prompts: int, num_seeds: int, weights: np.ndarray, slope: float = 1.0) -> np.ndarray:
    """Scores [P, S, M] of a slider whose true gain is `slope` per weight in units of a within-prompt standard deviation of 3."""
    base = 10 * rng.normal(size=(num_prompts, 1)) + 3 * rng.normal(size=(num_prompts, num_seeds))
    effect = 3 * slope * (1 + 0.3 * rng.normal(size=(num_prompts, num_seeds)))  # differs from pair to pair
    return base[:, :, None] + effect[:, :, None] * weights
