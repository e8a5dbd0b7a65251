"""Runs another program's own loader code on our files: what does it add to each weight?

    python adapters.py CLIENT FOLDER JOB      CLIENT: a function below; FOLDER: its repository; JOB: made by tests/clients/job.py

In a process of its own, because sd-scripts' packages are called as ours are; nothing of this project is imported. Every model is of zeros,
so that a weight after loading is what was added. Writes JOB/CLIENT/FAMILY/NAME.safetensors, by the names of the expected changes.
"""

import importlib.abc
import importlib.machinery
import json
import logging
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from unittest.mock import MagicMock

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Loader = Callable[[Path], dict[str, Tensor]]


class Family:
    """One family of models in the job's folder.

    Attributes:
        original: names and zeros of a checkpoint file; unet: those of its U-Net, without their prefix.
        text_encoders: names and zeros as transformers has them, by "text_encoder" and "text_encoder_2".
        unet_config: as ComfyUI writes it.
    """

    def __init__(self, folder: Path) -> None:
        about = json.loads((folder / "family.json").read_text(encoding="utf-8"))
        self.name, self.unet_config, self.folder = folder.name, about["unet_config"], folder
        self.original = {name: torch.zeros(shape) for name, shape in about["original"].items()}
        self.unet = part_of(self.original, "model.diffusion_model.")
        self.text_encoders = {
            part: {name: torch.zeros(shape) for name, shape in shapes.items()} for part, shapes in about["text_encoders"].items()
        }


