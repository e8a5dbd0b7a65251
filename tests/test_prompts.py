"""Prompt lists of every kind."""

from pathlib import Path

import pytest

from library.errors import UserError
from library.prompts import load_prompts
from library.types import PromptSpec


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_lines_with_sd_scripts_options(tmp_path: Path) -> None:
    text = "# comment\n\na red circle\na cat -- really --n ugly, bad --w 96 --h 64 --l 3.5 --d 1 --s 20\n"
    prompts = load_prompts(write(tmp_path / "p.txt", text))
    assert prompts == [
        PromptSpec(prompt="a red circle"),
        PromptSpec(prompt="a cat -- really", negative_prompt="ugly, bad", width=96, height=64, guidance_scale=3.5),
    ]


def test_toml_tables_take_top_level_defaults(tmp_path: Path) -> None:
    text = 'weight = 2\n[[prompts]]\nprompt = "beautiful"\n[[prompts]]\nprompt = "ugly"\ndirection = -1\nweight = 1\n'
    prompts = load_prompts(write(tmp_path / "p.toml", text))
    assert prompts == [PromptSpec(prompt="beautiful", weight=2.0), PromptSpec(prompt="ugly", direction=-1.0)]


def test_leco_file_of_sd_scripts_gives_targets(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = '[[prompts]]\ntarget = "van gogh"\nunconditional = "blurry"\nresolution = [96, 64]\naction = "erase"\n'
    prompts = load_prompts(write(tmp_path / "p.toml", text))
    assert prompts == [PromptSpec(prompt="van gogh", negative_prompt="blurry", height=96, width=64)]
    assert "action" in caplog.text


def test_parti_rows_and_categories(tmp_path: Path) -> None:
    path = write(tmp_path / "p.tsv", 'Prompt\tCategory\tChallenge\tNote\na "dog\tAnimals\tBasic\t\na car\tVehicles\tBasic\tx\n')
    assert [prompt.prompt for prompt in load_prompts(path)] == ['a "dog', "a car"]
    assert [prompt.prompt for prompt in load_prompts(path, ["Vehicles"])] == ["a car"]
    with pytest.raises(UserError, match="no category 'Food'; it has Animals, Vehicles"):
        load_prompts(path, ["Food"])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", "\n# nothing\n", "holds no prompts"),
        ("p.txt", "cat --w 100", "multiple of 8"),
        ("p.txt", "cat --x 3", "--x is not an option"),
        ("p.toml", "[[prompts]]\nprmpt = 'cat'", "unknown key 'prmpt'; did you mean prompt?"),
        ("p.toml", "[[prompts]]\nprompt = 'cat'\nweight = 0", "above 0"),
        ("p.toml", "[[prompts]]\nprompt = 'cat'\nweight = 'much'", "not a number"),
        ("p.toml", "[[prompts]]\nprompt = 'cat'\ndirection = 2", "direction is 2.0"),
        ("p.toml", "[[prompts]\n", "not valid TOML"),
        ("p.toml", "prompt = 'cat'", "holds no prompts"),
        ("p.tsv", "Text\na cat\n", "needs a column Prompt"),
    ],
)
def test_bad_files_say_what_is_wrong(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_prompts(write(tmp_path / name, text))
    assert str(tmp_path) in str(caught.value)


def test_missing_file() -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_prompts("nowhere.txt")
