"""No setting is without effect: each is read by what uses it, or says in a warning or an error that it is not."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import train_latent_scorer
import train_leco_score
from library.errors import UserError
from library.settings.options import build_config, option, options, resolve
from tests.helpers.setting_reads import ATTRIBUTES, recorded_reads, unread_settings
from tests.helpers.tiny_leco_run import make_workplace, settings
from tests.helpers.tiny_models import tiny_vae
from tools.settings_reference import SCRIPTS
from train_latent_scorer import LatentScorerConfig
from train_leco_score import leco_score_config

# Read only in runs unlike the ones below, which no other setting decides.
ELSEWHERE = {
    "force_scorer": "with a scorer that never saw noise",
    "pretrained_model_name_or_path": "by train_latent_scorer.py, without vae or for unet_encoder",
}
# Where they are not read, giving them another value is refused.
REFUSED = {
    "pretrain_criterion": "masked",
    "pretrain_steps": 5,
}


def slider_run(folder: Path) -> dict[str, Any]:
    return settings(make_workplace(folder), folder / "out", max_train_steps=1)


def scorer_run(folder: Path) -> dict[str, Any]:
    rows = ["path,score,split"]
    for number in range(12):
        Image.new("RGB", (32, 32), (number * 20,) * 3).save(folder / f"{number}.png")
        rows.append(f"{number}.png,{number / 12},{'train' if number % 4 else 'val'}")
    (folder / "ratings.csv").write_text("\n".join(rows), encoding="utf-8")
    tiny_vae().save_pretrained(folder / "vae")
    sizes = {"resolution": 32, "min_bucket_reso": 32, "max_bucket_reso": 64, "bucket_reso_steps": 8}
    files = {"vae": folder / "vae", "train_data_file": folder / "ratings.csv", "output_dir": folder / "out"}
    return files | sizes | {"scorer_size": "tiny", "max_train_steps": 1, "train_batch_size": 4}


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, config_class, make",
    [(train_leco_score, leco_score_config(), slider_run), (train_latent_scorer, LatentScorerConfig, scorer_run)],
)
def test_every_setting_does_something_or_says_that_it_does_not(script, config_class, make, tmp_path: Path) -> None:
    values = make(tmp_path)
    with recorded_reads(config_class) as reads:
        script.train(build_config(config_class, values))
    without_effect = []
    for name in unread_settings(config_class, reads, resolve(config_class, values)[0]):
        if name in REFUSED:
            with pytest.raises(UserError, match=name):
                build_config(config_class, values | {name: REFUSED[name]})
        elif name not in ELSEWHERE:
            without_effect.append(name)
    assert without_effect == [], "nothing reads them: use them, or say when they are read by only_with of option()"


@pytest.mark.parametrize("script", SCRIPTS)
def test_settings_of_every_script_are_read_and_depend_on_others_that_exist(script: str) -> None:
    table = options(SCRIPTS[script])
    if script.startswith("tools/"):  # the test above sees what the trainings read
        assert set(table) - set(options(LatentScorerConfig)) <= ATTRIBUTES
    conditions = [condition for entry in table.values() for condition in entry.only_with]
    named = {name for condition in conditions for name in ([condition] if isinstance(condition, str) else condition)}
    assert named <= {name for config_class in SCRIPTS.values() for name in options(config_class)}
    assert named or script == "tools/make_pixel_scorer.py"
    if script.startswith("train_"):
        assert named <= set(table)


@dataclass(frozen=True, kw_only=True)
class Made:
    used: int = option(1, help="Used.")
    only_checked: int = option(1, help="Checked.")
    only_copied: int = option(1, help="Copied.")
    by_property: int = option(1, help="Read through a property.")
    mode: str = option("a", help="Mode.")
    steps_of_b: int = option(1, help="Read by nobody at all.", only_with={"mode": ("b",)})
    max_train_steps: int = option(1, help="Read elsewhere.", only_with={"mode": ("b",)})

    def __post_init__(self) -> None:
        assert self.only_checked > 0

    @property
    def twice(self) -> int:
        return 2 * self.by_property


@dataclass(frozen=True, kw_only=True)
class MadeScript:
    made: Made


def test_the_recorder_tells_uses_from_checks_and_copies() -> None:
    config = build_config(MadeScript, {})
    with recorded_reads(MadeScript) as reads:
        copy = dataclasses.replace(config.made)
        assert dataclasses.asdict(copy)["only_copied"] == 1
        assert (copy.used, copy.twice, copy.mode) == (1, 2, "a")
    assert reads == {"used", "by_property", "mode"}
    assert unread_settings(MadeScript, reads, resolve(MadeScript, {})[0]) == ["only_checked", "only_copied", "steps_of_b"]
    assert config.made.only_checked == 1 and reads == {"used", "by_property", "mode"}  # records no longer
