"""Several scores become one direction: some are raised or lowered, some held where they are, some kept from passing a bound.

Every gradient counts at RMS 1 per sample, so that a weight means the same for every scorer and at every noise level. What would move
a held score, or a score beyond its bound farther beyond it, is projected out of the direction, as conflicting tasks' gradients are in
PCGrad (arXiv 2001.06782). A network follows that direction only nearly, so a score that has moved all the same is pushed back.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from library.objectives.rewards import Goal, rms, unit_rms

BEYOND_BOUND = 0.2  # standard deviations beyond a max or min at which the score is pushed back with full strength
MOST_AMPLIFIED = 10.0  # goals that contradict each other leave next to nothing, which must not be blown up to full strength


def ascent_direction(
    goals: Sequence[Goal],
    gradients: Mapping[str, Tensor],
    values: Mapping[str, Tensor],
    base_values: Mapping[str, Tensor] | None,
    push: Callable[[Tensor], Tensor],
    directions: Tensor,
    step_fraction: Tensor,
) -> Tensor:
    """Where the latents should go, at RMS |push| of the goal that is pushed most; less where goals contradict or limits forbid it.

    Args:
        gradients: of each goal's value [B, C, h, w], by name, at any scale.
        values, base_values: each goal's value [B], by name, with the slider and without it. base_values may be None if no score is held
            and `push` does without: gains are NaN then.
        push: from a goal's gain over the frozen model in its wanted direction [B], in standard deviations, to how strongly it is to
            rise further, -1..1 [B].
        directions: +1 where goals of positive weight are to rise, -1 where they are to fall, 0 where nothing is to move [B].
        step_fraction: the part of a whole trajectory's change that this step accounts for, 0..1 [B]; a held score is pushed back fully at
            its distance times step_fraction.

    Returns:
        [B, C, h, w]. One goal without a limit gives `directions * push(gain) * gradient / rms(gradient)`.
    """
    assert base_values is not None or not any(goal.held for goal in goals), "a held score is compared with the frozen model's"
    units = {goal.name: unit_rms(gradients[goal.name]) for goal in goals}
    gains = {
        name: value - base_values[name] if base_values is not None else torch.full_like(value, torch.nan) for name, value in values.items()
    }
    pushes = {goal.name: push(directions * goal.sign * gains[goal.name]) for goal in goals if goal.sign}
    if len(goals) == 1 and goals[0].limit is None:
        name, sign = goals[0].name, goals[0].sign
        return _scaled(units[name], sign * directions * pushes[name])

    wanted = torch.zeros_like(next(iter(units.values())))
    strength = aligned = torch.zeros_like(directions)
    for goal in goals:
        if goal.sign:
            wanted = wanted + _scaled(units[goal.name], goal.weight * directions * pushes[goal.name])
            size = pushes[goal.name].abs() * directions.abs()
            strength, aligned = torch.maximum(strength, size), aligned + abs(goal.weight) * size

    basis: list[Tensor] = []  # orthogonal per sample; every unit is at RMS 1, or 0 where it is not in the way
    for goal in goals:
        if goal.held:
            basis.append(_orthogonal(units[goal.name], basis))
            wanted = wanted - _scaled(basis[-1], _dot(wanted, basis[-1]))
    for goal in goals:
        if goal.limit is not None and not goal.held:
            away = _beyond(goal, values[goal.name]).sign()
            worse = (away * _dot(wanted, units[goal.name])) > 0
            basis.append(_scaled(_orthogonal(units[goal.name], basis), worse.float()))
            wanted = wanted - _scaled(basis[-1], _dot(wanted, basis[-1]))
    moved = _scaled(wanted, strength / torch.maximum(rms(wanted), aligned / MOST_AMPLIFIED).clamp_min(1e-12))
    for goal in goals:
        restoring = _restoring(goal, values[goal.name], gains[goal.name], step_fraction)
        if restoring is not None:
            moved = moved + _scaled(units[goal.name], restoring)
            strength = torch.maximum(strength, restoring.abs())
    return _scaled(moved, (strength / rms(moved).clamp_min(1e-12)).clamp_max(1))


def _restoring(goal: Goal, value: Tensor, gain: Tensor, step_fraction: Tensor) -> Tensor | None:
    """How strongly a score is pushed back, -1..1 along its gradient [B]: fully where it is at its hold's distance; None without limit."""
    if goal.limit is None:
        return None
    if goal.held:
        return -(gain / (goal.limit.value * step_fraction).clamp_min(1e-12)).clamp(-1, 1)  # from the first: small steps of one sign add up
    beyond = _beyond(goal, value)
    return -(beyond / BEYOND_BOUND).clamp(-1, 1)


def _beyond(goal: Goal, value: Tensor) -> Tensor:
    """By how many standard deviations a score is above its max (positive) or below its min (negative), or 0 [B]."""
    assert goal.limit is not None
    distance = value - goal.standardise(goal.limit.value)
    return distance.clamp_min(0) if goal.limit.kind == "max" else distance.clamp_max(0)


def _orthogonal(unit: Tensor, basis: Sequence[Tensor]) -> Tensor:
    """What of a unit [B, C, h, w] the basis does not span, at RMS 1; 0 where that is nothing (Gram-Schmidt)."""
    rest = unit
    for other in basis:
        rest = rest - _scaled(other, _dot(rest, other))
    return torch.where((rms(rest) > 1e-4).view(-1, 1, 1, 1), unit_rms(rest), torch.zeros_like(rest))


def _dot(first: Tensor, second: Tensor) -> Tensor:
    """Mean product per sample [B]: 1 for a unit with itself."""
    return (first * second).mean((1, 2, 3))


def _scaled(x: Tensor, factors: Tensor) -> Tensor:
    return x * factors.view(-1, 1, 1, 1)
