"""What documents and docstrings name (links, files, modules, settings), and what of it does not exist."""

import ast
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from library.prompts.entries import LINE_OPTIONS, UNUSED_OPTIONS

ROOT = Path(__file__).resolve().parents[2]
LOG = ROOT / "docs" / "experiments.md"  # history: it may name what is gone
OF_SD_SCRIPTS = ROOT / "docs" / "sd_scripts_options.md"  # generated: names of another program
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").rglob("*.md")])
PACKAGES = ("library", "networks", "tools", "examples", "benchmarks")
SOURCES = sorted([path for package in PACKAGES for path in (ROOT / package).rglob("*.py")] + list(ROOT.glob("*.py")))

# Options of other programs (pip, ruff, pytest, torch, accelerate), and those that a line of a prompt file takes.
OTHER_OPTIONS = {"help", "fix", "check", "junitxml", "standalone", "nproc_per_node", "num_processes", "cpu", "rate", "memory"}
PROMPT_OPTIONS = {*LINE_OPTIONS, *UNUSED_OPTIONS}
# Words that look like names of ours and are not: of other programs and their files, of columns, or made up as an example.
OTHER_WORDS = {
    *("strength_model", "load_lora_weights", "generic_ls_train", "generic_ss_train", "ss_leco_", "pickscore.PickScorer", "module.Class"),
    *("score_9", "score_8_up", "source_anime", "rating_safe"),
    *("votes_1", "votes_10", "layers.N.weight", "scoring_head.N.weight", "__colour__"),
    *(f"{column}_column" for column in ("label", "tags", "prompt", "weight", "split", "image")),
}
OTHER_FILES = {"library/strategy_sd.py"}  # of sd-scripts

FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
BACKTICKS = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
LINK = re.compile(r"\[[^\]\n]*\]\(([^)\s]+)\)")
FILE = re.compile(rf"(?<![\w/.-])(?:{'|'.join((*PACKAGES, 'docs', 'tests'))})/[\w./-]*\w\.(?:py|md|toml|json|png|safetensors)\b")
MODULE = re.compile(rf"(?<![\w./\"-])(?:{'|'.join((*PACKAGES, 'tests'))})(?:\.\w+)+(?![\w/]|\.\w)")
OPTION = re.compile(r"(?<![\w-])--(?:no-)?([a-z]\w*)")
TOML_KEY = re.compile(r"^ *([a-z]\w*) *=", re.MULTILINE)
SETTING = re.compile(r"([a-z][a-z0-9]*(?:_[a-z0-9]+)+)(?: *= *.+)?")
IDENTIFIER = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*(?:\(\))?")


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def nodes_of(path: Path) -> list[ast.AST]:
    """All of the tree: walking it takes longer than reading the file."""
    return list(ast.walk(tree_of(path)))


def docstrings(path: Path) -> Iterator[str]:
    """Of the module, its classes and its functions."""
    for node in nodes_of(path):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text


@cache
def options() -> frozenset[str]:
    """Every setting: a field that is given by `option(...)`, and every argument of an `argparse` parser."""
    found: set[str] = set()
    for path in SOURCES:
        for node in nodes_of(path):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(node.value, ast.Call):
                if isinstance(node.value.func, ast.Name) and node.value.func.id.endswith("option"):
                    found.add(node.target.id)
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument":
                found |= {str(word.value).removeprefix("--") for word in node.args if isinstance(word, ast.Constant)}
    return frozenset(found)


@cache
def code_words() -> frozenset[str]:
    """Every name in the code, and every string of it that is one word; docstrings and help texts are no code. And the names of tests."""
    tests = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")]
    found: set[str] = {name for text in tests for name in re.findall(r"def (test_\w+)", text)}
    for path in SOURCES:
        found |= {path.stem, path.parent.name}
        for node in nodes_of(path):
            match node:
                case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name) | ast.alias(name=name):
                    found |= set(name.split("."))
                case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.keyword(arg=str(name)):
                    found.add(name)
                case ast.Constant(value=str(text)) if re.fullmatch(r"[\w.:/-]+", text):
                    found |= set(re.split(r"[.:/-]", text))
    return frozenset(found)


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    text = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", lambda match: match[1] or "", heading.strip().lower())
    return re.sub(r"[^\w -]", "", text).replace(" ", "-")


