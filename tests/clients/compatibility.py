"""Writes the table of docs/compatibility.md: what other programs' own loader code makes of our files.

    LECO_SCORE_COMFYUI=~/ComfyUI LECO_SCORE_A1111=~/stable-diffusion-webui python -m tests.clients.compatibility

The programs whose folders are named (`tests.clients.compare.VARIABLES`) are run; the rows of the others stay as they are.
"""

import os
import re
import subprocess
import tempfile
from pathlib import Path

from tests.clients.compare import VARIABLES, Found, run_client
from tests.clients.job import make_job

PAGE = Path(__file__).resolve().parents[2] / "docs" / "compatibility.md"
TITLES = {"comfyui": "ComfyUI", "a1111": "A1111", "forge": "Forge", "sd_scripts": "sd-scripts", "diffusers": "Diffusers"}
TITLES |= {"invokeai": "InvokeAI", "sdnext": "SD.Next"}


def row(client: str, folder: Path, found: list[Found]) -> str:
    """| program | version | files used whole | weights | largest error |"""
    weights, wanted = sum(result.used for result in found), sum(result.wanted for result in found)
    whole, error = sum(result.right for result in found), max(result.error / result.peak for result in found)
    return f"| {TITLES[client]} | {version(client, folder)} | {whole} of {len(found)} | {weights} of {wanted} | {error:.1g} |"


def version(client: str, folder: Path) -> str:
    done = subprocess.run(["git", "-C", str(folder), "log", "-1", "--format=%h, %cs"], capture_output=True, text=True)
    if done.returncode == 0 and client != "diffusers":
        return done.stdout.strip()
    import diffusers

    return diffusers.__version__ if client == "diffusers" else "unknown"


def main() -> None:
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        make_job(Path(folder))
        for client, variable in VARIABLES.items():
            if os.environ.get(variable):
                place = Path(os.environ[variable])
                rows[client] = row(client, place, run_client(client, place, Path(folder)))
                print(rows[client], flush=True)
    text = PAGE.read_text(encoding="utf-8")
    for client, line in rows.items():
        pattern = re.compile(rf"^\| {re.escape(TITLES[client])} \|.*$", re.MULTILINE)
        assert pattern.search(text), f"{PAGE.name} has no row for {TITLES[client]}"
        text = pattern.sub(lambda _, line=line: line, text, count=1)
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
