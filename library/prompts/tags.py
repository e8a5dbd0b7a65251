"""Danbooru's tags as prompts: `1girl solo long_hair` -> "1girl, solo, long hair"."""

import re
from collections.abc import Sequence

import torch

from library.models.prompt_syntax import escape


def split_tags(line: str) -> list[str]:
    """The tags of a picture: parted by commas when the line has ", " or no space at all, else by spaces, as in danbooru's tag_string."""
    by_commas = ", " in line or " " not in line.strip()
    return [tag.strip() for tag in (line.split(",") if by_commas else line.split()) if tag.strip()]


def in_words(tag: str) -> str:
    """Underscores to spaces, but for emoticons such as ^_^ and x_x: tags without two letters in a row."""
    return tag.replace("_", " ") if re.search(r"[^\W\d_]{2}", tag) else tag


def tag_prompt(tags: Sequence[str]) -> str:
    """A prompt of these tags, their brackets escaped, which would be read as weights."""
    return escape(", ".join(map(in_words, tags)))


def vary(tags: Sequence[str], *, shuffle: bool, keep: int, dropout: float, generator: torch.Generator) -> list[str]:
    """The tags with all but the first `keep` shuffled, and each of those left out with probability `dropout`."""
    kept, others = list(tags[:keep]), list(tags[keep:])
    if dropout > 0:
        others = [tag for tag, draw in zip(others, torch.rand(len(others), generator=generator).tolist(), strict=True) if draw >= dropout]
    if shuffle:
        others = [others[place] for place in torch.randperm(len(others), generator=generator).tolist()]
    return kept + others
