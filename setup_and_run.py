"""Set up LECO score in a virtual environment, then open its page, run its demonstration or its tests there.

    python setup_and_run.py rate [--project_dir DIR] [--prompts_file FILE] [--pretrained_model_name_or_path FILE] [...]
    python setup_and_run.py demo [--output_dir DIR] [--score NAME] [--seed N] [...]
    python setup_and_run.py test [arguments of pytest]

The environment is the folder .venv beside this file; `--venv PATH` takes another. It is made if it is not there, and
packages are installed only if one of them is missing or is not the version that constraints.txt names. So a build of
torch that you installed into it yourself stays, if it has that version. All that follows the command goes to the page
(tools/rate.py), the demonstration or pytest, which run in this file's folder. `test` without arguments also runs the tests
of what needs optional packages, which it puts into the folder .optional, where nothing else sees them.
"""

from __future__ import annotations  # so that an old Python gets as far as the message that it is too old

import argparse
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
OLDEST_PYTHON = (3, 11)
CONSTRAINTS = "constraints.txt"
OPTIONAL, OPTIONAL_FOLDER = "requirements-optional.txt", ".optional"
UI = "requirements-ui.txt"
REQUIREMENTS = {"rate": ["requirements.txt", UI], "demo": ["requirements.txt"], "test": ["requirements.txt", "requirements-test.txt", UI]}


def main(argv: list[str]) -> int:
    """Run a command and return its exit code. Raises SystemExit with one sentence when the set-up fails."""
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    parser = argparse.ArgumentParser(usage="python setup_and_run.py {rate,demo,test} [--venv PATH] ...", add_help=False, allow_abbrev=False)
    parser.add_argument("command", choices=sorted(REQUIREMENTS))
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    given, rest = parser.parse_known_args(argv)
    if sys.version_info < OLDEST_PYTHON:
        needed, found = ".".join(map(str, OLDEST_PYTHON)), ".".join(map(str, sys.version_info[:3]))
        raise SystemExit(f"This is Python {found}, but the packages need Python {needed} or newer; install one and call it by its name.")
    python = make_environment(given.venv.absolute())
    install_missing(python, REQUIREMENTS[given.command])
    return {"rate": run_page, "demo": run_demo, "test": run_tests}[given.command](python, rest)


def make_environment(folder: Path) -> Path:
    """The Python of the virtual environment in `folder`, which is made if it has none."""
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if python.exists():
        return python
    if folder.exists() and not (folder / "pyvenv.cfg").exists():
        raise SystemExit(f"{folder} exists and is no virtual environment; give another folder with --venv.")
    say(f"Making a virtual environment in {folder}.")
    if run([sys.executable, "-m", "venv", folder]):
        raise SystemExit("The virtual environment could not be made, see above; on Debian and Ubuntu, install the package python3-venv.")
    return python


