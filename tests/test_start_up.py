"""What a script does before it knows its settings: nothing that takes seconds, and nothing against a user's environment."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [ROOT / "train_leco_score.py", ROOT / "train_latent_scorer.py"]
SCRIPTS += [file for file in sorted((ROOT / "tools").glob("*.py")) if "run_main" in file.read_text(encoding="utf-8")]
SCRIPTS.remove(ROOT / "tools" / "rate.py")  # whose own process has no torch; those that it starts are among the others
SLOW_TO_IMPORT = ("accelerate", "diffusers", "matplotlib", "pandas", "scipy.interpolate", "scipy.stats", "torch._dynamo", "transformers")
READ_ALL_SETTINGS = f"""
import sys
from tools.settings_reference import reference
reference()
print(*[module for module in {SLOW_TO_IMPORT} if module in sys.modules])
"""
STOP_AT_TORCH = """
import gc, os, runpy, sys
from importlib.machinery import PathFinder
class Stop:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"), PathFinder.find_spec("library") is not None, gc.isenabled())
            sys.exit()
sys.meta_path.insert(0, Stop())
sys.path[0] = os.path.dirname(sys.argv[1])
runpy.run_path(sys.argv[1], run_name="__main__")
"""


def python(code: str, *words: str | Path, folder: Path = ROOT, **environment: str) -> str:
    """What a program prints, without the last line's end."""
    clean = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=folder, env=clean | environment, capture_output=True, text=True, check=True
    )
    return done.stdout.removesuffix("\n")


def test_the_settings_of_all_scripts_are_read_without_what_takes_seconds_to_import() -> None:
    assert python(READ_ALL_SETTINGS) == ""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_threads_that_wait_are_quiet_and_no_garbage_is_looked_for_from_the_start_and_from_any_folder(script: Path, tmp_path: Path) -> None:
    assert python(STOP_AT_TORCH, script, folder=tmp_path) == "passive True False"


def test_a_users_own_choice_about_threads_is_kept() -> None:
    assert python(STOP_AT_TORCH, SCRIPTS[0], OMP_WAIT_POLICY="active") == "active True False"


@pytest.mark.parametrize("script", SCRIPTS[:2], ids=lambda script: script.stem)
def test_what_another_program_imports_leaves_its_garbage_collector_alone(script: Path) -> None:
    assert python("import gc, importlib, sys; importlib.import_module(sys.argv[1]); print(gc.isenabled())", script.stem) == "True"


def test_a_script_looks_for_garbage_again_when_it_begins() -> None:
    code = """
from library.settings.start_up import before_torch
before_torch()
import gc
from library.settings.cli import run_main
run_main(lambda: print(gc.isenabled()))
"""
    assert python(code) == "True"


def test_the_rating_pages_own_process_has_no_torch() -> None:
    assert python("import sys; import tools.rate, library.rating.server; print('torch' in sys.modules)") == "False"
