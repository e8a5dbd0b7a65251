"""A rating project: nothing that was acknowledged is lost or counted twice, and its tables are what the trainer reads."""

import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.errors import UserError
from library.rating.store import Project, Rating, StoredPicture
from library.rating.tables import import_ratings, write_tables


def filled(folder: Path, count: int = 4) -> Project:
    project = Project(folder)
    pictures = []
    for number in range(count):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / "pictures" / f"{number}.png")
        name = f"pictures/{number}.png"
        features = np.arange(9, dtype=np.float32) + number
        pictures.append(StoredPicture(hash=f"h{number}", file=name, shown=name, prompt="a, b", width=8, height=8, features=features))
    assert project.add_pictures(pictures) == count
    assert project.add_pictures(pictures) == 0
    project.add_opinion("beauty")
    return project


def test_answers_come_back_and_one_sent_twice_counts_once(tmp_path: Path) -> None:
    project = filled(tmp_path)
    beauty = project.opinion("Beauty")
    answer = Rating(token="a", mode="stars", first=1, value=4, reason="random", predicted=0.5, time=7.0)
    assert [project.add_ratings(beauty, [answer]) for _ in range(2)] == [1, 0]
    again = Project(tmp_path)
    [stored] = again.ratings(beauty)
    assert (stored.first, stored.value, stored.reason, stored.predicted, stored.time) == (1, 4, "random", 0.5, 7.0)
    assert again.pictures()[2].features.tolist() == (np.arange(9) + 2).tolist()
    again.undo(beauty, "a")
    assert project.ratings(beauty) == []
    assert project.add_ratings(beauty, [answer]) == 0  # what was taken back does not come back by a late retry
    assert again.undo(beauty, "late") is None
    project.add_ratings(beauty, [replace(answer, token="late")])  # it was overtaken on its way by its own undoing
    assert project.ratings(beauty) == []


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"value": 6}, "stars go from 1 to 5"),
        ({"value": 2.5}, "stars go from 1 to 5"),
        ({"mode": "pair", "second": 1, "value": 1}, "is no answer"),
        ({"mode": "love"}, "is no answer"),
        ({"first": 99}, "does not have"),
        ({"token": "x" * 65}, "1 to 64 characters"),
    ],
)
def test_what_is_no_answer_is_refused_and_nothing_of_its_batch_kept(tmp_path: Path, changes: dict, words: str) -> None:
    project = filled(tmp_path)
    good = Rating(token="good", mode="stars", first=2, value=1)
    with pytest.raises(UserError, match=words):
        project.add_ratings(
            project.opinion("beauty"), [good, Rating(**({"token": "b", "mode": "stars", "first": 1, "value": 1} | changes))]
        )
    assert project.ratings(project.opinion("beauty")) == []


@pytest.mark.parametrize("name", ["", "../up", "a/b", "x" * 41, "<b>"])
def test_names_that_cannot_be_folders_are_no_opinions(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="no name for an opinion"):
        Project(tmp_path).add_opinion(name)


def test_two_writers_lose_nothing(tmp_path: Path) -> None:
    filled(tmp_path)

    shared = Project(tmp_path)

    def write(writer: int) -> None:
        project = shared if writer < 2 else Project(tmp_path)  # two threads of one process, and another
        for number in range(40):
            project.add_ratings(project.opinion("beauty"), [Rating(token=f"{writer}-{number}", mode="skip", first=1)])

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    project = Project(tmp_path)
    assert len(project.ratings(project.opinion("beauty"))) == 120


def test_a_killed_process_loses_nothing_that_it_acknowledged(tmp_path: Path) -> None:
    filled(tmp_path)
    code = """
import sys; from pathlib import Path
from library.rating.store import Project, Rating
project = Project(Path(sys.argv[1])); beauty = project.opinion("beauty")
for number in range(100000):
    project.add_ratings(beauty, [Rating(token=str(number), mode="skip", first=1)]); print(number, flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
    assert process.stdout is not None
    for _ in range(20):
        process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL)
    acknowledged = 20 + len([line for line in process.stdout.read().splitlines() if line])
    process.wait()
    project = Project(tmp_path)
    assert len(project.ratings(project.opinion("beauty"))) >= acknowledged - 1  # a last line may have been cut short


def test_a_disk_that_refuses_is_one_sentence(tmp_path: Path) -> None:
    project = filled(tmp_path)
    project._db.execute("PRAGMA max_page_count=1")  # as a full disk: SQLite says that it is full
    with pytest.raises(UserError, match="what was rated before is safe; free the space"):
        for number in range(200):
            project.add_ratings(project.opinion("beauty"), [Rating(token=f"{number}" * 10, mode="skip", first=1)])


def test_tables_are_what_the_trainer_reads_and_come_back(tmp_path: Path) -> None:
    from library.scorer_data.readers.base import ReaderOptions
    from library.scorer_data.readers.recognition import read_records

    project = filled(tmp_path)
    beauty, cosy = project.opinion("beauty"), project.add_opinion("cosy")
    answers = [
        Rating(token="1", mode="stars", first=1, value=5),
        Rating(token="2", mode="stars", first=1, value=3, reason="repeat"),
        Rating(token="3", mode="stars", first=2, value=1),
        Rating(token="4", mode="pair", first=3, second=4, value=0.5),
        Rating(token="5", mode="skip", first=4),
    ]
    project.add_ratings(beauty, answers)
    write_tables(project, beauty, tmp_path)
    ratings, pairs = tmp_path / "ratings.csv", tmp_path / "pairs.csv"
    read = list(read_records(ratings, "auto", ReaderOptions(target="score")))
    assert [(record.name, record.score, record.prompt) for record in read] == [
        ("pictures/0.png", 4.0, "a, b"),
        ("pictures/1.png", 1.0, "a, b"),
    ]
    [pair] = read_records(pairs, "auto", ReaderOptions(target="pair"))
    assert pair.preference == 0.5
    assert import_ratings(project, cosy, ratings) == (2, 0)
    assert import_ratings(project, cosy, ratings) == (0, 0)
    assert import_ratings(project, cosy, pairs) == (1, 0)
    assert [(rating.first, rating.value, rating.reason) for rating in project.ratings(cosy)][:2] == [
        (1, 4.0, "imported"),
        (2, 1.0, "imported"),
    ]


def test_a_table_of_other_pictures_is_refused(tmp_path: Path) -> None:
    project = filled(tmp_path / "project")
    Image.new("RGB", (8, 8)).save(tmp_path / "other.png")
    table = tmp_path / "ratings.csv"
    table.write_text(f"path,score\n{tmp_path / 'other.png'},3\n")
    with pytest.raises(UserError, match="none of the 1 rows"):
        import_ratings(project, project.opinion("beauty"), table)
