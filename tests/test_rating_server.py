"""The page's server: who may speak to it, what it refuses, and that no answer is lost or counted twice."""

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psutil
import pytest

pytest.importorskip("uvicorn", reason="requirements-ui.txt")

from library.errors import UserError
from library.rating import live, runs
from library.rating.runner import PROGRESS
from library.rating.store import Project, StoredPicture
from tests.helpers.rating_project import RECIPE, drawn_project, served, stars_of


class Client:
    """Requests as a browser on the page sends them, with `headers` in place of its own."""

    def __init__(self, address: str, **headers: str) -> None:
        self.place = urlsplit(address).netloc
        self.headers = {"content-type": "application/json", "origin": address, "sec-fetch-site": "same-origin"} | headers

    def __call__(self, method: str, path: str, body: bytes | None = None, **headers: str | None) -> tuple[int, bytes, dict[str, str]]:
        connection = http.client.HTTPConnection(self.place, timeout=30)
        given = {name.replace("_", "-"): value for name, value in (self.headers | headers).items() if value is not None}
        connection.request(method, path, body, given)
        response = connection.getresponse()
        result = response.status, response.read(), {name.lower(): value for name, value in response.getheaders()}
        connection.close()
        return result

    def post(self, name: str, body: Any) -> tuple[int, Any]:
        status, content, _ = self("POST", f"/api/{name}", json.dumps(body).encode())
        return status, json.loads(content)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Client, Any, np.ndarray]]:
    project, worth = drawn_project(tmp_path_factory.mktemp("project"), 90)
    with served(project) as (address, session):
        yield Client(address), session, worth


def test_a_person_rates_undoes_corrects_and_looks(page: tuple[Client, Any, np.ndarray]) -> None:
    client, session, worth = page
    rng = np.random.default_rng(0)
    for _ in range(12):
        status, asked = client.post("ask", {"opinion": "beauty", "count": 3})
        assert status == 200 and len(asked["questions"]) == 3 and "reason" not in asked["questions"][0]
        answers = [
            {
                "token": q["token"],
                "mode": "stars",
                "pictures": [q["pictures"][0]["id"]],
                "value": stars_of(worth[q["pictures"][0]["id"] - 1], rng),
            }
            for q in asked["questions"]
        ]
        assert client.post("rate", {"opinion": "beauty", "answers": answers}) == (200, {"new": 3, "answers": answer_count(session)})
        assert client.post("rate", {"opinion": "beauty", "answers": answers})[1]["new"] == 0  # sent again, counted once
    status, undone = client.post("undo", {"opinion": "beauty", "token": answers[-1]["token"]})
    assert status == 200 and undone["pictures"][0]["id"] == answers[-1]["pictures"][0]
    wait_until(lambda: session.opinion("beauty").progress.answers == 35)
    state = client.post("state", {"opinion": "beauty"})[1]
    assert state["answers"] == 35 and state["progress"]["held_out"][2] > 0.3 and sum(state["stars"]) == 35
    assert np.corrcoef(session.opinion("beauty").worths()[0], worth)[0, 1] > 0.7
    seen = client.post("look", {"opinion": "beauty"})[1]
    most, least = ([worth[own["id"] - 1] for own in seen[part]] for part in ("most", "least"))
    assert np.mean(most) > 1 > -0.5 > np.mean(least)
    picture = seen["apart"][0]
    assert client.post("correct", {"opinion": "beauty", "picture": picture["id"], "value": 2, "token": "mended"}) == (200, {})
    given = [(r.value, r.reason) for r in session.opinion("beauty").ratings if r.first == picture["id"]]
    assert given == [(2, "picked")]


def test_tables_go_out_and_come_in(page: tuple[Client, Any, np.ndarray]) -> None:
    client, session, _ = page
    answers = [{"token": f"out-{picture}", "mode": "stars", "pictures": [picture], "value": 3} for picture in (1, 2)]
    assert client.post("rate", {"opinion": "beauty", "answers": answers})[0] == 200
    assert client.post("opinions", {"name": "cosy", "levels": 5}) == (200, {"name": "cosy"})
    _, table, headers = client("GET", "/tables/ratings.csv?opinion=beauty")
    assert headers["content-disposition"].startswith("attachment") and table.startswith(b"path,score")
    rows = table.count(b"\n") - 1
    status, content, _ = client("POST", "/api/import?opinion=cosy", table, content_type="text/csv")
    assert status == 200 and json.loads(content) == {"new": rows, "missing": 0}
    status, content, _ = client("POST", "/api/import?opinion=cosy", b"\xff\xfe not a table", content_type="text/csv")
    assert status == 400 and json.loads(content)["error"]
    assert session.project.folder.joinpath("project.sqlite").is_file()


