"""Single files of flow-matching transformers, whose language model and tokenizers may be elsewhere."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from library.errors import UserError
from library.models.family import Family
from library.models.flow_model import FlowFamily, read_tokenizer
from library.models.folder_parts import component, component_without_values
from library.models.hub import find_model
from library.models.single_file import VAE_PREFIXES, StateDict, build_part, count_groups, fill, read_tensors


@dataclass(frozen=True)
class TextSource:
    """Where a flow-matching transformer's language model is, if not with the model."""

    text_encoder: str | Path | None
    tokenizers: Sequence[str | Path]

    def check(self, family: Family, path: Path) -> None:
        """Raises UserError where it was given for a model that has its own."""
        given = self.text_encoder is not None or bool(self.tokenizers)
        if given and (path.is_dir() or not isinstance(family, FlowFamily)):
            raise UserError(f"{path} brings its own text encoder and tokenizer; leave text_encoder and tokenizer out.")
        if isinstance(family, FlowFamily) and self.tokenizers and len(self.tokenizers) != len(family.tokenizers):
            raise UserError(f"tokenizer has {len(self.tokenizers)} folders; {family.title} takes {len(family.tokenizers)}.")

    def parts(self, family: FlowFamily, tensors: StateDict, path: Path, dtype: torch.dtype, no_values: bool) -> tuple[list[Any], list[Any]]:
        """Text encoder and tokenizers for a single file with these tensors, which may hold the first itself."""
        import transformers

        source = path if self.text_encoder is None else find_model(self.text_encoder)
        tokenizers = [find_model(tokenizer) for tokenizer in self.tokenizers]
        if source.is_dir():
            folder = source if (source / "config.json").is_file() else source / "text_encoder"
            if not tokenizers:
                beside = [folder.parent / name for name in family.tokenizers]
                tokenizers = [folder] if len(beside) == 1 and (folder / "tokenizer_config.json").is_file() else beside
            load = component_without_values if no_values else component
            text_encoder = load(transformers.Qwen3Model, folder, dtype)
        else:
            found = tensors if source == path else read_tensors(source, shapes_only=no_values)[0]
            prefix = family.text_prefix if source == path else ""
            own = {name.removeprefix(prefix): tensor for name, tensor in found.items() if name.startswith(prefix)}
            if not own:
                raise UserError(f"{path} has no text encoder; give --text_encoder: the file or folder of {family.title}'s language model.")
            if not tokenizers:
                raise UserError(f"{path} has no tokenizer; give --tokenizer: the folder of that of {family.title}'s language model.")
            text_encoder = build_language_model(own, family, dtype, source)
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
    return [build_part(cls, config, part, dtype, path, cls.__name__) for cls, config, part in parts]


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
