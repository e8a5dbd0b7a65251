"""Prompt lists of every kind."""

import time
from pathlib import Path

import pytest
import torch

from library.errors import UserError
from library.models.prompt_syntax import escape, parse_weights, plain_text, read_as_text
from library.prompts.contents import ROW_ENDINGS, TABLE_ENDINGS
from library.prompts.files import PromptOptions, load_prompts, spread, with_aspect_buckets
from library.types import PromptSpec
from tests.helpers.rated_files import write


def texts(path: Path, text: str, **options) -> list[str]:
    return [prompt.prompt for prompt in load_prompts(write(path, text), options=PromptOptions(**options))]


def test_lines_with_sd_scripts_options(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = "# comment\n\na red circle\na cat -- really --n ugly, bad --w 96 --h 64 --l 3.5 --d 12345678901 --s 20 --ss euler_a\n--s 4\n"
    prompts = load_prompts(write(tmp_path / "p.txt", text))
    own = {"width": 96, "height": 64, "guidance_scale": 3.5, "seed": 12345678901, "num_steps": 20}
    assert prompts == [
        PromptSpec(prompt="a red circle"),
        PromptSpec(prompt="a cat -- really", negative_prompt="ugly, bad", **own),
        PromptSpec(prompt="", num_steps=4),
    ]
    assert caplog.text.count("do nothing here") == 1 and "run's sampler: --ss" in caplog.text


def test_lines_with_our_own_options(tmp_path: Path) -> None:
    prompts = load_prompts(write(tmp_path / "p.txt", "ugly --direction -1 --weight 2.5\nold --ow 512 --oh 384 --ct 8 --cl 0\n"))
    assert prompts == [
        PromptSpec(prompt="ugly", direction=-1.0, weight=2.5),
        PromptSpec(prompt="old", original_width=512, original_height=384, crop_top=8),
    ]


def test_toml_tables_take_top_level_defaults(tmp_path: Path) -> None:
    text = 'weight = 2\n[[prompts]]\nprompt = "beautiful"\nseed = 3\n[[prompts]]\nprompt = "ugly"\ndirection = -1\nweight = 1\n'
    prompts = load_prompts(write(tmp_path / "p.toml", text))
    assert prompts == [PromptSpec(prompt="beautiful", weight=2.0, seed=3), PromptSpec(prompt="ugly", direction=-1.0)]


def test_leco_file_of_sd_scripts_gives_targets(tmp_path: Path) -> None:
    text = '[[prompts]]\ntarget = "van gogh"\nunconditional = "blurry"\nresolution = [96, 64]\naction = "erase"\n'
    prompts = load_prompts(write(tmp_path / "p.toml", text))
    assert prompts == [PromptSpec(prompt="van gogh", negative_prompt="blurry", height=96, width=64)]


@pytest.mark.parametrize(
    "text",
    [
        'weight = 3.0\n[[targets]]\ntarget_class = "person"\npositive = "old"\nnegative = "young"\nresolutions = [[96, 64], [64, 96]]\n',
        'guidance_scale = 1.0\n[slider]\nweight = 3.0\nresolutions = [[96, 64], [64, 96]]\n[[slider.targets]]\ntarget_class = "person"\n',
        'target_class = "person"\nnegative = "young"\nweight = 3.0\nresolutions = [[96, 64], [64, 96]]\n',
    ],
)
def test_leco_sliders_give_what_they_act_on(tmp_path: Path, text: str) -> None:
    prompts = load_prompts(write(tmp_path / "p.toml", text))
    assert prompts == [
        PromptSpec(prompt="person", height=96, width=64, weight=1.5),
        PromptSpec(prompt="person", height=64, width=96, weight=1.5),
    ]


def test_a_slider_of_no_class_acts_on_the_empty_prompt(tmp_path: Path) -> None:
    assert load_prompts(write(tmp_path / "p.toml", '[[targets]]\npositive = "old"\n')) == [PromptSpec(prompt="")]


SAMPLE = {"width": 512, "height": 768, "guidance_scale": 7.0, "negative_prompt": "ugly"}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "p.toml",
            '[prompt]\nwidth = 512\nheight = 768\nscale = 7\nnegative_prompt = "ugly"\nsample_sampler = "ddim"\n'
            '[[prompt.subset]]\nprompt = "a cat"\nseed = 1\n[[prompt.subset]]\nprompt = "a dog"\nsample_steps = 28\n',
        ),
        (
            "p.json",
            '[{"prompt": "a cat", "negative_prompt": "ugly", "width": 512, "height": 768, "seed": 1, "scale": 7.0, "guidance_scale": 3.5,'
            ' "enum": 0}, "a dog --n ugly --w 512 --H 768 --l 7 --s 28 --g 3.5"]',
        ),
        (
            "p.YAML",
            "- {prompt: a cat, negative_prompt: ugly, width: 512, height: 768, seed: 1, scale: 7}\n"
            "- {prompt: a dog, negative_prompt: ugly, width: 512, height: 768, sample_steps: 28, scale: 7, seed: }\n",
        ),
        (
            "p.csv",
            "name;Prompt;negative_prompt;width;height;cfg;scale;seed;sample_steps\r\n"
            "x;a cat;ugly;512;768;;7;1;\r\ny;a dog;ugly;512;768;;7;;28\r\n",
        ),
        (
            "p.txt",
            '--prompt "a cat" --negative_prompt "ugly" --width 512 --height 768 --cfg_scale 7 --seed 1 --sampler_name "Euler a"\n'
            "a dog --n ugly --w 512 --h 768 --l 7 --s 28\n",
        ),
    ],
)
def test_sample_prompts_of_other_programs(tmp_path: Path, name: str, text: str) -> None:
    assert load_prompts(write(tmp_path / name, text)) == [
        PromptSpec(prompt="a cat", seed=1, **SAMPLE),
        PromptSpec(prompt="a dog", num_steps=28, **SAMPLE),
    ]