def part_of(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


# ---- trees of modules for programs that patch modules ----

BLOCKS = {"transformer_blocks": "Transformer2DModel", "in_layers": "ResnetBlock2D", "op": "Downsample2D", "conv": "Upsample2D"}
BLOCKS |= {"q_proj": "CLIPAttention", "fc1": "CLIPMLP"}  # a block's class, known by a child of it


def tree(tensors: Mapping[str, Tensor], root: nn.Module | None = None) -> nn.Module:
    """Linear, Conv2d and MultiheadAttention modules of these names; blocks get the class names by which sd-scripts finds them."""
    root = nn.Module() if root is None else root
    for name, tensor in tensors.items():
        *path, last = name.split(".")
        if last == "in_proj_weight":
            leaf: nn.Module = nn.MultiheadAttention(tensor.shape[1], 1, bias=False)
        elif last == "weight" and tensor.ndim in (2, 4) and path[-1] != "out_proj":
            leaf = nn.Linear(*tensor.T.shape, bias=False) if tensor.ndim == 2 else nn.Conv2d(tensor.shape[1], len(tensor), tensor.shape[2:])
        elif last == "weight" and tensor.ndim == 2:  # out_proj of transformers; that of MultiheadAttention is there already
            if isinstance(root.get_submodule(".".join(path[:-1])) if _has(root, path[:-1]) else None, nn.MultiheadAttention):
                continue
            leaf = nn.Linear(*tensor.T.shape, bias=False)
        else:
            continue
        module = root
        for word in path[:-1]:
            if word not in module._modules:
                module.add_module(word, nn.Module())
            module = module._modules[word]  # type: ignore[assignment]
        module.add_module(path[-1], leaf)
    for module in root.modules():
        for child, name in BLOCKS.items():
            if child in module._modules and type(module) is nn.Module:
                module.__class__ = type(name, (nn.Module,), {})
    return root


def _has(root: nn.Module, path: list[str]) -> bool:
    module: nn.Module | None = root
    for word in path:
        module = None if module is None else module._modules.get(word)
    return module is not None


def zero(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


def changed(model: nn.Module, prefix: str) -> dict[str, Tensor]:
    """Weights that are not zero, by `prefix` and their names."""
    return {f"{prefix}{name}": tensor.detach().clone() for name, tensor in model.state_dict().items() if tensor.any()}


def stub(*names: str) -> None:
    """Modules that are imported and not used here."""
    for name in names:
        if name in sys.modules:
            continue
        module = MagicMock(name=name, __path__=[], __spec__=importlib.machinery.ModuleSpec(name, None))
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent in sys.modules:
            setattr(sys.modules[parent], child, module)


def bare(folder: Path, *names: str) -> None:
    """Packages without what their __init__ imports, which is the whole program."""
    for name in names:
        sys.modules.setdefault(name, types.ModuleType(name)).__path__ = [str(folder / name.replace(".", "/"))]


class Missing(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Packages that the programs import beside what is used here, where they are not installed."""

    names = ("torchvision", "cv2", "sentencepiece", "onnx", "onnxruntime", "gguf", "blake3", "dotenv", "semver", "picklescan", "kornia")
    names += ("pydantic_settings", "torchsde", "einops", "aiohttp", "av", "toml", "imagesize", "voluptuous", "rich", "deprecated")

    def find_spec(self, fullname, path, target=None):  # noqa: ANN001, ANN201
        known = fullname.partition(".")[0] in self.names
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True) if known else None

    def create_module(self, spec):  # noqa: ANN001, ANN201
        return MagicMock(name=spec.name)

    def exec_module(self, module) -> None:  # noqa: ANN001
        pass


# ---- the programs ----


def comfyui(folder: Path, family: Family) -> Loader:
    sys.path.insert(0, str(folder))
    import comfy.options

    comfy.options.enable_args_parsing()
    sys.argv.append("--cpu")
    import comfy.lora
    import comfy.lora_convert

    unet = {f"diffusion_model.{name}": tensor for name, tensor in family.unet.items()}
    model = types.SimpleNamespace(state_dict=lambda: unet, model_config=types.SimpleNamespace(unet_config=family.unet_config))
    return _comfy_like(family, model, comfy.lora, lambda lora: comfy.lora_convert.convert_lora(lora), comfy.lora.calculate_weight)


def forge(folder: Path, family: Family) -> Loader:
    sys.path[:0] = [str(folder), str(folder / "packages_3rdparty")]
    sys.argv.append("--always-cpu")
    import backend.patcher.lora as own

    unet = {f"diffusion_model.{name}": tensor for name, tensor in family.unet.items()}
    config = types.SimpleNamespace(unet_config=family.unet_config, huggingface_repo="")
    model = types.SimpleNamespace(state_dict=lambda: unet, config=config, diffusion_model=types.SimpleNamespace(config=family.unet_config))
    return _comfy_like(family, model, own, lambda lora: lora, own.merge_lora_to_weight)


def _comfy_like(family: Family, model: object, own: types.ModuleType, convert: Callable, merge: Callable) -> Loader:
    names = {"sd1": {"clip_l": "text_encoder"}, "sd2": {"clip_h": "text_encoder"}}
    names["sdxl"] = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
    clip = {
        f"{short}.transformer.{name}": tensor
        for short, part in names[family.name].items()
        for name, tensor in family.text_encoders[part].items()
    }
    keys = own.model_lora_keys_clip(types.SimpleNamespace(state_dict=lambda: clip), own.model_lora_keys_unet(model, {}))
    full = {f"{short}.transformer.": f"diffusers:{part}." for short, part in names[family.name].items()}
    full |= {"diffusion_model.": "original:model.diffusion_model."}

    def load(file: Path) -> dict[str, Tensor]:
        patches = own.load_lora(convert(load_file(file)), keys)
        patches = patches[0] if isinstance(patches, tuple) else patches
        found = {}
        for key, patch in patches.items():
            shape = (clip | {f"diffusion_model.{name}": tensor for name, tensor in family.unet.items()})[key].shape
            prefix = next(prefix for prefix in full if key.startswith(prefix))
            found[full[prefix] + key.removeprefix(prefix)] = merge([(1.0, patch, 1.0, None, None)], torch.zeros(shape), key)
        return found

    return load


def a1111(folder: Path, family: Family) -> Loader:
    stub("modules", "modules.models", "modules.models.sd3", "modules.models.sd3.mmdit", "modules.textual_inversion", "gradio")
    stub("modules.textual_inversion.textual_inversion", "modules.patches", "modules.ui_extra_networks", "modules.sd_disable_initialization")
    stub(*(f"modules.{name}" for name in ("shared", "devices", "sd_models", "errors", "scripts", "sd_hijack", "cache", "hashes")))
    shared, mmdit = sys.modules["modules.shared"], sys.modules["modules.models.sd3.mmdit"]
    mmdit.QkvLinear = type("QkvLinear", (nn.Linear,), {})
    shared.walk_files = lambda *_, **__: []
    shared.cmd_opts.lora_dir = shared.cmd_opts.lyco_dir_backcompat = str(folder / "no_loras")
    sys.modules["modules.sd_models"].read_state_dict = load_file
    devices = sys.modules["modules.devices"]
    devices.cpu = devices.device = torch.device("cpu")
    devices.dtype = torch.float32
    sys.modules["modules.errors"].display.side_effect = RuntimeError
    sys.path.insert(0, str(folder / "extensions-builtin" / "Lora"))
    import networks

    networks.extra_network_lora = MagicMock(errors={})
    own: dict[str, nn.Module] = {}

    def model() -> types.SimpleNamespace:
        own.clear()
        own["model.diffusion_model."] = zero(tree(family.unet))
        made = types.SimpleNamespace(is_sdxl=family.name == "sdxl", model=nn.Module())
        made.model.add_module("diffusion_model", own["model.diffusion_model."])
        if made.is_sdxl:
            prefixes = ["conditioner.embedders.0.", "conditioner.embedders.1."]
            own.update({prefix: zero(tree(part_of(family.original, prefix))) for prefix in prefixes})
            made.conditioner = types.SimpleNamespace(embedders=[types.SimpleNamespace(wrapped=own[prefix]) for prefix in prefixes])
        else:
            own["cond_stage_model."] = zero(tree(part_of(family.original, "cond_stage_model.")))
            made.cond_stage_model = types.SimpleNamespace(wrapped=own["cond_stage_model."])
        return made

    def load(file: Path) -> dict[str, Tensor]:
        shared.sd_model = model()
        networks.assign_network_names_to_compvis_modules(shared.sd_model)
        network = networks.load_network(file.stem, types.SimpleNamespace(filename=str(file)))
        network.te_multiplier = network.unet_multiplier = 1.0
        network.dyn_dim = None
        networks.loaded_networks[:] = [network]
        with torch.no_grad():
            for module in shared.sd_model.network_layer_mapping.values():
                if type(module) in (nn.Linear, nn.Conv2d, nn.MultiheadAttention):  # not attention's out_proj, whose forward never runs
                    networks.network_apply_weights(module)
        assert not networks.extra_network_lora.errors, networks.extra_network_lora.errors
        return {name: tensor for prefix, module in own.items() for name, tensor in changed(module, f"original:{prefix}").items()}

    return load


def sd_scripts(folder: Path, family: Family) -> Loader:
    sys.path.insert(0, str(folder))
    from library.sdxl_original_unet import SdxlUNet2DConditionModel

    from networks.lora import create_network_from_weights

    class Empty(SdxlUNet2DConditionModel):
        def __init__(self) -> None:
            nn.Module.__init__(self)

    def load(file: Path) -> dict[str, Tensor]:
        encoders = [zero(tree(tensors)) for tensors in family.text_encoders.values()]
        if family.name == "sdxl":
            unet, prefix = zero(tree(family.unet, Empty())), "original:model.diffusion_model."
        else:
            unet, prefix = diffusers_unet(family), "diffusers:unet."
        given = encoders if family.name == "sdxl" else encoders[0]
        network, weights = create_network_from_weights(1.0, str(file), None, given, unet, for_inference=True)
        network.merge_to(given, unet, weights, torch.float32, "cpu")
        found = changed(unet, prefix)
        for part, encoder in zip(family.text_encoders, encoders, strict=True):
            found |= changed(encoder, f"diffusers:{part}.")
        return found

    return load


def diffusers_unet(family: Family) -> nn.Module:
    from diffusers import UNet2DConditionModel

    return zero(UNet2DConditionModel.from_pretrained(family.folder / "model" / "unet"))


def diffusers(folder: Path, family: Family) -> Loader:
    if (folder / "src").is_dir():
        sys.path.insert(0, str(folder / "src"))
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(family.folder / "model")

    def load(file: Path) -> dict[str, Tensor]:
        parts = {part: zero(getattr(pipeline, part)) for part in ("unet", *family.text_encoders)}
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
        found = {}
        for part, module in parts.items():
            for name, tensor in changed(module, "").items():
                name = (
                    name if part == "unet" or name.startswith("text_model.") else f"text_model.{name}"
                )  # transformers 5 has no such level
                found[f"diffusers:{part}.{name}"] = tensor
        return found

    return load


def invokeai(folder: Path, family: Family) -> Loader:
    sys.path.insert(0, str(folder))
    bare(folder, *(f"invokeai.backend.model_manager{name}" for name in ("", ".load", ".load.model_cache")))
    stub("invokeai.backend.model_manager.load.model_cache.model_cache", "invokeai.backend.model_manager.taxonomy")
    from invokeai.backend.patches.layer_patcher import LayerPatcher
    from invokeai.backend.patches.lora_conversions.sd_lora_conversion_utils import lora_model_from_sd_state_dict
    from invokeai.backend.patches.lora_conversions.sdxl_lora_conversion_utils import convert_sdxl_keys_to_diffusers_format

    prefixes = {"text_encoder": "lora_te_"} if family.name != "sdxl" else {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}

    def load(file: Path) -> dict[str, Tensor]:
        state = load_file(file)
        lora = lora_model_from_sd_state_dict(convert_sdxl_keys_to_diffusers_format(state) if family.name == "sdxl" else state)
        parts = {"unet": diffusers_unet(family)} | {part: zero(tree(tensors)) for part, tensors in family.text_encoders.items()}
        found = {}
        for part, module in parts.items():
            patches = [(lora, 1.0)]
            given = {"prefix": {"unet": "lora_unet_", **prefixes}[part], "dtype": torch.float32, "force_direct_patching": True}
            with LayerPatcher.apply_smart_model_patches(model=module, patches=patches, **given):
                found |= changed(module, f"diffusers:{part}.")
        return found

    return load


def sdnext(folder: Path, family: Family) -> Loader:
    bare(folder, "modules")
    stub(*(f"modules.{name}" for name in ("shared", "devices", "errors", "logger", "sd_models", "sd_models_compile", "sd_checkpoint")))
    stub("modules.hashes", "modules.files_cache")
    shared, devices = sys.modules["modules.shared"], sys.modules["modules.devices"]
    devices.device = devices.cpu = torch.device("cpu")
    devices.dtype = torch.float32
    sys.modules["modules.sd_models"].read_state_dict = lambda file, what: load_file(file)
    shared.sd_model_type = "sdxl" if family.name == "sdxl" else "sd"
    from modules.lora import lora_apply, lora_common, lora_load

    def load(file: Path) -> dict[str, Tensor]:
        parts = {"unet": diffusers_unet(family)} | {part: zero(tree(tensors)) for part, tensors in family.text_encoders.items()}
        shared.sd_model = types.SimpleNamespace(**parts)
        lora_load.lora_cache.clear()
        network = lora_load.load_safetensors(file.stem, types.SimpleNamespace(filename=str(file)))
        network.te_multiplier = network.unet_multiplier = 1.0
        lora_common.loaded_networks[:] = [network]
        lora_common.extra_network_lora = MagicMock(errors={})
        found = {}
        for part, model in parts.items():
            for name, module in model.named_modules():
                change, _ = lora_apply.network_calc_weights(module, module.network_layer_name)
                if change is not None:
                    found[f"diffusers:{part}.{name}.weight"] = change
        assert not lora_common.extra_network_lora.errors
        return found

    return load


CLIENTS = {function.__name__: function for function in (comfyui, forge, a1111, sd_scripts, diffusers, invokeai, sdnext)}


def main() -> None:
    client, folder, job = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    sys.argv = sys.argv[:1]  # some of them read the command line when they are imported
    sys.path = [path for path in sys.path if Path(path or ".").resolve() != Path(__file__).resolve().parent]
    torch.set_num_threads(1)
    from diffusers import UNet2DConditionModel  # noqa: F401  (it would ask the versions of what is made up)

    sys.meta_path.append(Missing())
    logging.basicConfig(level=logging.WARNING)
    for place in sorted(path for path in (job / "families").iterdir() if path.is_dir()):
        load = CLIENTS[client](folder.resolve(), Family(place))
        output = job / client / place.name
        output.mkdir(parents=True, exist_ok=True)
        for file in sorted((place / "loras").glob("*.safetensors")):
            found = load(file)
            save_file({name: tensor.contiguous() for name, tensor in found.items()}, output / file.name)


if __name__ == "__main__":
    main()
