"""The words, tables and pictures of a measurement: they say what the numbers say, and nothing in them can be injected."""

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from library.measuring.comparison import comparison_dict, summarise
from library.measuring.record import EvaluationRecord
from library.reports import plots
from library.reports.plots import GAP, HEADER, LABEL_WIDTH, LIGHT, multiplier_grid, record_plots, signed
from library.reports.report import STATISTICS, html_report
from library.reports.text import comparison_text, summary_sentence, text_table
from tests.helpers.records import record_of

MULTIPLIERS = (-1.0, 0.0, 1.0)


def measured(score=(1.2, 1.2), judge=(1.0, 1.0), captions=(1.0, 1.0, 1.0), name="brighter", **statistics) -> EvaluationRecord:
    """A slider whose gains at +1 and -1 are these; captions are shares; with the pictures of one prompt."""
    record = record_of(score, {"judge": judge}, {"captions": captions}, score_name="score", spread=0.02, statistics=statistics, name=name)
    generator = torch.Generator().manual_seed(0)
    return replace(record, pictures=(torch.randint(0, 256, (3, 3, 40, 64), generator=generator, dtype=torch.uint8),))


def test_a_slider_is_told_of_in_plain_words():
    words = summary_sentence(measured())
    assert "training score score rises by 1.2" in words and "falls by 1.2" in words and "independent judge judge rises by 1.0" in words
    assert "captions holds for 100% of the base model's pictures, 100% at weight +1 and 100% at weight -1" in words


def test_text_table_is_ascii_and_aligned():
    lines = text_table(measured(captions=(0.9, 1.0, 0.8))).splitlines()
    assert all(line.isascii() for line in lines)
    table = lines[1:7]
    assert len({len(line) for line in table}) == 1
    assert table[-1].split()[0] == "+1" and "+1.2" in table[-1] and "0.812 [" in table[-1]
    assert any(line.startswith("warning: At weight +1 captions holds for 19% of the pictures less") for line in lines)


