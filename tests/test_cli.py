import io
import logging
import sys
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from library.errors import UserError
from library.models.config import ModelConfig
from library.settings import cli
from library.settings.cli import parse_config, run_main
from library.settings.options import option, options
from library.settings.shared import LoggingConfig, NetworkConfig, SavingConfig, TrainingConfig


@dataclass(frozen=True, kw_only=True)
class Extra:
    weights: tuple[float, ...] = option((), help="Numbers, 100% of them.")
    steepness: float = option(2.0, help="Hardly ever turned.", expert=True)
    scores: tuple[dict[str, Any], ...] = option((), help="An array of tables.")


@dataclass(frozen=True, kw_only=True)
class Script:
    model: ModelConfig
    network: NetworkConfig
    training: TrainingConfig
    saving: SavingConfig
    logging: LoggingConfig
    extra: Extra


@pytest.fixture
def config_file(tmp_path: Path):
    def write(text: str) -> str:
        path = tmp_path / "config.toml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


MODEL = 'pretrained_model_name_or_path = "model.safetensors"\n'


def parse(*argv: str) -> Script:
    return parse_config(Script, argv)


def error_of(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        parse(*argv)
    return str(caught.value)


def test_the_config_file_alone_is_enough(config_file):
    config = parse("--config_file", config_file(MODEL + "seed = 7\n"))
    assert config.model.pretrained_model_name_or_path == "model.safetensors"
    assert config.training.seed == 7


def test_the_command_line_alone_is_enough():
    config = parse("--pretrained_model_name_or_path", "m", "--network_alpha=1e-1", "--vae", "v.pt")
    assert config.network.network_alpha == 0.1
    assert config.model.vae == Path("v.pt")


def test_nothing_given_names_what_is_missing():
    assert error_of() == "pretrained_model_name_or_path is not set; give a checkpoint file, a diffusers folder or a hub id"


def test_the_command_line_beats_the_file_and_the_file_the_defaults(config_file):
    config = parse("--config_file", config_file(MODEL + "seed = 7\nmax_train_steps = 11\n"), "--seed", "8")
    assert (config.training.seed, config.training.max_train_steps, config.training.gradient_accumulation_steps) == (8, 11, 1)


def test_toml_is_appended_if_missing(config_file):
    path = config_file(MODEL + "seed = 7\n")
    assert parse("--config_file", path.removesuffix(".toml")).training.seed == 7


def test_a_dot_in_the_name_is_not_an_extension(tmp_path: Path):
    (tmp_path / "v1.5.toml").write_text(MODEL)
    assert parse("--config_file", str(tmp_path / "v1.5")).model.pretrained_model_name_or_path == "model.safetensors"


def test_section_titles_are_decoration(config_file):
    text = "max_train_steps = 3\n[anything]\n" + MODEL + "[network]\nseed = 7\nnetwork_dim = 2\n"
    config = parse("--config_file", config_file(text))
    assert (config.training.max_train_steps, config.training.seed, config.network.network_dim) == (3, 7, 2)


def test_a_true_in_the_file_can_be_unset(config_file):
    path = config_file(MODEL + "gradient_checkpointing = true\nv_parameterization = true\nxformers = true\n")
    assert parse("--config_file", path).training.gradient_checkpointing is True
    config = parse("--config_file", path, "--no-gradient_checkpointing", "--no-v_parameterization")
    assert config.training.gradient_checkpointing is False
    assert config.model.v_parameterization is False
    assert config.training.xformers is True
    assert parse("--config_file", path, "--xformers").training.xformers is True


def test_an_optional_value_in_the_file_can_be_unset(config_file):
    assert parse("--config_file", config_file(MODEL + 'vae = "v.pt"\n'), "--vae", "").model.vae is None


def test_lists(config_file):
    path = config_file(MODEL + 'network_args = ["conv_dim=4", "conv_alpha=1"]\nweights = [1, 2]\n')
    config = parse("--config_file", path)
    assert config.network.network_args == ("conv_dim=4", "conv_alpha=1")
    assert config.extra.weights == (1.0, 2.0)
    config = parse("--config_file", path, "--network_args", "--weights", "-1", "0.5", "--seed", "3")
    assert config.network.network_args == ()
    assert config.extra.weights == (-1.0, 0.5)


def test_values_of_the_file_are_coerced_and_checked(config_file):
    assert parse("--config_file", config_file(MODEL + 'network_alpha = "1e-4"\n')).network.network_alpha == 1e-4
    message = "mixed_precision is 'bf17', but it must be one of no, fp16, bf16 (did you mean 'bf16'?)"
    assert error_of("--config_file", config_file(MODEL + 'mixed_precision = "bf17"\n')) == message + " (line 2)"
    assert error_of("--mixed_precision", "bf17") == message


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--qqq", "1"], "unknown option --qqq; --help lists the options"),
        (["--network_dm=4"], "unknown option --network_dm (did you mean --network_dim?); --help lists the options"),
        (["--config_fil", "x"], "unknown option --config_fil (did you mean --config_file?); --help lists the options"),
        (["--network_di", "4"], "unknown option --network_di (did you mean --network_dim?); --help lists the options"),
        (["--xformers", "true"], "the word 'true' belongs to no option; a switch takes no value (write --name or --no-name)"),
        (["--seed"], "command line: argument --seed: expected one argument"),
        (["--seed", "x"], "seed is 'x', but it must be a whole number"),
        (["--scores", "x"], "--scores has no form on the command line; write it in the config file as [[scores]]"),
    ],
)
def test_mistakes_on_the_command_line(argv: list[str], message: str):
    assert error_of(*argv) == message


