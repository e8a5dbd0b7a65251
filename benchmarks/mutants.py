"""Change one operator, number or condition at a time (a mutant), and count for how many a test fails: docs/reliability.md has the figures.

    python -m benchmarks.mutants --count 50 --output mutants.json
    python -m benchmarks.mutants --survivors mutants.json    # only those that no test found then

The changes are cosmic-ray's (`pip install cosmic-ray`), without bit operators. Left out is what changes words alone: annotations, errors,
f-strings and lines of the log. Every mutant stands in a copy of the tree. The tests that reach its line, quickest first, run in a fork of
this process, which has torch and diffusers imported and nothing of the project; those that are marked slow are left out. They have five
times the CPU time that they take unchanged, and 10 seconds; a mutant that takes longer is killed, too. POSIX only.
"""

import ast
import contextlib
import importlib
import itertools
import json
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from scipy.stats import binomtest

from benchmarks import ROOT, argument_parser

AREAS = {  # patterns of files, and the tests of them
    "solvers": ("library/diffusion/solvers.py", "solvers"),
    "noise schedule": (
        "library/diffusion/flow.py library/diffusion/noise_schedule.py",
        "noise_schedule properties solvers few_step flow_families",
    ),
    "rollouts": ("library/rollouts/*.py", "rollout sampling noised_pictures few_step prompt_encoding prompt_aware"),
    "objectives": (
        "library/objectives/**/*.py",
        "rewards reward_* goals estimators score_term score_objective leco_term image_terms anchors",
    ),
    "networks": ("networks/*.py", "lora lora_* network_setup checkpoint_forms"),
    "checkpoints": ("library/training/checkpoints.py", "checkpoints"),
    "run state and files": (
        "library/training/run_files.py library/training/run_state.py",
        "checkpoints slider_files hub_files train_leco_score_resume train_latent_scorer",
    ),
    "calibration": (
        "library/measuring/calibration.py library/measuring/response_curve.py library/measuring/strength.py",
        "calibration",
    ),
}
WARM = "torch safetensors.torch PIL.Image accelerate diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion"


@dataclass(frozen=True)
class Mutant:
    """The `occurrence`-th place, in the order of the syntax tree, where a cosmic-ray operator can change a file."""

    file: str
    line: int
    operator: str
    occurrence: int
    before: str
    after: str = ""


def files_of(area: str) -> list[str]:
    """Relative to the tree, in order."""
    return sorted(str(path.relative_to(ROOT)) for pattern in AREAS[area][0].split() for path in ROOT.glob(pattern))


