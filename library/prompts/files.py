"""Prompt lists from files, with their choices written out: docs/prompts.md shows every format."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from library.errors import UserError
from library.models.prompt_syntax import escape
from library.prompts.contents import (
    GIVE_PROMPTS,
    LINE_ENDINGS,
    ROW_ENDINGS,
    TABLE_ENDINGS,
    read_prompt_lines,
    read_prompt_rows,
    read_tables,
)
from library.prompts.entries import Entry, from_lines, from_rows, from_tables
from library.prompts.wildcards import Wildcards
from library.scorer_data.buckets import BucketConfig, bucket_sizes
from library.settings.options import check_at_least, option
from library.types import PromptSpec

PONY_TAG = re.compile(r"score_\d(_up)?|source_(anime|furry|pony|cartoon)|rating_(safe|questionable|explicit)", re.IGNORECASE)
RATINGS = {"g": "general", "s": "sensitive", "q": "questionable", "e": "explicit"}  # of Danbooru since 2022
PONY_RATINGS = {"general": "safe", "sensitive": "safe"}  # it knows three
TAG_VARIANTS = 4  # prompts made of each line of tags that are shuffled or dropped


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """How prompts are read, and what becomes of them."""

    prompt_format: str = option(
        "auto",
        choices=("auto", "danbooru"),
        help="Of a .txt: auto takes each line as a prompt, danbooru as the tags of a picture (1girl solo long_hair).",
        expert=True,
    )
    shuffle_caption: bool = option(
        False, help="With prompt_format danbooru: shuffle each line's tags.", expert=True, only_with={"prompt_format": ("danbooru",)}
    )
    keep_tokens: int = option(
        0,
        help="With prompt_format danbooru: this many tags at the front are neither shuffled nor dropped.",
        expert=True,
        only_with={"prompt_format": ("danbooru",)},
    )
    caption_tag_dropout_rate: float = option(
        0.0,
        help="With prompt_format danbooru: leave each tag out with this probability.",
        expert=True,
        only_with={"prompt_format": ("danbooru",)},
    )
    wildcards_dir: Path | None = option(None, help="Folder of lists for __name__ in prompts: name.txt, one entry a line.", expert=True)
    max_prompt_variants: int = option(
        64, help="A prompt with more choices than that becomes so many prompts at random, else all of them.", expert=True
    )
    enable_bucket: bool = option(False, help="Spread prompts that have no size of their own over pictures of other aspect ratios.")

    def __post_init__(self) -> None:
        check_at_least(self, 1, "max_prompt_variants")
        check_at_least(self, 0, "keep_tokens")
        if not 0 <= self.caption_tag_dropout_rate < 1:
            raise UserError(f"caption_tag_dropout_rate is {self.caption_tag_dropout_rate}; it must be from 0 to below 1")

    @property
    def varies_tags(self) -> bool:
        return self.prompt_format == "danbooru" and (self.shuffle_caption or self.caption_tag_dropout_rate > 0)


def load_prompts(path: str | Path, options: PromptOptions | None = None, generator: torch.Generator | None = None) -> list[PromptSpec]:
    """Read a prompt list; the file's ending says of which kind, and docs/prompts.md shows each.

    `.toml`, `.yaml`, `.json`: `[[prompts]]` tables with the fields of `PromptSpec` or of sd-scripts' sample prompts, or the `target`s and
    `target_class`es of a LECO file; keys above the tables are their defaults. `.csv`: a column `prompt`, and others with the names of
    those fields. `.tsv`: PartiPrompts, taken literally. `.txt`, or no ending: a prompt a line with sd-scripts' options
    (`library.prompts.entries.LINE_OPTIONS`). A prompt with choices (`library.prompts.wildcards`) becomes several, which share its weight.

    Args:
        options: None is the defaults.
        generator: of choices and tags that are drawn; None is one with seed 0.

    Raises:
        UserError: no such file, nothing in it, no list of prompts, or a line or key that cannot be understood; it names file and line.
    """
    path, options = Path(path).expanduser(), options or PromptOptions()
    generator = generator or torch.Generator().manual_seed(0)
    ending = path.suffix.lower()
    if not path.is_file():
        state = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"prompts file {path} {state}; {GIVE_PROMPTS}")
    if ending not in (endings := (*LINE_ENDINGS, *TABLE_ENDINGS, *ROW_ENDINGS)):
        raise UserError(f"prompts file {path} ends in {path.suffix!r}; a list of prompts ends in {', '.join(filter(None, endings))}")
    is_tags = options.prompt_format == "danbooru"
    if is_tags and ending not in LINE_ENDINGS:
        raise UserError(f"prompt_format danbooru reads a .txt, a picture's tags on each line, but the prompts file is {path}")
    if ending in TABLE_ENDINGS:
        entries = from_tables(read_tables(path), path)
    elif ending in ROW_ENDINGS:
        entries = from_rows(read_prompt_rows(path), path)
    else:
        entries = from_lines(read_prompt_lines(path), path)
    if ending == ".tsv":
        prompts = [replace(spec, prompt=escape(spec.prompt)) for _, spec in entries]
    else:
        prompts = (_of_tags if is_tags else _written_out)(entries, options, generator)
    if not prompts:
        raise UserError(f"prompts file {path} holds no prompts; write {'[[prompts]] tables' if ending in TABLE_ENDINGS else 'one a line'}")
    return prompts


def _written_out(entries: Iterable[Entry], options: PromptOptions, generator: torch.Generator) -> list[PromptSpec]:
    """Choices in prompt and negative prompt are made together: each variant is a pair."""
    wildcards = Wildcards(options.wildcards_dir)
    prompts = []
    for where, spec in entries:
        variants = wildcards.expand((spec.prompt, spec.negative_prompt), options.max_prompt_variants, generator, where)
        for prompt, negative in variants:
            prompts.append(replace(spec, prompt=prompt, negative_prompt=negative, weight=spec.weight / len(variants)))
    return prompts


def _of_tags(entries: Iterable[Entry], options: PromptOptions, generator: torch.Generator) -> list[PromptSpec]:
    count = TAG_VARIANTS if options.varies_tags else 1
    prompts = []
    for _, spec in entries:
        tags = _split_tags(spec.prompt)
        for _ in range(count):
            varied = _vary(tags, options, generator)
            prompts.append(replace(spec, prompt=_tag_prompt(varied), weight=spec.weight / count))
    return prompts


def spread(prompts: Sequence[PromptSpec], count: int) -> list[PromptSpec]:
    """`count` prompts, evenly over the list (all of them if there are fewer), ordered by size so that equal sizes stand together."""
    count = min(count, len(prompts))
    chosen = [prompts[index * len(prompts) // count] for index in range(count)]
    return sorted(chosen, key=lambda prompt: (prompt.height or 0, prompt.width or 0))


def with_aspect_buckets(prompts: Sequence[PromptSpec], resolution: tuple[int, int]) -> list[PromptSpec]:
    """Every prompt without a size of its own once for each bucket of sd-scripts, which share its weight; the others as they are.

    Args:
        resolution: (height, width) in pixels; no bucket is larger in area. Sides go from 3/4 to 4/3 of it, which is 9 : 16 to 16 : 9, in
            steps of 64, or of an eighth of a small resolution.
    """
    height, width = resolution
    config = BucketConfig(
        resolution=f"{width},{height}",
        min_bucket_reso=min(height, width) * 3 // 4,
        max_bucket_reso=max(height, width) * 4 // 3,
        bucket_reso_steps=max(8, min(64, min(height, width) // 64 * 8)),
    )
    sizes = bucket_sizes(config)
    result: list[PromptSpec] = []
    for prompt in prompts:
        if prompt.width is not None or prompt.height is not None:
            result.append(prompt)
        else:
            share = prompt.weight / len(sizes)
            result += [replace(prompt, width=own_width, height=own_height, weight=share) for own_width, own_height in sizes]
    return result


def _split_tags(line: str) -> list[str]:
    r"""The tags of a picture: parted by commas when the line has ", " or no space at all, else by spaces, as in danbooru's tag_string.

    Brackets may be escaped already, miku_\(vocaloid\), as in prompts for A1111.
    """
    line = re.sub(r"\\\(([^()]*)\\\)", r"(\1)", line)
    by_commas = ", " in line or " " not in line.strip()
    return [tag.strip() for tag in (line.split(",") if by_commas else line.split()) if tag.strip()]


def _in_words(tag: str, *, pony: bool) -> str:
    """A tag as models know it: with spaces, but for emoticons such as ^_^ and x_x (tags without two letters in a row) and Pony's own.

    Danbooru's `rating:g` or `rating:general` is Pony's rating_safe, and `general` to models of Danbooru's tags (Illustrious, NoobAI).
    """
    if rating := re.fullmatch(r"rating:(\w+)", tag, re.IGNORECASE):
        name = RATINGS.get(rating[1].lower(), rating[1].lower())
        return f"rating_{PONY_RATINGS.get(name, name)}" if pony else name
    return tag if PONY_TAG.fullmatch(tag) or not re.search(r"[^\W\d_]{2}", tag) else tag.replace("_", " ")


def _tag_prompt(tags: Sequence[str]) -> str:
    """A prompt of these tags, their brackets escaped, which would be read as weights."""
    pony = any(map(PONY_TAG.fullmatch, tags))
    return escape(", ".join(_in_words(tag, pony=pony) for tag in tags))


def _vary(tags: Sequence[str], options: PromptOptions, generator: torch.Generator) -> list[str]:
    """The tags but the first `keep_tokens` shuffled, and each of those left out with probability `caption_tag_dropout_rate`."""
    kept, others = list(tags[: options.keep_tokens]), list(tags[options.keep_tokens :])
    if options.caption_tag_dropout_rate > 0:
        draws = torch.rand(len(others), generator=generator).tolist()
        others = [tag for tag, draw in zip(others, draws, strict=True) if draw >= options.caption_tag_dropout_rate]
    if options.shuffle_caption:
        others = [others[place] for place in torch.randperm(len(others), generator=generator).tolist()]
    return kept + others
