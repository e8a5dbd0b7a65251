"""A simulated person on the real page in real Chromium: by keyboard alone, in every mode, and after the server was gone."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from tests.helpers.rating_project import drawn_project, served, short_recipe, stars_of

pytest.importorskip("uvicorn", reason="requirements-ui.txt")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is in requirements-test.txt")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
AXE = os.environ.get("AXE_CORE", "")  # axe.min.js of the npm package axe-core; benchmarks/README.md says how to get it
VIEWS = ("rate", "insight", "opinion-view", "train")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium; on Debian: apt install chromium")]

Desk = tuple[Any, Any, np.ndarray, list[str]]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def desk(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    """A browser's page on a project of drawings, its session, the true worths, and what the page complained of."""
    project, worth = drawn_project(tmp_path_factory.mktemp("project"), 120)
    complaints: list[str] = []
    with served(project) as (address, session):
        page = browser.new_page(viewport={"width": 1440, "height": 900})
        page.set_default_timeout(30_000)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.goto(address)
        page.wait_for_selector(".stage figure img")
        yield page, session, worth, complaints
        page.close()


def shown(page: Any) -> int:
    """The number of the picture to rate."""
    return int(page.get_attribute(".stage figure img", "src").rpartition("/")[2])


def press(page: Any, key: str) -> None:
    """Press a key and wait until another question is shown."""
    before = page.inner_html(".stage")
    page.keyboard.press(key)
    page.wait_for_function("before => document.querySelector('.stage').innerHTML !== before", arg=before)


def wait_for(page: Any, session: Any, count: int) -> list[Any]:
    for _ in range(200):
        ratings = session.opinion("beauty").ratings
        if len(ratings) >= count:
            return ratings
        page.wait_for_timeout(50)
    raise AssertionError(f"{len(ratings)} of {count} answers came")


def test_a_person_rates_by_keyboard_and_is_understood(desk: Desk) -> None:
    page, session, worth, complaints = desk
    page.wait_for_selector(".stage figure img")
    rng = np.random.default_rng(0)
    for _ in range(40):
        press(page, str(stars_of(worth[shown(page) - 1], rng)))
    press(page, " ")  # skip
    first = shown(page)
    press(page, "1")
    press(page, "z")
    assert shown(page) == first  # the mistaken one comes back
    press(page, "5")
    ratings = wait_for(page, session, 42)
    assert [r.value for r in ratings if r.first == first and r.reason == "picked"] == [5]
    assert sum(r.mode == "skip" for r in ratings) == 1 and any(r.reason == "repeat" for r in ratings)
    for _ in range(200):
        if session.opinion("beauty").progress.answers >= 35:
            break
        page.wait_for_timeout(100)
    progress = session.opinion("beauty").progress
    assert progress.held_out is not None and progress.held_out.high > 0.4  # 13 answers or so; which depends on how fast the machine is
    page.wait_for_function("() => /predicts you to -?0\\.[0-9]/.test(document.querySelector('.side').textContent)")
    true = np.corrcoef(session.opinion("beauty").worths()[0], worth)[0, 1]
    assert true > 0.75
    assert complaints == []


def test_pairs_and_grid_by_keyboard(desk: Desk) -> None:
    page, session, _, complaints = desk
    before = len(session.opinion("beauty").ratings)
    press(page, "p")
    page.wait_for_selector(".pair img")
    for key in ("ArrowLeft", "ArrowRight", "ArrowDown"):
        press(page, key)
    pairs = [r.value for r in wait_for(page, session, before + 3) if r.mode == "pair"]
    assert pairs == [1, 0, 0.5]
    press(page, "g")
    page.wait_for_selector(".grid .cell")
    page.focus(".grid .cell")
    for value in range(1, 6):
        page.keyboard.press(str(value))
    ratings = wait_for(page, session, before + 8)
    assert [r.value for r in ratings[-5:]] == [1, 2, 3, 4, 5]
    page.focus(".grid .cell:nth-child(2)")
    page.keyboard.press("1")  # changes its mind
    ratings = wait_for(page, session, before + 8)
    page.wait_for_timeout(300)
    assert sorted(r.value for r in session.opinion("beauty").ratings[-5:]) == [1, 1, 3, 4, 5]
    press(page, "s")
    assert complaints == []