def words(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """From where to where (line, column) there are annotations, raised errors, f-strings and lines of the log."""
    parts: list[Any] = []
    for node in ast.walk(ast.parse(source)):
        parts += [getattr(node, "annotation", None), getattr(node, "returns", None)]
        is_log = isinstance(node, ast.Call) and ast.unparse(node.func).startswith(("logger.", "print"))
        parts += [node] if is_log or isinstance(node, ast.Raise | ast.JoinedStr) else []
    return [((part.lineno, part.col_offset), (part.end_lineno, part.end_col_offset)) for part in parts if part]


class Operators:
    """cosmic-ray's, by name, as far as they take no arguments and do not make bit operators."""

    def __init__(self) -> None:
        try:
            self.trees = importlib.import_module("cosmic_ray.ast")
            provider = importlib.import_module("cosmic_ray.operators.provider").OperatorProvider()
        except ImportError as error:
            raise SystemExit(f"cosmic-ray is missing ({error}): pip install cosmic-ray") from error
        names = [name for name in provider if not ("Bit" in name or "Shift" in name or provider[name].arguments())]
        self.by_name = {name: provider[name]() for name in names}

    def mutants(self, file: str) -> Iterator[Mutant]:
        source = (ROOT / file).read_text(encoding="utf-8")
        lines, left_out, nodes = source.splitlines(), words(source), list(self.trees.ast_nodes(self.trees.get_ast(source)))
        for name, operator in self.by_name.items():
            places = [start for node in nodes for start, _ in operator.mutation_positions(node)]
            for occurrence, start in enumerate(places):
                if not any(first <= start < last for first, last in left_out):
                    yield Mutant(file, start[0], name, occurrence, lines[start[0] - 1].strip())

    def apply(self, mutant: Mutant) -> str | None:
        """The changed source; None if it is none, or has the same syntax tree."""
        source, operator, left = (ROOT / mutant.file).read_text(encoding="utf-8"), self.by_name[mutant.operator], [mutant.occurrence]

        class Change(self.trees.Visitor):
            def visit(self, node: Any) -> Any:
                positions = len(list(operator.mutation_positions(node)))
                index, left[0] = left[0], left[0] - positions
                is_star = getattr(node.parent, "type", "") == "parameters"  # of a signature
                return operator.mutate(node, index) if 0 <= index < positions and not is_star else node

        changed = Change().walk(self.trees.get_ast(source)).get_code()
        with contextlib.suppress(SyntaxError):
            return changed if ast.dump(ast.parse(changed)) != ast.dump(ast.parse(source)) else None

    def draw(self, area: str, count: int, seed: int) -> tuple[int, list[Mutant]]:
        """-> (how many there could be, some of them)."""
        every = [mutant for file in files_of(area) for mutant in self.mutants(file)]
        random.Random(f"{seed} {area}").shuffle(every)
        return len(every), list(itertools.islice((mutant for mutant in every if self.apply(mutant)), count))


class Lines:
    """A pytest plugin: how long each test takes, and which lines of some files it reaches; a fixture's count for all its file."""

    def __init__(self, files: set[str]) -> None:
        self.files, self.seconds = files, dict[str, float]()
        self.reached: dict[str, set[tuple[str, int]]] = defaultdict(set)

    @contextlib.contextmanager
    def record(self, reached: set[tuple[str, int]]) -> Iterator[None]:
        def trace(frame: FrameType, event: str, _: object) -> Any:
            if frame.f_code.co_filename not in self.files:
                return None
            reached.add((frame.f_code.co_filename, frame.f_lineno))
            return trace

        sys.settrace(trace)
        try:
            yield
        finally:
            sys.settrace(None)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Iterator[None]:
        with self.record(self.reached[item.nodeid.partition("::")[0]]):
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        start = time.process_time()
        with self.record(self.reached[item.nodeid]):
            result = yield
        self.seconds[item.nodeid] = time.process_time() - start
        return result

    def tests_of(self, file: str, lines: range) -> list[str]:
        """Those that reach one of these lines; of lines that run at import, those that reach the file. The quickest first."""

        def reach(test: str) -> set[int]:
            return {line for name, line in self.reached[test] | self.reached[test.partition("::")[0]] if name == file}

        found = [test for test in self.seconds if reach(test) & set(lines)] or [test for test in self.seconds if reach(test)]
        return sorted(found, key=self.seconds.__getitem__)


def statement(source: str, line: int) -> range:
    """The lines of the statement at a line, without its body."""
    spans = [range(line, line + 1)]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.stmt) and node.lineno <= line <= (node.end_lineno or 0):
            body = getattr(node, "body", None)
            spans.append(range(node.lineno, body[0].lineno if body else (node.end_lineno or 0) + 1))
    return next(span for span in reversed(spans) if line in span)


