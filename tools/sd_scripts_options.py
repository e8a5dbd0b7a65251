"""Write docs/sd_scripts_options.md: what becomes here of every option of sd-scripts' LECO and LoRA trainers.

    python -m tools.sd_scripts_options

Their names and defaults are in sd_scripts_options.json (sd-scripts 0.10: commit 48d368f; its LECO scripts: 063ef10). What is said of an
option is what train_leco_score.py does with a file that holds it.
"""

import argparse
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.errors import UserError
from library.settings.options import build_config, options
from library.settings.sd_scripts_defaults import REASONS
from library.settings.sd_scripts_keys import REPLACEMENTS
from train_leco_score import leco_score_config

DATA = Path(__file__).with_suffix(".json")
PAGE = Path(__file__).resolve().parents[1] / "docs" / "sd_scripts_options.md"
SCRIPTS = ("train_leco.py", "sdxl_train_leco.py", "train_network.py")
HEAD = """# Options of sd-scripts

What becomes of every option of sd-scripts' `train_leco.py`, `sdxl_train_leco.py` and `train_network.py` (version 0.10) in a config file or
on the command line of `train_leco_score.py`. *obeyed*: it means the same. *warned*: it has no use here, and one warning names it with
all the others of its kind. An option that nobody knows is an error.

This page is written by `python -m tools.sd_scripts_options`; do not edit it.

## Other defaults

`--defaults sd-scripts`, or `defaults = "sd-scripts"` in the file, takes theirs.

| option | sd-scripts (LECO) | here | why |
|---|---|---|---|
"""
TABLE = """
Two more are decisions: `network_train_unet_only` is on (their LECO trains nothing else either), and `v_parameterization` is read from
the model. Where sd-scripts wants a value and has no default (`output_dir`, `prompts_file`, the model), the folder has one: `output`.

## All options

| option | of | what becomes of it |
|---|---|---|
"""
OF_THE_ENGINE = ("config_file", "output_config")
# values that an option wants, where another of its type would be refused; and the settings beside which it is read
VALUES: Mapping[str, Any] = {
    "lr_scheduler": "linear",
    "lr_scheduler_type": "CosineAnnealingLR",
    "lr_scheduler_args": ["num_cycles=2"],
    "optimizer_type": "Lion",
    "optimizer_args": ["weight_decay=0.1"],
    "network_args": ["conv_dim=4"],
    "mixed_precision": "bf16",
    "resolution": "512,768",
    "lr_warmup_steps": 10,
    "text_encoder_lr": [1e-5, 1e-5],
    "base_weights_multiplier": [0.5],
    "zero_terminal_snr": True,
    "save_model_as": "ckpt",
    "huggingface_repo_id": "owner/name",
    "huggingface_repo_type": "dataset",
    "huggingface_repo_visibility": "public",
}
_LOGGED = {"log_with": "tensorboard"}
_HUB = {"huggingface_repo_id": "owner/name"}
BESIDE: Mapping[str, Mapping[str, Any]] = {
    "lr_scheduler_num_cycles": {"lr_scheduler": "cosine_with_restarts"},
    "lr_scheduler_power": {"lr_scheduler": "polynomial"},
    "lr_scheduler_timescale": {"lr_scheduler": "inverse_sqrt"},
    "lr_scheduler_min_lr_ratio": {"lr_scheduler": "cosine_with_min_lr"},
    "lr_decay_steps": {"lr_scheduler": "warmup_stable_decay"},
    "log_prefix": _LOGGED,
    "log_tracker_name": _LOGGED,
    "wandb_run_name": _LOGGED,
    "wandb_api_key": _LOGGED,
    "text_encoder_lr": {"network_train_unet_only": False},
    "base_weights_multiplier": {"base_weights": ["a.safetensors"]},
    "dim_from_weights": {"network_weights": "a.safetensors"},
    "save_last_n_steps": {"save_every_n_steps": 10},
    "save_last_n_steps_state": {"save_every_n_steps": 10, "save_state": True},
    "sample_prompts": {"sample_at_first": True},
    "huggingface_repo_type": _HUB,
    "huggingface_path_in_repo": _HUB,
    "huggingface_repo_visibility": _HUB,
    "huggingface_token": _HUB,
    "save_state_to_huggingface": _HUB,
    "async_upload": _HUB,
    "resume_from_huggingface": {"resume": "owner/name/state"},
    "min_snr_gamma": {"objective": ["leco"]},
    "min_timestep": {"scorer": ["a.safetensors"]},
    "max_timestep": {"scorer": ["a.safetensors"]},
}


@dataclass(frozen=True)
class Fate:
    """What becomes of an option: "obeyed", "warned" or "refused", and the note beside it."""

    kind: str
    note: str = ""


def read_data() -> dict[str, dict[str, Any]]:
    return json.loads(DATA.read_text(encoding="utf-8"))


def value_for(name: str, entry: Mapping[str, Any]) -> Any:
    """A value that is not the option's default."""
    if name in VALUES:
        return VALUES[name]
    if "choices" in entry:
        return next(choice for choice in entry["choices"] if choice not in entry["default"].values())
    value = {"switch": True, "int": 7, "float": 0.5, "str": "words"}[entry["type"]]
    return [value] if entry.get("several") else value


def fate(name: str, entry: Mapping[str, Any]) -> Fate:
    """What the settings of train_leco_score.py make of this option, alone in a file but for what it depends on."""
    if name in OF_THE_ENGINE:
        return Fate("obeyed", "on the command line")
    given = {"pretrained_model_name_or_path": "m", "prompts_file": "p.txt", **BESIDE.get(name, {}), name: value_for(name, entry)}
    with _warnings() as said:
        try:
            build_config(leco_score_config(), given)
        except UserError as error:
            return Fate("refused", str(error))
    if name in REPLACEMENTS and any(f"{name} (" in text for text in said):
        return Fate("warned", REPLACEMENTS[name])
    if any(name in text for text in said):
        return Fate("warned")
    own = options(leco_score_config()).get(name)
    if own is not None and own.condition:
        return Fate("obeyed", own.condition)
    beside = ", ".join(f"{key} {value}" for key, value in BESIDE.get(name, {}).items())
    return Fate("obeyed", "" if own is not None or not beside else f"with {beside}")


@contextmanager
def _warnings() -> Iterator[list[str]]:
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("library.settings.options")
    logger.addHandler(handler)
    propagate, logger.propagate = logger.propagate, False
    try:
        yield said
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


def page() -> str:
    """The page, in Markdown."""
    table = options(leco_score_config())
    defaults = []
    for name, (theirs, why) in REASONS.items():
        ours = table[name].default
        defaults.append(f"| `{name}` | `{theirs}` | {'not set' if ours is None else f'`{ours}`'} | {why} |")
    rows = []
    for name, entry in read_data().items():
        scripts = [script for script in SCRIPTS if script in entry["default"]]
        found = fate(name, entry)
        note = f": {found.note}" if found.note else ""
        rows.append(f"| `{name}` | {'all' if len(scripts) == len(SCRIPTS) else ', '.join(scripts)} | {found.kind}{note} |")
    return HEAD + "\n".join(defaults) + "\n" + TABLE + "\n".join(rows) + "\n"


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
