"""Evaluation records whose gains are made up."""

from collections.abc import Mapping

import numpy as np

from library.measuring.record import REWARD, EvaluationRecord
from library.measuring.statistics import summarise_response

HEALTHY = {
    "latent_drift": 0.2,
    "pixel_drift": 0.05,
    "latent_statistics": 0.1,
    "perceptual_distance": 0.1,
    "latent_diversity": 0.95,
    "pixel_diversity": 0.95,
    "latent_nyquist": 1.1,
    "nyquist": 1.1,
    "saturation": 1.1,
    "clipped": 0.02,
    "edges": 1.1,
}
BASE = {"latent_drift": 0.0, "pixel_drift": 0.0, "latent_statistics": 0.0, "perceptual_distance": 0.0, "clipped": 0.01}  # the others are 1


def record_of(
    score: tuple[float, float] | None = (1.0, 1.0),
    judges: Mapping[str, tuple[float, float]] | None = None,
    shares: Mapping[str, tuple[float, float, float]] | None = None,
    *,
    score_name: str = REWARD,
    others: Mapping[str, tuple[float, float]] | None = None,
    spread: float = 0.1,
    num_prompts: int = 8,
    directions: np.ndarray | None = None,
    statistics: Mapping[str, float | tuple[float, float]] | None = None,
    name: str = "slider",
) -> EvaluationRecord:
    """A record at -1, 0 and +1, with 4 seeds a prompt.

    Args:
        score, judges: gains at +1 and at -1, above 0 is the right way, in within-prompt standard deviations.
        shares: of yes-or-no judges: at -1, 0 and +1.
        others: more scores of the training: changes at +1 and -1 in their own units.
        spread: of the gain over pictures.
        statistics: at both weights, or at -1 and +1, where they are not `HEALTHY`.
    """
    rng, num_seeds = np.random.default_rng(0), 4
    shape = (num_prompts, num_seeds)
    wanted = np.ones(num_prompts) if directions is None else directions
    responses = {}

    def add(name: str, role, down: np.ndarray, base: np.ndarray, up: np.ndarray) -> None:
        responses[name] = summarise_response(name, role, np.stack([down, base, up], axis=2), (-1.0, 0.0, 1.0), rng, wanted)

    for key, (up, down) in {**({score_name: score} if score else {}), **(judges or {})}.items():
        base = rng.standard_normal(shape)
        unit = np.sqrt(base.var(axis=1, ddof=1).mean())
        noise = [part - part.mean() for part in spread * rng.standard_normal((2, *shape))]
        moved = [base + sign * (gain + part) * unit * wanted[:, None] for sign, gain, part in ((-1, down, noise[0]), (1, up, noise[1]))]
        add(key, "scorer" if key == score_name and score else "judge", moved[0], base, moved[1])
    for key, (up, down) in (others or {}).items():
        base = rng.standard_normal(shape)
        add(key, "scorer", base - down, base, base + up)
    for key, at in (shares or {}).items():
        add(
            key,
            "judge",
            *((np.arange(num_prompts * num_seeds) < round(share * num_prompts * num_seeds)).astype(float).reshape(shape) for share in at),
        )
    ends = {key: value if isinstance(value, tuple) else (value, value) for key, value in (HEALTHY | dict(statistics or {})).items()}
    return EvaluationRecord(
        name=name,
        multipliers=(-1.0, 0.0, 1.0),
        prompts=tuple(f"prompt {row}" for row in range(num_prompts)),
        seeds=tuple(tuple(range(num_seeds * row, num_seeds * (row + 1))) for row in range(num_prompts)),
        responses=responses,
        statistics={key: (down, BASE.get(key, 1.0), up) for key, (down, up) in ends.items()},
        seed_distance=1.0,
        settings={"num_steps": 20},
    )
