"""Every option of sd-scripts' LECO and LoRA trainers in our file and on our command line, and the page that says what becomes of each."""

import logging
from pathlib import Path
from typing import Any

import pytest

from library.settings.cli import parse_config
from library.settings.options import options
from library.settings.sd_scripts_defaults import REASONS, SD_SCRIPTS
from tools.sd_scripts_options import BESIDE, OF_THE_ENGINE, PAGE, fate, page, read_data, value_for
from train_leco_score import leco_score_config

DATA = read_data()
NONE = (None, "", (), 0)
SAME = {  # another value that means the same, or no value at all: the page says so
    "min_timestep": (0, None),
    "max_timestep": (1000, None),
    "optimizer_type": ("AdamW", ""),
    "network_train_unet_only": (True, False),
    "v_parameterization": (None, False),
    "output_dir": ("output", None),
}


def test_the_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m tools.sd_scripts_options"


def test_no_option_is_fatal_and_those_without_use_are_one_warning(caplog: pytest.LogCaptureFixture):
    fates = {name: fate(name, entry) for name, entry in DATA.items() if name not in OF_THE_ENGINE}
    assert {found.kind for found in fates.values()} == {"obeyed", "warned"}, [found.note for found in fates.values()]

    def parse(*names: str) -> None:
        caplog.clear()
        given = {key: value for name in names for key, value in {**BESIDE.get(name, {}), name: value_for(name, DATA[name])}.items()}
        words = [word for key, value in given.items() for word in _words(key, value)]
        with caplog.at_level(logging.WARNING):
            parse_config(leco_score_config(), ["--pretrained_model_name_or_path", "m", *words])

    for name in [name for name, found in fates.items() if found.kind == "obeyed" and name != "pretrained_model_name_or_path"]:
        parse(name)
        assert not caplog.messages, name
    warned = [name for name, found in fates.items() if found.kind == "warned"]
    parse(*warned)
    (message,) = caplog.messages
    assert all(name in message for name in warned)


