import logging
import re
from dataclasses import FrozenInstanceError, dataclass
from pathlib import Path
from typing import Any

import pytest

from library.errors import UserError
from library.models.config import ModelConfig
from library.settings.option_values import nearest
from library.settings.options import build_config, key_value_pairs, option, options
from library.settings.registry import Registry
from library.settings.sd_scripts_keys import REPLACEMENTS, UNUSED
from library.settings.shared import LoggingConfig, NetworkConfig, OptimizerConfig, SavingConfig, TrainingConfig


@dataclass(frozen=True, kw_only=True)
class EveryType:
    text: str = option("a", help="Text.")
    count: int = option(1, help="A whole number.")
    rate: float = option(0.5, help="A number.")
    switch: bool = option(False, help="A switch.")
    place: Path = option(Path("here"), help="A path.")
    maybe_count: int | None = option(None, help="A whole number or nothing.")
    maybe_switch: bool | None = option(None, help="A switch or nothing.")
    words: list[str] = option(["x"], help="Words.")
    numbers: tuple[float, ...] = option((1.0,), help="Numbers.")
    colours: tuple[str, ...] = option((), choices=("red", "green"), help="Some of two words.")
    mode: str = option("fast", choices=("fast", "slow"), help="One of two words.")
    entries: tuple[dict[str, Any], ...] = option((), help="An array of tables.")


@dataclass(frozen=True, kw_only=True)
class Everything:
    types: EveryType


@dataclass(frozen=True, kw_only=True)
class Script:
    model: ModelConfig
    network: NetworkConfig
    optimizer: OptimizerConfig
    training: TrainingConfig
    saving: SavingConfig
    logging: LoggingConfig


def types_of(**values: object) -> EveryType:
    return build_config(Everything, values).types


def script(**values: object) -> Script:
    return build_config(Script, {"pretrained_model_name_or_path": "model.safetensors", **values})


def error_of(make: Any, **values: object) -> str:
    with pytest.raises(UserError) as caught:
        make(**values)
    return str(caught.value)


def test_defaults_are_the_fields():
    assert types_of() == EveryType()
    assert types_of().words == ["x"]
    assert types_of().words is not types_of().words


def test_a_config_is_frozen():
    with pytest.raises(FrozenInstanceError):
        types_of().count = 2  # type: ignore[misc]


def test_options_is_the_flat_table_of_the_leaves():
    table = options(Script)
    assert list(table)[:2] == ["pretrained_model_name_or_path", "model_family"]
    assert table["seed"].section == "training" and table["seed"].item_type is int
    assert table["network_args"].container is tuple and table["network_args"].item_type is str
    assert table["vae"].optional and table["vae"].item_type is Path
    assert table["mixed_precision"].choices == ("no", "fp16", "bf16")
    assert all(entry.help.endswith(".") for entry in table.values())


def test_two_options_of_one_name_are_our_own_mistake():
    @dataclass(frozen=True, kw_only=True)
    class Twice:
        one: EveryType
        two: EveryType

    with pytest.raises(AssertionError, match="two options are called text"):
        options(Twice)


