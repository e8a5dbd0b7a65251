"""train_leco_score.py on tiny random models: a model folder, a scorer for its VAE, prompts of two sizes, and settings for seconds."""

import json
from pathlib import Path
from typing import Any

import safetensors
import torch

from library.models.vae import VaeFingerprint
from library.scorers.base import Scorer, ScorerSpec, build_scorer
from library.scorers.heads import HeadSpec
from library.scorers.io import save_scorer
from library.settings.options import build_config
from tests.helpers.tiny_models import save_folder, tiny_model, tiny_vae
from train_leco_score import leco_score_config, train

PROMPTS = "a red circle\na blue square --w 128\n"


def tiny_scorer(vae: VaeFingerprint, channels: int = 4, **spec: Any) -> Scorer:
    """An untrained latent ResNet: an opinion without sense, but with a gradient."""
    architecture = {"in_channels": channels, "channels": [8, 16], "blocks": 1, "norm_groups": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_scorer(
            ScorerSpec(kind="latent_resnet", architecture=architecture, vae=vae, heads=(HeadSpec(std=0.05),), std=0.05, **spec)
        )


def make_workplace(folder: Path, kind: str = "sd1", full: bool = False) -> Path:
    """`folder` with model/, scorer.safetensors and prompts.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    model = tiny_model(kind, full=full)
    save_folder(model, folder / "model")
    save_scorer(folder / "scorer.safetensors", tiny_scorer(model.vae_fingerprint()))
    (folder / "prompts.txt").write_text(PROMPTS, encoding="utf-8")
    return folder


def settings(workplace: Path, output_dir: Path, **changes: Any) -> dict[str, Any]:
    return {
        "pretrained_model_name_or_path": str(workplace / "model"),
        "scorer": [str(workplace / "scorer.safetensors")],
        "prompts_file": str(workplace / "prompts.txt"),
        "output_dir": str(output_dir),
        "output_name": "tiny",
        "train_batch_size": 2,
        "max_denoising_steps": 3,
        "network_dim": 2,
        "network_alpha": 2.0,
        "learning_rate": 1e-2,
        "max_train_steps": 2,
        "seed": 0,
        "num_threads": torch.get_num_threads(),
        "save_precision": "float",
        "measure": "off",
        **changes,
    }


def run(workplace: Path, output_dir: Path, **changes: Any) -> Path:
    return train(build_config(leco_score_config(), settings(workplace, output_dir, **changes)))


def run_with_defaults(workplace: Path, output_dir: Path, **changes: Any) -> Path:
    """The defaults of the script, but for what is written beside the slider and these changes."""
    kept = {"pretrained_model_name_or_path", "scorer", "prompts_file", "output_dir", "output_name", "seed", "num_threads"}
    own = {name: value for name, value in settings(workplace, output_dir).items() if name in kept}
    return train(build_config(leco_score_config(), own | {"measure": "off"} | changes))


def foreign_vae_fingerprint() -> VaeFingerprint:
    return VaeFingerprint.of(tiny_vae(seed=5))


def write_toml(path: Path, values: dict[str, Any]) -> Path:
    path.write_text("[all]\n" + "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items()), encoding="utf-8")
    return path


def metadata_of(path: Path) -> dict[str, str]:
    with safetensors.safe_open(path, framework="pt") as file:
        return file.metadata()
