"""The options of sd-scripts (its argument groups of version 0.10 and 0.11, and the keys that kohya_ss's LECO tab writes).

A config file written for sd-scripts should run here. A key that this project declares is simply used; the others are named
in one warning (`library.settings.options.resolve`), so that nobody believes in a setting that does nothing. Those that say in other
words what a setting here says are translated.
"""

from collections.abc import Collection, Mapping

from library.errors import UserError

LOG_ARGS = ("log_prefix", "log_tracker_name", "wandb_run_name", "wandb_api_key")

REPLACEMENTS: Mapping[str, str] = {
    "max_train_epochs": "use max_train_steps",
    "save_every_n_epochs": "use save_every_n_steps",
    "save_last_n_epochs": "use save_last_n_steps",
    "sample_every_n_epochs": "use sample_every_n_steps",
    "use_8bit_adam": 'use optimizer_type = "AdamW8bit"',
    "use_lion_optimizer": 'use optimizer_type = "Lion"',
    "lr_scheduler_type": "give the dotted class name as lr_scheduler",
    "lr_decay_steps": 'use lr_scheduler_args = ["num_decay_steps=..."]',
    "lr_scheduler_timescale": 'use lr_scheduler_args = ["timescale=..."]',
    "lr_scheduler_min_lr_ratio": 'use lr_scheduler_args = ["min_lr_rate=..."], or min_lr_ratio for warmup_stable_decay',
    "mem_eff_attn": "use xformers",
    "full_fp16": 'use mixed_precision = "fp16"; the weights of the LoRA stay in float32',
    "full_bf16": 'use mixed_precision = "bf16"; the weights of the LoRA stay in float32',
    "zero_terminal_snr": "it is read from the model",
    "sdpa": "it is always used, unless xformers is",
    "save_model_as": "it is always safetensors",
    "lr_scheduler_num_cycles": "only cosine_with_restarts and cosine_with_min_lr have cycles",
    "lr_scheduler_power": "only polynomial has a power",
}
"""Keys that mean something else here, each with what to do."""

# models and optimizers, saving, training, sampling and LECO, data sets, logging
_UNUSED = """
tokenizer_cache_dir fused_backward_pass optimizer_schedulefree_wrapper optimizer_schedulefree_wrapper_args schedulefree_wrapper_args
fp8_base fp8_base_unet no_half_vae disable_mmap_load_safetensors max_token_length
cache_text_encoder_outputs cache_text_encoder_outputs_to_disk

huggingface_repo_id huggingface_repo_type huggingface_path_in_repo huggingface_token huggingface_repo_visibility
async_upload save_state_to_huggingface resume_from_huggingface save_n_epoch_ratio save_last_n_epochs_state
save_last_n_steps_state config_file output_config
metadata_title metadata_author metadata_description metadata_license metadata_tags metadata_usage_hint metadata_thumbnail
metadata_merged_from metadata_trigger_phrase metadata_preprocessor metadata_is_negative_embedding

train_batch_size max_data_loader_n_workers persistent_data_loader_workers dynamo_backend lowram highvram
ddp_timeout ddp_gradient_as_bucket_view ddp_static_graph deepspeed cpu_offload_checkpointing
noise_offset noise_offset_random_strength multires_noise_iterations multires_noise_discount ip_noise_gamma
ip_noise_gamma_random_strength adaptive_noise_scale min_timestep max_timestep loss_type huber_schedule huber_c huber_scale
min_snr_gamma scale_v_pred_loss_like_noise_pred v_pred_like_loss debiased_estimation_loss weighted_captions masked_loss
skip_until_initial_step initial_epoch initial_step prior_loss_weight training_mode
validation_seed validation_split validate_every_n_steps validate_every_n_epochs max_validation_steps

sample_prompts sample_sampler sample_at_first sample_every_n_steps
prompts_file max_denoising_steps leco_denoise_guidance_scale

dataset_config dataset_class train_data_dir reg_data_dir in_json caption_extension caption_extention caption_separator
caption_prefix caption_suffix caption_dropout_rate caption_dropout_every_n_epochs caption_tag_dropout_rate
shuffle_caption secondary_separator enable_wildcard keep_tokens keep_tokens_separator resolution
cache_latents cache_latents_to_disk vae_batch_size skip_cache_check skip_image_resolution
enable_bucket min_bucket_reso max_bucket_reso bucket_reso_steps bucket_no_upscale resize_interpolation
flip_aug color_aug random_crop face_crop_aug_range dataset_repeats debug_dataset alpha_mask conditioning_data_dir
token_warmup_min token_warmup_step cache_info

v2 log_prefix log_tracker_name wandb_run_name wandb_api_key
log_tracker_config log_config console_log_level console_log_file console_log_simple
"""

UNUSED: frozenset[str] = frozenset(_UNUSED.split())
"""Keys that do nothing here (unless a script declares an option of that name, which then is the one that is used)."""


def translate(values: Mapping[str, object], known: Collection[str]) -> dict[str, object]:
    """`values` with sd-scripts' words for what the settings `known` say in others; what is the same here anyway is left out.

    Raises:
        UserError: v2 beside another model_family.
    """
    result = dict(values)

    def take(name: str) -> str:
        value = result.pop(name)
        return " ".join(map(str, value)) if isinstance(value, list) else str(value)

    for name, usual in (("sdpa", ("", "true")), ("save_model_as", ("safetensors",))):
        if name in result and name not in known and (text := take(name)).lower() not in usual:
            result[name] = text
    if "v2" in result and "model_family" in known and take("v2").lower() in ("", "true"):
        if result.setdefault("model_family", "sd2") not in ("auto", "sd2"):
            raise UserError(f"v2 is set and model_family is {result['model_family']}; leave one of the two out")
        result["model_family"] = "sd2"
    if "train_data_file" in known and "dataset_config" in result and (text := take("dataset_config")):
        if result.get("train_data_file") not in (None, ""):
            raise UserError("train_data_file and dataset_config are both set; leave one out")
        result["train_data_file"] = text
    schedule = str(result.get("lr_scheduler", "")).lower()
    if "lr_scheduler_num_cycles" in result and schedule in ("cosine_with_restarts", "cosine_with_min_lr"):
        cycles = take("lr_scheduler_num_cycles")
        if not cycles.isdecimal() or cycles == "0":
            raise UserError(f"lr_scheduler_num_cycles is {cycles}, but it must be a whole number above 0")
        waves = cycles if schedule == "cosine_with_restarts" else int(cycles) / 2  # cosine_with_min_lr counts down and up again as one
        _put_before(result, "lr_scheduler_args", f"num_cycles={waves}")
    if "lr_scheduler_power" in result and schedule == "polynomial":
        _put_before(result, "lr_scheduler_args", f"power={take('lr_scheduler_power')}")
    if "log_args" in known:
        for name in [name for name in LOG_ARGS if name in result]:
            if text := take(name):
                _put_before(result, "log_args", f"{name}={text}")
    return result


def _put_before(values: dict[str, object], name: str, word: str) -> None:
    """Put a word before those of a setting of several, which then have the last say."""
    given = values.get(name, ())
    values[name] = [word, *(given if isinstance(given, (list, tuple)) else [given])]