def test_options_of_sd_scripts_are_warned_about_once_wherever_they_are(config_file, caplog: pytest.LogCaptureFixture):
    path = config_file(MODEL + "max_data_loader_n_workers = 4\n")
    with caplog.at_level(logging.WARNING):
        parse("--config_file", path, "--full_bf16", "--loss_type", "l2", "--huber_c=0.1", "--seed", "3")
    (record,) = caplog.records
    for name in ("max_data_loader_n_workers", "full_bf16 (use mixed_precision", "loss_type", "huber_c"):
        assert name in record.getMessage()
    assert "l2" not in record.getMessage()


def test_all_mistakes_of_a_file_are_reported_together(config_file):
    path = config_file('[a]\nseed = "x"\n# seed = 1\n[b]\nqqq = 1\nnetwork_dim = 1.5\n')
    assert error_of("--config_file", path) == (
        "3 settings are wrong:\n  seed is 'x', but it must be a whole number (line 2)\n"
        "  unknown option 'qqq' (line 5); --help lists the options\n"
        "  network_dim is 1.5, but it must be a whole number (line 6)"
    )
    assert "line" not in error_of("--config_file", config_file("seed = 1\n"), "--seed", "x"), "the command line's own mistake"
    path = config_file(MODEL + "qqq = 1\nnetwork_dim = 0\nlearning_rate = 0\nseed = 1.5\nmax_train_steps = 0\n")
    assert error_of("--config_file", path, "--learning_rate", "1") == (
        "3 settings are wrong:\n  unknown option 'qqq' (line 2); --help lists the options\n"
        "  seed is 1.5, but it must be a whole number (line 5)\n"
        "  network_dim is 0, but it must be at least 1 (line 3)"
    ), "max_train_steps stands beside a mistaken seed, whose checks wait"
    path = config_file(MODEL + "network_dim = 0\nmax_train_steps = 0\n")
    assert error_of("--config_file", path) == (
        "2 settings are wrong:\n  network_dim is 0, but it must be at least 1 (line 2)\n"
        "  max_train_steps is 0, but it must be at least 1 (line 3)"
    )


def test_a_preset_of_kohya_ss_is_told_from_a_missing_file(tmp_path: Path):
    (tmp_path / "preset.json").write_text('{"LoRA_type": "Standard"}')
    assert "preset.json is JSON; give the settings as TOML" in error_of("--config_file", str(tmp_path / "preset.json"))


def test_mistakes_in_the_file(config_file, tmp_path: Path):
    path = config_file("")

    def message(text: str) -> str:
        return error_of("--config_file", config_file(text))

    assert message("learning = 1\n") == "unknown option 'learning' (line 1); --help lists the options"
    assert message("seed = 1\n[b]\nseed = 2\n") == f"config_file {path} gives seed twice: 1 in the top of the file and 2 in [b]"
    assert message("[a]\nseed = 1\n[b]\nseed = 2\n") == f"config_file {path} gives seed twice: 1 in [a] and 2 in [b]"
    assert message("[a.b]\nseed = 1\n") == f"config_file {path}: [a.b] is a section in a section; sections go one level deep"
    assert message("[[prompts]]\ntarget = 'x'\n") == (
        f"config_file {path}: [[prompts]] is an array of tables, and no option takes one under that name"
    )
    Path(path).write_bytes(b"\xff\xfe\x00")
    assert error_of("--config_file", path) == f"config_file {path} is not UTF-8 text; save it as UTF-8"
    missing = tmp_path / "missing"
    assert error_of("--config_file", str(missing)) == f"config_file {missing}.toml cannot be read: No such file or directory"


