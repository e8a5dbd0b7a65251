"""Load a diffusion model, or only its VAE, from a diffusers folder, a single file, or a hub id."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from library.diffusion.flow import FLOW_SCHEDULER, FlowSchedule
from library.diffusion.noise_schedule import NoiseSchedule
from library.errors import UserError
from library.models import single_file
from library.models.base import DiffusionModel
from library.models.clip_tokenizer import build_clip_tokenizer
from library.models.family import Component, Family
from library.models.flow_file import TextSource, build_transformer
from library.models.flow_model import FlowFamily
from library.models.folder_parts import component, component_without_values, read_json
from library.models.hub import find_model
from library.models.prediction import predicts_v, warn_of_name
from library.models.registry import FAMILIES
from library.models.unet_model import UNetFamily
from library.models.vae import Autoencoder, LatentSpace, place_vae, vae_class
from library.models.vae_slices import for_pictures

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    """What `load_model` was asked for."""

    path: Path
    family: str
    v_parameterization: bool | None
    vae: str | Path | None
    text: TextSource
    dtype: torch.dtype
    no_values: bool

    def check_family(self, found: Family) -> None:
        if self.family not in ("auto", found.name):
            raise UserError(
                f"{self.path} is a {found.title} model ({found.name}), but family {self.family!r} was given; leave it out or correct it."
            )
        self.text.check(found, self.path)


def load_model(
    path: str | Path,
    *,
    family: str = "auto",
    v_parameterization: bool | None = None,
    vae: str | Path | None = None,
    text_encoder: str | Path | None = None,
    tokenizer: Sequence[str | Path] = (),
    clip_skip: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> DiffusionModel:
    """Load a model, frozen and in eval mode.

    Args:
        path: a diffusers folder (with model_index.json), its hub id, or a .safetensors or .ckpt file in the original layout.
        family: "auto", or what the model is expected to be: a name in `FAMILIES`.
        v_parameterization: whether the U-Net puts out v; None is what the folder's scheduler or the file says, see
            `library.models.prediction`. A tensor ztsnr in a file asks for a zero-terminal-SNR schedule.
        vae: a file, folder or hub id with another VAE, in place of the model's own or where it has none.
        text_encoder, tokenizer: the same of the language model of a flow-matching transformer; its tokenizer's folder is in the text
            encoder's if it is not given. Anima has two.
        clip_skip: as sd-scripts means it: 1 is the last hidden state, 2 the last but one; None is the family's own.
        dtype: of U-Net and text encoders; and of the VAE unless its config says force_upcast.
        device: "meta" reads no weights: a model of tensors without values.

    Raises:
        UserError: the path is missing or holds something else, or the options do not fit the model.
    """
    path = find_model(path)
    _check_family_name(family)
    logger.info("loading the model %s", path)
    wanted = _Wanted(
        path=path,
        family=family,
        v_parameterization=v_parameterization,
        vae=vae,
        text=TextSource(text_encoder, tokenizer),
        dtype=dtype,
        no_values=torch.device(device).type == "meta",
    )
    with _foreign(path):
        model = (_load_folder if path.is_dir() else _load_file)(wanted)
        _make_ready(model.vae)
        _check_vae(model, path if vae is None else vae)
    if clip_skip is not None:
        model.set_clip_skip(clip_skip)
    return model.freeze().to(device, dtype)


def load_vae(path: str | Path, *, family: str = "auto") -> Autoencoder:
    """Load only a VAE, in float32, frozen: from the folder of a VAE or of a diffusers model, from a checkpoint, or from a VAE file.

    Args:
        family: whose scaling factor to take when the file does not say it: a file with nothing but a VAE fits SD1 and SDXL alike.

    Raises:
        UserError: there is no VAE at the path, or it does not say its scaling factor and `family` is "auto".
    """
    path = find_model(path)
    _check_family_name(family)
    logger.info("loading the VAE of %s", path)
    with _foreign(path):
        vae = _load_vae(path, family)
        _make_ready(vae)
    vae.requires_grad_(False).eval()
    place_vae(vae, dtype=torch.float32)
    return vae


def _load_vae(path: Path, family: str) -> Autoencoder:
    if path.is_dir():
        folder = path if (path / "config.json").is_file() else path / "vae"
        if not (folder / "config.json").is_file():
            raise UserError(f"The folder {path} has no VAE: neither config.json nor vae/config.json is in it.")
        return _vae_of_folder(folder, component)
    tensors, _ = single_file.read_tensors(path)
    if family == "auto":
        has_vae = any(name.endswith(("encoder.conv_in.weight", "encoder.conv1.weight")) for name in tensors)
        if has_vae and not any(name.startswith(single_file.UNET_PREFIX) for name in tensors):
            raise UserError(
                f"{path} holds only a VAE, which does not say its scaling factor; give the model's family ({', '.join(FAMILIES)})."
            )
        if not has_vae and not single_file.is_lora(tensors):
            raise UserError(f"{path} has no VAE; {single_file.GIVE_VAE}.")
        return single_file.build_vae(tensors, single_file.detect_family(tensors, path), path)
    return single_file.build_vae(tensors, FAMILIES[family], path)


@contextmanager
def _foreign(path: Path) -> Iterator[None]:
    """Diffusers and transformers raise what they like on files that are not what they should be; the user is told in a sentence."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(f"{path} cannot be loaded as a model, it is damaged or of another layout ({reason}); download it again.") from error