class Copy:
    """A copy of the tree. Bytecode is written of the unchanged source alone, and a mutant's file has a date that fits none."""

    def __init__(self, folder: Path) -> None:
        self.tree = folder / "tree"
        shutil.copytree(ROOT, self.tree, ignore=shutil.ignore_patterns(".git", ".venv", "output", "wandb"))

    def run(self, tests: list[str], limit: int, lines: Lines | None = None) -> int:
        """In a fork, with at most so many seconds of CPU -> pytest's exit code, or minus the signal. `lines` is filled."""
        sys.dont_write_bytecode = lines is None
        pid = os.fork()
        if not pid:
            try:
                os.setpgid(0, 0)
                output = os.open(self.tree / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(output, 1)
                os.dup2(output, 2)
                os.chdir(self.tree)
                sys.path[0] = str(self.tree)
                for name in [name for name in sys.modules if name.startswith("benchmarks")]:
                    del sys.modules[name]
                resource.setrlimit(resource.RLIMIT_AS, (2**34, 2**34))
                resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
                options = ["-xq", "-m", "not slow", "-p", "no:cacheprovider", "--basetemp", str(self.tree / "made")]
                code = pytest.main([*options, *tests], plugins=[lines] if lines else [])
                if lines:
                    (self.tree / "lines.pickle").write_bytes(pickle.dumps((lines.seconds, dict(lines.reached))))
                os._exit(code)
            finally:
                os._exit(99)
        end = time.monotonic() + 20 * limit
        while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
            if time.monotonic() > end:  # it waits for something
                os.killpg(pid, signal.SIGKILL)
            time.sleep(0.05)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # what it started and left
        return os.waitstatus_to_exitcode(ended[1])

    def lines_of(self, area: str) -> Lines:
        """What the area's tests reach in its files. Raises SystemExit where one fails as it is."""
        lines = Lines({str(self.tree / file) for file in files_of(area)})
        tests = [f"tests/{path.name}" for word in AREAS[area][1].split() for path in sorted(ROOT.glob(f"tests/test_{word}.py"))]
        if self.run(tests, 3600, lines):
            raise SystemExit(f"a test fails without any change:\n{(self.tree / 'output.txt').read_text()[-2000:]}")
        lines.seconds, reached = pickle.loads((self.tree / "lines.pickle").read_bytes())
        lines.reached.update(reached)
        return lines

    def kills(self, mutant: Mutant, changed: str, lines: Lines) -> bool:
        """Whether a test fails, or does not end, with this source."""
        path = self.tree / mutant.file
        tests = lines.tests_of(str(path), statement((ROOT / mutant.file).read_text(encoding="utf-8"), mutant.line))
        path.write_text(changed, encoding="utf-8")
        os.utime(path, (1, 1))
        try:
            return bool(tests) and self.run(tests, 10 + int(5 * sum(lines.seconds[test] for test in tests))) != 0
        finally:
            shutil.copy2(ROOT / mutant.file, path)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--areas", nargs="+", choices=AREAS, default=list(AREAS), help="Which parts of the project are changed.")
    parser.add_argument("--count", type=int, default=50, help="How many mutants of each area are drawn.")
    parser.add_argument("--seed", type=int, default=0, help="Of the draw.")
    parser.add_argument("--survivors", type=Path, metavar="FILE", help="Draw none: try those again that survived in these results.")
    parser.add_argument("--output", type=Path, metavar="FILE", help="Write the results there, as JSON, after each area.")
    given = parser.parse_args()
    operators, results = Operators(), {}
    os.environ |= {"HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}  # for what is imported here, and for what tests start
    for name in WARM.split():
        importlib.import_module(name)
    with tempfile.TemporaryDirectory() as folder:
        copy = Copy(Path(folder))
        for area in given.areas:
            possible, mutants = operators.draw(area, 0 if given.survivors else given.count, given.seed)
            if given.survivors:
                earlier = json.loads(given.survivors.read_text(encoding="utf-8"))
                mutants = [Mutant(**survivor) for survivor in earlier.get(area, {}).get("survivors", [])]
            lines, survivors = copy.lines_of(area) if mutants else Lines(set()), []
            for mutant in mutants:
                changed, rows = operators.apply(mutant), (ROOT / mutant.file).read_text(encoding="utf-8").splitlines()
                if not changed or rows[mutant.line - 1].strip() != mutant.before:
                    raise SystemExit(f"{mutant.file} is no longer what it was when these survivors were found: draw new ones")
                if not copy.kills(mutant, changed, lines):
                    survivors.append(replace(mutant, after=changed.splitlines()[mutant.line - 1].strip()))
                    print(f"{mutant.file}:{mutant.line} {mutant.operator}\n  - {mutant.before}\n  + {survivors[-1].after}", flush=True)
            drawn, killed = len(mutants), len(mutants) - len(survivors)
            low, high = binomtest(killed, drawn).proportion_ci() if drawn else (0.0, 1.0)  # Clopper and Pearson's
            print(f"{area}: {killed} of {drawn} killed, {low:.0%} to {high:.0%} (95 %), of {possible}", flush=True)
            results[area] = {"possible": possible, "drawn": drawn, "killed": killed, "survivors": [asdict(mutant) for mutant in survivors]}
            if given.output:
                given.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
