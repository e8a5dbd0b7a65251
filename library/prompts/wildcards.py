r"""Prompts with choices: `{a|b}`, `{2$$a|b|c}` and `__name__`, the lists of a folder, as the dynamic-prompts extension of A1111 has them.

`{a|b|c}` is one of them, `{2$$a|b|c}` two of them joined by ", ", `{1-2$$ and $$a|b|c}` one or two joined by " and ". `__colour__` is a
line of colour.txt, `__clothes/hat__` one of clothes/hat.txt, `__clothes/*__` one of any list there. Choices nest, in lists too. `\{`,
`\}` and `\|` are only characters.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import torch

from library.errors import UserError
from library.prompts.contents import read_lines
from library.settings.option_values import nearest

MAX_COMBINATIONS = 10_000  # of one {2$$...}: more are not to be listed
MAX_DEPTH = 50
_MARK = re.compile(
    r"\\(?P<escaped>[{}|])|(?P<open>\{)(?:(?P<least>\d+)(?:-(?P<most>\d+))?\$\$(?:(?P<joiner>[^{}|$]*)\$\$)?)?"
    r"|(?P<next>\|)|(?P<close>\})|__(?P<name>[\w*][\w* ./-]*?)__"
)


@dataclass(frozen=True)
class Text:
    """Text without a choice. Like the other patterns, it has `count` variants, which `variant` gives by number."""

    text: str
    count: int = 1

    def variant(self, number: int) -> str:
        return self.text


class Joined:
    """Patterns one after the other, each with its own choice."""

    def __init__(self, parts: Sequence["Pattern"], joiner: str = "") -> None:
        self.parts, self.joiner = parts, joiner
        self.count = math.prod(part.count for part in parts)

    def variant(self, number: int) -> str:
        return self.joiner.join(_variants(self.parts, number))


class Alternatives:
    """One of several patterns; every variant of every one counts the same."""

    def __init__(self, options: Sequence["Pattern"]) -> None:
        self.options = options
        self.count = sum(option.count for option in options)

    def variant(self, number: int) -> str:
        for option in self.options:
            if number < option.count:
                return option.variant(number)
            number -= option.count
        raise IndexError(number)


Pattern = Text | Joined | Alternatives


class Wildcards:
    """Reads texts with choices. Lists are read once.

    Args:
        folder: of the lists; None allows no `__name__`.
    """

    def __init__(self, folder: Path | None) -> None:
        if folder is not None and not folder.is_dir():
            raise UserError(f"wildcards_dir is {folder}, which is not a folder; give the folder that holds the lists (.txt)")
        self.folder = folder
        self._lists: dict[str, Alternatives] = {}

    def expand(self, texts: Sequence[str], limit: int, generator: torch.Generator, where: str) -> list[tuple[str, ...]]:
        """The variants of some texts together: all in their order when there are at most `limit`, else so many different ones at random.

        Args:
            where: file and line, for the message.

        Returns:
            As many texts as were given, for each variant.

        Raises:
            UserError: braces that do not match, no such list, a list that cannot be read or names itself.
        """
        patterns = [self._parse(text, where, ()) for text in texts]
        count = math.prod(pattern.count for pattern in patterns)
        numbers: dict[int, None] = {} if count > limit else dict.fromkeys(range(count))
        while len(numbers) < min(count, limit):
            numbers[_random_below(count, generator)] = None
        return [tuple(_variants(patterns, number)) for number in numbers]

    def _parse(self, text: str, where: str, inside: tuple[str, ...]) -> Pattern:
        """`inside`: the lists that the text stands in."""
        opened: list[tuple[re.Match[str], list[list[Pattern]]]] = []  # each brace and the options so far
        parts: list[Pattern] = []
        end = 0
        for mark in _MARK.finditer(text):
            if mark["next"] and not opened:  # only a character: it is read with what follows
                continue
            parts.append(Text(text[end : mark.start()]))
            end = mark.end()
            if mark["escaped"]:
                parts.append(Text(mark["escaped"]))
            elif mark["name"]:
                parts.append(self._list(mark["name"], where, inside))
            elif mark["open"]:
                if len(opened) == MAX_DEPTH:
                    raise UserError(f"{where}: braces nest more than {MAX_DEPTH} deep; write \\{{ for the character")
                opened.append((mark, [parts]))  # the parts before the brace, then the options
                parts = []
            elif mark["next"]:
                opened[-1][1].append(parts)
                parts = []
            elif not opened:
                raise UserError(f"{where}: there is a }} without its {{; write \\}} for the character")
            else:
                brace, (before, *options) = opened.pop()
                _refuse_templates(text[brace.start() : mark.end()], where)
                parts = [*before, _choice(brace, [_joined(own) for own in (*options, parts)], where)]
        if opened:
            raise UserError(f"{where}: a {{ is not closed; write \\{{ for the character")
        return _joined([*parts, Text(text[end:])])

    def _list(self, name: str, where: str, inside: tuple[str, ...]) -> Alternatives:
        if name in self._lists:
            return self._lists[name]
        if name in inside:
            raise UserError(f"{where}: the wildcard __{name}__ names itself ({' -> '.join((*inside, name))}); take it out of its list")
        if self.folder is None:
            raise UserError(
                f"{where}: the prompt names the wildcard __{name}__, but wildcards_dir is not set; give the folder of the lists"
            )
        if "*" in name:
            names = sorted(file.relative_to(self.folder).with_suffix("").as_posix() for file in self.folder.glob(f"{name}.txt"))
            if found := [self._list(own, where, inside) for own in names if own not in inside]:
                return Alternatives(found)
        path = self.folder / f"{name}.txt"
        if not path.is_file():
            known = sorted(file.relative_to(self.folder).with_suffix("").as_posix() for file in self.folder.rglob("*.txt"))
            near = nearest(name, known)
            hint = f"did you mean __{near}__?" if near else f"it has {', '.join(known) or 'none'}"
            raise UserError(f"{where}: wildcards_dir {self.folder} has no list {name}.txt; {hint}")
        options = [
            self._parse(line.strip(), f"{path} line {number}", (*inside, name))
            for number, line in enumerate(read_lines(path, f"{where}: the list"), start=1)
            if line.strip() and not line.lstrip().startswith("#")
        ]
        if not options:
            raise UserError(f"{where}: the list {path} is empty; write one entry a line")
        self._lists[name] = Alternatives(options)
        return self._lists[name]


def _variants(parts: Sequence[Pattern], number: int) -> list[str]:
    """One variant of each part: the number's digits in a mixed base, the last part's changing fastest."""
    texts = []
    for part in reversed(parts):
        number, own = divmod(number, part.count)
        texts.append(part.variant(own))
    return texts[::-1]


def _joined(parts: Sequence[Pattern]) -> Pattern:
    if all(isinstance(part, Text) for part in parts):
        return Text("".join(part.text for part in parts if isinstance(part, Text)))
    return Joined(parts)


def _refuse_templates(choice: str, where: str) -> None:
    """What braces mean in other programs and would be words here."""
    if choice == "{prompt}":
        raise UserError(f"{where}: {{prompt}} is the place of a prompt in a style; write the prompt there")
    if weight := re.search(r"[{|](?:\d+\$\$)?\s*(\d*\.?\d+)::", choice):
        raise UserError(f"{where}: weights of choices ({weight[1]}::) are not known; write a choice as many times as it is to count")


def _choice(brace: re.Match[str], options: list[Pattern], where: str) -> Alternatives:
    if brace["least"] is None:
        return Alternatives(options)
    least = int(brace["least"])
    most = int(brace["most"] or least)
    if not least <= most <= len(options):
        raise UserError(f"{where}: {brace[0]} asks for {least} to {most} of {len(options)} options; give numbers of at most that, in order")
    if (count := sum(math.comb(len(options), chosen) for chosen in range(least, most + 1))) > MAX_COMBINATIONS:
        raise UserError(f"{where}: {brace[0]} of {len(options)} options is {count} combinations; it must be at most {MAX_COMBINATIONS}")
    joiner = ", " if brace["joiner"] is None else brace["joiner"]
    return Alternatives([Joined(chosen, joiner) for size in range(least, most + 1) for chosen in combinations(options, size)])


def _random_below(bound: int, generator: torch.Generator) -> int:
    """A whole number in 0..bound - 1, for bounds of any size: 64 bits more than needed make the remainder as good as uniform."""
    number = 0
    for _ in range((bound.bit_length() + 64) // 32 + 1):
        number = (number << 32) | int(torch.randint(2**32, (), generator=generator))
    return number % bound