def anchors(text: str) -> set[str]:
    return {slug(line.lstrip("#")) for line in FENCE.sub("", text).splitlines() if line.startswith("#")}


def broken_links(text: str, folder: Path) -> list[str]:
    """Links to a file or a heading that is not there; `folder` is that of the page."""
    found = []
    for target in LINK.findall(FENCE.sub("", text)):
        if re.match(r"https?://|mailto:", target):
            continue
        file, _, anchor = target.partition("#")
        path = folder / file
        if not path.exists() or (anchor and anchor not in anchors(path.read_text(encoding="utf-8") if file else text)):
            found.append(target)
    return found


def missing_files(text: str) -> list[str]:
    return [name for name in FILE.findall(text) if name not in OTHER_FILES and not (ROOT / name).exists()]


def missing_modules(text: str) -> list[str]:
    """Dotted names that begin with one of our packages and can neither be imported nor be found in what can."""
    return [name for name in MODULE.findall(FILE.sub("", text)) if not _exists(name)]


def missing_options(text: str) -> list[str]:
    return [name for name in OPTION.findall(text) if name not in options() | OTHER_OPTIONS | PROMPT_OPTIONS]


def missing_settings(text: str) -> list[str]:
    """Words like `this_one` or `this_one = 3` in backticks, and keys of TOML, that are neither a setting nor any other name in the code."""
    words = [match[1] for word in BACKTICKS.findall(FENCE.sub("", text)) if (match := SETTING.fullmatch(word))]
    words += [key for block in FENCE.findall(text) if block.startswith("```toml") for key in TOML_KEY.findall(block)]
    return [word for word in words if word not in options() | code_words() | OTHER_WORDS]


def missing_names(text: str) -> list[str]:
    """Of a docstring: names in backticks that no code has."""
    names = [word.removesuffix("()") for word in BACKTICKS.findall(text) if IDENTIFIER.fullmatch(word)]
    ours = [name for name in names if not MODULE.match(name) and name not in OTHER_WORDS]
    return [name for name in ours if not all(part in code_words() for part in name.split("."))]


def problems(checks: Iterable[tuple[str, list[str]]]) -> list[str]:
    """One line each, for the message of a test."""
    return [f"{what}: {name}" for what, names in checks for name in names]


@cache
def _exists(name: str) -> bool:
    """Whether a dotted name is a module, or what a module holds. Read from the files: nothing is imported."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        folder = ROOT.joinpath(*parts[:end])
        file = next((path for path in (folder.with_suffix(".py"), folder / "__init__.py") if path.is_file()), None)
        if file is not None:
            return _holds(tree_of(file).body, parts[end:])
    return ROOT.joinpath(*parts).is_dir()


def _holds(body: Iterable[ast.stmt], names: list[str]) -> bool:
    if not names:
        return True
    for node in body:
        match node:
            case ast.ClassDef(name=own) if own == names[0]:
                return _holds(node.body, names[1:]) or (len(names) == 2 and _sets_itself(node, names[1]))
            case ast.FunctionDef(name=own) | ast.AnnAssign(target=ast.Name(id=own)) if own == names[0]:
                return len(names) == 1
            case ast.Assign(targets=[ast.Name(id=own)]) if own == names[0]:
                return len(names) == 1
            case ast.Import(names=aliases) | ast.ImportFrom(names=aliases) if names[0] in {alias.asname or alias.name for alias in aliases}:
                return len(names) == 1
    return False


def _sets_itself(node: ast.ClassDef, name: str) -> bool:
    """Whether a method assigns to self.NAME."""
    return any(isinstance(part, ast.Attribute) and part.attr == name and isinstance(part.ctx, ast.Store) for part in ast.walk(node))
