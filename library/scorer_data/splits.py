"""Which pictures are trained on and which are kept for validation: the same in every run and on every machine."""

import hashlib
from collections.abc import Iterable
from typing import TypeVar

from library.scorer_data.records import RatedImage, RatedPair

Record = TypeVar("Record", RatedImage, RatedPair)


def split_of(record: RatedImage | RatedPair, validation_split: float) -> str:
    """ "train", "val" or "test": what the record says, else by a hash.

    The hash is of the name, so that old pictures stay where they were when new ones are added. A pair goes by its prompt if it has one:
    a picture takes part in several pairs of one prompt, and must not be on both sides.
    """
    if record.split is not None:
        return record.split
    name = record.prompt or record.name if isinstance(record, RatedPair) else record.name
    return "val" if name_fraction(name) < validation_split else "train"


def split_images(records: Iterable[Record], validation_split: float) -> tuple[list[Record], list[Record]]:
    """Those to train on and those to validate with; test records are in neither."""
    parts: dict[str, list[Record]] = {"train": [], "val": [], "test": []}
    for record in records:
        parts[split_of(record, validation_split)].append(record)
    return parts["train"], parts["val"]


def name_fraction(name: str) -> float:
    """A number in 0..1 that depends on the name alone, evenly spread over names."""
    return int.from_bytes(hashlib.sha256(name.encode(errors="surrogateescape")).digest()[:8], "big") / 2**64
