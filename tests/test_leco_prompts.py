"""Files in the formats of sd-scripts' docs/train_leco.md, and what is refused in them."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from library.errors import UserError
from library.prompts.leco_files import LecoSetting, is_leco_file, load_leco_settings, unused_leco_keys

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str) -> Path:
        path = tmp_path / "leco.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def essence(setting: LecoSetting) -> tuple[str, str, str, float]:
    return setting.positive, setting.unconditional, setting.action, setting.multiplier


def test_prompts_with_every_field(write: Write) -> None:
    """The shape of the documentation's section 2.1."""
    path = write("""
[[prompts]]
target = "impressionism"
positive = "impressionist painting"
unconditional = "photo"
neutral = "picture"
action = "enhance"
guidance_scale = 1.5
resolution = [512, 768]
dynamic_resolution = true
batch_size = 2
dynamic_crops = true
multiplier = -1
weight = 0.5
""")
    assert load_leco_settings(path) == [
        LecoSetting(
            target="impressionism",
            positive="impressionist painting",
            unconditional="photo",
            neutral="picture",
            action="enhance",
            guidance_scale=1.5,
            size=(512, 768),
            dynamic_resolution=True,
            batch_size=2,
            dynamic_crops=True,
            multiplier=-1.0,
            weight=0.5,
        )
    ]


def test_what_a_prompt_leaves_out_is_as_in_sd_scripts(write: Write) -> None:
    path = write(
        'guidance_scale = 2\nresolution = 640\n[[prompts]]\ntarget = "a"\nunconditional = "b"\n[[prompts]]\ntarget = "c"\nresolution = 512'
    )
    first, second = load_leco_settings(path)
    assert (first.positive, first.neutral, first.action, first.multiplier, first.weight) == ("a", "b", "erase", 1.0, 1.0)
    assert (first.guidance_scale, first.size, second.guidance_scale, second.size) == (2.0, (640, 640), 2.0, (512, 512))
    assert (second.neutral, second.unconditional, second.shift, second.batch_size) == ("", "", -2.0, None)


def test_a_slider_with_both_ends_is_four_settings(write: Write) -> None:
    """The shape of section 2.2: the two at one sign have one target, neutral + m (positive - negative)."""
    path = write("""
guidance_scale = 1.0
resolution = 1024
neutral = ""

[[targets]]
target_class = "1dog"
positive = "1dog, long fur"
negative = "1dog, short fur"
multiplier = 1.5
weight = 2.0
""")
    settings = load_leco_settings(path)
    long, short = "1dog, long fur", "1dog, short fur"
    assert [essence(setting) for setting in settings] == [
        (short, long, "erase", 1.5),
        (long, short, "enhance", 1.5),
        (long, short, "erase", -1.5),
        (short, long, "enhance", -1.5),
    ]
    assert {(setting.target, setting.size, setting.weight, setting.neutral) for setting in settings} == {("1dog", (1024, 1024), 2.0, "")}
    for setting in settings:  # the sign of the shift along long - short is the multiplier's
        ahead = 1 if setting.positive == long else -1
        assert ahead * setting.shift * setting.multiplier > 0


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        ("positive", [("sharp", "", "enhance", 1.0), ("sharp", "", "erase", -1.0)]),
        ("negative", [("sharp", "", "erase", 1.0), ("sharp", "", "enhance", -1.0)]),
    ],
)
def test_a_slider_with_one_end_is_two_settings(write: Write, end: str, expected: list) -> None:
    settings = load_leco_settings(write(f'[[targets]]\ntarget_class = ""\n{end} = "sharp"'))
    assert [essence(setting) for setting in settings] == expected


def test_each_neutral_and_each_resolution_is_a_set_of_its_own(write: Write) -> None:
    """The shape of section 2.3."""
    path = write("""
guidance_scale = 1.5
resolutions = [[512, 512], [512, 768]]
neutrals = ["", "photo of a dog", "a drawing"]

[[targets]]
target_class = "dog"
positive = "happy dog"
negative = "sad dog"
""")
    settings = load_leco_settings(path)
    assert len(settings) == 3 * 2 * 4
    assert {(setting.neutral, setting.size) for setting in settings} == {
        (neutral, size) for neutral in ("", "photo of a dog", "a drawing") for size in ((512, 512), (512, 768))
    }


def test_neutrals_come_from_files_beside_the_toml_and_a_table_has_its_own(write: Write, tmp_path: Path) -> None:
    (tmp_path / "neutrals.txt").write_text("a lake\n\n  a hill \n", encoding="utf-8")
    path = write("""
neutral_prompt_file = "neutrals.txt"
neutrals = ["a road"]

[[targets]]
target_class = ""
positive = "detailed"

[[targets]]
target_class = ""
positive = "detailed"
neutral = "a cup"

[[targets]]
target_class = ""
positive = "detailed"
neutrals = ["a tree", "a leaf"]
""")
    neutrals = [setting.neutral for setting in load_leco_settings(path)]
    assert neutrals == ["a road"] * 2 + ["a lake"] * 2 + ["a hill"] * 2 + ["a cup"] * 2 + ["a tree"] * 2 + ["a leaf"] * 2