def test_leco_in_yaml(tmp_path: Path) -> None:
    text = (
        '- target: "cat"\n  positive: # the target\n  unconditional: ""\n  resolution: 512\n  dynamic_resolution: false\n  batch_size: 1\n'
    )
    assert load_prompts(write(tmp_path / "p.yml", text)) == [PromptSpec(prompt="cat", width=512, height=512)]


def test_only_line_ends_end_a_line(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes("\ufeffa\u2028b\u0085\r\nc\x0cd\re\n".encode())
    assert [prompt.prompt for prompt in load_prompts(tmp_path / "p.txt")] == ["a\u2028b", "c\x0cd", "e"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b'[{"prompt": "a"}]', "no list of prompts, but JSON"),
        ("p.txt", b"[[prompts]]\ntarget = 'a'", "no list of prompts, but TOML"),
        ("p.txt", b"# x\n- target: a", "no list of prompts, but YAML"),
        ("p.txt", b"\n<!DOCTYPE html>", "but a web page; download the file itself"),
        ("p.txt", b"\x89PNG\r\n\x1a\n\0", "cannot be read as UTF-8"),
        ("p.txt", b"PK\3\4\0", "is no text"),
        ("p.safetensors", b"a cat", r"ends in '.safetensors'; a list of prompts ends in .txt, .toml"),
        ("p.csv", b"a cat, red\nx, y\n", r"columns a cat, red; it needs a column prompt; a list of one prompt a line ends in .txt"),
        ("p.csv", b'prompt\n"open\n', "line 2"),
        ("p.json", b'[\n{"prompt": }]', "not valid JSON: line 2: Expecting value"),
        ("p.json", b"[" * 100_000, "nests hundreds deep"),
        ("p.json", b"3", "neither a list of prompts nor a table"),
        ("p.yaml", b"- target: a\n  positive: b: c\n", "not valid YAML: line 2: mapping values"),
        ("p.yaml", b"[" * 100_000, "nests hundreds deep"),
        ("p.yaml", b"- target: no", "`prompt` is missing or is not text"),
    ],
)
def test_what_is_no_list_of_prompts(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_prompts(tmp_path / name)
    assert str(tmp_path) in str(caught.value)


def test_parti_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = 'Prompt\tCategory\tChallenge\tNote\na "dog\tAnimals\tBasic\t\na {car} (red)\tVehicles\tBasic\tx\n'
    path = write(tmp_path / "p.tsv", rows)
    assert [prompt.prompt for prompt in load_prompts(path)] == ['a "dog', r"a {car} \(red\)"]
    assert not caplog.records


def test_columns_that_are_not_read_are_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "p.csv", "prompt,sampler,width,Heigth,category\na cat,euler,512,768,x\na dog,ddim,512,,\n")
    assert load_prompts(path) == [PromptSpec(prompt="a cat", width=512), PromptSpec(prompt="a dog", width=512)]
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(f"{path}: these columns are not read: sampler, heigth; those that are: ") and "num_steps" in said