def install_missing(python: Path, files: list[str]) -> None:
    """Install what the requirement files name, unless all of it is there at the versions of the tested set."""
    # In the environment's own Python: only that one knows what is installed there.
    ask = f"import setup_and_run; print('\\n'.join(setup_and_run.unmet({files!r})))"
    answer = subprocess.run([python, "-c", ask], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if answer.returncode:
        raise SystemExit(f"The virtual environment of {python} does not work, see above; delete it and start again.")
    missing = answer.stdout.split("\n") if answer.stdout.strip() else []
    if not missing:
        say("All packages are installed.")
        return
    say("To install: " + ", ".join(line.strip() for line in missing) + ". The first time, this takes some minutes.")
    chosen = [word for file in files for word in ("-r", file)]
    if run([python, "-m", "pip", "install", "--disable-pip-version-check", *chosen, "-c", CONSTRAINTS]):
        raise SystemExit("pip could not install the packages, see its message above; when that is mended, the same command goes on.")


def unmet(files: list[str]) -> list[str]:
    """The requirements in `files` that the running Python's packages do not fulfil at the pinned versions, in words."""
    try:
        from packaging.requirements import Requirement  # comes with the packages, so without it there is nothing to compare
    except ImportError:
        return ["everything in " + " and ".join(files)]
    pins = {canonical(pin.name): pin.specifier for pin in map(Requirement, read_lines(CONSTRAINTS))}
    pending = [Requirement(line) for file in files for line in read_lines(file)]
    result = []
    while pending:
        requirement = pending.pop(0)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        wanted = requirement.specifier & pins.get(canonical(requirement.name), requirement.specifier)
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            result.append(requirement.name)
            continue
        if not wanted.contains(version, prereleases=True):  # 2.13.0+cpu and 2.13.0+cu130 are 2.13.0
            result.append(f"{requirement.name} (version {version} is there)")
        for own in map(Requirement, importlib.metadata.requires(requirement.name) or []):
            if own.marker is not None and any(own.marker.evaluate({"extra": extra}) for extra in requirement.extras):
                own.marker = None
                pending.append(own)
    return result


def canonical(name: str) -> str:
    """A package's name as comparisons want it: huggingface_hub and Huggingface-Hub are one."""
    return name.lower().replace("_", "-").replace(".", "-")


def read_lines(file: str) -> list[str]:
    """The lines of a requirements file, without comments."""
    lines = (line.partition("#")[0].strip() for line in (ROOT / file).read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line]


def run_page(python: Path, arguments: list[str]) -> int:
    """The page on which a person rates pictures; without arguments, those of the embedded model."""
    say("Opening the page.")
    return run([python, "tools/rate.py", *arguments])


def run_demo(python: Path, arguments: list[str]) -> int:
    """The main job on the embedded model: rated pictures, a scorer, a slider, and what it does on prompts it has not seen."""
    say("Running the demonstration on the embedded model.")
    return run([python, "-m", "examples.shapes.demo", *arguments])


def run_tests(python: Path, arguments: list[str]) -> int:
    """All checks, one after the other; the exit code of the first that failed, or 0."""
    checks = {
        "ruff check": [python, "-m", "ruff", "check", "."],
        "ruff format": [python, "-m", "ruff", "format", "--check", "."],
        "pyright": [python, "-m", "pyright", "--pythonpath", python],
        "pytest": [python, "-m", "pytest", "-n", str(num_workers()), "--dist", "worksteal", *arguments],
    }
    # The models in the tests are so small that more threads make them slower.
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    codes = {}
    for name, command in checks.items():
        say(f"Running {name}.")
        codes[name] = run(command, environment)
    if not arguments:
        codes["optional tests"] = run_optional_tests(python, environment)
    failed = [name for name, code in codes.items() if code]
    if failed:
        print("Failed: " + ", ".join(failed), file=sys.stderr)
    return codes[failed[0]] if failed else 0


def num_workers() -> int:
    """Processes for the tests: one for each core that this process may use, 8 at most, since each takes about 1 GB."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 8)


def run_optional_tests(python: Path, environment: dict[str, str]) -> int:
    """The tests of what needs optional packages, in a process that sees these packages; the exit code of pip or of pytest."""
    folder = ROOT / OPTIONAL_FOLDER
    wanted, installed = ROOT / OPTIONAL, folder / "installed.txt"
    if not installed.exists() or installed.read_bytes() != wanted.read_bytes():
        say(f"Installing what {OPTIONAL} names into {folder}.")
        code = run(
            [python, "-m", "pip", "install", "--disable-pip-version-check", "--no-deps", "--upgrade", "--target", folder, "-r", OPTIONAL]
        )
        if code:
            return code
        installed.write_bytes(wanted.read_bytes())
    say("Running the tests of what needs optional packages.")
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    return run([python, "-m", "pytest", "tests/optional"], {**environment, "PYTHONPATH": path})


def run(command: list[str | Path], environment: dict[str, str] | None = None) -> int:
    """Run a program in this file's folder, its output to where ours goes; returns its exit code."""
    quiet = {"OMP_WAIT_POLICY": "passive"}  # torch's threads that wait must not take others' cores
    return subprocess.run(command, cwd=ROOT, env={**quiet, **(environment or os.environ)}).returncode


def say(sentence: str) -> None:
    print(f"== {sentence}", flush=True)  # before what the next program prints


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