def _words(key: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{key}" if value else f"--no-{key}"]
    return [f"--{key}", *map(str, value if isinstance(value, list) else [value])]


def test_every_default_that_differs_is_explained():
    table = options(leco_score_config())
    for name, entry in DATA.items():
        if name not in table or name in SAME:
            continue
        theirs = entry["default"].get("train_leco.py", entry["default"].get("train_network.py"))
        differs = theirs != table[name].default and not (theirs in NONE and table[name].default in NONE)
        assert differs == (name in REASONS), name
        if name in REASONS and theirs is not None:
            assert REASONS[name][0] == theirs


def test_their_defaults_can_be_had(tmp_path, capsys):
    file = tmp_path / "c.toml"
    file.write_text('pretrained_model_name_or_path = "m"\nnetwork_dim = 16\ndefaults = "sd-scripts"\n', encoding="utf-8")
    config = parse_config(leco_score_config(), ["--config_file", str(file), "--seed", "3"], defaults={"sd-scripts": SD_SCRIPTS})
    assert (config.network.network_dim, config.network.network_alpha, config.training.max_train_steps) == (16, 1.0, 1600)
    assert (config.optimizer.learning_rate, config.saving.save_precision, config.rollout.train_batch_size) == (2e-6, "float", 1)


# As the two tabs of kohya_ss write them: a value for everything, in their forms.
LECO_TAB = """
clip_skip = 1
gradient_checkpointing = true
learning_rate = 0.0002
leco_denoise_guidance_scale = 3.0
lr_scheduler = "cosine_with_restarts"
lr_scheduler_args = []
lr_scheduler_num_cycles = 2
lr_scheduler_power = 1
lr_warmup_steps = 20
max_denoising_steps = 30
max_train_steps = 300
min_snr_gamma = 5
mixed_precision = "fp16"
network_alpha = 4.0
network_args = [ "conv_dim=4", "conv_alpha=2",]
network_dim = 8
network_module = "networks.lora"
noise_offset = 0.05
optimizer_args = [ "weight_decay=0.02",]
optimizer_type = "AdamW8bit"
prompts_file = "PROMPTS"
save_every_n_steps = 100
save_model_as = "safetensors"
sdpa = true
unet_lr = 0.0002
v2 = true
wandb_run_name = "words"
zero_terminal_snr = true
"""
LORA_TAB = """
bucket_reso_steps = 64
cache_latents = true
caption_extension = ".txt"
dynamo_backend = "no"
enable_bucket = true
epoch = 4
huber_schedule = "snr"
huggingface_repo_id = ""
huggingface_repo_type = ""
huggingface_repo_visibility = ""
keep_tokens = 1
loss_type = "l2"
lr_scheduler = "cosine"
lr_scheduler_num_cycles = 1
lr_warmup_steps = 0.1
max_data_loader_n_workers = 0
max_timestep = 1000
max_token_length = 75
metadata_author = "somebody"
network_args = [ "down_lr_weight=1,1,1,1,1,1,1,1,1,1,1,1", "loraplus_lr_ratio=16",]
network_dim = 16
network_module = "networks.lora"
noise_offset_type = "Multires"
optimizer_args = [ "scale_parameter=False", "relative_step=False",]
optimizer_type = "Adafactor"
prior_loss_weight = 1.0
resolution = "512,768"
reg_data_dir = ""
resume = ""
sample_prompts = "samples.txt"
sample_sampler = "euler_a"
save_every_n_epochs = 1
save_model_as = "safetensors"
shuffle_caption = true
stop_text_encoder_training = 50
text_encoder_lr = [ 5e-5, 5e-5,]
train_batch_size = 2
train_data_dir = "/pictures"
xformers = true
"""


@pytest.mark.parametrize(
    "text, unread, read",
    [
        (LECO_TAB, "lr_scheduler_power noise_offset wandb_run_name", "min_snr_gamma v2 lr_scheduler_num_cycles"),
        (LORA_TAB, "train_data_dir epoch shuffle_caption sample_prompts", "resolution metadata_author resume huggingface_repo_type"),
    ],
    ids=["LECO", "LoRA"],
)
def test_a_file_of_a_tab_of_kohya_ss_runs_with_one_warning(text: str, unread: str, read: str, tmp_path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "prompts.toml").write_text('[[prompts]]\ntarget = "a"\nneutral = ""\naction = "erase"\n', encoding="utf-8")
    (tmp_path / "tab.toml").write_text(text.replace("PROMPTS", (tmp_path / "prompts.toml").as_posix()), encoding="utf-8")
    parse_config(leco_score_config(), ["--config_file", str(tmp_path / "tab.toml"), "--pretrained_model_name_or_path", "m"])
    (message,) = caplog.messages
    assert message.startswith("these settings do nothing here: ")
    assert all(name in message for name in unread.split()) and not any(name in message for name in read.split())


def test_keys_of_earlier_versions_of_kohya_ss(tmp_path, caplog: pytest.LogCaptureFixture):
    """As the presets of its history have them, where nothing was chosen and where something was."""
    unset = 'lora_network_weights = ""\nconv_dims = ""\nconv_alphas = ""\n'
    (tmp_path / "a.toml").write_text(unset, encoding="utf-8")
    command = ["--pretrained_model_name_or_path", "m", "--prompts_file", "p.txt", "--scorer", "s"]
    parse_config(leco_score_config(), ["--config_file", str(tmp_path / "a.toml"), *command])
    assert caplog.messages == []
    chosen = 'lora_network_weights = "a.safetensors"\nuse_wandb = true\nsdxl_min_timestep = 0\nmax_resolution = "512,512"\n'
    (tmp_path / "b.toml").write_text(chosen, encoding="utf-8")
    config = parse_config(leco_score_config(), ["--config_file", str(tmp_path / "b.toml"), *command])
    assert config.network.network_weights == Path("a.safetensors")
    assert caplog.messages == [
        'these settings do nothing here: use_wandb (use log_with = "wandb"), sdxl_min_timestep, max_resolution (use resolution)'
    ]
