"""What other programs made of our files, beside what they should make of them."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file

VARIABLES = {
    "comfyui": "LECO_SCORE_COMFYUI",
    "a1111": "LECO_SCORE_A1111",
    "forge": "LECO_SCORE_FORGE",
    "sd_scripts": "LECO_SCORE_SD_SCRIPTS",
    "diffusers": "LECO_SCORE_DIFFUSERS",
    "invokeai": "LECO_SCORE_INVOKEAI",
    "sdnext": "LECO_SCORE_SDNEXT",
}
"""The environment variable that names a program's folder. `LECO_SCORE_CLIENTS_PYTHON` is a Python that has what they import."""
TOLERANCE = 1e-6  # of the largest change of a weight: float32 products in another order


@dataclass(frozen=True)
class Found:
    """A file: how many weights it should change and does, the largest error, and the largest change."""

    name: str
    wanted: int
    used: int
    strange: int
    error: float
    peak: float

    @property
    def right(self) -> bool:
        return self.used == self.wanted and not self.strange and self.error <= TOLERANCE * self.peak


def run_client(client: str, folder: Path, job: Path) -> list[Found]:
    """Load every file of a job with a program's own code, in a process of its own. Raises RuntimeError with its last words if it fails."""
    python = os.environ.get("LECO_SCORE_CLIENTS_PYTHON", sys.executable)
    script = Path(__file__).with_name("adapters.py")
    done = subprocess.run([python, str(script), client, str(folder), str(job)], capture_output=True, text=True, cwd=job)
    if done.returncode != 0:
        raise RuntimeError(f"{client} in {folder} ended with {done.returncode}: {done.stderr[-2000:]}")
    return compare(client, job)


def compare(client: str, job: Path) -> list[Found]:
    """Of a client's output in the job's folder."""
    found = []
    for file in sorted((job / client).glob("*/*.safetensors")):
        family = file.parent.name
        expected = load_file(job / "families" / family / "expected" / file.name)
        expected = {name: tensor for name, tensor in expected.items() if _is_style_of(client, family, name)}
        changes = load_file(file)
        both = expected.keys() & changes.keys()
        error = max(((changes[name].float() - expected[name]).abs().max().item() for name in both), default=0.0)
        peak = max(tensor.abs().max().item() for tensor in expected.values())
        found.append(Found(f"{family}/{file.stem}", len(expected), len(both), len(changes) - len(both), error, peak))
    return found


def _is_style_of(client: str, family: str, name: str) -> bool:
    """Whether a program calls this weight so: by a checkpoint's names or by Diffusers'."""
    style, _, path = name.partition(":")
    if path.startswith(("model.diffusion_model.", "unet.")):
        original = client in ("comfyui", "forge", "a1111") or (client == "sd_scripts" and family == "sdxl")
    else:
        original = client == "a1111"
    return style == ("original" if original else "diffusers")
