"""Other programs' training, by their own step code, on a U-Net that is handed to it: what benchmarks.compare runs.

What a step does not need (loading, prompts, logs, progress) is replaced; the step, its sampling and its loss are theirs. So is the LoRA of
the first two. ai-toolkit's LoRA and its class of models come with packages of their own: stand-ins are a LoRA of the same layers, and calls
of the U-Net as its class makes them.
"""

import contextlib
import io
import re
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from benchmarks import ROOT
from benchmarks.earlier import Tree

CPU = torch.device("cpu")
STEPS, RANK, BATCH = 40, 4, 4  # at equal settings; the guidance of trajectories is 3 in all of them


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a program is to do.

    Attributes:
        unet: to be trained a LoRA of.
        updates: how many, one at least.
        equal: with this module's settings, in place of the program's own.
        after: called after every update.
    """

    unet: Any
    updates: int
    equal: bool
    after: Callable[[], None]

    @property
    def side(self) -> int:
        """Of the latents."""
        return self.unet.config["sample_size"]

    def embedding(self, *_: Any) -> Tensor:
        """Of a prompt, whatever it says."""
        return torch.randn(1, 77, self.unet.config["cross_attention_dim"])


class Schedule:
    """A constant learning rate, whose step tells that an update is done."""

    def __init__(self, after: Callable[[], None]) -> None:
        self.step = after

    def get_last_lr(self) -> list[float]:
        return [1e-4]


def middle(low: int, high: int, size: tuple[int, ...], **_: Any) -> Tensor:
    """In place of torch.randint: the mean; FLOPs are linear in the length of a trajectory, so they are the mean as well."""
    return torch.full(size, (low + high - 1) // 2)


@contextlib.contextmanager
def modules(**found: Any) -> Iterator[None]:
    """Modules by name ("__" is a dot), in place of those of that name."""
    with patch.dict(sys.modules, {name.replace("__", "."): module for name, module in found.items()}):
        yield


class Stub(ModuleType):
    """A module with what it is given; all else in it is a mock."""

    def __init__(self, name: str = "stub", path: Path | None = None, **attributes: Any) -> None:
        super().__init__(name)
        self.__path__ = [str(path)] * (path is not None)
        self.__dict__.update(attributes)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock()


def leco(folder: Path, task: Task) -> int:
    """p1atdev/LECO: `train_lora.train` -> graded samples an update."""
    with modules(wandb=Stub()):
        train_lora: Any = import_module("train_lora")
    train_lora.DEVICE_CUDA = CPU
    train_lora.train_util.encode_prompts = task.embedding
    train_lora.train_util.get_lr_scheduler = lambda *_, **__: Schedule(task.after)
    scheduler = DDIMScheduler(num_train_timesteps=1000, clip_sample=False, steps_offset=0)
    train_lora.model_util.load_models = lambda *_, **__: (MagicMock(), MagicMock(), task.unet, scheduler)
    task.unet.enable_xformers_memory_efficient_attention = lambda: None  # its own attention on a GPU; torch's does the same sums
    train_lora.LoRANetwork.save_weights = lambda *_, **__: None
    config = train_lora.RootConfig(
        prompts_file="",
        pretrained_model={"name_or_path": ""},
        network={"rank": RANK} if task.equal else {},
        train={"iterations": task.updates, "precision": "float32", **({"max_denoising_steps": STEPS} if task.equal else {})},
        save={"path": "/nowhere"},
        logging={},
        other={},
    )
    batch = BATCH if task.equal else 1
    settings = train_lora.PromptSettings(target="a", positive="b", resolution=8 * task.side, batch_size=batch)
    with patch.object(Path, "mkdir"):
        train_lora.train(config, [settings])
    return batch


def sd_scripts(folder: Path, task: Task) -> int:
    """sd-scripts: `train_leco.main`, whose own settings are the equal ones but for the batch -> graded samples an update."""
    from accelerate import Accelerator

    parameters = Namespace(
        pretrained_model_name_or_path="", prompts_file="", output_dir="", seed=0, v2=False, max_token_length=None, tokenizer_cache_dir=None,
        clip_skip=None, mem_eff_attn=False, xformers=False, sdpa=False, zero_terminal_snr=False, gradient_checkpointing=False,
        full_fp16=False, noise_offset=None, min_snr_gamma=None, max_grad_norm=1.0, save_every_n_steps=None, max_train_steps=task.updates,
        learning_rate=1e-4, unet_lr=None, network_args=None, network_weights=None, network_module="networks.lora", network_dim=RANK,
        network_alpha=1.0, network_dropout=None, dim_from_weights=False, network_train_text_encoder_only=False,
        max_denoising_steps=STEPS, leco_denoise_guidance_scale=3.0,
    )  # fmt: skip
    functions: dict[str, Any] = dict(  # wherever in `library` a version keeps them
        read_config_from_file=lambda *_: parameters,
        prepare_accelerator=lambda _: Accelerator(cpu=True),
        prepare_dtype=lambda _: (torch.float32, torch.float32),
        load_target_model=lambda *_: (torch.nn.Identity(), None, task.unet, None),
        get_optimizer=lambda _, groups: ("", "", torch.optim.AdamW(groups)),
        get_scheduler_fix=lambda *_: Schedule(task.after),
        get_optimizer_train_eval_fn=lambda *_: (lambda: None, lambda: None),
    )
    files = ("train_leco.py", "networks/lora.py", "library/leco_train_util.py")
    source = "".join((folder / name).read_text(encoding="utf-8") for name in files)
    asked = {"train_util", *re.findall(r"library\.(\w+)", source)} - {"leco_train_util"}
    mocks = {name: Stub(SdxlUNet2DConditionModel=ModuleType, **functions) for name in asked}
    library = Stub("library", folder / "library", **mocks)
    batch = BATCH if task.equal else 1
    with modules(toml=Stub(), library=library, **{f"library__{name}": mock for name, mock in mocks.items()}):
        train_leco = import_module("train_leco")
        make = train_leco.load_prompt_settings.__globals__["PromptSettings"]
        with patch.multiple(
            train_leco,
            setup_parser=MagicMock,
            load_prompt_settings=lambda _: [make(target="a", positive="b", resolution=8 * task.side, batch_size=batch)],
            encode_prompt_sd=task.embedding,
            save_weights=lambda *_, **__: None,
        ):
            train_leco.main()
    return batch


class Network:
    """A LoRA on the attention, used as ai-toolkit's trainers use theirs."""

    def __init__(self, unet: Any, rank: int) -> None:
        from peft import LoraConfig, get_peft_model

        self.unet = get_peft_model(unet, LoraConfig(r=rank, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
        self.optimizer = torch.optim.AdamW([weight for weight in self.unet.parameters() if weight.requires_grad])
        self.multiplier: Any = 1.0
        self.is_active = False

    def set_multiplier(self, multiplier: float) -> None:
        self.multiplier = multiplier

    @property
    def is_active(self) -> bool:
        return self.active

    @is_active.setter
    def is_active(self, active: bool) -> None:
        self.active = active
        (self.unet.enable_adapter_layers if active else self.unet.disable_adapter_layers)()

    def __enter__(self) -> None:
        self.is_active = True

    def __exit__(self, *_: Any) -> None:
        self.is_active = False


def ai_toolkit(folder: Path) -> dict[str, Any]:
    """Modules in the place of those of ai-toolkit that do not say what a step computes."""

    class Base:
        pass

    return {
        "torchvision": Stub(),
        "torchvision__transforms": Stub(),
        "toolkit": Stub("toolkit", folder / "toolkit"),
        "toolkit__basic": Stub(),
        "toolkit__config_modules": Stub(),
        "toolkit__data_transfer_object": Stub(),
        "toolkit__data_transfer_object__data_loader": Stub(),
        "toolkit__sd_device_states_presets": Stub(),
        "toolkit__train_tools": Stub(get_torch_dtype=lambda _: torch.float32),
        "toolkit__extension": Stub(Extension=Base),
        "extensions_built_in__sd_trainer": Stub(),
        "extensions_built_in__sd_trainer__DiffusionTrainer": Stub(DiffusionTrainer=Base),
        "jobs": Stub("jobs", folder / "jobs"),
        "jobs__process": Stub("jobs.process", folder / "jobs" / "process"),
        "jobs__process__BaseSDTrainProcess": Stub(BaseSDTrainProcess=Base),
    }


def predict(
    unet: Any, latents: Tensor, text_embeddings: Any = None, timestep: Any = 0, guidance_scale: float = 7.5, **given: Any
) -> Tensor:
    """ai-toolkit's `StableDiffusion.predict_noise`: with guidance where there are two embeddings for a latent."""
    embeddings = (text_embeddings or given["conditional_embeddings"]).text_embeds
    if len(embeddings) == len(latents):
        return unet(latents, timestep.repeat(len(latents) // len(timestep)), embeddings).sample
    uncond, cond = unet(torch.cat([latents] * 2), timestep.repeat(2 * len(latents) // len(timestep)), embeddings).sample.chunk(2)
    return uncond + guidance_scale * (cond - uncond)


def slider(folder: Path, task: Task) -> int:
    """ai-toolkit: `TrainSliderProcess.hook_train_loop` with the settings of its example -> graded samples an update.

    As of its commit 27a03a9 a step without pictures fails, since it concatenates three timesteps without a dimension for 3 x 4 latents:
    here a timestep is four of them.
    """
    with modules(**ai_toolkit(folder)):
        theirs: Any = import_module("jobs.process.TrainSliderProcess")
        embeds = import_module("toolkit.prompt_utils")
        theirs.train_tools = SimpleNamespace(concat_prompt_embeddings=lambda first, second, _: embeds.concat_prompt_embeds([first, second]))
        network, scheduler = Network(task.unet, RANK if task.equal else 8), DDIMScheduler(clip_sample=False, steps_offset=0)
        sd: Any = SimpleNamespace(unet=network.unet, predict_noise=partial(predict, network.unet), text_encoder=MagicMock())

        def set_timesteps(count: int, **_: Any) -> None:
            scheduler.set_timesteps(count)
            sd.noise_scheduler.timesteps = scheduler.timesteps[:, None].expand(-1, 4)

        def diffuse(latents: Tensor, embeddings: Any, total_timesteps: int, guidance_scale: float, **_: Any) -> Tensor:
            for timestep in sd.noise_scheduler.timesteps[:total_timesteps]:
                eps = sd.predict_noise(latents, embeddings, timestep, guidance_scale=guidance_scale)
                latents = scheduler.step(eps, timestep[0], latents).prev_sample
            return latents

        sd.noise_scheduler = SimpleNamespace(set_timesteps=set_timesteps, init_noise_sigma=1.0)
        sd.diffuse_some_steps, sd.set_device_state = diffuse, lambda _: None
        sd.encode_prompt = lambda _: embeds.PromptEmbeds(task.embedding())
        sd.get_latent_noise = lambda batch_size, **_: torch.randn(batch_size, 4, task.side, task.side)
        target = SimpleNamespace(target_class="a", positive="b", negative="c", multiplier=1.0, weight=1.0)
        trainer: Any = object.__new__(theirs.TrainSliderProcess)
        trainer.print, trainer.data_loader, trainer.sd, trainer.network = lambda *_: None, None, sd, network
        trainer.device_torch, trainer.optimizer, trainer.lr_scheduler = CPU, network.optimizer, Schedule(task.after)
        trainer.prompt_txt_list = trainer.eval_slider_device_state = trainer.train_slider_device_state = None
        trainer.slider_config = SimpleNamespace(
            prompt_file=None, prompt_tensors=None, targets=[target], anchors=[], batch_full_slide=True, low_ram=False, resolutions=[(1, 1)]
        )
        trainer.train_config = SimpleNamespace(
            dtype="float32", batch_size=1, noise_scheduler="ddpm", max_denoising_steps=STEPS, noise_offset=0.0, learnable_snr_gos=False,
            min_snr_gamma=None, gradient_checkpointing=not task.equal,
        )  # fmt: skip
        trainer.hook_before_train_loop()
        for _ in range(task.updates):
            trainer.hook_train_loop(None)
    return len(trainer.prompt_pairs[0].multiplier_list)


def concept_slider(folder: Path, task: Task) -> int:
    """ai-toolkit: `ConceptSliderTrainer.get_guided_loss` on noised pictures, at +1 and at -1, with the settings of its page but for the
    anchor -> graded samples an update. Not counted: encoding the pictures.
    """
    with modules(**ai_toolkit(folder)):
        theirs: Any = import_module("extensions_built_in.concept_slider.ConceptSliderTrainer")
        embeds = import_module("toolkit.prompt_utils")
    network = Network(task.unet, RANK if task.equal else 32)
    if not task.equal:
        task.unet.enable_gradient_checkpointing()
    trainer: Any = object.__new__(theirs.ConceptSliderTrainer)
    trainer.slider, trainer.network, trainer.device_torch = theirs.ConceptSliderTrainerConfig(), network, CPU
    trainer.train_config = SimpleNamespace(dtype="float32")
    trainer.positive_prompt_embeds, trainer.negative_prompt_embeds, trainer.target_class_embeds = (
        embeds.PromptEmbeds(task.embedding()) for _ in range(3)
    )
    trainer.anchor_class_embeds = None
    trainer.sd = SimpleNamespace(unet=network.unet, predict_noise=partial(predict, network.unet))
    pictures = BATCH // 2 if task.equal else 1
    for _ in range(task.updates):
        network.optimizer.zero_grad()
        with network:
            noisy = torch.randn(pictures, 4, task.side, task.side)
            trainer.get_guided_loss(noisy, None, False, [], torch.full((pictures,), 500), {}, None, None)
        network.optimizer.step()
        task.after()
    return 2 * pictures


@dataclass(frozen=True)
class Program:
    """Which option names its folder, what runs it, and how many updates a run of its own length has."""

    option: str
    run: Callable[[Path, Task], int]
    updates: int


PROGRAMS = {
    "p1atdev/LECO": Program("leco", leco, 500),  # TrainConfig.iterations
    "sd-scripts train_leco": Program("sd_scripts", sd_scripts, 1600),  # --max_train_steps
    "ai-toolkit TrainSliderProcess": Program("ai_toolkit", slider, 500),  # config/examples/train_slider.example.yml
    "ai-toolkit ConceptSliderTrainer": Program("ai_toolkit", concept_slider, 3000),  # ui/src/app/jobs/new/jobConfig.ts
}


@contextlib.contextmanager
def their_packages(folder: Path) -> Iterator[None]:
    """Within the block packages are imported from the folder, and those of this project that have the same names wait."""
    before, elsewhere = set(sys.modules), [entry for entry in sys.path if Path(entry).resolve() != ROOT]
    with (
        patch.object(sys, "path", elsewhere),
        Tree(folder).active(),
        patch.object(torch, "randint", middle),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        try:
            yield
        finally:
            for name in set(sys.modules) - before:
                if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(folder)):
                    del sys.modules[name]