def test_danbooru_tags(tmp_path: Path) -> None:
    lines = (
        "1girl solo long_hair ^_^ miku_(vocaloid) --n lowres\n1girl, solo, long hair, x_x\n1boy,hat\n||_|| 3d\nmiku_\\(vocaloid\\) \\m/\n"
    )
    found = load_prompts(write(tmp_path / "t.txt", lines), options=PromptOptions(prompt_format="danbooru"))
    assert [prompt.prompt for prompt in found] == [
        r"1girl, solo, long hair, ^_^, miku \(vocaloid\)",
        "1girl, solo, long hair, x_x",
        "1boy, hat",
        "||_||, 3d",
        r"miku \(vocaloid\), \\m/",
    ]
    assert found[0].negative_prompt == "lowres"


def test_quality_and_rating_tags_are_as_their_models_want_them(tmp_path: Path) -> None:
    lines = "score_9 score_8_up source_anime rating:g 1girl\nmasterpiece best_quality rating:s\nrating_safe, rating:q, score_board\n"
    assert texts(tmp_path / "t.txt", lines, prompt_format="danbooru") == [
        "score_9, score_8_up, source_anime, rating_safe, 1girl",
        "masterpiece, best quality, sensitive",
        "rating_safe, rating_questionable, score board",
    ]


def test_tags_are_shuffled_and_dropped_behind_those_that_are_kept(tmp_path: Path) -> None:
    tags = [f"tag{number}" for number in range(20)]
    file = write(tmp_path / "t.txt", " ".join(tags) + " --weight 4")
    options = PromptOptions(prompt_format="danbooru", shuffle_caption=True, keep_tokens=2)
    prompts = load_prompts(file, options=options)
    variants = [prompt.prompt.split(", ") for prompt in prompts]
    assert [prompt.weight for prompt in prompts] == [1.0] * 4
    assert all(variant[:2] == ["tag0", "tag1"] and sorted(variant) == sorted(tags) for variant in variants)
    assert len({tuple(variant) for variant in variants}) == 4
    assert load_prompts(file, options=options) == prompts
    assert load_prompts(file, options=options, generator=torch.Generator().manual_seed(1)) != prompts

    options = PromptOptions(prompt_format="danbooru", caption_tag_dropout_rate=0.5, keep_tokens=1)
    draws = [load_prompts(file, options=options, generator=torch.Generator().manual_seed(seed)) for seed in range(50)]
    variants = [prompt.prompt.split(", ") for prompts in draws for prompt in prompts]
    assert all(variant[0] == "tag0" and variant == [tag for tag in tags if tag in variant] for variant in variants)
    left = sum(len(variant) - 1 for variant in variants) / (200 * 19)
    assert abs(left - 0.5) < 0.05  # 6 standard deviations of 3,800 draws


