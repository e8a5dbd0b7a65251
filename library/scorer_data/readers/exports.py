"""What other programs export, in the words of a table: Label Studio's tasks and answers, and idealo's JSON (image-quality-assessment)."""

import json
import re
import statistics
from collections import Counter
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

VOTES = 10  # ratings 1 to 10
LARGEST = 2**53  # of ratings; JSON's numbers may be too large for a float
# Where a kind of answer of Label Studio keeps its value, and the column of a table that is the same.
ANSWERS = {"rating": "score", "number": "score", "choices": "label", "selected": "label"}
PICTURE = re.compile(r"\.(jpe?g|png|webp|bmp|gif|tiff?|avif|jfif)$", re.IGNORECASE)


def plain_row(item: Mapping[str, Any]) -> dict[str, Any]:
    """A row by names in lower case, with `path`, `score`, `label`, `votes` and `prompt` where another program calls them otherwise.

    Label Studio: JSON (tasks with annotations, of which those that were cancelled do not count), JSON_MIN and CSV. The answers to the only
    question with a number are the score, those to the only one with choices the label; others go by the question's name.
    idealo: `label` with ten counts is the votes.
    """
    row = {str(name).lower(): value for name, value in item.items()}
    if isinstance(row.get("annotations"), list) and isinstance(row.get("data"), dict):
        row = _task(row["data"], row["annotations"])
    elif "annotation_id" in row:
        row = _with_usual_names(row, {name: kind for name, value in row.items() if (kind := _kind(from_json(value)))})
    if isinstance(row.get("label"), list) and len(row["label"]) == VOTES:
        row["votes"] = row.pop("label")
    return row


def is_export(columns: Mapping[str, Any] | list[str]) -> bool:
    """Whether a table with these columns is Label Studio's, whose columns are the names of questions."""
    return {"annotation_id", "lead_time"} <= set(columns)


def plain_answer(value: object) -> object:
    """What a cell of Label Studio's says: the mean of ratings, the most frequent choice. Anything else is as it was."""
    value = from_json(value)
    if not isinstance(value, (list, dict)):
        return value
    answers: list[Any] = value if isinstance(value, list) else [value]
    kinds = {_kind(answer) for answer in answers}
    if not answers or None in kinds:
        return value
    said = [next(answer[name] for name in ANSWERS if name in answer) for answer in answers]
    if all(isinstance(one, float | int) and abs(one) < LARGEST for one in said):
        return statistics.fmean(said)
    chosen = Counter(tuple(map(str, one)) if isinstance(one, list) else (str(one),) for one in said).most_common(1)[0][0]
    return chosen[0] if len(chosen) == 1 else list(chosen)


def picture_names(text: str) -> tuple[str, ...]:
    """Under which names a picture that a row names may be found: of Label Studio's addresses, what is left of them on a disk."""
    if "/local-files/?d=" in text:
        return (unquote(text.split("/local-files/?d=")[1]),)
    if "data/upload/" in text and (
        match := re.search(r"(?:^|/)data/upload/(?:\d+/)?([^/]+)$", text)
    ):  # eight digits were put before the name that it had
        name = unquote(match[1])
        return (name, re.sub(r"^[0-9a-f]{8}-", "", name))
    return (text,)


def from_json(value: object) -> object:
    """A cell that holds JSON, read; any other as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _task(data: Mapping[str, Any], annotations: list[Any]) -> dict[str, Any]:
    answers: dict[str, list[Any]] = {}
    for annotation in annotations:
        results = annotation.get("result") if isinstance(annotation, dict) and not annotation.get("was_cancelled") else None
        for result in results if isinstance(results, list) else []:
            if isinstance(result, dict) and _kind(result.get("value")):
                answers.setdefault(str(result.get("from_name")).lower(), []).append(result["value"])
    row = {str(name).lower(): value for name, value in data.items()} | answers
    return _with_usual_names(row, {name: kind for name, given in answers.items() if (kind := _kind(given))})


def _with_usual_names(row: dict[str, Any], kinds: Mapping[str, str]) -> dict[str, Any]:
    """`kinds`: of the answers by the question, which of `ANSWERS` they are."""
    for column in ("score", "label"):
        own = [name for name, kind in kinds.items() if ANSWERS[kind] == column]
        if len(own) == 1:
            row.setdefault(column, row[own[0]])
            if column == "label":
                row.setdefault("tags", row[own[0]])
    pictures = [name for name, value in row.items() if isinstance(value, str) and PICTURE.search(value)]
    if len(pictures) == 1:
        row.setdefault("path", row[pictures[0]])
    elif len(pictures) == 2:
        row.update(zip(("path_a", "path_b"), (row[name] for name in pictures), strict=True))
    if isinstance(text := row.get("text", row.get("caption")), str):
        row.setdefault("prompt", text)
    return row


def _kind(value: object) -> str | None:
    """Which of `ANSWERS` a value of Label Studio's is."""
    first = value[0] if isinstance(value, list) and value else value
    return next((name for name in ANSWERS if name in first), None) if isinstance(first, dict) else None