def _vae_of_folder(folder: Path, load: Component) -> Autoencoder:
    config = read_json(folder / "config.json", "give the VAE by vae, or a model that is complete")
    return load(vae_class(str(config.get("_class_name", "AutoencoderKL"))), folder, torch.float32)


def _make_ready(vae: Autoencoder) -> None:
    for_pictures(vae)
    if vae.device.type != "meta" or not hasattr(vae, "bn"):
        for factor in LatentSpace.of(vae).factor:
            if type(factor) not in (int, float) or not 0 < factor < math.inf:
                raise ValueError(f"latents of the VAE are multiplied with {str(factor)[:40]}")


def _check_vae(model: DiffusionModel, path: str | Path) -> None:
    """Refuse a VAE whose latents are not what the network draws, as far as that can be told."""
    space, published = model.spec.latent_space, LatentSpace.of_config(FAMILIES[model.spec.family].config["vae"])
    expected = model.unet.config["in_channels"]
    if space.channels != expected or (expected == published.channels and space.has_frames != published.has_frames):
        wanted = published.name if expected == published.channels else f"latents of {expected} channels"
        raise UserError(
            f"The VAE {path} makes {space.name} ({space.channels} channels), and {model.spec.name} draws {wanted}; leave it out."
        )


def _check_family_name(family: str) -> None:
    if family != "auto":
        FAMILIES[family]  # raises UserError


def _load_folder(wanted: _Wanted) -> DiffusionModel:
    import diffusers

    path = wanted.path
    modular = path / "modular_model_index.json"
    index_file = modular if modular.is_file() else path / "model_index.json"
    index = read_json(index_file, "give the folder of a whole diffusers model, or a checkpoint file")
    family = _family_of_folder(index, path)
    wanted.check_family(family)
    scheduler_config = read_json(path / "scheduler" / "scheduler_config.json", "the diffusers model is not complete")
    schedule = _schedule(scheduler_config, wanted.v_parameterization)
    if wanted.v_parameterization is None:
        warn_of_name(_folder_name(path), schedule.prediction_type == "v_prediction")
    load = component_without_values if wanted.no_values else component
    unet = load(getattr(diffusers, family.denoiser_class), path / family.denoiser, wanted.dtype)
    vae = _vae_of_folder(path / "vae", load) if wanted.vae is None else load_vae(wanted.vae, family=family.name)
    text = family.text_of_folder(path, load, wanted.dtype)
    return _model(family, schedule, unet, vae, text, _folder_name(path), scheduler_config.get("_class_name", ""))


def _folder_name(path: Path) -> str:
    """The folder's name, or its repository's if it is a commit in Hugging Face's cache (models--owner--name/snapshots/<hash>)."""
    repository = path.parent.parent.name
    in_cache = path.parent.name == "snapshots" and repository.startswith("models--")
    return repository.split("--")[-1] if in_cache else path.name