class Page(HTMLParser):
    """Counts tags and keeps what a browser would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)
        self.sources += [value or "" for key, value in attrs if key in ("src", "srcset", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag


def test_report_is_self_contained_and_escapes_everything():
    evil = '<script>alert("1")</script>&'
    record = measured(name=evil)
    response = replace(record.responses["score"], name=evil)
    record = replace(
        record,
        settings={"note": evil},
        prompts=(evil, *record.prompts[1:]),
        responses={evil: response},
        origin={evil: evil},
    )
    text = html_report([record], title=evil)
    page = Page(text)
    assert page.open == [] and "script" not in page.tags and "link" not in page.tags
    assert len(page.sources) == 3 + 2 and all(re.match(r"data:image/(png|jpeg);base64,", source) for source in page.sources)
    assert "url(" not in text and "@import" not in text and text.count("&lt;script&gt;") >= 5


def shown(source: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))))


def test_report_shows_every_picture_as_it_is_and_large_ones_smaller():
    record = measured()
    large = torch.zeros((3, 3, 640, 320), dtype=torch.uint8)
    large[:, 1] = 200
    record = replace(record, pictures=(*record.pictures, large))
    sources = Page(html_report([record])).sources
    for place in range(3):
        assert np.array_equal(shown(sources[place]), record.pictures[0][place].permute(1, 2, 0).numpy())
    assert shown(sources[3]).shape == (512, 256, 3) and np.abs(shown(sources[3]).astype(int) - [0, 200, 0]).max() < 8
    light, dark = (shown(source)[2, 2, :3].tolist() for source in (sources[7], sources[6]))
    assert light == [255, 255, 255] and dark == [0x1D, 0x21, 0x28]  # the plot for a dark page has its ground


def test_report_says_what_one_needs_to_know():
    text = html_report([measured(judge=(0.4, 0.5))])
    assert "recommended weight" in text and "Begin with weight +1" in text and "usable from -1 (no farther measured) to +1" in text
    assert "66%" in text or "67%" in text  # of 1.2 standard deviations the judges see 0.4
    assert text.index("Same prompt, same seed") < text.index("Score over weight") < text.index("What to know before using it")
    text = html_report([measured(saturation=(0.5, 1.75))])
    assert STATISTICS["saturation"][0] in text and "1.75" in text


def test_report_compares_several_sliders_pair_by_pair():
    records = [measured(name="step 100"), measured((0.4, 0.4), name="step 50")]
    text = html_report(records)
    assert text.count("How much the scores move") == 2 and "+1.2" in text and "+0.4" in text
    assert "step 100 +1.0" in text.split("</p>")[1] or "step 50 +1.0" in text.split("</p>")[1]  # the judge of both gains 1
    assert "Side by side" in text and "<b>-0.8" in text and "<b>+0.8" in text  # step 50 minus step 100 at +1 and -1
    assert Page(text).open == [] and text.count("<details>") == 5  # the second grid, each slider, and the prompts of both
    found = comparison_dict(records)
    rows = found["gain_differences_std"]
    assert found["against"] == "step 100" and isinstance(rows, dict)
    assert [round(cell[0], 1) for cell in rows["step 50"]["score"]] == [0.8, 0.0, -0.8]
    assert "step 50 - step 100, score: -0.8" in comparison_text(records)


def test_a_summary_knows_how_much_the_judges_do_not_see() -> None:
    found = summarise(measured((1.0, 1.0), judge=(0.25, 0.9)))
    assert found.hack_index == pytest.approx(0.75, abs=0.03) and found.score == "score" and found.recommended == 1.0
    assert found.line and found.line.slope.value == pytest.approx(1.0, abs=0.03)
    burnt = summarise(measured(clipped=(0.0, 0.5)))
    assert burnt.line and burnt.line.usable[1] < 1 and burnt.recommended == burnt.line.usable[1]
    backwards = measured((-1.0, -1.0))
    assert summarise(backwards).recommended is None and "No weight is usable" in html_report([backwards])


def test_grid_shows_every_pixel_where_it_belongs():
    pictures = torch.randint(0, 256, (3, 3, 40, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tall = torch.zeros((3, 3, 640, 320), dtype=torch.uint8)
    tall[:, 0] = 255
    grid = np.asarray(Image.open(io.BytesIO(multiplier_grid([pictures, tall], ["wide", "tall"], MULTIPLIERS))))
    cell = 160  # the tall pictures are reduced to 160 x 320, the wide ones enlarged twice to 128 x 80
    assert grid.shape == (HEADER + 80 + 320 + 2 * GAP, LABEL_WIDTH + 3 * (cell + GAP), 3)
    left = LABEL_WIDTH + 2 * (cell + GAP) + (cell - 128) // 2
    shown = grid[HEADER : HEADER + 80, left : left + 128]
    assert np.array_equal(shown, pictures[2].permute(1, 2, 0).numpy().repeat(2, 0).repeat(2, 1))
    assert tuple(grid[HEADER + 80 + GAP + 160, LABEL_WIDTH + 80]) == (255, 0, 0)


def test_scores_of_one_unit_share_a_plot_and_two_sliders_have_one_a_score():
    record = measured()
    alone, beside = record_plots([record]), record_plots([record, replace(record, name="other")])
    unscaled = [name for name, response in record.responses.items() if response not in record.scaled]
    assert list(alone) == ["Gain of every score over the weight.", *(f"Mean of {name} over the weight." for name in unscaled)]
    assert len(unscaled) < len(record.responses) == len(beside)
    for draw in (*alone.values(), *beside.values()):
        picture = Image.open(io.BytesIO(draw(LIGHT))).convert("RGB")
        colours = {colour for _, colour in picture.getcolors(maxcolors=1 << 24) or []}
        assert (0x25, 0x63, 0xEB) in colours  # the line is drawn


def test_all_gains_of_several_sliders_are_drawn_on_one_scale(monkeypatch):
    """So that a small side effect looks small; a share has its own."""
    scales = {}

    def keep(figure):
        [axes] = figure.axes
        scales[axes.get_title(loc="left")] = axes.get_ylim()
        return b""

    monkeypatch.setattr(plots, "figure_png", keep)
    record = measured(judge=(0.01, 0.02))
    for draw in record_plots([record, replace(record, name="other")]).values():
        draw(LIGHT)
    [(low, high)] = {scales.pop(score.name) for score in record.scaled}
    assert low < min(score.gains_std[0].low for score in record.scaled) and high > max(score.gains_std[-1].high for score in record.scaled)
    assert scales and (low, high) not in scales.values()


def test_each_plot_has_the_lines_that_its_description_names(monkeypatch):
    """Every drawing is made after all of them were prepared, and must not take the last one's lines."""
    shown = []
    monkeypatch.setattr(plots, "weight_plot", lambda lines, title, **_: shown.append((title, lines)) or b"")
    record = measured()
    for draw in record_plots([record]).values():
        draw(LIGHT)
    (title, lines), *others = shown
    assert title == "Training score and judges" and [line.values for line in lines] == [score.gains_std for score in record.scaled]
    assert others and all([line.values for line in lines] == [record.responses[title].means] for title, lines in others)


def test_signed():
    assert [signed(value) for value in (-0.5, 0.0, 1.0)] == ["\u22120.5", "0", "+1"]
    assert re.fullmatch(r"\+1\.5", signed(1.5))