@pytest.mark.parametrize(
    "name, value, expected",
    [
        ("text", "b", "b"),
        ("text", 12, "12"),
        ("text", "", ""),
        ("count", 3, 3),
        ("count", "3", 3),
        ("count", 3.0, 3),
        ("count", "1e3", 1000),
        ("count", "9007199254740993", 9007199254740993),  # more digits than a float holds
        ("rate", "1e-4", 1e-4),
        ("rate", 2, 2.0),
        ("switch", True, True),
        ("switch", "False", False),
        ("place", "there", Path("there")),
        ("place", "~", Path.home()),
        ("maybe_count", "", None),
        ("maybe_count", None, None),
        ("maybe_count", "4", 4),
        ("maybe_count", False, None),  # as people write that it is not set
        ("maybe_switch", False, False),
        ("words", ["a", "b"], ["a", "b"]),
        ("words", "a", ["a"]),
        ("numbers", ["1", 2], (1.0, 2.0)),
        ("numbers", [], ()),
        ("colours", ["red"], ("red",)),
        ("entries", [{"a": 1}], ({"a": 1},)),
    ],
)
def test_values_are_coerced(name: str, value: object, expected: object):
    result = getattr(types_of(**{name: value}), name)
    assert result == expected and type(result) is type(expected)


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("rate", "abc", "rate is 'abc', but it must be a number"),
        ("rate", "nan", "rate is 'nan', but it must be a number"),
        ("rate", True, "rate is True, but it must be a number"),
        ("rate", "", "rate is empty, but it must be a number"),
        ("count", 1.5, "count is 1.5, but it must be a whole number"),
        ("count", "1.5", "count is '1.5', but it must be a whole number"),
        ("count", float("inf"), "count is inf, but it must be a whole number"),
        ("count", [1], "count is [1], but it must be a whole number"),
        ("switch", 1, "switch is 1, but it must be true or false"),
        ("text", False, "text is False, but it must be text"),
        ("place", "", "place is empty, but it must be a path"),
        ("numbers", ["1", "x"], "numbers is 'x', but it must be a number"),
        ("entries", ["x"], "entries is 'x', but it must be a table"),
        ("mode", "slwo", "mode is 'slwo', but it must be one of fast, slow (did you mean 'slow'?)"),
        ("colours", ["blue"], "colours is 'blue', but it must be one of red, green"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_expected(name: str, value: object, message: str):
    assert error_of(types_of, **{name: value}) == message


def test_an_unknown_option_names_the_nearest():
    assert error_of(script, learning_rat=1) == "unknown option 'learning_rat' (did you mean 'learning_rate'?); --help lists the options"
    assert error_of(script, qqq=1) == "unknown option 'qqq'; --help lists the options"


def test_options_of_sd_scripts_are_named_in_one_warning(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        config = script(lowram=True, max_train_epochs=3, seed=5)
    assert config.training.seed == 5
    assert [record.getMessage() for record in caplog.records] == [
        "these settings do nothing here: lowram, max_train_epochs (use max_train_steps)"
    ]


@pytest.mark.parametrize(
    "values, unread",
    [
        ({"text_encoder_lr": 1e-5}, "text_encoder_lr (not with network_train_unet_only or only with network_train_text_encoder_only)"),
        ({"text_encoder_lr": 1e-5, "network_train_unet_only": False}, None),
        (
            {"network_dim": 8, "network_alpha": 1, "dim_from_weights": True, "network_weights": "l.safetensors"},
            "network_dim (not with dim_from_weights), network_alpha (not with dim_from_weights)",
        ),
        ({"log_prefix": "a", "wandb_run_name": "b"}, "log_prefix, wandb_run_name"),
        ({"log_args": ["log_prefix=a"]}, "log_args (only with log_with or only with logging_dir)"),
        ({"log_prefix": "a", "logging_dir": "logs"}, None),
        ({"wandb_run_name": "", "text_encoder_lr": ""}, None),  # said to be not set
        ({}, None),
    ],
)
def test_settings_that_nothing_reads_are_named_in_one_warning(
    values: dict[str, object], unread: str | None, caplog: pytest.LogCaptureFixture
):
    script(**values)
    expected = [] if unread is None else [f"these settings do nothing here: {unread}"]
    assert [record.getMessage() for record in caplog.records] == expected


@pytest.mark.parametrize(
    "values, name, meant",
    [
        ({"v2": True}, "model_family", "sd2"),
        ({"v2": ["true"], "model_family": "auto"}, "model_family", "sd2"),  # as the command line hands it on
        ({"v2": False}, "model_family", "auto"),
        ({"lr_scheduler": "Polynomial", "lr_scheduler_power": 2.0}, "lr_scheduler_args", ("power=2.0",)),
        (
            {"lr_scheduler": "cosine_with_restarts", "lr_scheduler_num_cycles": ["3"], "lr_scheduler_args": ["num_cycles=2"]},
            "lr_scheduler_args",
            ("num_cycles=3", "num_cycles=2"),  # ours has the last word
        ),
        ({"lr_scheduler": "cosine_with_min_lr", "lr_scheduler_num_cycles": 1}, "lr_scheduler_args", ("num_cycles=0.5",)),
        (
            {"log_with": "all", "log_prefix": "try-", "wandb_api_key": ["k"]},
            "log_args",
            ("wandb_api_key=k", "log_prefix=try-"),
        ),
        ({"sdpa": True, "save_model_as": "safetensors"}, "xformers", False),
        (
            {"optimizer_args": "decouple=True betas=(0.9, 0.99) weight_decay=0.01"},
            "optimizer_args",
            ("decouple=True", "betas=(0.9, 0.99)", "weight_decay=0.01"),
        ),
        ({"network_args": ["conv_dim=4 conv_alpha=1"]}, "network_args", ("conv_dim=4", "conv_alpha=1")),
        ({"text_encoder_lr": [5e-5, 5e-5], "network_train_unet_only": False}, "text_encoder_lr", 5e-5),
        ({"text_encoder_lr": [], "network_train_unet_only": False}, "text_encoder_lr", None),
        ({"lr_warmup_steps": "10%"}, "lr_warmup_steps", 0.1),
        (
            {"lr_scheduler": "warmup_stable_decay", "lr_decay_steps": 50, "lr_scheduler_min_lr_ratio": 0.1},
            "lr_scheduler_args",
            ("min_lr_ratio=0.1", "num_decay_steps=50"),
        ),
        ({"lr_scheduler": "cosine_with_min_lr", "lr_scheduler_min_lr_ratio": "0.1"}, "lr_scheduler_args", ("min_lr_rate=0.1",)),
        ({"lr_scheduler": "inverse_sqrt", "lr_scheduler_timescale": 7}, "lr_scheduler_args", ("timescale=7",)),
        ({"lr_scheduler": "constant", "lr_scheduler_type": "CosineAnnealingLR"}, "lr_scheduler", "CosineAnnealingLR"),
        ({"lr_scheduler": "linear", "lr_scheduler_type": ""}, "lr_scheduler", "linear"),
        ({"save_every_n_steps": 0}, "save_every_n_steps", None),
        ({"scale_weight_norms": 0.0}, "scale_weight_norms", None),
    ],
)
def test_what_sd_scripts_says_in_other_words_is_obeyed(values: dict[str, object], name: str, meant: object, caplog: Any):
    config = script(**values)
    section = getattr(config, options(Script)[name].section)
    assert getattr(section, name) == meant
    assert not caplog.records


@pytest.mark.parametrize(
    "values, warning",
    [
        ({"sdpa": False}, "sdpa (it is always used, unless xformers is)"),
        ({"save_model_as": "ckpt"}, "save_model_as (it is always safetensors)"),
        ({"lr_scheduler_power": 1}, "lr_scheduler_power (only polynomial has a power)"),
    ],
)
def test_what_sd_scripts_can_and_this_cannot_is_a_warning(values: dict[str, object], warning: str, caplog: Any):
    script(**values)
    assert [record.getMessage() for record in caplog.records] == [f"these settings do nothing here: {warning}"]


def test_text_encoders_with_different_rates_are_refused():
    assert error_of(script, text_encoder_lr=[1e-4, 1e-5], network_train_unet_only=False) == (
        "text_encoder_lr is [0.0001, 1e-05], but all text encoders have one learning rate here; give one number"
    )


def test_numbers_in_one_text_are_parted_at_commas():
    assert types_of(numbers="512, 768").numbers == types_of(numbers=["512,768"]).numbers == (512.0, 768.0)


def test_keys_of_the_gui_and_of_other_scripts_are_one_warning(caplog: pytest.LogCaptureFixture):
    script(epoch=1, noise_offset_type="Original", LoRA_type="Standard", t5xxl="a", block_lr="1", lowvram=False)
    (record,) = caplog.records
    assert all(
        name in record.getMessage() for name in ("epoch (use max_train_steps)", "noise_offset_type", "LoRA_type", "t5xxl", "block_lr")
    )


def test_a_setting_can_depend_on_an_item_of_a_list_and_on_what_another_script_has(caplog: pytest.LogCaptureFixture):
    @dataclass(frozen=True, kw_only=True)
    class Terms:
        objective: tuple[str, ...] = option((), help="Terms.")
        pictures: str = option("", help="Of one of them.", only_with={"objective": ("images",)})
        elsewhere: str = option("", help="With a setting that this script lacks.", only_with="not_here")
        both: str = option("", help="With two.", only_with={"objective": ("images",), "pictures": ("b",)})

    @dataclass(frozen=True, kw_only=True)
    class WithTerms:
        terms: Terms

    build_config(WithTerms, {"objective": ["score", "images"], "pictures": "a", "elsewhere": "x"})
    assert not caplog.records
    build_config(WithTerms, {"objective": ["score"], "pictures": "a", "both": "c"})
    (record,) = caplog.records
    assert record.getMessage().endswith("pictures (only with objective images), both (only with objective images and only with pictures b)")


def test_the_choices_may_be_a_table_that_is_filled_later():
    kinds: Registry[int] = Registry("kind")

    @dataclass(frozen=True, kw_only=True)
    class Kinds:
        kind: str | None = option(None, choices=kinds, help="One of them.")

    @dataclass(frozen=True, kw_only=True)
    class WithKinds:
        kinds: Kinds

    kinds.register("round")(1)
    assert build_config(WithKinds, {"kind": "round"}).kinds.kind == "round"
    assert error_of(lambda **values: build_config(WithKinds, values), kind="rund") == (
        "kind is 'rund', but it must be one of round (did you mean 'round'?)"
    )
    kinds.register("square")(2)
    assert build_config(WithKinds, {"kind": "square"}).kinds.kind == "square"


def test_a_declared_option_is_used_though_sd_scripts_has_it(caplog: pytest.LogCaptureFixture):
    @dataclass(frozen=True, kw_only=True)
    class Rollout:
        max_denoising_steps: int = option(40, help="Steps.")

    @dataclass(frozen=True, kw_only=True)
    class WithRollout:
        rollout: Rollout

    assert "max_denoising_steps" in UNUSED
    assert build_config(WithRollout, {"max_denoising_steps": "20"}).rollout.max_denoising_steps == 20
    assert not caplog.records


def test_the_table_of_sd_scripts_does_not_overlap_itself():
    assert not UNUSED & REPLACEMENTS.keys()
    assert not options(Script).keys() & REPLACEMENTS.keys()


@pytest.mark.parametrize("hint", [note for note in REPLACEMENTS.values() if note.startswith("use ")])
def test_a_replacement_is_an_option(hint: str):
    names = re.findall(r"(?:^use|, or) (\w+)", hint)
    here = options(Script).keys() | {"resolution", "sample_every_n_steps", "min_lr_ratio"}  # a script's own, and an argument
    assert names and set(names) <= here


@pytest.mark.parametrize(
    "values, message",
    [
        (
            {"pretrained_model_name_or_path": ""},
            "pretrained_model_name_or_path is not set; give a checkpoint file, a diffusers folder or a hub id",
        ),
        ({"v2": True, "model_family": "sdxl"}, "v2 is set and model_family is sdxl; leave one of the two out"),
        ({"clip_skip": 0}, "clip_skip is 0, but it must be at least 1"),
        ({"network_dim": 0}, "network_dim is 0, but it must be at least 1"),
        ({"network_alpha": -1}, "network_alpha is -1.0, but it must be at least 0"),
        ({"network_dropout": 1}, "network_dropout is 1.0, but it must be below 1"),
        ({"network_dropout": -0.5}, "network_dropout is -0.5, but it must be at least 0"),
        ({"network_args": ["conv_dim"]}, "network_args has 'conv_dim', but every entry must be \"key=value\""),
        ({"scale_weight_norms": -1}, "scale_weight_norms is -1.0, but it must be above 0"),
        (
            {"dim_from_weights": True},
            "dim_from_weights is set without network_weights; name the LoRA file that the ranks are taken from",
        ),
        ({"learning_rate": 0}, "learning_rate is 0.0, but it must be above 0"),
        ({"unet_lr": -1}, "unet_lr is -1.0, but it must be at least 0"),
        ({"text_encoder_lr": -1}, "text_encoder_lr is -1.0, but it must be at least 0"),
        ({"max_grad_norm": -1}, "max_grad_norm is -1.0, but it must be at least 0"),
        ({"lr_warmup_steps": -1}, "lr_warmup_steps is -1.0, but it must be at least 0"),
        ({"lr_warmup_steps": 1.5}, "lr_warmup_steps is 1.5, but it must be a whole number of steps, or a share below 1"),
        (
            {"lr_scheduler_num_cycles": 0, "lr_scheduler": "cosine_with_restarts"},
            "lr_scheduler_num_cycles is 0, but it must be a whole number above 0",
        ),
        ({"optimizer_args": ["=3"]}, "optimizer_args has '=3', but every entry must be \"key=value\""),
        ({"lr_scheduler_args": ["x"]}, "lr_scheduler_args has 'x', but every entry must be \"key=value\""),
        ({"max_train_steps": 0}, "max_train_steps is 0, but it must be at least 1"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0, but it must be at least 1"),
        ({"num_threads": 0}, "num_threads is 0, but it must be at least 1"),
        ({"seed": -1}, "seed is -1, but it must be at least 0"),
        ({"output_name": ".."}, "output_name is '..', but it must be a file name that does not begin with a dot; the folder is output_dir"),
        (
            {"output_name": "a/b"},
            "output_name is 'a/b', but it must be a file name that does not begin with a dot; the folder is output_dir",
        ),
        (
            {"output_name": ".safetensors"},
            "output_name is '.safetensors', but it must be a file name that does not begin with a dot; the folder is output_dir",
        ),
        ({"output_name": ""}, "output_name is '', but it must be a file name that does not begin with a dot; the folder is output_dir"),
        ({"save_every_n_steps": -1}, "save_every_n_steps is -1, but it must be at least 1"),
        ({"save_last_n_steps": 5}, "save_last_n_steps is set without save_every_n_steps; say how often to save"),
    ],
)
def test_the_checks_of_the_concerns(values: dict[str, object], message: str):
    assert error_of(script, **values) == message


def test_what_the_concerns_say_together():
    assert script(network_args=["conv_dim=4", "algo = lokr"]).network.network_kwargs == {"conv_dim": "4", "algo": "lokr"}


@pytest.mark.parametrize(
    "values, trackers",
    [
        ({}, set()),
        ({"logging_dir": "logs"}, {"tensorboard"}),
        ({"log_with": "wandb", "logging_dir": "logs"}, {"wandb"}),
        ({"log_with": "all"}, {"tensorboard", "wandb"}),
    ],
)
def test_trackers(values: dict[str, object], trackers: set[str]):
    assert script(**values).logging.trackers == trackers


def test_a_secret_is_in_no_repr_and_no_error():
    config = script(wandb_api_key="hunter2", log_with="wandb")
    assert config.logging.details == {"wandb_api_key": "hunter2"} and "hunter2" not in repr(config)
    assert "hunter2" not in error_of(script, log_args=["hunter2"])
    assert "hunter2" not in error_of(script, log_args=["api_key=hunter2"])


def test_key_value_pairs_split_at_the_first_equals_sign():
    assert key_value_pairs("network_args", ["a=b=c", " d = 1 "]) == {"a": "b=c", "d": "1"}


def test_nearest_ignores_case():
    assert nearest("adamw8BIT", ["AdamW", "AdamW8bit"]) == "AdamW8bit"
    assert nearest("zzz", ["AdamW"]) is None