@pytest.mark.parametrize(
    "headers, status",
    [
        ({"host": "evil.example"}, 403),  # DNS rebinding
        ({"origin": "http://evil.example"}, 403),  # CSRF
        ({"origin": "null"}, 403),
        ({"origin": None, "sec_fetch_site": "cross-site"}, 403),
        ({"content_type": "text/plain"}, 403),  # what a form of another site can send
        ({"content_length": "99999999"}, 413),
        ({"host": "localhost"}, 403),  # its origin is another
        ({}, 200),
        ({"origin": None, "sec_fetch_site": None}, 200),  # curl
    ],
)
def test_only_the_page_is_answered(page: tuple[Client, Any, np.ndarray], headers: dict, status: int) -> None:
    client = page[0]
    assert client("POST", "/api/state", b'{"opinion": "beauty"}', **headers)[0] == status


@pytest.mark.parametrize(
    "name, body, words",
    [
        ("rate", {"opinion": "beauty", "answers": []}, "1 to 50"),
        ("rate", {"opinion": "beauty", "answers": [3]}, "JSON object"),
        ("rate", {"opinion": "beauty", "answers": [{"token": "t", "mode": "stars", "pictures": [10**9], "value": 3}]}, "does not have"),
        (
            "rate",
            {"opinion": "beauty", "answers": [{"token": "t", "mode": "stars", "pictures": ["../x"], "value": 3}]},
            "one or two pictures",
        ),
        ("rate", {"opinion": "beauty", "answers": [{"token": "t", "mode": "stars", "pictures": [1], "value": 9}]}, "from 1 to 5"),
        (
            "rate",
            {"opinion": "beauty", "answers": [{"token": "t", "mode": "stars", "pictures": [1], "value": float("nan")}]},
            "from 1 to 5",
        ),
        ("ask", {"opinion": "beauty", "count": 10**6}, "from 1 to 24"),
        ("ask", {"opinion": ["x"]}, "give a text"),
        ("look", {"opinion": "<script>"}, "no opinion"),
        ("opinions", {"name": "../../etc", "levels": 5}, "no name for an opinion"),
        ("opinions", {"name": "many", "levels": 7}, "5 or 10"),
        ("correct", {"opinion": "beauty", "picture": 10**9, "value": 1, "token": "x"}, "no such picture"),
        ("train", {"opinion": "beauty"}, "there are none"),
        ("resume", {"opinion": "beauty"}, "no training"),
        ("state", [1], "no JSON object"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(page: tuple[Client, Any, np.ndarray], name: str, body: Any, words: str) -> None:
    status, answer = page[0].post(name, body)
    assert status == 400 and words in answer["error"] and "\n" not in answer["error"]


@pytest.mark.parametrize(
    "path", ["/pictures/99999", "/pictures/..%2f..%2fproject.sqlite", "/run/..%2fplan.json", "/run/plan.json", "/page/../server.py"]
)
def test_nothing_is_served_by_a_path(page: tuple[Client, Any, np.ndarray], path: str) -> None:
    status, content, _ = page[0]("GET", f"{path}?opinion=beauty")
    assert status in (400, 404) and b"import" not in content and b"SQLite" not in content


def test_what_is_served_cannot_run_or_be_framed(page: tuple[Client, Any, np.ndarray]) -> None:
    client = page[0]
    for path in ("/", "/page/app.js", "/pictures/1"):
        status, _, headers = client("GET", path)
        assert (
            status == 200 and headers["x-content-type-options"] == "nosniff" and "default-src 'none'" in headers["content-security-policy"]
        )
    assert client("POST", "/api/state", b"{" * 5000)[0] == 400


def test_two_tabs_at_once_lose_nothing_and_are_asked_different_things(tmp_path: Path) -> None:
    """ANSWERS=150 has each tab give as many, one every 0.4 s; docs/experiments.md has what came of that."""
    count, pace = int(os.environ.get("ANSWERS", "20")), 0.4 if "ANSWERS" in os.environ else 0.0
    project, _ = drawn_project(tmp_path, 3 * count + 30)
    with served(project) as (address, session):
        shown: list[list[int]] = [[], []]
        began, times = time.monotonic(), []

        def tab(number: int) -> None:
            client = Client(address)
            for done in range(count):
                time.sleep(max(0.0, began + pace * done - time.monotonic()))
                started = time.monotonic()
                [question] = client.post("ask", {"opinion": "beauty", "count": 1})[1]["questions"]
                shown[number].append(question["pictures"][0]["id"])
                answer = {"token": question["token"], "mode": "stars", "pictures": [shown[number][-1]], "value": 3}
                for _ in range(2):  # as after a lost reply
                    assert client.post("rate", {"opinion": "beauty", "answers": [answer]})[0] == 200
                times.append(time.monotonic() - started)

        tabs = [threading.Thread(target=tab, args=(number,)) for number in range(2)]
        for thread in tabs:
            thread.start()
        for thread in tabs:
            thread.join()
        print(f"{len(times)} answers in {time.monotonic() - began:.1f} s, each asked for and sent twice in {np.median(times):.3f} s")
        ratings = session.opinion("beauty").ratings
        assert len(ratings) == 2 * count
        first = [rating.first for rating in ratings if rating.reason != "repeat"]
        assert len(set(first)) == len(first)
    again = Project(tmp_path)
    assert len(again.ratings(again.opinion("beauty"))) == 2 * count


def test_another_host_needs_the_token(tmp_path: Path) -> None:
    project, _ = drawn_project(tmp_path, 4)
    with served(project, token="secret") as (address, _):
        client = Client(address)
        assert client("GET", "/")[0] == 403
        assert client("GET", "/?token=wrong")[0] == 403
        status, _, headers = client("GET", "/?token=secret")
        assert status == 200 and "HttpOnly" in headers["set-cookie"] and headers["referrer-policy"] == "no-referrer"
        assert client("GET", "/pictures/1", cookie="leco_token=secret")[0] == 200
        assert client("POST", "/api/state", b"{}", cookie="leco_token=secrets")[0] == 403


def test_of_ten_thousand_pictures_the_next_comes_while_all_are_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long that takes: here as long as the person rates."""
    learned = threading.Event()
    monkeypatch.setattr(live, "choose", lambda *args, **settings: [] if learned.wait(60) else pytest.fail("nobody rated"))
    drawn_project(tmp_path, 1)
    rng, project = np.random.default_rng(0), Project(tmp_path)
    features = rng.normal(size=(10_000, 60)).astype(np.float32)
    project.add_pictures(
        StoredPicture(
            hash=f"p{row}", file=f"{row}.png", shown=f"{row}.png", prompt="a", width=8, height=8, features=np.resize(features[row], 116)
        )
        for row in range(10_000)
    )
    with served(project) as (address, session):
        client = Client(address)
        for number in range(40):
            status, asked = client.post("ask", {"opinion": "beauty", "count": 1})
            assert status == 200
            [question] = asked["questions"]
            answer = {"token": question["token"], "mode": "stars", "pictures": [question["pictures"][0]["id"]], "value": 1 + number % 5}
            client.post("rate", {"opinion": "beauty", "answers": [answer]})
        assert len(session.opinion("beauty").ratings) == 40 and session.opinion("beauty").learned < 0
        learned.set()


def test_a_training_that_was_killed_is_seen_and_goes_on(tmp_path: Path) -> None:
    """The runner, with scripts of no work in place of the trainers."""
    folder = tmp_path / "runs" / "beauty-1"
    folder.mkdir(parents=True)
    (tmp_path / "wait.py").write_text("import time, pathlib, sys\npathlib.Path(sys.argv[1]).touch()\ntime.sleep(float(sys.argv[2]))\n")
    script = str(tmp_path / "wait.py")
    steps = {"scorer": [script, str(folder / "first"), "0"], "slider": [script, str(folder / "second"), "60"]}
    (folder / runs.PLAN).write_text(json.dumps({"answers": 60, "steps": steps}))
    assert runs.describe(folder)["state"] == "interrupted"  # as if it had been killed before it said anything
    runs.launch(folder)
    assert runs.is_running(folder) and runs.describe(folder)["state"] in ("starting", "running")
    wait_until((folder / "second").exists)
    assert runs.is_running(folder) and runs.describe(folder)["state"] == "running" and runs.describe(folder)["done"] == ["scorer"]
    runs.kill_orphans(folder)  # of a run that is alive it touches nothing
    assert runs.is_running(folder)
    [work] = psutil.Process(int((folder / "pid").read_text())).children()
    work.kill()  # as the system does where memory runs out
    wait_until(lambda: runs.describe(folder)["state"] == "interrupted" and not runs.is_running(folder))
    (folder / "second").unlink()
    runs.launch(folder)
    wait_until((folder / "second").exists)
    os.kill(int((folder / "pid").read_text()), signal.SIGKILL)
    wait_until(lambda: runs.describe(folder)["state"] == "interrupted")
    (folder / "second").unlink()
    project = Project(tmp_path)
    beauty, trainings = project.add_opinion("beauty"), runs.Runs(project, RECIPE)
    trainings.resume(beauty)
    with pytest.raises(UserError, match="is being trained already"):
        trainings.resume(beauty)  # pressed twice
    wait_until((folder / "second").exists)
    runs.interrupt(folder)
    wait_until(lambda: runs.describe(folder)["state"] == "stopped")
    assert json.loads((folder / PROGRESS).read_text())["done"] == ["scorer"]
    steps["slider"] = [script, str(folder / "no" / "folder"), "0"]
    (folder / runs.PLAN).write_text(json.dumps({"answers": 60, "steps": steps}))
    runs.launch(folder)
    wait_until(lambda: runs.describe(folder)["state"] == "failed" and not runs.is_running(folder))
    stranger = subprocess.Popen([sys.executable, script, str(tmp_path / "there"), "60"], start_new_session=True)
    (folder / "pid").write_text(str(stranger.pid))  # who has the number of a runner that is long gone
    runs.kill_orphans(folder)
    time.sleep(0.2)
    assert stranger.poll() is None
    stranger.kill()
    stranger.wait()
    assert "FileNotFoundError" in runs.describe(folder)["log"]


def answer_count(session: Any) -> int:
    return len(session.opinion("beauty").ratings)


def wait_until(condition: Any, seconds: float = 40) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.05)


def test_a_server_that_is_killed_loses_no_answer_that_it_acknowledged(tmp_path: Path) -> None:
    """KILLS=50 kills it as often; docs/experiments.md has what came of that."""
    drawn_project(tmp_path, 90)
    rng, acknowledged, unsure = np.random.default_rng(0), set(), set()
    for number in range(int(os.environ.get("KILLS", "2"))):
        command = [sys.executable, "-m", "tests.helpers.rating_project", str(tmp_path)]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
        assert server.stdout is not None
        client = Client(server.stdout.readline().strip())
        timer = threading.Timer(float(rng.uniform(0.02, 0.6)), server.kill)
        for answer in range(10_000):
            token = f"{number}-{answer}"
            unsure.add(token)
            body = {"token": token, "mode": "stars", "pictures": [1 + answer % 90], "value": 1 + answer % 5}
            try:
                status, _ = client.post("rate", {"opinion": "beauty", "answers": [body]})
            except (OSError, http.client.HTTPException, ValueError):
                break  # killed before, while or after it wrote
            assert status == 200
            acknowledged.add(token)
            if answer == 0:
                timer.start()  # from the first answer on, however long the server takes to start
        timer.join()
        server.wait()
        server.stdout.close()
    project = Project(tmp_path)
    kept = [rating.token for rating in project.ratings(project.opinion("beauty"))]
    assert acknowledged and acknowledged <= set(kept) <= unsure and len(set(kept)) == len(kept)
    print(f"{len(acknowledged)} acknowledged, {len(kept)} kept")