def _family_of_folder(index: Mapping[str, Any], path: Path) -> Family:
    """By the pipeline's class, or by its parts where that is another: image to image and the like have the same as text to image."""
    pipeline, repair = index.get("_class_name"), "download the folder again, or give another model"
    if not isinstance(pipeline, str):
        raise UserError(f"The model index of {path} names no pipeline by _class_name; {repair}.")
    titles = ", ".join(family.title for family in FAMILIES.values())
    what = f"{path} holds a {pipeline}; the models that can be trained are {titles}."
    classes = {name: value[1] for name, value in index.items() if isinstance(value, list | tuple) and len(value) > 1}
    known = [family for family in FAMILIES.values() if classes.get(family.denoiser) == family.denoiser_class]
    if not known:
        for family in (family for family in FAMILIES.values() if family.pipeline_class == pipeline):
            part = f"no {family.denoiser} of the class {family.denoiser_class}"
            raise UserError(f"The model index of {path} says {pipeline}, but lists {part}; {repair}.")
        raise UserError(what)
    denoiser = known[0].denoiser
    config = read_json(path / denoiser / "config.json", "the diffusers model is not complete")
    if denoiser == "unet":
        in_channels = config.get("in_channels", 4)
        if in_channels != 4:
            raise UserError(
                f"The U-Net of {path} takes {in_channels} channels: an inpainting or editing model; give a text-to-image model."
            )
        if config.get("class_embed_type") is not None:
            raise UserError(f"The U-Net of {path} takes an embedding of a picture (unCLIP); give a text-to-image model.")
    found = [family for family in known if family.is_folder(index, config)]
    for family in [family for family in found if family.pipeline_class == pipeline] or found:
        return family
    raise UserError(what)


def _load_file(wanted: _Wanted) -> DiffusionModel:
    path, dtype, v_parameterization = wanted.path, wanted.dtype, wanted.v_parameterization
    tensors, metadata = single_file.read_tensors(path, shapes_only=wanted.no_values)
    family = single_file.detect_family(tensors, path)
    wanted.check_family(family)
    bundled = family.config
    scheduler_config = bundled["scheduler"]
    if isinstance(family, UNetFamily):
        if v_parameterization is None:
            v_parameterization = predicts_v(tensors, metadata, family.name, path.name)
        if "ztsnr" in tensors:  # only trailing steps begin at the timestep where the SNR is zero; arXiv 2305.08891, section 3.3
            scheduler_config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    schedule = _schedule(scheduler_config, v_parameterization)
    if isinstance(family, UNetFamily):
        unet_config = single_file.unet_config(tensors, family) | bundled.get(schedule.prediction_type, {}).get("unet", {})
        unet = single_file.build_unet(tensors, unet_config, dtype, path)
        text_encoders: list[Any] = [
            single_file.build_text_encoder(tensors, slot, bundled[slot.folder], dtype, path) for slot in family.text_encoders
        ]
        tokenizers: list[Any] = [build_clip_tokenizer(slot.pad_token) for slot in family.text_encoders]
    else:
        assert isinstance(family, FlowFamily)
        text_encoders, tokenizers = wanted.text.parts(family, tensors, path, dtype, wanted.no_values)
        unet, *others = build_transformer(tensors, family, dtype, path)
        text_encoders += others
    vae = single_file.build_vae(tensors, family, path) if wanted.vae is None else load_vae(wanted.vae, family=family.name)
    return _model(family, schedule, unet, vae, (text_encoders, tokenizers), path.name)


def _model(
    family: Family, schedule: NoiseSchedule, unet: Any, vae: Autoencoder, text: tuple[list[Any], list[Any]], name: str, scheduler: str = ""
) -> DiffusionModel:
    text_encoders, tokenizers = text
    return family.model_class(
        spec=family.spec(prediction_type=schedule.prediction_type, unet=unet, vae=vae, name=name, scheduler=scheduler),
        schedule=schedule,
        unet=unet,
        vae=vae,
        text_encoders=text_encoders,
        tokenizers=tokenizers,
    )


def _schedule(config: Mapping[str, Any], v_parameterization: bool | None) -> NoiseSchedule:
    is_flow = config.get("_class_name") == FLOW_SCHEDULER
    if v_parameterization is not None:
        if is_flow:
            raise UserError("v_parameterization was given, but the model is of flow matching and predicts velocities; leave it out.")
        config = {**config, "prediction_type": "v_prediction" if v_parameterization else "epsilon"}
    return (FlowSchedule if is_flow else NoiseSchedule).from_config(config)
