"""One training step of another program, by its own code, on a U-Net that is handed to it: what benchmarks.compare starts.

A process of its own, since sd-scripts calls its packages `library` and `networks` as well: nothing of this project is imported here.
What a step does not need (loading, prompts, logs, progress) is replaced; the step, its sampling, its loss and its LoRA are theirs.

    python benchmarks/other_programs.py PROGRAM FOLDER UNET OUTPUT
"""

import contextlib
import json
import re
import sys
from argparse import Namespace
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

CPU = torch.device("cpu")


def middle(low: int, high: int, size: tuple[int, ...], **_: Any) -> torch.Tensor:
    """In place of torch.randint: the mean; FLOPs are linear in the length of a trajectory, so they are the mean as well."""
    return torch.full(size, (low + high - 1) // 2)


@contextlib.contextmanager
def modules(**found: Any) -> Iterator[None]:
    """Modules by name ("__" is a dot), in place of those of that name."""
    with patch.dict(sys.modules, {name.replace("__", "."): module for name, module in found.items()}):
        yield


class Stub(ModuleType):
    """A module with what it is given; all else in it is a mock."""

    def __init__(self, name: str = "stub", **attributes: Any) -> None:
        super().__init__(name)
        self.__path__ = []
        self.__dict__.update(attributes)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock()


def leco(unet: Any, side: int) -> int:
    """p1atdev/LECO: `train_lora.train` with one iteration -> graded samples."""
    with modules(wandb=Stub()):
        train_lora: Any = import_module("train_lora")
        train_util: Any = import_module("train_util")
    width = unet.config["cross_attention_dim"]
    train_lora.DEVICE_CUDA = CPU
    train_util.encode_prompts = lambda *_: torch.randn(1, 77, width)
    scheduler = DDIMScheduler(num_train_timesteps=1000, clip_sample=False, steps_offset=0)
    train_lora.model_util.load_models = lambda *_, **__: (MagicMock(), MagicMock(), unet, scheduler)
    unet.enable_xformers_memory_efficient_attention = lambda: None  # its own attention on a GPU; torch's does the same sums
    train_lora.LoRANetwork.save_weights = lambda *_, **__: None
    config = train_lora.RootConfig(
        prompts_file="",
        pretrained_model={"name_or_path": ""},
        network={},
        train={"iterations": 1, "precision": "float32"},
        save={"path": "/nowhere"},
        logging={},
        other={},
    )
    with patch.object(Path, "mkdir"):
        train_lora.train(config, [train_lora.PromptSettings(target="a", positive="b", resolution=8 * side)])
    return 1


def sd_scripts(unet: UNet2DConditionModel, side: int) -> int:
    """sd-scripts: `train_leco.main` with one step -> graded samples."""
    from accelerate import Accelerator

    width = unet.config["cross_attention_dim"]
    parameters = Namespace(
        pretrained_model_name_or_path="", prompts_file="", output_dir="", seed=0, v2=False, max_token_length=None, tokenizer_cache_dir=None,
        clip_skip=None, mem_eff_attn=False, xformers=False, sdpa=False, zero_terminal_snr=False, gradient_checkpointing=False,
        full_fp16=False, noise_offset=None, min_snr_gamma=None, max_grad_norm=1.0, save_every_n_steps=None, max_train_steps=1,
        learning_rate=1e-4, unet_lr=None, network_args=None, network_weights=None, network_module="networks.lora", network_dim=4,
        network_alpha=1.0, network_dropout=None, dim_from_weights=False, network_train_text_encoder_only=False,
        max_denoising_steps=40, leco_denoise_guidance_scale=3.0,
    )  # fmt: skip
    functions: dict[str, Any] = dict(  # wherever in `library` a version keeps them
        read_config_from_file=lambda *_: parameters,
        prepare_accelerator=lambda _: Accelerator(cpu=True),
        prepare_dtype=lambda _: (torch.float32, torch.float32),
        load_target_model=lambda *_: (torch.nn.Identity(), None, unet, None),
        get_optimizer=lambda _, groups: ("", "", torch.optim.AdamW(groups)),
        get_scheduler_fix=lambda _, optimizer, __: torch.optim.lr_scheduler.ConstantLR(optimizer),
        get_optimizer_train_eval_fn=lambda *_: (lambda: None, lambda: None),
    )
    files = ("train_leco.py", "networks/lora.py", "library/leco_train_util.py")
    source = "".join(Path(sys.path[0], name).read_text(encoding="utf-8") for name in files)
    asked = {"train_util", *re.findall(r"library\.(\w+)", source)} - {"leco_train_util"}
    mocks = {name: Stub(SdxlUNet2DConditionModel=ModuleType, **functions) for name in asked}
    library = Stub("library", **mocks)
    library.__path__ = [str(Path(sys.path[0], "library"))]
    with modules(toml=Stub(), library=library, **{f"library__{name}": mock for name, mock in mocks.items()}):
        train_leco = import_module("train_leco")
        settings = train_leco.load_prompt_settings.__globals__["PromptSettings"](target="a", positive="b", resolution=8 * side)
        with patch.multiple(
            train_leco,
            setup_parser=MagicMock,
            load_prompt_settings=lambda _: [settings],
            encode_prompt_sd=lambda *_: torch.randn(1, 77, width),
            save_weights=lambda *_, **__: None,
        ):
            train_leco.main()
    return 1


def ai_toolkit(unet: UNet2DConditionModel, side: int) -> int:
    """ai-toolkit: `ConceptSliderTrainer.get_guided_loss` on one noised picture, at +1 and at -1 -> graded samples."""
    from peft import LoraConfig, get_peft_model  # for a LoRA of rank 4 on attention; theirs comes with its own loader of models

    class Base:
        pass

    stubs = {
        "toolkit": Stub(),
        "toolkit__data_transfer_object": Stub(),
        "toolkit__data_transfer_object__data_loader": Stub(),
        "toolkit__prompt_utils": Stub(concat_prompt_embeds=torch.cat),
        "toolkit__train_tools": Stub(get_torch_dtype=lambda _: torch.float32),
        "extensions_built_in__sd_trainer": Stub(),
        "extensions_built_in__sd_trainer__DiffusionTrainer": Stub(DiffusionTrainer=Base),
        "toolkit__extension": Stub(Extension=Base),
    }
    with modules(**stubs):
        theirs = import_module("extensions_built_in.concept_slider.ConceptSliderTrainer")
    wrapped = get_peft_model(unet, LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))

    class Network:
        def set_multiplier(self, multiplier: float) -> None:
            pass

        @property
        def is_active(self) -> bool:
            return True

        @is_active.setter
        def is_active(self, active: bool) -> None:
            (wrapped.enable_adapter_layers if active else wrapped.disable_adapter_layers)()

    trainer: Any = object.__new__(theirs.ConceptSliderTrainer)
    trainer.slider, trainer.network, trainer.device_torch = theirs.ConceptSliderTrainerConfig(), Network(), CPU
    trainer.train_config = SimpleNamespace(dtype="float32")
    trainer.positive_prompt_embeds, trainer.negative_prompt_embeds, trainer.target_class_embeds = torch.randn(
        3, 1, 77, unet.config["cross_attention_dim"]
    )
    trainer.anchor_class_embeds = None

    def predict_noise(latents: torch.Tensor, conditional_embeddings: torch.Tensor, timestep: torch.Tensor, **_: Any) -> torch.Tensor:
        return wrapped(latents, timestep, conditional_embeddings).sample

    trainer.sd = SimpleNamespace(unet=wrapped, predict_noise=predict_noise)
    trainer.get_guided_loss(torch.randn(1, 4, side, side), None, False, [], torch.tensor([500]), {}, None, None)
    return 2


PROGRAMS = {"leco": leco, "sd_scripts": sd_scripts, "ai_toolkit": ai_toolkit}


def main() -> None:
    program, folder, unet_folder, output = sys.argv[1:]
    sys.path[0] = folder
    unet: Any = UNet2DConditionModel.from_pretrained(unet_folder)
    rows = {"forward": 0, "with_gradient": 0}

    def count(_: Any, args: tuple, found: Any) -> None:
        prediction = found[0] if isinstance(found, tuple) else found.sample
        rows["forward"] += len(prediction)
        rows["with_gradient"] += len(prediction) if prediction.requires_grad else 0

    unet.register_forward_hook(count)
    torch.manual_seed(0)
    with FlopCounterMode(display=False) as counter, patch.object(torch, "randint", middle):
        samples = PROGRAMS[program](unet, unet.config["sample_size"])
    Path(output).write_text(json.dumps({"flops": counter.get_total_flops(), "samples": samples, "rows": rows}), encoding="utf-8")


if __name__ == "__main__":
    main()