@pytest.mark.parametrize(
    "text, complaint",
    [
        (MODEL + "\nseed = = 1\n", "line 3: a value is missing"),
        ("seed = 1\nv2 =\n", "line 2: a value is missing"),
        ("v2 = True\n", "line 1: True is not a value; write true"),
        ("save_precision = fp16 # half\n", "line 1: fp16 is not a value; write text in quotes"),
        ("seed = 1\nseed = 2\n", "line 2: this key or table is in the file twice; leave one of the two out"),
        ("[a]\nseed = 1\n[a]\nv2 = true\n", "line 3: this key or table is in the file twice; leave one of the two out"),
        ("seed = 1\nweights = [1,\n 2,\n", "line 2: the array is not closed; its closing bracket is missing"),
        ("weights = [1,\n 2,\nseed = 1\n", "line 3: a setting begins inside an array; its closing bracket is missing in a line above"),
        ("weights = [1 2]\n", "line 1: the array is not closed; a comma or its closing bracket is missing"),
        ('seed = 1\nvae = "a.pt\nv2 = true\n', "line 2: the text that begins here is never closed; a quote is missing at its end"),
        ("seed = 1\nvae = 'a.pt", "line 2: the text that begins here is never closed; a quote is missing at its end"),
        ('vae = """a.pt\n\n', "line 1: the text that begins here is never closed; a quote is missing at its end"),
        ('vae = "C:\\models"', "line 1: a backslash in double quotes begins an escape; write the path with / or in single quotes"),
        ('vae = "D:\\x"', "line 1: a backslash in double quotes begins an escape; write the path with / or in single quotes"),
        ('vae = "C:\\Users"', "line 1: a backslash in double quotes begins an escape; write the path with / or in single quotes"),
        ("seed = 1\nvae = “a.pt”\n", "line 2: curly quotes are not TOML; write \" or '"),
        ('vae = "a.pt”\n', "line 1: curly quotes are not TOML; write \" or '"),
        ("[model\n", "line 1: expected ']' at the end of a table declaration"),
    ],
)
def test_a_file_that_is_not_toml_is_explained(config_file, text: str, complaint: str):
    path = config_file(text)
    assert error_of("--config_file", path) == f"config_file {path} is not valid TOML: {complaint}"


def test_brackets_without_end_are_no_traceback(config_file):
    start = time.process_time()
    parts = ("[" * 5000, "1\nb" + ".a" * 100_000 + " = 1", "1\n[" + '"a" . ' * 100_000 + "b]", "{a" + ". 'b c'" * 100_000 + " = 1}")
    for text in parts:
        assert "nests arrays or tables hundreds deep" in error_of("--config_file", config_file("weights = " + text))
    for text in ("'" + "a" * 1_000_000, '"' * 100_000, "a " * 100_000, "a" + " " * 100_000 + ".", "'a'" * 100_000):
        error_of("--config_file", config_file("weights = " + text))
    assert time.process_time() - start < 20  # it was without end for keys of many parts


def test_an_array_may_mix_whole_numbers_and_others(config_file):
    assert parse("--config_file", config_file(MODEL + "weights = [0.25, 0.5, 1, 2]\n")).extra.weights == (0.25, 0.5, 1.0, 2.0)


def test_the_same_value_twice_is_no_contradiction(config_file):
    assert parse("--config_file", config_file(MODEL + "[a]\nseed = 1\n[b]\nseed = 1\n")).training.seed == 1


def test_an_array_of_tables_is_the_value_of_a_declared_option(config_file):
    config = parse("--config_file", config_file(MODEL + "[[scores]]\nfile = 'a'\n[[scores]]\nfile = 'b'\nweight = 2\n"))
    assert config.extra.scores == ({"file": "a"}, {"file": "b", "weight": 2})


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path):
    (tmp_path / "c.toml").write_bytes(b"\xef\xbb\xbf" + MODEL.encode())
    assert parse("--config_file", str(tmp_path / "c.toml")).model.pretrained_model_name_or_path == "model.safetensors"


def test_output_config_round_trips(config_file, tmp_path: Path):
    output = tmp_path / "out"
    path = config_file("[[scores]]\nfile = 'a'\nweights = [1, 2]\n[s]\n" + MODEL + "seed = 7\n")
    argv = ["--config_file", path, "--network_args", "conv_dim=4", "--network_alpha", "1e-5", "--wandb_api_key", "hunter2"]
    argv += ["--training_comment", 'C:\\x00\\new "é" \x7f\n', "--weights", "1", "0.5", "--xformers"]
    with pytest.raises(SystemExit) as caught:
        parse(*argv, "--output_config", str(output))
    assert caught.value.code == 0

    text = output.with_suffix(".toml").read_text(encoding="utf-8")
    assert "# vae =\n" in text and "\n[training]\n" in text and "seed = 7\n" in text
    assert all(word not in text for word in ("hunter2", "log_args", "config_file", "output_config"))
    expected = parse(*argv)
    result = parse("--config_file", str(output), "--wandb_api_key", "hunter2")
    assert result == expected

    before = output.with_suffix(".toml").read_bytes()
    assert error_of(*argv, "--output_config", str(output)) == f"output_config {output}.toml exists already; give a new file name"
    assert output.with_suffix(".toml").read_bytes() == before