def test_a_whole_session_from_an_empty_page_to_a_slider(browser: Any, tmp_path: Path) -> None:
    """Short; `benchmarks.rating session` is the same with the page's own settings, and measures what comes of it."""
    project, worth = drawn_project(tmp_path, 60)
    prompts = [f"a {colour} {shape}" for colour in ("red", "blue") for shape in ("circle", "square")]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts), encoding="utf-8")  # few, since each is measured
    judge = str(Path(__file__).parents[1] / "examples" / "shapes" / "scores.py") + ":brightness"
    with served(project, recipe=short_recipe(tmp_path, scorer_steps=10, train_steps=2, judges=(judge,))) as (address, session):
        page = browser.new_page(viewport={"width": 1440, "height": 900})
        page.set_default_timeout(30_000)
        page.goto(address)
        page.wait_for_selector(".stage figure img")
        rng = np.random.default_rng(1)
        for number in range(24):
            if number == 10:
                page.goto(f"{address}/#train")
                page.wait_for_selector("text=Give at least 20 answers")
                assert page.is_disabled("[data-focus=begin]")
                page.goto(f"{address}/#rate")
                page.wait_for_selector(".stage figure img")
            press(page, str(stars_of(worth[shown(page) - 1], rng)))
        wait_for(page, session, 24)
        page.goto(f"{address}/#train")
        page.dblclick("[data-focus=begin]:enabled")
        page.wait_for_selector("text=You may close this page")
        page.close()  # it goes on
        page = browser.new_page(viewport={"width": 390, "height": 844})
        page.goto(f"{address}/#train")
        page.wait_for_selector("text=Your slider is ready.", timeout=900_000)
        assert [path.name for path in (tmp_path / "runs").iterdir()] == ["beauty-1"]  # it was pressed twice
        assert "Dashed: brightness" in page.inner_text(".page") and page.query_selector(".judge-dot")
        assert "train_leco_score.py --config_file" in page.inner_text(".page")
        for name in ("Download the slider", "The scorer"):
            with page.expect_download() as download:
                page.click(f"text={name}")
            tensors = load_file(download.value.path())
            assert tensors and all(tensor.isfinite().all() for tensor in tensors.values())
        assert page.request.get(address + page.get_attribute("text=The report", "href")).ok
        assert page.evaluate("() => [...document.images].every(image => image.complete && image.naturalWidth > 0)")
        page.close()


@pytest.mark.parametrize("size", [(1440, 900), (1024, 768), (390, 844)])
def test_nothing_scrolls_while_rating_and_nothing_sticks_out(desk: Desk, size: tuple[int, int]) -> None:
    page, _, _, complaints = desk
    page.set_viewport_size({"width": size[0], "height": size[1]})
    for view in VIEWS:
        page.evaluate("view => { location.hash = view }", view)
        page.wait_for_timeout(400)
        width, height = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.scrollHeight]")
        assert width <= size[0], (view, width)
        if view == "rate":
            assert height <= size[1]
            box = page.locator(".controls").bounding_box()
            assert box["y"] + box["height"] <= size[1]
        if folder := os.environ.get("SCREENSHOTS"):
            page.screenshot(path=Path(folder, f"{view}_{size[0]}.png"))
    page.evaluate("location.hash = 'rate'")
    assert complaints == []


@pytest.mark.skipif(not AXE, reason="AXE_CORE is not set")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(desk: Desk, scheme: str) -> None:
    page, _, _, _ = desk
    page.set_viewport_size({"width": 1440, "height": 900})
    page.emulate_media(color_scheme=scheme)
    found = []
    for view in (*VIEWS, "rate p", "rate g", "rate s"):
        page.evaluate("view => { location.hash = view }", view.split()[0])
        page.wait_for_timeout(600)
        if " " in view:
            press(page, view[-1])
        page.evaluate(Path(AXE).read_text(encoding="utf-8"))  # not as a script element, which the page's own policy refuses
        result = page.evaluate("() => axe.run()")
        found += [(view, v["id"], v["nodes"][0]["html"]) for v in result["violations"] if v["impact"] in ("serious", "critical")]
    page.emulate_media(color_scheme="light")
    page.evaluate("location.hash = 'rate'")
    assert found == []


def test_a_view_asks_for_nothing_before_it_knows_the_opinion(browser: Any, tmp_path: Path) -> None:
    project, _ = drawn_project(tmp_path, 3)
    with served(project) as (address, _):
        page = browser.new_page()
        asked: list[Any] = []
        late: list[Any] = []  # the first answer, which says which opinions there are, comes when we let it
        page.on("response", lambda response: asked.append((response.url, response.status)) if "/api/ask" in response.url else None)
        page.route("**/api/state", lambda route: late.append(route), times=1)
        page.goto(f"{address}/#insight")
        page.evaluate("location.hash = 'rate'")
        page.wait_for_timeout(300)
        assert late and asked == []
        late[0].continue_()
        page.wait_for_selector(".stage figure img")
        assert asked and all(status == 200 for _, status in asked)
        page.close()


def test_a_prompt_that_is_markup_stays_text(browser: Any, tmp_path: Path) -> None:
    project, _ = drawn_project(tmp_path, 3)
    project._db.execute("UPDATE pictures SET prompt = '<img src=x onerror=alert(1)>' || id")
    with served(project) as (address, _):
        page = browser.new_page()
        dialogs: list[Any] = []
        page.on("dialog", lambda dialog: (dialogs.append(dialog), dialog.dismiss()))
        page.goto(address)
        page.wait_for_selector(".stage figure img")
        assert page.inner_text("figcaption").startswith("<img src=x") and page.locator("img[src=x]").count() == 0
        assert dialogs == []
        page.close()