def test_choices_are_written_out(tmp_path: Path) -> None:
    prompts = load_prompts(write(tmp_path / "p.txt", r"a {red|{dark |}blue} \{box\} | --n {bad|ugly} --weight 6"))
    assert [prompt.prompt for prompt in prompts[::2]] == ["a red {box} |", "a dark blue {box} |", "a blue {box} |"]
    assert [prompt.negative_prompt for prompt in prompts[:2]] == ["bad", "ugly"]
    assert [prompt.weight for prompt in prompts] == [1.0] * 6


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{2$$a|b|c}", ["a, b", "a, c", "b, c"]),
        ("{1-2$$ and $$a|b}", ["a", "b", "a and b"]),
        ("({x|y}:1.2)", ["(x:1.2)", "(y:1.2)"]),
        ("{one}", ["one"]),
    ],
)
def test_choices_of_several(tmp_path: Path, text: str, expected: list[str]) -> None:
    assert texts(tmp_path / "p.txt", text) == expected


def test_wildcards_are_lists_in_a_folder(tmp_path: Path) -> None:
    write(tmp_path / "w" / "colour.txt", "# colours\nred\n\n{dark|light} blue\n")
    write(tmp_path / "w" / "clothes" / "hat.txt", "__colour__ cap\ntop hat\n")
    write(tmp_path / "w" / "clothes" / "shoe.txt", "boot\n")
    assert texts(tmp_path / "p.txt", "{__clothes/*__|x} --d -1", wildcards_dir=tmp_path / "w")[-3:] == ["top hat", "boot", "x"]
    found = texts(tmp_path / "p.txt", "a __clothes/hat__, snake_case", wildcards_dir=tmp_path / "w")
    assert found == [f"a {hat}, snake_case" for hat in ("red cap", "dark blue cap", "light blue cap", "top hat")]


def test_too_many_choices_are_drawn(tmp_path: Path) -> None:
    text = "{a|b|c|d} {a|b|c|d} {a|b|c|d} --weight 2\nplain"
    prompts = load_prompts(write(tmp_path / "p.txt", text), options=PromptOptions(max_prompt_variants=40))
    assert len({prompt.prompt for prompt in prompts}) == len(prompts) == 41
    assert [prompt.weight for prompt in prompts] == [2 / 40] * 40 + [1.0]
    assert load_prompts(tmp_path / "p.txt", options=PromptOptions(max_prompt_variants=40)) == prompts
    many = texts(tmp_path / "p.txt", "{0|1|2|3|4|5|6|7|8|9}" * 50, max_prompt_variants=500)
    share = sum(text.count("7") for text in many) / (500 * 50)
    assert len(many) == 500 and abs(share - 0.1) < 0.01  # 5 standard deviations of 25,000 draws


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\nb {red|blue", r"line 2: a \{ is not closed"),
        ("red}", r"line 1: there is a \} without its \{"),
        ("{3$$a|b}", "3 to 3 of 2 options"),
        ("{10$$" + "|".join(map(str, range(30))) + "}", "is 30045015 combinations"),
        ("{a|" * 1000 + "b" + "}" * 1000, "braces nest more than 50 deep"),
        ("a __colr__", "has no list colr.txt; did you mean __colour__"),
        ("a __loop__", r"loop.txt line 1: the wildcard __loop__ names itself \(loop -> loop\)"),
        ("a __empty__", "empty.txt is empty"),
    ],
)
def test_choices_that_cannot_be_made(tmp_path: Path, text: str, message: str) -> None:
    for name, content in (("colour", "red"), ("loop", "x __loop__"), ("empty", "# nothing\n")):
        write(tmp_path / "w" / f"{name}.txt", content)
    with pytest.raises(UserError, match=message):
        texts(tmp_path / "p.txt", text, wildcards_dir=tmp_path / "w")