@pytest.mark.parametrize(
    "text",
    [
        'target_class = "dog"\npositive = "happy dog"',
        '[slider]\ntarget_class = "dog"\npositive = "happy dog"',
        '[[slider.targets]]\ntarget_class = "dog"\npositive = "happy dog"',
        '[slider]\npositive = "happy dog"\n[[slider.targets]]\ntarget_class = "dog"',
        '[[prompts]]\ntarget_class = "dog"\npositive = "happy dog"',
    ],
)
def test_a_slider_may_stand_in_any_of_the_places(write: Write, text: str) -> None:
    settings = load_leco_settings(write(text))
    assert [(setting.target, *essence(setting)) for setting in settings] == [
        ("dog", "happy dog", "", "enhance", 1.0),
        ("dog", "happy dog", "", "erase", -1.0),
    ]


def test_a_target_may_stand_among_targets(write: Write) -> None:
    (setting,) = load_leco_settings(write('[[targets]]\ntarget = "dog"\naction = "enhance"'))
    assert (setting.target, setting.positive, setting.shift) == ("dog", "dog", 1.0)


def test_an_unknown_key_above_the_tables_is_named_in_a_warning(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    path = write('guidance_scal = 3\nnegative = "x"\n[[prompts]]\ntarget = "a"')
    with caplog.at_level(logging.WARNING):
        (setting,) = load_leco_settings(path)
    assert setting.guidance_scale == 1.0
    assert "guidance_scal (did you mean guidance_scale?)" in caplog.text and "negative" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[[prompts]]\ntarget = "a"\nguidance_scal = 3', "number 1: unknown key 'guidance_scal'; did you mean guidance_scale"),
        ('[[targets]]\ntarget_class = "a"\npostive = "b"', "unknown key 'postive'; did you mean positive"),
        ('[[prompts]]\npositive = "a"', "target is missing"),
        ('[[prompts]]\ntarget = "a"\naction = "raise"', "erase or enhance"),
        ('[[targets]]\ntarget_class = "a"', "positive and negative are both empty"),
        ('[[prompts]]\ntarget = "a"\nresolution = 500', "multiples of 8"),
        ('[[prompts]]\ntarget = "a"\nresolution = 800000', "multiples of 8"),
        ('[[prompts]]\ntarget = "a"\nresolution = [512]', "multiples of 8"),
        ('[[prompts]]\ntarget = "a"\nmultiplier = 0', "learns nothing"),
        ('[[prompts]]\ntarget = "a"\nweight = 0', "above 0"),
        ('[[prompts]]\ntarget = "a"\nweight = nan', "not a number"),
        ('[[prompts]]\ntarget = "a"\nbatch_size = 1.5', "whole number"),
        ("[[prompts]]\ntarget = 3", "text in quotes"),
        ('[[prompts]]\ntarget = "a"\ndynamic_crops = 1', "true or false"),
        ('[[targets]]\ntarget_class = "a"\npositive = "b"\nneutrals = "c"', "list of prompts"),
        ('[[targets]]\ntarget_class = "a"\npositive = "b"\nneutral_prompt_file = "none.txt"', "cannot be read"),
        ("guidance_scale = 1", r"no \[\[prompts\]\] or \[\[targets\]\]"),
        ("targets = []", r"no \[\[prompts\]\] or \[\[targets\]\]"),
        ("a = ", "not valid TOML"),
    ],
)
def test_what_cannot_be_understood_is_refused(write: Write, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_leco_settings(write(text))


def test_a_missing_file_is_a_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_leco_settings(tmp_path / "none.toml")


def test_leco_in_yaml_is_the_same(write: Write, tmp_path: Path) -> None:
    path = tmp_path / "leco.yaml"
    path.write_text('- target: "a"\n  positive: # the target\n  neutral: ""\n  resolution: [96, 64]\n  action: enhance\n', encoding="utf-8")
    assert is_leco_file(path)
    in_toml = write('[[prompts]]\ntarget = "a"\nneutral = ""\nresolution = [96, 64]\naction = "enhance"\n')
    assert load_leco_settings(path) == load_leco_settings(in_toml)


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ('guidance_scale = 2\n[[prompts]]\ntarget = "a"\nweight = 2\naction = "erase"', ["action", "guidance_scale"]),
        ('[slider]\n[[slider.targets]]\npositive = "b"\nresolution = 64', ["positive"]),
        ('target_class = "a"\nnegative = "b"', ["negative"]),
        ('[[prompts]]\nprompt = "a"\nguidance_scale = 3', []),
    ],
)
def test_keys_that_only_leco_reads(write: Write, text: str, keys: list[str]) -> None:
    assert unused_leco_keys(write(text)) == keys


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[[prompts]]\ntarget = "a"', True),
        ('[[prompts]]\nprompt = "a"', False),
        ('[[targets]]\ntarget_class = "a"', True),
        ('[slider]\ntarget_class = "a"', True),
        ('target_class = "a"', True),
        ("guidance_scale = 1", False),
    ],
)
def test_a_leco_file_is_known_from_a_list_of_prompts(write: Write, tmp_path: Path, text: str, expected: bool) -> None:
    assert is_leco_file(write(text)) is expected
    (tmp_path / "prompts.txt").write_text("target = 1")
    assert not is_leco_file(tmp_path / "prompts.txt")
