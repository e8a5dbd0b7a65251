"""ComfyUI's own loader code on a LoRA file for a transformer: which weights it changes, and by how much.

    python comfy_transformers.py FOLDER JOB.json LORA.safetensors OUTPUT.safetensors

JOB: class of comfy.model_base, its unet_config, shapes of the transformer's tensors by original name; with "values", what is added to
weights of zeros is written. Prints the file's keys that nothing took, as JSON. In a process of its own, as `adapters`.
"""

import json
import sys
import types
from pathlib import Path

import torch
from adapters import Missing
from safetensors.torch import load_file, save_file


def main() -> None:
    folder, job, lora_file, output = sys.argv[1:]
    sys.argv = [*sys.argv[:1], "--cpu"]  # which ComfyUI reads when it is imported
    from diffusers import UNet2DConditionModel  # noqa: F401  (as transformers, it would ask the versions of what is made up)
    from transformers import Qwen2Tokenizer, T5TokenizerFast  # noqa: F401

    Missing.names += ("comfy_aimdo", "comfy_kitchen", "spandrel")
    sys.meta_path.append(Missing())
    sys.path.insert(0, folder)
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.lora
    import comfy.lora_convert
    import comfy.model_base

    about = json.loads(Path(job).read_text(encoding="utf-8"))
    model_class = getattr(comfy.model_base, about["class"])
    names = {f"diffusion_model.{name}": torch.Size(shape) for name, shape in about["shapes"].items()}
    stand_in = type(
        "Model", (model_class,), {"__init__": lambda self: None, "state_dict": lambda self: names, "__getattr__": object.__getattribute__}
    )
    model = stand_in()
    object.__setattr__(model, "model_config", types.SimpleNamespace(unet_config=about["unet_config"]))
    lora = comfy.lora_convert.convert_lora(load_file(lora_file))
    taken: set[str] = set()
    patches = comfy.lora.load_lora(lora, comfy.lora.model_lora_keys_unet(model, {}), log_missing=False)
    for patch in patches.values():
        taken |= set(patch.loaded_keys)
    print(json.dumps(sorted(set(lora) - taken)))
    if about["values"]:
        weights = {name: torch.zeros(shape) for name, shape in names.items()}
        for key, patch in patches.items():
            name, (axis, offset, size) = (key, (0, 0, names[key][0])) if isinstance(key, str) else key[:2]
            part = weights[name].narrow(axis, offset, size)
            part.copy_(comfy.lora.calculate_weight([(1.0, patch, 1.0, None, None)], part.clone(), name))
        save_file({name.removeprefix("diffusion_model."): weight for name, weight in weights.items() if weight.any()}, output)


if __name__ == "__main__":
    main()
