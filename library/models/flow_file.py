"""Single files of flow-matching transformers, whose language model and tokenizers may be elsewhere."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.errors import UserError
from library.models.family import Family
from library.models.flow_model import FlowFamily, read_tokenizer
from library.models.folder_parts import component
from library.models.hub import find_model
from library.models.single_file import VAE_PREFIXES, StateDict, build, count_groups, fill, read_tensors


@dataclass(frozen=True)
class TextSource:
    """Where a flow-matching transformer's language model is, if not with the model."""

    text_encoder: str | Path | None
    tokenizers: Sequence[str | Path]

    def check(self, family: Family) -> None:
        if isinstance(family, FlowFamily):
            if self.tokenizers and len(self.tokenizers) != len(family.tokenizers):
                raise UserError(f"tokenizer has {len(self.tokenizers)} folders; {family.title} takes {len(family.tokenizers)}.")
        elif self.text_encoder is not None or self.tokenizers:
            raise UserError(f"text_encoder and tokenizer are for transformers; {family.title} models bring their own: leave them out.")

    def parts(self, family: FlowFamily, tensors: Mapping[str, Tensor], path: Path, dtype: torch.dtype) -> tuple[list[Any], list[Any]]:
        """Text encoder and tokenizers for a single file with these tensors, which may hold the first itself."""
        own = {name.removeprefix(family.text_prefix): tensor for name, tensor in tensors.items() if name.startswith(family.text_prefix)}
        folder = None
        if self.text_encoder is not None:
            source = find_model(self.text_encoder)
            if source.is_dir():
                folder = source if (source / "config.json").is_file() else source / "text_encoder"
                source = folder
            else:
                own = read_tensors(source)[0]
            path = source
        if folder is None and not own:
            raise UserError(f"{path} has no text encoder; give --text_encoder: the file or folder of {family.title}'s language model.")
        tokenizers = [find_model(tokenizer) for tokenizer in self.tokenizers]
        if not tokenizers and folder is not None:
            beside = [folder.parent / name for name in family.tokenizers]
            tokenizers = [folder] if len(beside) == 1 and (folder / "tokenizer_config.json").is_file() else beside
        if not tokenizers:
            raise UserError(f"{path} has no tokenizer; give --tokenizer: the folder of that of {family.title}'s language model.")
        if folder is not None:
            import transformers

            text_encoder = component(transformers.Qwen3Model, folder, dtype)
        else:
            text_encoder = build_language_model(own, family, dtype, path)
        return [text_encoder], [read_tokenizer(tokenizer) for tokenizer in tokenizers]


def build_transformer(tensors: StateDict, family: FlowFamily, dtype: torch.dtype, path: Path) -> list[Any]:
    """A flow-matching transformer, and what the file holds besides that belongs to `text_encoders`."""
    import diffusers

    prefix = family.prefix_in(tensors)
    assert prefix is not None, "detect_family found it"
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    if not prefix:  # what else such a file may hold
        own = {name: tensor for name, tensor in own.items() if not name.startswith((*VAE_PREFIXES, family.text_prefix))}
    parts = [(getattr(diffusers, family.denoiser_class), *family.denoiser_of_file(own)), *family.other_parts_of_file(own)]
    return [build(cls, config, part, dtype, path, cls.__name__) for cls, config, part in parts]


def build_language_model(tensors: StateDict, family: FlowFamily, dtype: torch.dtype, path: Path) -> Any:
    """Qwen3 without its head, from transformers' names."""
    import transformers
    from accelerate import init_empty_weights

    own = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    if "layers.0.self_attn.q_norm.weight" not in own:
        raise UserError(f"{path} is no Qwen3 language model, which {family.title} reads prompts with; give that.")
    head = own["layers.0.self_attn.q_norm.weight"].shape[0]
    config = family.config["text_encoder"] | {
        "vocab_size": own["embed_tokens.weight"].shape[0],
        "hidden_size": own["embed_tokens.weight"].shape[1],
        "intermediate_size": own["layers.0.mlp.gate_proj.weight"].shape[0],
        "num_hidden_layers": count_groups(own, r"layers\.(\d+)\."),
        "num_attention_heads": own["layers.0.self_attn.q_proj.weight"].shape[0] // head,
        "num_key_value_heads": own["layers.0.self_attn.k_proj.weight"].shape[0] // head,
        "head_dim": head,
    }
    with init_empty_weights():
        text_encoder = transformers.Qwen3Model(transformers.Qwen3Config(**config))
    fill(text_encoder, own, dtype, path, "text encoder")
    return text_encoder
