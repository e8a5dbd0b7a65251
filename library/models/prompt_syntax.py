r"""The prompt syntax of A1111's web UI: (more), [less], (word:1.3), \( for a bracket that is only a bracket, and BREAK.

Prompts of any length become chunks of 75 tokens, each with its own beginning and end, and with a weight for every token.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

EMPHASIS = 1.1
DEEPEST = 100  # brackets in each other; more are characters
LEAST_MEAN = 0.01  # of hidden states, as a share of their standard deviation
Chunk = list[tuple[int, float]]  # at most 75 tokens, each with its weight
# No part of it may be matched in two ways: a prompt is anybody's text, and 100,000 spaces or digits must not take minutes.
_SYNTAX = re.compile(
    r"(?P<escaped>\\[()\[\]\\]?)|(?P<bracket>[()\[\]])|:\s*(?P<weight>[+-]?(?:\d+(?:\.\d*)?|\.\d+))\s*\)|\b(?P<part>BREAK)\b"
)
NO_EMBEDDINGS: Mapping[str, range] = MappingProxyType({})
_SPACES = re.compile(r"\s*")
# What other programs read, and this one does not.
FOREIGN = {
    "AND": re.compile(r"\bAND\b"),
    "<lora:...>": re.compile(r"<(?:lora|lyco|hypernet):[^<>]*>", re.IGNORECASE),
    "prompt editing ([a:b:0.5])": re.compile(r"(?<!\\)\[(?:[^\[\]:]*:){1,2}\s*(?:\d+(?:\.\d*)?|\.\d+)%?\s*\]"),
    "alternating words ([a|b])": re.compile(r"(?<!\\)\[[^\[\]|]*\|[^\[\]]*\]"),
    "textual inversion": re.compile(
        r"\bembedding:|\b(?:easynegative|badhandv4|bad[-_]hands[-_]5|bad[-_]prompt|bad[-_]artist|bad[-_]image|ng_deepnegative|fastnegative"
        r"|verybadimagenegative|negativexl|unaestheticxl)",
        re.IGNORECASE,
    ),
}
Section = list[tuple[str, float]]


def parse_weights(prompt: str) -> list[Section]:
    """Split a prompt at BREAK, and each section into runs of text of one weight.

    `(text)` multiplies the weight with 1.1, `[text]` divides by it, `(text:1.3)` multiplies with the number; they nest. A bracket
    that is never closed reaches to the end, one that was never opened is a character, and a backslash that is before no bracket is
    dropped, as in A1111. No BREAK and no brackets give [[(prompt, 1.0)]], text that is empty gives [[]].
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
        text = prompt[end : match.start()]
        add(text.rstrip() if match["part"] else text)
        end = match.end()
        mark = match["bracket"]
        if match["escaped"]:
            add(match["escaped"][1:])
        elif match["part"]:
            add(None)
            spaces = _SPACES.match(prompt, end)
            end = spaces.end() if spaces else end
        elif match["weight"] and opened["("]:
            close("(", float(match["weight"]))
        elif mark in opened and len(opened[mark]) < DEEPEST:
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


def read_as_text(prompts: Sequence[str], embeddings: Collection[str] = ()) -> dict[str, str]:
    """What other programs would read in these prompts and this one takes for text: its name, and the first prompt that has it.

    Args:
        embeddings: words of textual inversion, which are read.
    """
    known = _words(embeddings)
    found: dict[str, str] = {}
    for prompt in prompts:
        left = known.sub("", prompt) if known else prompt
        for name, pattern in FOREIGN.items():
            if name not in found and pattern.search(left):
                found[name] = prompt
    return found


def escape(text: str) -> str:
    r"""Text whose brackets mean nothing, as a prompt: "miku (vocaloid)" -> "miku \(vocaloid\)"."""
    return re.sub(r"[()\[\]\\]", r"\\\g<0>", text)


def tokenize(
    prompts: Sequence[str], tokenizer: Any, length: int, min_chunks: int = 1, embeddings: Mapping[str, range] = NO_EMBEDDINGS
) -> tuple[Tensor, Tensor]:
    """Token ids and weights of B prompts, both [N, B, length]: N chunks each, as many as the longest needs and at least `min_chunks`.

    Shorter prompts end in empty chunks, as in A1111. A chunk is full after length - 2 tokens, or ends at BREAK.

    Args:
        length: the text encoder's number of positions, 77.
        embeddings: words of textual inversion, and the places of their tokens behind the tokenizer's.
    """
    room, words = length - 2, _words(embeddings)
    rows = [_chunks(prompt, tokenizer, room, embeddings, words) for prompt in prompts]
    count = max([min_chunks, *map(len, rows)])
    rows = [row + [[]] * (count - len(row)) for row in rows]
    ids = torch.full((count, len(rows), length), tokenizer.pad_token_id)
    weights = torch.ones(count, len(rows), length)
    for place, row in enumerate(rows):
        for number, chunk in enumerate(row):
            tokens = [token for token, _ in chunk]
            ids[number, place, : len(tokens) + 2] = torch.tensor([tokenizer.bos_token_id, *tokens, tokenizer.eos_token_id])
            weights[number, place, 1 : len(tokens) + 1] = torch.tensor([weight for _, weight in chunk])
    return ids, weights


def _words(embeddings: Collection[str]) -> re.Pattern[str] | None:
    """Finds the words of textual inversion, with ComfyUI's embedding: before them or without; the longest first."""
    names = "|".join(map(re.escape, sorted(embeddings, key=len, reverse=True)))
    return re.compile(rf"(?<![\w-])(?:embedding:)?({names})(?![\w-])", re.IGNORECASE) if names else None


def _chunks(prompt: str, tokenizer: Any, room: int, embeddings: Mapping[str, range], words: re.Pattern[str] | None) -> list[Chunk]:
    chunks: list[Chunk] = []
    for section in parse_weights(prompt):
        chunks.append([])
        for text, weight in section:
            # every other part is a word of textual inversion
            for number, part in enumerate(words.split(text) if words else [text]):
                if number % 2:
                    pieces = [[len(tokenizer) + place for place in embeddings[part.lower()]]]
                else:  # `verbose` would warn of more than 77 tokens
                    pieces = [[token] for token in tokenizer(part, add_special_tokens=False, verbose=False).input_ids]
                for tokens in pieces:
                    if len(chunks[-1]) + len(tokens) > room:
                        chunks.append([])
                    chunks[-1] += [(token, weight) for token in tokens]
    return chunks


def apply_weights(hidden: Tensor, weights: Tensor) -> Tensor:
    """A1111's emphasis: multiply each token's hidden state with its weight, then scale the chunk so that its mean is what it was.

    A mean below a hundredth of the spread is noise, by which A1111 would scale all the same; here such a chunk is not scaled (A1111's
    setting "No norm").

    Args:
        hidden: of B chunks [B, T, D].
        weights: [B, T]; a chunk whose weights are all 1 stays as it is, to the bit.
    """
    weights = weights.to(hidden.device)
    plain = (weights == 1).all(dim=1)[:, None, None]
    if bool(plain.all()):
        return hidden
    before = hidden.float()
    after = before * weights[:, :, None]
    mean, new_mean = before.mean((1, 2), keepdim=True), after.mean((1, 2), keepdim=True)
    has_mean = (mean.abs() > LEAST_MEAN * before.std((1, 2), keepdim=True)) & (new_mean != 0)
    scale = torch.where(has_mean, mean / torch.where(has_mean, new_mean, 1.0), 1.0)
    return torch.where(plain, hidden, (after * scale).to(hidden.dtype))
