"""The two commands of the README: what they install, what they skip, what they run, and what they say when it fails."""

import importlib.metadata
import os
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import setup_and_run

FILES = ("requirements.txt", "requirements-test.txt", "requirements-gpu.txt", "requirements-ui.txt")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root of its own, with a constraints file that pins nothing."""
    monkeypatch.setattr(setup_and_run, "ROOT", tmp_path)
    (tmp_path / "constraints.txt").write_text("")
    return tmp_path


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The programs that would have been run. Every one of them succeeds."""
    started: list[list[str]] = []
    monkeypatch.setattr(setup_and_run, "run", lambda command: started.append(list(map(str, command))) or 0)
    return started


def unmet(folder: Path, requirements: str, constraints: str = "") -> list[str]:
    (folder / "requirements.txt").write_text(requirements)
    (folder / "constraints.txt").write_text(constraints)
    return setup_and_run.unmet(["requirements.txt"])


@pytest.mark.parametrize("file", FILES)
def test_every_requirement_has_a_pin_that_it_allows(file: str) -> None:
    pins = {setup_and_run.canonical(pin.name): pin for pin in map(Requirement, setup_and_run.read_lines("constraints.txt"))}
    for requirement in map(Requirement, setup_and_run.read_lines(file)):
        [pin] = pins[setup_and_run.canonical(requirement.name)].specifier
        assert pin.operator == "=="
        assert requirement.specifier.contains(pin.version), f"{requirement} does not allow the tested {pin}"


def test_what_is_installed_at_its_pin_is_met(folder: Path) -> None:
    version = importlib.metadata.version("pytest")
    assert unmet(folder, "# a comment\npytest>=1 # another\n", f"pytest=={version}") == []


@pytest.mark.parametrize(
    ("requirements", "constraints"),
    [("pytest>=999", ""), ("pytest", "pytest==0.0.1"), ("PyTest", "pytest==0.0.1"), ("pytest", "PyTest==0.0.1")],
)
def test_another_version_is_not_met(folder: Path, requirements: str, constraints: str) -> None:
    [line] = unmet(folder, requirements, constraints)
    assert importlib.metadata.version("pytest") in line


def test_what_is_not_installed_is_not_met_unless_its_marker_rules_it_out(folder: Path) -> None:
    assert unmet(folder, "no-such-package-1\nno-such-package-2; python_version < '3'") == ["no-such-package-1"]


def test_a_build_of_the_pinned_version_is_met(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.13.0+cpu")
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: None)
    assert unmet(folder, "torch>=2.13", "torch==2.13.0") == []
    assert unmet(folder, "torch>=2.13", "torch==2.13.1") == ["torch (version 2.13.0+cpu is there)"]


def test_an_extra_stands_for_its_packages(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        importlib.metadata, "requires", lambda name: ["absent-1; extra == 'node'", "absent-2; extra == 'other'", "absent-3"]
    )
    assert unmet(folder, "pytest[node]") == ["absent-1"]
    assert unmet(folder, "pytest") == []


def test_nothing_is_installed_when_all_is_there(folder: Path, commands: list, monkeypatch: pytest.MonkeyPatch) -> None:
    source = (Path(__file__).resolve().parents[1] / "setup_and_run.py").read_text(encoding="utf-8")
    (folder / "setup_and_run.py").write_text(source, encoding="utf-8")  # the environment's Python imports it from the root
    (folder / "requirements.txt").write_text("pytest\n")
    setup_and_run.install_missing(Path(sys.executable), ["requirements.txt"])
    assert commands == []

    (folder / "requirements.txt").write_text("pytest\nno-such-package\n")
    setup_and_run.install_missing(Path(sys.executable), ["requirements.txt"])
    [command] = commands
    assert command[1:4] == ["-m", "pip", "install"]
    assert command[-4:] == ["-r", "requirements.txt", "-c", "constraints.txt"]

    monkeypatch.setattr(setup_and_run, "run", lambda command: 1)
    with pytest.raises(SystemExit, match="pip could not install"):
        setup_and_run.install_missing(Path(sys.executable), ["requirements.txt"])


def test_a_folder_that_is_no_environment_is_left_alone(tmp_path: Path, commands: list) -> None:
    (tmp_path / "holiday.jpg").touch()
    with pytest.raises(SystemExit, match="no virtual environment"):
        setup_and_run.make_environment(tmp_path)
    assert commands == []


