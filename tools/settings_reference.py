"""Write docs/reference.md: a line for every setting of every script, from the tables that `--help` is made of.

python -m tools.settings_reference
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

from library.settings.option_values import Option
from library.settings.options import options
from tools.cache_latents import CacheLatentsConfig
from tools.evaluate_slider import EvaluateSliderConfig
from tools.make_pixel_scorer import MakePixelScorerConfig
from tools.rate import RateScriptConfig
from tools.score_images import ScoreImagesConfig
from tools.train_image_prompt_adapter import TrainImagePromptAdapterConfig
from train_latent_scorer import LatentScorerConfig
from train_leco_score import leco_score_config

REFERENCE = Path(__file__).resolve().parents[1] / "docs" / "reference.md"
SCRIPTS: Mapping[str, type] = {
    "train_leco_score.py": leco_score_config(),
    "train_latent_scorer.py": LatentScorerConfig,
    "tools/evaluate_slider.py": EvaluateSliderConfig,
    "tools/rate.py": RateScriptConfig,
    "tools/score_images.py": ScoreImagesConfig,
    "tools/make_pixel_scorer.py": MakePixelScorerConfig,
    "tools/cache_latents.py": CacheLatentsConfig,
    "tools/train_image_prompt_adapter.py": TrainImagePromptAdapterConfig,
}
HEAD = """# Settings

Every setting of every script, on the command line as `--NAME VALUE` and in the TOML file as `NAME = VALUE`. Those marked *expert* are
shown by `--help all` and not by `--help`. This page is written by `python -m tools.settings_reference`; do not edit it.
"""


def reference() -> str:
    """The page, in Markdown."""
    lines = [HEAD]
    for script, config_class in SCRIPTS.items():
        table = options(config_class)
        lines.append(f"## {script}\n")
        section = None
        for entry in table.values():
            if entry.section != section:
                lines += [*([""] if section else []), f"### {entry.section}\n", "| setting | default | |", "|---|---|---|"]
                section = entry.section
            lines.append(_row(entry))
        lines.append("")
    return "\n".join(lines)


def _row(entry: Option) -> str:
    default = "" if entry.default in (None, "", (), []) or entry.secret else f"`{_shown(entry.default)}`"
    choices = f" One of {', '.join(f'`{choice}`' for choice in entry.choices)}." if entry.choices is not None else ""
    condition = f" {entry.condition[0].upper()}{entry.condition[1:]}." if entry.condition else ""
    text = f"{'*expert* ' if entry.expert else ''}{entry.help}{choices}{condition}"
    return f"| `{entry.name}` | {default} | {text.replace('|', chr(92) + '|').replace('<', '&lt;')} |"


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    REFERENCE.write_text(reference(), encoding="utf-8")


if __name__ == "__main__":
    main()
