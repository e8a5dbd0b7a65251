"""Tiny random pipelines of the families by flow matching, whose `save_pretrained` writes folders."""

import re
from typing import Any

import torch
from diffusers import (
    AnimaAutoBlocks,
    AnimaTextConditioner,
    AutoencoderKL,
    AutoencoderKLWan,
    CosmosTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3Model

from examples.shapes.tokenizer import build_chat_tokenizer
from library.models.single_file import bundled_config

WIDTH, HEADS = 64, 2
LANGUAGE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1}


def tiny_language_model(vocab_size: int) -> Qwen3Model:
    config: dict[str, Any] = bundled_config("z_image")["text_encoder"] | LANGUAGE | {"vocab_size": vocab_size, "head_dim": 16}
    return Qwen3Model(Qwen3Config(**config))


def tiny_flux_vae() -> AutoencoderKL:
    config = bundled_config("z_image")["vae"] | {"block_out_channels": [32] * 4, "layers_per_block": 1, "sample_size": 64}
    vae = AutoencoderKL.from_config(config)
    assert isinstance(vae, AutoencoderKL)
    return vae


def z_image_pipeline(**changes: Any) -> ZImagePipeline:
    """Fresh random weights, the same ones each time, none of which is 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer: Any = build_chat_tokenizer()
        sizes = {"dim": WIDTH, "n_heads": HEADS, "n_kv_heads": HEADS, "n_layers": 2, "n_refiner_layers": 1, "cap_feat_dim": 32}
        transformer = ZImageTransformer2DModel(**bundled_config("z_image")["transformer"] | sizes | {"axes_dims": [8, 12, 12]} | changes)
        for parameter in transformer.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.1)
        scheduler: Any = FlowMatchEulerDiscreteScheduler.from_config(bundled_config("z_image")["scheduler"])
        pipeline = ZImagePipeline(
            transformer=transformer.eval(),
            vae=tiny_flux_vae().eval(),
            text_encoder=tiny_language_model(len(tokenizer)).eval(),
            tokenizer=tokenizer,
            scheduler=scheduler,
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def anima_pipeline() -> Any:
    """The same of Anima, both of whose tokenizers are Qwen's here."""
    config = bundled_config("anima")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer: Any = build_chat_tokenizer()
        sizes = {"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 2, "text_embed_dim": 32, "adaln_lora_dim": 16}
        adapter = {"source_dim": 32, "target_dim": 32, "model_dim": 32, "num_layers": 1, "num_attention_heads": 2}
        scheduler: Any = FlowMatchEulerDiscreteScheduler.from_config(config["scheduler"])
        pipeline: Any = AnimaAutoBlocks().init_pipeline()
        pipeline.update_components(
            transformer=CosmosTransformer3DModel(**config["transformer"] | sizes).eval(),
            text_conditioner=AnimaTextConditioner(**adapter, target_vocab_size=len(tokenizer)).eval(),
            vae=AutoencoderKLWan(**config["vae"] | {"base_dim": 8}).eval(),
            text_encoder=tiny_language_model(len(tokenizer)).eval(),
            tokenizer=tokenizer,
            t5_tokenizer=tokenizer,
            scheduler=scheduler,
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


PIPELINES = {"z_image": z_image_pipeline, "anima": anima_pipeline}


ANIMA_NAMES = {"transformer_blocks": "blocks", "attn1": "self_attn", "attn2": "cross_attn", "to_out.0": "output_proj"}
ANIMA_NAMES |= {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "norm_q": "q_norm", "norm_k": "k_norm", "ff.net.2": "mlp.layer2"}
ANIMA_NAMES |= {"ff.net.0.proj": "mlp.layer1", "patch_embed.proj": "x_embedder.proj.1", "proj_out": "final_layer.linear"}
ANIMA_NAMES |= {"time_embed.t_embedder": "t_embedder.1", "time_embed.norm": "t_embedding_norm"}
ANIMA_NAMES |= {f"norm_out.linear_{place}": f"final_layer.adaln_modulation.{place}" for place in (1, 2)}
ANIMA_NAMES |= {
    f"norm{number}.linear_{place}": f"adaln_modulation_{part}.{place}"
    for number, part in enumerate(("self_attn", "cross_attn", "mlp"), start=1)
    for place in (1, 2)
}


def original_names(kind: str, pipeline: Any) -> dict[str, Tensor]:
    """As the published single files have them: of Z-Image q, k and v in one matrix, of Anima with its adapter."""
    tensors, found = dict(pipeline.transformer.state_dict()), {}
    if kind == "anima":
        for name, tensor in tensors.items():
            for ours, theirs in ANIMA_NAMES.items():
                name = name.replace(ours, theirs)
            found[name] = tensor.clone()
        return found | {f"llm_adapter.{name}": tensor for name, tensor in pipeline.text_conditioner.state_dict().items()}
    for name, tensor in tensors.items():
        if ".to_q." in name:
            tensor = torch.cat([tensors[name.replace(".to_q.", f".to_{letter}.")] for letter in "qkv"])
        if ".to_k." not in name and ".to_v." not in name:
            name = name.replace(".to_q.", ".qkv.").replace(".to_out.0.", ".out.").replace("all_x_embedder.2-1", "x_embedder")
            name = re.sub(r"\.norm_([qk])\.", r".\1_norm.", name).replace("all_final_layer.2-1", "final_layer")
            found[name] = tensor.clone()
    return found


WAN_NAMES = {
    r"^quant_conv": "conv1",
    r"^post_quant_conv": "conv2",
    r"norm_out": "head.0",
    r"\.conv_out": ".head.2",
    r"mid_block\.resnets\.(\d)": lambda found: f"middle.{2 * int(found[1])}",
    r"mid_block\.attentions\.0": "middle.1",
    r"up_blocks\.(\d)\.resnets\.(\d)": lambda found: f"upsamples.{4 * int(found[1]) + int(found[2])}",
    r"up_blocks\.(\d)\.upsamplers\.0": lambda found: f"upsamples.{4 * int(found[1]) + 3}",
    r"down_blocks": "downsamples",
    r"(middle|samples)(\.\d+)\.conv1": r"\1\2.residual.2",
    r"(middle|samples)(\.\d+)\.conv2": r"\1\2.residual.6",
    r"\.norm1": ".residual.0",
    r"\.norm2": ".residual.3",
    r"conv_shortcut": "shortcut",
    r"conv_in": "conv1",
}


def wan_vae_names(vae: Any) -> dict[str, Tensor]:
    """The VAE of Wan and of Qwen-Image as its published single files have it."""
    found = {}
    for name, tensor in vae.state_dict().items():
        for ours, theirs in WAN_NAMES.items():
            name = re.sub(ours, theirs, name)
        found[name] = tensor.clone()
    return found
