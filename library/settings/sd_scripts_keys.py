"""The options of sd-scripts (all its training scripts, version 0.10 and 0.11) and the keys that kohya_ss's tabs write.

A config file written for sd-scripts should run here. A key that this project declares is simply used; the others are named
in one warning (`library.settings.options.resolve`), so that nobody believes in a setting that does nothing. Those that say in other
words what a setting here says are translated.
"""

import re
from collections.abc import Collection, Mapping

from library.errors import UserError

WORD_LISTS = ("optimizer_args", "lr_scheduler_args", "network_args")
ZERO_IS_UNSET = ("save_every_n_steps", "save_last_n_steps", "sample_every_n_steps", "scale_weight_norms", "min_snr_gamma")
SEVERAL_WORDS = ("text_encoder_lr",)  # there a list, one for each text encoder
LOG_ARGS = ("log_prefix", "log_tracker_name", "wandb_run_name", "wandb_api_key")

SAME: Mapping[str, str] = {"dataset_config": "train_data_file", "train_data_file": "dataset_config"}
"""Two names of one setting, of which the command line's beats the file's."""

REPLACEMENTS: Mapping[str, str] = {
    "epoch": "use max_train_steps",
    "optimizer": "use optimizer_type",
    "network_train_text_encoder": "use network_train_unet_only = false",
    "qwen3": "use text_encoder",
    "t5_tokenizer_path": "use tokenizer, which takes both of Anima's",
    "discrete_flow_shift": "it is read from the model's scheduler",
    "lr_warmup": "use lr_warmup_steps",
    "max_resolution": "use resolution",
    "lora_network_weights": "use network_weights",
    "use_wandb": 'use log_with = "wandb"',
    "lr_restart_cycles": 'use lr_scheduler_args = ["num_cycles=..."]',
    "sample_batch_size": "it follows the size of the latents",
    "max_train_epochs": "use max_train_steps",
    "save_every_n_epochs": "use save_every_n_steps",
    "save_last_n_epochs": "use save_last_n_steps",
    "sample_every_n_epochs": "use sample_every_n_steps",
    "use_8bit_adam": 'use optimizer_type = "AdamW8bit"',
    "use_lion_optimizer": 'use optimizer_type = "Lion"',
    "lr_decay_steps": "only warmup_stable_decay decays over steps of its own",
    "lr_scheduler_timescale": "only inverse_sqrt has a timescale",
    "lr_scheduler_min_lr_ratio": "only cosine_with_min_lr and warmup_stable_decay have a lowest rate",
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

# models and optimizers, saving, training, sampling and LECO, data sets, logging; the rest of its scripts'; kohya_ss', now and earlier
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
skip_until_initial_step initial_epoch initial_step lr_scheduler_type prior_loss_weight training_mode
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

ae apply_lg_attn_mask apply_t5_attn_mask attn_mode base_weights base_weights_multiplier block_lr blocks_to_swap blockwise_fused_optimizers
byt5 ckpt clip_g clip_g_dropout_rate clip_l clip_l_dropout_rate clip_skip cond_emb_dim control_net_lr controlnet_model_name_or_path
cross_attn_lr diffusers_xformers dim_from_weights double_blocks_to_swap enable_scaled_pos_embed
fp16_master_weights_and_gradients fp8_scaled fp8_vl fused_optimizer_groups gemma2 gemma2_max_token_length gradient_accumulation_steps
gradient_checkpointing guidance_scale init_word input_image_dir learning_rate learning_rate_te learning_rate_te1 learning_rate_te2
learning_rate_te3 llm_adapter_lr llm_adapter_path log_with logging_dir logit_mean logit_std lr_scheduler lr_scheduler_args lr_warmup_steps
max_grad_norm max_train_steps mem_eff_save mixed_precision mlp_lr mod_lr mode_scale model_prediction_type model_type network_alpha
network_args network_dim network_dropout network_module network_train_text_encoder_only network_train_unet_only network_weights
no_metadata no_token_padding num_last_block_to_freeze num_vectors_per_token offload_optimizer_device offload_optimizer_nvme_path
offload_param_device offload_param_nvme_path optimizer_args optimizer_type output_dir output_image_dir output_name perlin_noise
pos_emb_random_crop_rate pretrained_model_name_or_path qwen3_max_token_length resume save_clip save_every_n_steps save_last_n_steps
save_precision save_state save_state_on_train_end save_t5xxl scale_weight_norms seed self_attn_lr sigmoid_scale single_blocks_to_swap
skip_latents_validity_check split_attn split_mode stop_text_encoder_training support_controlnet support_dreambooth support_dropout
support_finetuning system_prompt t5_dropout_rate t5_max_token_length t5xxl t5xxl_device t5xxl_dtype
t5xxl_max_token_length text_encoder text_encoder_batch_size text_encoder_cpu text_encoder_lr timestep_sampling token_string torch_compile
train_t5xxl train_text_encoder training_comment training_shift unet_lr unsloth_offload_checkpointing use_flash_attn use_object_template
use_safetensors use_sage_attn use_style_template use_t5xxl_cache_only v_parameterization vae vae_chunk_size vae_disable_cache
weighting_scheme weights xformers zero3_init_flag zero3_save_16bit_model zero_stage

LoRA_type LyCORIS_preset additional_parameters anima_attn_mode anima_cache_text_encoder_outputs anima_cache_text_encoder_outputs_to_disk
anima_checkbox anima_compile anima_compile_backend anima_compile_cache_size_limit anima_compile_dynamic anima_compile_fullgraph
anima_compile_mode anima_discrete_flow_shift anima_llm_adapter_path anima_qwen3 anima_qwen3_max_token_length anima_qwen_image_vae_2d
anima_sigmoid_scale anima_split_attn anima_t5_max_token_length anima_t5_tokenizer_path anima_timestep_sampling anima_torch_compile
anima_unsloth_offload_checkpointing anima_vae anima_vae_chunk_size anima_vae_disable_cache batch_size block_alphas block_dims
block_lr_zero_threshold bypass_mode caption_metadata_filename compile compile_backend compile_cache_size_limit compile_dynamic
compile_fullgraph compile_mode config_file_name constrain conv_alpha conv_block_alphas conv_block_dims conv_dim create_buckets
create_caption decompose_both dora_wd down_lr_weight dynamo_mode dynamo_use_dynamic dynamo_use_fullgraph enable_all_linear
extra_accelerate_launch_args factor flux1_cache_text_encoder_outputs flux1_cache_text_encoder_outputs_to_disk flux1_checkbox flux1_clip_l
flux1_t5xxl flux_fused_backward_pass full_path generate_caption_database generate_image_buckets ggpo_beta ggpo_sigma gpu_ids gr_type
hunyuan_attn_mode hunyuan_byt5 hunyuan_discrete_flow_shift hunyuan_fp8_scaled hunyuan_fp8_vl hunyuan_image_cache_text_encoder_outputs
hunyuan_image_cache_text_encoder_outputs_to_disk hunyuan_image_checkbox hunyuan_model_prediction_type hunyuan_sigmoid_scale
hunyuan_split_attn hunyuan_text_encoder hunyuan_text_encoder_cpu hunyuan_timestep_sampling hunyuan_vae hunyuan_vae_chunk_size image_folder
img_attn_dim img_mlp_dim img_mod_dim in_dims latent_metadata_filename loraplus loraplus_lr_ratio loraplus_text_encoder_lr_ratio
loraplus_unet_lr_ratio lowvram lumina_ae lumina_cache_text_encoder_outputs lumina_cache_text_encoder_outputs_to_disk lumina_checkbox
lumina_discrete_flow_shift lumina_gemma2 lumina_gemma2_max_token_length lumina_model_prediction_type lumina_sigmoid_scale
lumina_system_prompt lumina_timestep_sampling lumina_use_flash_attn lumina_use_sage_attn main_process_port mid_lr_weight
model_list module_dropout multi_gpu network_weights_file noise_offset_type num_cpu_threads_per_process num_machines num_processes
qwen_image_vae_2d rank_dropout rank_dropout_scale rescaled sd3_cache_text_encoder_outputs sd3_cache_text_encoder_outputs_to_disk
sd3_checkbox sd3_clip_l sd3_clip_l_dropout_rate sd3_disable_mmap_load_safetensors sd3_enable_scaled_pos_embed sd3_fused_backward_pass
sd3_t5_dropout_rate sd3_t5xxl sd3_text_encoder_batch_size sdxl sdxl_cache_text_encoder_outputs sdxl_checkbox sdxl_no_half_vae
show_timesteps show_timesteps_resolution single_dim single_mod_dim split_qkv stop_text_encoder_training_pct t5xxl_lr template train_blocks
train_dir train_double_block_indices train_inpainting train_lora_ggpo train_norm train_on_input train_single_block_indices training_preset
txt_attn_dim txt_mlp_dim txt_mod_dim unit up_lr_weight use_cp use_latent_files use_scalar use_tucker

blockwise_fused_optimizer cache_latent conv_alphas conv_dims dataset_config_path effnet_checkpoint_path previewer_checkpoint_path
sample_prompts_path save_as_bool sdxl_max_timestep sdxl_min_timestep weigts
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

    for name in [name for name in ZERO_IS_UNSET if str(result.get(name)) in ("0", "0.0")]:
        result[name] = None
    for name, usual in (("sdpa", ("", "true")), ("save_model_as", ("safetensors",))):
        if name in result and name not in known and (text := take(name)).lower() not in usual:
            result[name] = text
    if "v2" in result and "model_family" in known and take("v2").lower() in ("", "true"):
        if result.setdefault("model_family", "sd2") not in ("auto", "sd2"):
            raise UserError(f"v2 is set and model_family is {result['model_family']}; leave one of the two out")
        result["model_family"] = "sd2"
    for name in ("fp8_base", "fp8_base_unet"):
        if name in result and "quantize_base" in known and take(name).lower() in ("", "true"):
            result.setdefault("quantize_base", "fp8")
    if "network_weights" in known and "lora_network_weights" in result and (text := take("lora_network_weights")):
        result.setdefault("network_weights", text)
    if "train_data_file" in known and "dataset_config" in result and (text := take("dataset_config")):
        if result.get("train_data_file") not in (None, ""):
            raise UserError("train_data_file and dataset_config are both set; leave one out")
        result["train_data_file"] = text
    for name in [name for name in WORD_LISTS if result.get(name)]:  # people write them in one string, too
        own = result[name]
        given = own if isinstance(own, (list, tuple)) else [own]
        result[name] = [word for text in given for word in re.split(r"\s+(?=\w+=)", str(text).strip())]
    rates = result.get("text_encoder_lr")
    if isinstance(rates, (list, tuple)) and not rates:  # what kohya_ss' form writes where nothing was entered
        result["text_encoder_lr"] = None
    elif isinstance(rates, (list, tuple)):  # one for each encoder
        trained = result.get("network_train_unet_only", True) in (False, "false") or "network_train_text_encoder_only" in result
        if trained and len(set(map(str, rates))) > 1:
            raise UserError(f"text_encoder_lr is {list(rates)}, but all text encoders have one learning rate here; give one number")
        result["text_encoder_lr"] = rates[0]
    warmup = result.get("lr_warmup_steps")
    if isinstance(warmup, str) and re.fullmatch(r"\s*\d+(\.\d+)?\s*%\s*", warmup):
        result["lr_warmup_steps"] = float(warmup.strip().rstrip("% ")) / 100
    if "lr_scheduler_type" in result and "lr_scheduler" in known and (text := take("lr_scheduler_type")):
        result["lr_scheduler"] = text
    schedule = str(result.get("lr_scheduler", "")).lower()
    if result.get("lr_decay_steps") not in (None, "", 0) and schedule == "warmup_stable_decay":
        _put_before(result, "lr_scheduler_args", f"num_decay_steps={take('lr_decay_steps')}")
    ratio = {"cosine_with_min_lr": "min_lr_rate", "warmup_stable_decay": "min_lr_ratio"}.get(schedule)
    if ratio and result.get("lr_scheduler_min_lr_ratio") not in (None, ""):
        _put_before(result, "lr_scheduler_args", f"{ratio}={take('lr_scheduler_min_lr_ratio')}")
    if "lr_scheduler_num_cycles" in result and schedule in ("cosine_with_restarts", "cosine_with_min_lr"):
        cycles = take("lr_scheduler_num_cycles")
        if not cycles.isdecimal() or cycles == "0":
            raise UserError(f"lr_scheduler_num_cycles is {cycles}, but it must be a whole number above 0")
        waves = cycles if schedule == "cosine_with_restarts" else int(cycles) / 2  # cosine_with_min_lr counts down and up again as one
        _put_before(result, "lr_scheduler_args", f"num_cycles={waves}")
    if "lr_scheduler_power" in result and schedule == "polynomial":
        _put_before(result, "lr_scheduler_args", f"power={take('lr_scheduler_power')}")
    if "lr_scheduler_timescale" in result and schedule == "inverse_sqrt" and (text := take("lr_scheduler_timescale")):
        _put_before(result, "lr_scheduler_args", f"timescale={text}")
    if "log_args" in known and (result.get("log_with") or result.get("logging_dir")):
        for name in [name for name in LOG_ARGS if name in result]:
            if text := take(name):
                _put_before(result, "log_args", f"{name}={text}")
    return result


def _put_before(values: dict[str, object], name: str, word: str) -> None:
    """Put a word before those of a setting of several, which then have the last say."""
    given = values.get(name, ())
    values[name] = [word, *(given if isinstance(given, (list, tuple)) else [given])]