def test_output_config_makes_a_file_to_be_filled_in(tmp_path: Path):
    with pytest.raises(SystemExit):
        parse("--output_config", str(tmp_path / "new.toml"))
    content = tomllib.loads((tmp_path / "new.toml").read_text(encoding="utf-8"))
    assert content["model"]["pretrained_model_name_or_path"] == ""
    assert content["network"]["network_dim"] == 8


def test_output_config_without_a_file_writes_the_config_file_as_in_sd_scripts(tmp_path: Path):
    with pytest.raises(SystemExit) as caught:
        parse("--config_file", str(tmp_path / "new.toml"), "--output_config", "--seed", "7")
    assert caught.value.code == 0
    assert tomllib.loads((tmp_path / "new.toml").read_text(encoding="utf-8"))["training"]["seed"] == 7
    assert error_of("--output_config").startswith("--output_config names no file: write --output_config FILE")


def test_output_config_that_cannot_be_written(tmp_path: Path):
    path = tmp_path / "nowhere" / "new.toml"
    assert error_of("--output_config", str(path)) == f"output_config {path} cannot be written: No such file or directory"


def test_dry_run_prints_and_checks(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        parse("--pretrained_model_name_or_path", "m", "--dry_run", "--wandb_api_key", "hunter2")
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert tomllib.loads(printed)["training"]["max_train_steps"] == 500
    assert "hunter2" not in printed
    assert error_of("--dry_run").startswith("pretrained_model_name_or_path is not set")


@pytest.mark.parametrize("words, experts", [("-h", False), ("--help", False), ("--help all", True), ("--help_all", True)])
def test_help_has_the_options_and_their_defaults(words: str, experts: bool, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        parse_config(Script, words.split(), description="What it does.\n\n    python script.py\n    python script.py again\n")
    assert caught.value.code == 0
    as_printed = capsys.readouterr().out
    printed = " ".join(as_printed.split())
    assert (
        "What it does.\n\n    python script.py\n    python script.py again\n" in as_printed
        and "--network_dim" in printed
        and "100% of them" in printed
        and "(default: 500)" in printed
    )
    assert ("--steepness" in printed) == experts
    hidden = sum(entry.expert for entry in options(Script).values())
    assert (f"--help all shows {hidden} more settings" in printed) == (not experts)


def test_an_expert_setting_is_accepted_though_help_does_not_show_it():
    assert parse("--pretrained_model_name_or_path", "m", "--steepness", "3").extra.steepness == 3.0


def test_what_is_written_leaves_out_what_nothing_reads(config_file, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture):
    with pytest.raises(SystemExit):
        parse("--pretrained_model_name_or_path", "m", "--dry_run")
    printed = capsys.readouterr().out
    assert "\n# network_weights =\n" in printed
    with pytest.raises(SystemExit):
        parse("--config_file", config_file(printed), "--network_weights", "a", "--dim_from_weights", "--dry_run")
    assert "\n# network_dim = 8  # not with dim_from_weights\n" in capsys.readouterr().out
    assert [record.getMessage() for record in caplog.records] == [
        "these settings do nothing here: network_dim (not with dim_from_weights), network_alpha (not with dim_from_weights)"
    ]


def test_argv_of_the_program_is_the_default(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["script.py", "--pretrained_model_name_or_path", "m", "--seed", "4"])
    assert parse_config(Script).training.seed == 4


@pytest.mark.parametrize("error, code, line", [(UserError("no."), 2, "error: no.\n"), (KeyboardInterrupt(), 130, "interrupted\n")])
def test_run_main_says_it_in_one_line(error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]):
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        run_main(main)
    assert caught.value.code == code
    assert capsys.readouterr().err == line


def test_run_main_makes_one_line_and_a_file_of_an_error_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def main() -> None:
        raise ValueError("a bug\nand more")

    with pytest.raises(SystemExit) as caught:
        run_main(main)
    (log,) = tmp_path.iterdir()
    assert caught.value.code == 1
    assert capsys.readouterr().err == (
        f"error: something unexpected happened (ValueError: a bug), which is a mistake of this program; please report it with {log}\n"
    )
    assert log.read_text(encoding="utf-8").startswith("Traceback") and "a bug\nand more" in log.read_text(encoding="utf-8")
    monkeypatch.setenv("LECO_SCORE_DEBUG", "1")
    with pytest.raises(ValueError, match="a bug"):
        run_main(main)


def test_log_lines_go_above_the_progress_bar(monkeypatch: pytest.MonkeyPatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    root = logging.Logger("root of the test")
    monkeypatch.setattr(logging, "root", root)
    cli.setup_logging("WARNING")
    root.info("not shown")
    root.warning("shown")
    assert stream.getvalue() == "WARNING: shown\n"
