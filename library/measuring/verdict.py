"""What the looks at a slider, one after the other, amount to: warnings in words, each said once, and reasons to stop."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from library.measuring.observation import SIGNS, Observation

CAPTION_LOSS = 0.10  # a yes-or-no judge may fall by this share of the pictures
BEYOND_RISE = 0.10  # share of the pictures whose score has passed its limit
CLIPPING_RISE = 0.05  # share of pixel values
DIVERSITY_FLOOR = 0.7  # of the base model's RMS distance between seeds
DIVERSITY_FLOORS = {"latent_diversity": DIVERSITY_FLOOR, "diversity": DIVERSITY_FLOOR**2}  # the second is a squared distance
JUDGE_SHARE = 0.5  # of the training score's gain that the judges are to confirm
SATURATION_CEILING = 1.5  # times the base model's mean chroma
NYQUIST_CEILING = 2.0  # times the base model's share of the highest frequencies
STRONG_GAIN = 1.0  # standard deviations: what is wrong with a slider matters from here on
FLAT_GAIN = 0.1  # standard deviations: less is no effect
FLAT_LOOKS = 3  # looks without effect until that is said
HARDLY_MOVED = 0.01  # relative change of the predictions
# The complaints that speak against a slider whatever its score is about: stronger colours, for one, may be what was wanted.
GAMING_MARKS = ("share of ", "held ", "beyond ", "clipping", "nyquist", "latent_nyquist", "diversity")


@dataclass(frozen=True, kw_only=True)
class Look:
    """What is remembered of an observation: the step, the training score's and the judges' mean gain over both signs."""

    step: int
    score: float
    judge: float | None


@dataclass(kw_only=True)
class Watch:
    """Looks at every observation of a run.

    Attributes:
        early_stop_gain: stop when both signs gain as much, in within-prompt standard deviations; None never.
        patience: stop when the judges' gain has been below its best for so many observations while the training score rose; None never.
        max_drift: stop when the latents at +1 or -1 are farther (RMS) than this from the base model's; None never.
        network_scale: alpha / dim, what the network's output is multiplied with; for advice.
    """

    early_stop_gain: float | None
    patience: int | None
    max_drift: float | None
    network_scale: float
    looks: list[Look] = field(default_factory=list)
    said: set[str] = field(default_factory=set)

    def judge(self, observation: Observation) -> Observation:
        """The observation with what there is to warn of for the first time, and why training should stop."""
        self.looks.append(Look(step=observation.step, score=observation.mean_score_gain, judge=observation.mean_judge_gain))
        warnings = complaints(observation) | self._flat(observation)
        new = {key: words for key, words in warnings.items() if key not in self.said}
        self.said |= new.keys()
        return replace(observation, warnings=tuple(new.values()), stop=self._stop(observation))

    def state_dict(self) -> dict[str, Any]:
        return {"looks": [asdict(look) for look in self.looks], "said": sorted(self.said)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.looks, self.said = [Look(**look) for look in state["looks"]], set(state["said"])

    def _flat(self, observation: Observation) -> dict[str, str]:
        """No effect at either sign for `FLAT_LOOKS` looks since the start, and why."""
        trained = [look for look in self.looks if look.step > 0]
        if len(trained) < FLAT_LOOKS or not all(abs(observation.score_gain(sign).value) <= FLAT_GAIN for sign in SIGNS):
            return {}
        moved = max(observation.statistics[sign]["eps_distance"] for sign in SIGNS)
        gains = " and ".join(f"{sign * observation.score_gain(sign).value:+.2f} at {sign:+d}" for sign in SIGNS)
        words = f"step {observation.step}: the training score does not move ({gains}, in standard deviations)"
        if moved < HARDLY_MOVED:
            advice = (
                f"the slider has changed the model's predictions by only {moved:.1%}: raise learning_rate, or network_alpha (the network's "
                f"output is multiplied with alpha / dim = {self.network_scale:.3g})"
            )
        else:
            advice = (
                f"the slider has changed the model's predictions by {moved:.1%}, but not to where the score is higher: look at the "
                "scorer's gradient with check_reward, or train longer if the gain grows from one measurement to the next"
            )
        return {"flat": f"{words}; {advice}"}

    def _stop(self, observation: Observation) -> str | None:
        goal, step = self.early_stop_gain, observation.step
        if goal is not None and all(observation.score_gain(sign).value >= goal for sign in SIGNS):
            return f"step {step}: both weights move the training score by {goal:g} standard deviations or more: strong enough"
        drift = max(observation.statistics[sign]["drift"] for sign in SIGNS)
        if self.max_drift is not None and drift > self.max_drift:
            return f"step {step}: the latents are {drift:.2f} (RMS) from the base model's, beyond early_stop_drift {self.max_drift:g}"
        judged = [(look.judge, look.score, look.step) for look in self.looks if look.judge is not None]
        if self.patience is not None and len(judged) > self.patience:
            best, score, best_step = max(judged, key=lambda look: look[0])
            since = [look for look in judged if look[2] > best_step]
            if len(since) >= self.patience and best - judged[-1][0] > FLAT_GAIN and all(look[1] > score for look in since):
                return (
                    f"step {step}: since step {best_step} the judges' gain has fallen from {best:.2f} to {judged[-1][0]:.2f} standard "
                    f"deviations while the training score's rose from {score:.2f} to {judged[-1][1]:.2f}: from here on the score is gamed"
                )
        return None


def complaints(observation: Observation) -> dict[str, str]:
    """What is wrong with a slider as it is now: a sentence for each kind of thing."""
    step = observation.step
    found: dict[str, str] = {}
    for sign in SIGNS:
        score, other = observation.score_gain(sign), observation.score_gain(-sign)
        falling = [judge for judge in observation.judges if observation.gain(judge.name, sign).high < 0]
        if score.low > 0 and falling:
            worst = min((observation.gain(judge.name, sign).value, judge.name) for judge in falling)
            found.setdefault(
                "gamed",
                f"step {step}: the training score rises while the judges fall: {score.value:+.1f} against {worst[0]:+.1f} standard "
                f"deviations ({worst[1]}, in the direction of weight {sign:+d}): the score is being gamed; use a checkpoint from before, "
                "raise preserve_weight, or train the scorer on more pictures",
            )
        judged = observation.judge_gain(sign)
        if judged is not None and not falling and score.value >= STRONG_GAIN and judged < JUDGE_SHARE * score.value:
            found.setdefault(
                "unconfirmed",
                f"step {step}: at weight {sign:+d} the training score gained {score.value:.1f} standard deviations and the judges only "
                f"{judged:.1f}: look at the previews, part of the gain may be gamed",
            )
        if other.value >= STRONG_GAIN and score.value < FLAT_GAIN * other.value:
            found[f"dead{sign:+d}"] = (
                f"step {step}: weight {-sign:+d} moves the training score by {other.value:.1f} standard deviations and weight {sign:+d} "
                f"does not ({score.value:+.1f}, above 0 would be right): train_multipliers should hold both signs"
            )
    for judge in observation.share_judges:
        if (lost := observation.share_lost(judge)) > CAPTION_LOSS:
            found[f"share of {judge.name}"] = (
                f"step {step}: {judge.name} holds for {lost:.0%} of the pictures less than without the slider: what was asked for gets lost"
            )
    for name, limit in observation.held.items():
        gains = observation.responses[name].gains  # in the scorer's standard deviations
        moved, sign = max((abs(gains[1 + sign].value), sign) for sign in SIGNS)
        if moved > limit:
            found[f"held {name}"] = (
                f"step {step}: at weight {sign:+d} the score {name}, which is to be held within {limit:g} of its standard deviations, "
                f"has moved by {moved:.2f}"
            )
    for name, (words, shares) in observation.beyond.items():
        share, sign = max((shares[1 + sign], sign) for sign in SIGNS)
        if share - shares[1] > BEYOND_RISE:
            found[f"beyond {name}"] = (
                f"step {step}: at weight {sign:+d} the score {name} of {share:.0%} of the pictures is {words}, its limit "
                f"({shares[1]:.0%} without the slider)"
            )
    return found | _marks(observation)


def _marks(observation: Observation) -> dict[str, str]:
    """What a gamed score leaves in the pictures."""
    step = observation.step

    def most(name: str) -> tuple[float, int]:
        return max((observation.statistics[sign].get(name, math.nan), sign) for sign in SIGNS)

    found: dict[str, str] = {}
    base_clipped = observation.base_statistics.get("clipped", math.nan)
    (clipped, clip_sign), (saturation, hue_sign) = most("clipped"), most("saturation")
    if clipped - base_clipped > CLIPPING_RISE:
        found["clipping"] = (
            f"step {step}: at weight {clip_sign:+d} {clipped:.0%} of the pixel values are clipped to black or white "
            f"({base_clipped:.0%} without the slider)"
        )
    if saturation > SATURATION_CEILING:
        found["saturation"] = (
            f"step {step}: at weight {hue_sign:+d} the colours are {saturation:.1f} times as strong as the base model's; if that is not "
            "what the score is about, it is being gamed"
        )
    for name, what in (("nyquist", "pixels"), ("latent_nyquist", "latents")):
        share, sign = most(name)
        if share > NYQUIST_CEILING:
            found[name] = (
                f"step {step}: at weight {sign:+d} the finest detail in the {what} is {share:.1f} times as strong as the base model's: a "
                "grid or noise, the usual trace of a gamed score; look at the previews at full size"
            )
    for name, floor in DIVERSITY_FLOORS.items():
        kept, sign = min((observation.statistics[sign].get(name, math.nan), sign) for sign in SIGNS)
        if kept < floor:
            found["diversity"] = (
                f"step {step}: at weight {sign:+d} seeds of one prompt differ only {kept:.0%} as much as without the slider"
            )
    return found
