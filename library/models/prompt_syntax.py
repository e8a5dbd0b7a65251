r"""The prompt syntax of A1111's web UI: (more), [less], (word:1.3), \( for a bracket that is only a bracket, and BREAK."""

import re

EMPHASIS = 1.1
_SYNTAX = re.compile(
    r"(?P<escaped>\\[()\[\]\\])|(?P<bracket>[()\[\]])|:\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)|\s*\b(?P<part>BREAK)\b\s*"
)
Section = list[tuple[str, float]]


def parse_weights(prompt: str) -> list[Section]:
    """Split a prompt at BREAK, and each section into runs of text of one weight.

    `(text)` multiplies the weight with 1.1, `[text]` divides by it, `(text:1.3)` multiplies with the number; they nest. A bracket
    that is never closed reaches to the end, one that was never opened is a character, as in A1111. No BREAK and no brackets give
    [[(prompt, 1.0)]], text that is empty gives [[]].
    """
    texts: list[str | None] = []  # None is BREAK
    weights: list[float] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def add(text: str | None) -> None:
        if text != "":
            texts.append(text)
            weights.append(1.0)

    def close(bracket: str, factor: float) -> None:
        start = opened[bracket].pop()
        weights[start:] = [weight * factor for weight in weights[start:]]

    end = 0
    for match in _SYNTAX.finditer(prompt):
        add(prompt[end : match.start()])
        end = match.end()
        mark = match["bracket"]
        if match["escaped"]:
            add(match["escaped"][1])
        elif match["part"]:
            add(None)
        elif match["weight"] and opened["("]:
            close("(", float(match["weight"]))
        elif mark in opened:
            opened[mark].append(len(texts))
        elif mark == ")" and opened["("]:
            close("(", EMPHASIS)
        elif mark == "]" and opened["["]:
            close("[", 1 / EMPHASIS)
        else:
            add(match[0])
    add(prompt[end:])
    for bracket, factor in (("(", EMPHASIS), ("[", 1 / EMPHASIS)):
        while opened[bracket]:
            close(bracket, factor)
    return _sections(texts, weights)


def _sections(texts: list[str | None], weights: list[float]) -> list[Section]:
    """Runs of one weight are one text again, so that the tokenizer sees what it would have seen without brackets."""
    sections: list[Section] = [[]]
    for text, weight in zip(texts, weights, strict=True):
        section = sections[-1]
        if text is None:
            sections.append([])
        elif section and section[-1][1] == weight:
            section[-1] = (section[-1][0] + text, weight)
        else:
            section.append((text, weight))
    return sections[:-1] if len(sections) > 1 and not sections[-1] else sections


def plain_text(prompt: str) -> str:
    """The prompt without brackets, weights and BREAK: for readers that know no such syntax."""
    return " ".join("".join(text for text, _ in section).strip() for section in parse_weights(prompt)).strip()


def escape(text: str) -> str:
    r"""Text whose brackets mean nothing, as a prompt: "miku (vocaloid)" -> "miku \(vocaloid\)"."""
    return re.sub(r"[()\[\]\\]", r"\\\g<0>", text)
