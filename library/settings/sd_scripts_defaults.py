"""Where a name of sd-scripts has another default here: what it is there, and why. `--defaults sd-scripts` takes theirs.

Theirs are those of train_leco.py and sdxl_train_leco.py; `python -m tools.sd_scripts_options` writes the table into the documentation.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

REASONS: Mapping[str, tuple[Any, str]] = MappingProxyType(
    {
        "network_dim": (4, "a score moves more of a picture than two prompts do"),
        "network_alpha": (1.0, "the rank, so that a learning rate fits every rank"),
        "learning_rate": (2e-6, "theirs is for whole models; the documentation of their LECO begins at 1e-4"),
        "max_train_steps": (1600, "the run ends by itself when nothing more is gained"),
        "train_batch_size": (1, "trajectories on the belt, which are the samples of one U-Net call"),
        "mixed_precision": ("no", "what the device is good at"),
        "save_precision": ("float", "half the file; UIs load LoRAs in fp16"),
        "max_denoising_steps": (40, "20, or a few-step base's own; every step is learned from"),
        "leco_denoise_guidance_scale": (3.0, "5, or a few-step base's own: pictures as people make them"),
        "output_name": ("last", "files of several runs in one folder are told apart"),
    }
)
SD_SCRIPTS: Mapping[str, Any] = MappingProxyType({name: default for name, (default, _) in REASONS.items()})