def test_wildcards_need_their_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="names the wildcard __colour__, but wildcards_dir is not set"):
        texts(tmp_path / "p.txt", "a __colour__ cat")
    with pytest.raises(UserError, match="wildcards_dir is .*, which is not a folder"):
        texts(tmp_path / "p.txt", "a cat", wildcards_dir=tmp_path / "none")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", "\n# nothing\n", "holds no prompts"),
        ("p.txt", "cat --w 100", "width is 100; sides are multiples of 8 from 8 to 16384 pixels"),
        ("p.txt", "cat --w 80000000", "width is 80000000; sides are"),
        ("p.txt", "cat --w", "width is '', which is not a number"),
        ("p.txt", "cat --x 3", "--x is not an option"),
        ("p.txt", "ok\n\ncat --s 2.5", "line 3: num_steps is 2.5; it must be a whole number from 1"),
        ("p.txt", "a girl -w 640 -d -1", "begin with two dashes; write --w for -w"),
        ("p.txt", "{prompt}, film grain", "the place of a prompt in a style"),
        ("p.txt", "a {3::red|1::blue} cat", r"weights of choices \(3::\) are not known"),
        ("p.txt", "cat --d -2", "seed is -2; it must be a whole number from 0"),
        ("p.txt", "cat --l 0", "guidance_scale is 0; it must be above 0"),
        ("p.txt", "cat --l inf", "not a number"),
        ("p.toml", "[[prompts]]\nprmpt = 'cat'", "unknown key 'prmpt'; did you mean prompt?"),
        ("p.toml", "[[prompts]]\nprompt = 'cat'\nweight = 0", "above 0"),
        ("p.toml", "[[prompts]]\nprompt = 'cat'\nweight = 'much'", "not a number"),
        ("p.toml", "[[prompts]]\nprompt = 'cat'\nweight = true", "weight is True, which is not a number"),
        ("p.toml", "[[prompts]]\nprompt = 'cat'\ndirection = 2", "direction is 2"),
        ("p.toml", "[[prompts]]\nprompt = 'cat'\nnegative_prompt = 3", "`negative_prompt` is missing or is not text"),
        ("p.toml", "[[prompts]\n", "not valid TOML"),
        ("p.toml", "prompt = 'cat'", "holds no prompts"),
        ("p.toml", "targets = 3", "must be a list of"),
        ("p.tsv", "Text\na cat\n", "needs a column prompt"),
    ],
)
def test_bad_files_say_what_is_wrong(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_prompts(write(tmp_path / name, text))
    assert str(tmp_path) in str(caught.value)


def test_missing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_prompts("nowhere.txt")
    with pytest.raises(UserError, match="is a folder; give a .txt, .toml") as caught:
        load_prompts(tmp_path)
    assert all(ending in str(caught.value) for ending in (*TABLE_ENDINGS, *ROW_ENDINGS) if ending != ".yml")
    write(tmp_path / "mine.txt", "a cat")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert [spec.prompt for spec in load_prompts("~/mine.txt")] == ["a cat"]


def test_options_that_contradict(tmp_path: Path) -> None:
    assert not PromptOptions(shuffle_caption=True).varies_tags, "which configurations of LoRAs hold"
    with pytest.raises(UserError, match="from 0 to below 1"):
        PromptOptions(prompt_format="danbooru", caption_tag_dropout_rate=1.0)
    with pytest.raises(UserError, match="danbooru reads a .txt"):
        texts(tmp_path / "p.toml", "[[prompts]]\nprompt = 'cat'", prompt_format="danbooru")


@pytest.mark.parametrize(
    ("prompt", "sections"),
    [
        ("", [[]]),
        ("a cat: red", [[("a cat: red", 1.0)]]),
        ("an (important) word", [[("an ", 1.0), ("important", 1.1), (" word", 1.0)]]),
        ("(a:1.0) [(b)] c", [[("a b c", 1.0)]]),
        ("(unbalanced", [[("unbalanced", 1.1)]]),
        ("a) b] c:2)", [[("a) b] c:2)", 1.0)]]),
        (r"\(literal\] \ \\ C:\a", [[("(literal]  \\ C:a", 1.0)]]),
        ("(a (b:2) :0.5)", [[("a ", 0.5), ("b", 1.0), (" ", 0.5)]]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",  # the example in A1111's source
            [
                [("a ", 1.0), ("house", 1.573), (" ", 1.1), ("on", 1.0), (" a ", 1.1), ("hill", 0.55), (", sun, ", 1.1)]
                + [("sky", 1.4641), (".", 1.1)]
            ],
        ),
        ("a cat BREAK (a BREAK dog:2) BREAK", [[("a cat", 1.0)], [("a", 2.0)], [("dog", 2.0)]]),
        ("BREAKFAST", [[("BREAKFAST", 1.0)]]),
        ("BREAK a", [[], [("a", 1.0)]]),
    ],
)
def test_weights_are_those_of_a1111(prompt: str, sections: list[list[tuple[str, float]]]) -> None:
    found = parse_weights(prompt)
    assert [[text for text, _ in section] for section in found] == [[text for text, _ in section] for section in sections]
    weights = [weight for section in sections for _, weight in section]
    assert [weight for section in found for _, weight in section] == pytest.approx(weights, rel=1e-12)


@pytest.mark.parametrize("text", ["a" + " " * 100_000 + "b", ":" + "1" * 100_000, "[a:" * 30_000, "[a:b:" + "9" * 100_000, "(" * 100_000])
def test_a_hostile_prompt_takes_no_time(text: str) -> None:
    start = time.process_time()
    parse_weights(text)
    read_as_text([text])
    assert time.process_time() - start < 10  # it was minutes


def test_a_prompt_of_more_characters_than_any_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("x " * 25_000, encoding="utf-8")
    assert len(load_prompts(tmp_path / "p.txt")) == 1
    (tmp_path / "p.txt").write_text("x " * 25_000 + "xx", encoding="utf-8")
    with pytest.raises(UserError, match="a prompt has 50002 characters, and 50000 are the most; shorten 'x x x"):
        load_prompts(tmp_path / "p.txt")


def test_what_other_programs_read_is_named() -> None:
    prompts = ["a cat AND a dog", "[a:b:0.5]", "[cat::10] [x|y]", "<lora:more:1> (SALT)", "bad EasyNegative, ugly", "embedding:mine.pt"]
    found = read_as_text(prompts)
    assert found == {
        "AND": prompts[0],
        "prompt editing ([a:b:0.5])": prompts[1],
        "alternating words ([a|b])": prompts[2],
        "<lora:...>": prompts[3],
        "textual inversion": prompts[4],
    }
    assert read_as_text(["easynegative", "embedding:mine"], ["mine", "easynegative"]) == {}
    assert read_as_text([r"\[a:b:0.5\]", "a [b] (c:1.2) {d} AND_E, 3:4, bandage"]) == {}


def test_escaped_text_is_text_again() -> None:
    text = r"miku (vocaloid) [x] \m/ \(o"
    assert parse_weights(escape(text)) == [[(text, 1.0)]]
    assert plain_text("a (red:1.2) cat BREAK on [the] mat") == "a red cat on the mat"


def test_aspect_buckets_share_a_prompts_weight() -> None:
    prompts = [PromptSpec(prompt="a", weight=5.0, seed=1), PromptSpec(prompt="b", width=64)]
    spread_out = with_aspect_buckets(prompts, (512, 512))
    sizes = [(prompt.width, prompt.height) for prompt in spread_out[:-1]]
    assert sizes == [(384, 640), (448, 576), (512, 512), (576, 448), (640, 384)]
    assert {(prompt.prompt, prompt.weight, prompt.seed) for prompt in spread_out[:-1]} == {("a", 1.0, 1)}
    assert spread_out[-1] is prompts[1]
    sdxl = {(prompt.width, prompt.height) for prompt in with_aspect_buckets(prompts[:1], (1024, 1024))}
    assert {(1344, 768), (1216, 832), (1152, 896), (1024, 1024), (832, 1216)} <= sdxl and (1408, 704) not in sdxl
    tiny = {(prompt.width, prompt.height) for prompt in with_aspect_buckets(prompts[:1], (64, 64))}
    assert tiny == {(48, 80), (56, 72), (64, 64), (72, 56), (80, 48)}


def test_spread_is_even_and_ordered_by_size() -> None:
    prompts = [PromptSpec(prompt=str(number), width=8 * (1 + number % 2)) for number in range(6)]
    assert [prompt.prompt for prompt in spread(prompts, 3)] == ["0", "2", "4"]
    assert [prompt.prompt for prompt in spread(prompts, 9)] == ["0", "2", "4", "1", "3", "5"]