def test_an_environment_is_made_once(tmp_path: Path, commands: list) -> None:
    python = setup_and_run.make_environment(tmp_path / "venv")
    assert commands == [[sys.executable, "-m", "venv", str(tmp_path / "venv")]]
    python.parent.mkdir(parents=True)
    python.touch()
    assert setup_and_run.make_environment(tmp_path / "venv") == python
    assert len(commands) == 1


@pytest.mark.parametrize(
    "words", [["demo", "--seed", "3", "--venv", "v", "--score", "size"], ["--venv", "v", "demo", "--seed", "3", "--score", "size"]]
)
def test_the_demonstration_gets_the_other_arguments(words: list[str], commands: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup_and_run, "make_environment", lambda folder: folder / "python")
    monkeypatch.setattr(setup_and_run, "install_missing", lambda python, files: None)
    assert setup_and_run.main(words) == 0
    assert commands == [[str(Path("v").absolute() / "python"), "-m", "examples.shapes.demo", "--seed", "3", "--score", "size"]]


def test_every_check_runs_and_the_first_failure_is_the_exit_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    codes = iter([0, 3, 0, 5])
    started = []
    monkeypatch.setattr(setup_and_run, "run", lambda command, environment: started.append(command) or next(codes))
    assert setup_and_run.run_tests(Path("python"), ["-k", "lora"]) == 3
    assert [command[2] for command in started] == ["ruff", "ruff", "pyright", "pytest"]
    own = f"-n {setup_and_run.num_workers()} --dist worksteal -k lora"  # a later -n of the user's own counts
    assert " ".join(started[-1][3:]) == own
    assert "ruff format, pytest" in capsys.readouterr().err


def test_no_failure_is_code_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup_and_run, "run", lambda command, environment: 0)
    monkeypatch.setattr(setup_and_run, "run_optional_tests", lambda python, environment: 0)
    assert setup_and_run.run_tests(Path("python"), []) == 0


def test_optional_tests_run_when_pytest_is_given_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(setup_and_run, "run", lambda command, environment: 0)
    monkeypatch.setattr(setup_and_run, "run_optional_tests", lambda python, environment: 1)
    assert setup_and_run.run_tests(Path("python"), []) == 1
    assert "optional tests" in capsys.readouterr().err
    assert setup_and_run.run_tests(Path("python"), ["-k", "lora"]) == 0


def test_optional_packages_are_installed_apart_and_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[list[str], dict[str, str] | None]] = []

    def run(command: list, environment: dict[str, str] | None = None) -> int:
        (folder / ".optional").mkdir(exist_ok=True)  # as pip does
        started.append((list(map(str, command)), environment))
        return 0

    monkeypatch.setattr(setup_and_run, "run", run)
    monkeypatch.setenv("PYTHONPATH", "mine")
    (folder / "requirements-optional.txt").write_text("timm==1\n")
    assert setup_and_run.run_optional_tests(Path("python"), {"OMP_NUM_THREADS": "1"}) == 0
    assert setup_and_run.run_optional_tests(Path("python"), {}) == 0
    assert [command[2] for command, _ in started] == ["pip", "pytest", "pytest"]
    install, tests = started[0][0], started[1]
    assert "--no-deps" in install and install[install.index("--target") + 1] == str(folder / ".optional")
    assert tests == (
        ["python", "-m", "pytest", "tests/optional"],
        {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(folder / ".optional"), "mine"])},
    )

    (folder / "requirements-optional.txt").write_text("timm==2\n")
    setup_and_run.run_optional_tests(Path("python"), {})
    assert [command[2] for command, _ in started[3:]] == ["pip", "pytest"]


def test_optional_packages_that_cannot_be_installed_are_a_failure(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "requirements-optional.txt").write_text("no-such-package\n")
    monkeypatch.setattr(setup_and_run, "run", lambda command: 4)
    assert setup_and_run.run_optional_tests(Path("python"), {}) == 4


@pytest.mark.parametrize("words", [[], ["--help"]])
def test_usage(words: list[str], commands: list, capsys: pytest.CaptureFixture) -> None:
    assert setup_and_run.main(words) == 0
    assert "setup_and_run.py demo" in capsys.readouterr().out
    assert commands == []


def test_an_unknown_command_is_refused(commands: list) -> None:
    with pytest.raises(SystemExit) as stop:
        setup_and_run.main(["tests"])
    assert stop.value.code == 2
    assert commands == []


def test_an_old_python_is_told_so(commands: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 9, 7, "final", 0))
    with pytest.raises(SystemExit, match=r"Python 3\.9\.7, but the packages need Python 3\.11"):
        setup_and_run.main(["demo"])
    assert commands == []
