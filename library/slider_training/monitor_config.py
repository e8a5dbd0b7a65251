"""How a training is watched: the settings."""

from dataclasses import dataclass
from pathlib import Path

from library.errors import UserError
from library.measuring.calibration import CalibrationTarget
from library.settings.options import check_above, check_at_least, option

MEASURED = {"measure": ("light", "full")}


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """Pictures and measurements while training, judges, early stop, and the strength of the saved file."""

    measure: str = option(
        "light",
        choices=("off", "light", "full"),
        help="light: few quick pictures, where they are worth it, and calibration; full: more of them, sampled as the training samples; "
        "off: nothing is measured, stopped, chosen or calibrated.",
    )
    eval_prompts_file: str | None = option(None, help="Prompts for measurements and previews; not set: the training prompts.", expert=True)
    evaluate_every_n_steps: int | None = option(
        None,
        help="Measure the slider every so many steps, too; not set: a few times a run, or every 50 steps with measure full.",
        expert=True,
        only_with=MEASURED,
    )
    judges: tuple[str, ...] = option(
        (),
        help="Independent opinions that training never follows: functions of pixels, package.module:function or file.py:function. They "
        "choose the step that is kept, and stop a training that games the score. With =stay it is a side effect that should not move, "
        "with =share a yes or no that must not fall.",
        only_with=MEASURED,
    )
    judge_scorers: tuple[str, ...] = option(
        (), help="More judges: scorer files that training does not follow; =stay and =share as above.", expert=True, only_with=MEASURED
    )
    early_stop_gain: float | None = option(
        2.0,
        help="Stop once weight +1 raises the score by so many within-prompt standard deviations and -1 lowers it as much.",
        only_with=MEASURED,
    )
    calibrate: str = option(
        "visible",
        help="After training, scale alpha so that weight 1 moves the score by one within-prompt standard deviation, or by more where that "
        "is too little to be plainly seen (visible); by exactly so many (a number, such as 1.0); or not at all (off).",
        only_with=MEASURED,
    )
    max_drift: float | None = option(
        None,
        help="Calibrate to no strength whose latents are farther than this (RMS) from the base model's.",
        expert=True,
        only_with=MEASURED,
    )
    sample_every_n_steps: int | None = option(None, help="Write a grid of previews, at weights -1, 0 and 1, every so many steps.")
    sample_prompts: str | None = option(
        None,
        help="Prompts of the previews, all of them; not set: four of those that are measured.",
        only_with=("sample_every_n_steps", "sample_at_first"),
        expert=True,
    )
    preview_vae: Path | None = option(
        None,
        help="Tiny autoencoder (TAESD and its like, a folder of diffusers' AutoencoderTiny) that decodes the previews, which is quicker "
        "and takes less memory; what is measured is decoded by the model's own.",
        only_with=("sample_every_n_steps", "sample_at_first"),
        expert=True,
    )
    sample_at_first: bool = option(False, help="Write a grid of previews before training, too.", expert=True)

    @property
    def previews(self) -> bool:
        """Whether any are written."""
        return self.sample_at_first or self.sample_every_n_steps is not None

    def __post_init__(self) -> None:
        check_at_least(self, 1, "evaluate_every_n_steps", "sample_every_n_steps")
        check_above(self, 0, "early_stop_gain", "max_drift")
        _ = self.target

    @property
    def target(self) -> CalibrationTarget | None:
        """What weight +1 is to do; None without calibration. Raises UserError for a word that is none."""
        if self.calibrate in ("off", ""):
            return None
        if self.calibrate == "visible":
            return CalibrationTarget(visible=True, max_drift=self.max_drift)
        try:
            gain = float(self.calibrate)
        except ValueError:
            gain = 0.0
        if not 0 < gain < float("inf"):
            raise UserError(f"calibrate is {self.calibrate!r}, but it must be visible, off, or a number above 0 such as 1.0")
        return CalibrationTarget(gain=gain, max_drift=self.max_drift)
