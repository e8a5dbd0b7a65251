import json
import re
import shutil

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from library.errors import UserError
from library.models import single_file
from library.models.base import DiffusionModel
from library.models.loading import load_model, load_vae
from library.models.registry import FAMILIES
from library.models.vae import VaeFingerprint
from tests.helpers.tiny_models import (
    FAMILY_NAMES,
    FULL_VAE,
    KINDS,
    assert_same_weights,
    save_folder,
    save_single_file,
    single_file_tensors,
    tiny_model,
    tiny_vae,
    transformers_to_openclip,
    unet_to_ldm,
    vae_to_ldm,
)

TIMESTEPS = torch.tensor([3, 700])


def assert_same_model(loaded: DiffusionModel, original: DiffusionModel) -> None:
    """Bit by bit the same weights, and the same answer to the same prompts: so heads, activations, padding and schedule agree too."""
    assert_same_weights(loaded.unet, original.unet)
    assert_same_weights(loaded.vae, original.vae)
    for ours, theirs in zip(loaded.text_encoders, original.text_encoders, strict=True):
        assert_same_weights(ours, theirs)
    assert (loaded.spec.family, loaded.spec.prediction_type) == (original.spec.family, original.spec.prediction_type)
    assert loaded.spec.latent_space.scaling_factor == original.spec.latent_space.scaling_factor
    assert torch.equal(loaded.schedule.alphas_cumprod, original.schedule.alphas_cumprod)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        conds = [model.encode_prompts(["a cat", ""], (64, 64)) for model in (loaded, original)]
        torch.testing.assert_close(conds[0].text, conds[1].text)
        ours, theirs = (model.predict_eps(latents, TIMESTEPS, cond) for model, cond in zip((loaded, original), conds, strict=True))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_folder(kind, tmp_path):
    original = tiny_model(kind, full=True)
    loaded = load_model(save_folder(original, tmp_path / "model"))
    assert_same_model(loaded, original)
    assert loaded.spec.name == "model" and loaded.spec.resolution == original.spec.resolution
    assert not any(parameter.requires_grad for parameter in loaded.unet.parameters())
    assert not loaded.unet.training


@pytest.mark.parametrize(("kind", "ending"), [*((kind, ".safetensors") for kind in KINDS), ("sd1", ".ckpt")])
def test_single_file(kind, ending, tmp_path):
    original = tiny_model(kind, full=True)
    path = save_single_file(original, tmp_path / f"model{ending}")
    assert_same_model(load_model(path, v_parameterization=kind.endswith("_v")), original)


@pytest.mark.parametrize("kind", FAMILY_NAMES)
def test_without_values_a_folder_and_a_file_have_the_model_s_shapes(kind, tmp_path):
    model = tiny_model(kind, full=True)
    folder, file = save_folder(model, tmp_path / "folder"), save_single_file(model, tmp_path / "file.safetensors")
    for weights in [*folder.rglob("*.safetensors"), *folder.rglob("*.bin")]:
        weights.unlink()  # only the configs are read
    for path in (folder, file):
        loaded = load_model(path, device="meta", dtype=torch.float16)
        assert loaded.device.type == loaded.vae.device.type == "meta"
        for ours, theirs in zip((loaded.unet, *loaded.text_encoders), (model.unet, *model.text_encoders), strict=True):
            assert {name: (own.shape, own.dtype) for name, own in ours.named_parameters()} == {
                name: (own.shape, torch.float16) for name, own in theirs.named_parameters()
            }


def test_v_prediction_is_read_from_the_file_unless_the_flag_says_otherwise(tmp_path):
    model = tiny_model("sdxl_v", full=True)
    plain = save_single_file(model, tmp_path / "plain.safetensors")
    by_key = save_single_file(model, tmp_path / "key.safetensors", extra={"v_pred": torch.tensor([])})
    by_metadata = save_single_file(model, tmp_path / "metadata.safetensors", metadata={"modelspec.prediction_type": "v"})
    assert load_model(plain).spec.prediction_type == "epsilon"
    assert load_model(by_key).spec.prediction_type == "v_prediction"
    assert load_model(by_metadata).spec.prediction_type == "v_prediction"
    assert load_model(by_key, v_parameterization=False).spec.prediction_type == "epsilon"
    assert load_model(by_key).schedule.alphas_cumprod[-1] > 0.004


def test_zero_terminal_snr_is_read_from_the_file(tmp_path):
    markers = {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}
    model = load_model(save_single_file(tiny_model("sdxl_v", full=True), tmp_path / "model.safetensors", extra=markers))
    assert model.schedule.alphas_cumprod[-1] < 1e-7
    assert model.schedule.inference_timesteps(10)[0] == 999


def test_flag_overrides_the_folder(tmp_path):
    folder = save_folder(tiny_model("sd2", full=True), tmp_path / "model")
    model = load_model(folder, v_parameterization=True)
    assert model.spec.prediction_type == model.schedule.prediction_type == "v_prediction"
    assert model.spec.base_model_version == "sd_v2_v"


def test_dtype_and_clip_skip(tmp_path):
    path = save_single_file(tiny_model("sd1", full=True), tmp_path / "model.safetensors")
    model = load_model(path, dtype=torch.bfloat16, clip_skip=2)
    assert (model.unet.dtype, model.text_encoders[0].dtype, model.vae.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert model.clip_skip == 2


def test_half_precision_file_loads_in_float32(tmp_path):
    tensors = {name: tensor.half() for name, tensor in single_file_tensors(tiny_model("sd1", full=True)).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    model = load_model(tmp_path / "model.safetensors")
    assert model.dtype == model.vae.dtype == torch.float32
    assert torch.equal(model.unet.conv_in.weight, tiny_model("sd1", full=True).unet.conv_in.weight.half().float())


def test_sd2_file_with_the_whole_openclip_tower(tmp_path):
    """Published SD2 files hold 24 layers and a projection; only 23 layers are used."""
    model = tiny_model("sd2", full=True)
    config = CLIPTextConfig(**{**model.text_encoders[0].config.to_dict(), "num_hidden_layers": 24})
    tower = CLIPTextModel(config)
    tensors = {name: tensor for name, tensor in single_file_tensors(model).items() if not name.startswith("cond_stage_model.")}
    tensors |= {f"cond_stage_model.model.{name}": tensor for name, tensor in transformers_to_openclip(tower.state_dict()).items()}
    tensors |= {"cond_stage_model.model.text_projection": torch.eye(32), "cond_stage_model.model.logit_scale": torch.tensor(4.6)}
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    loaded = load_model(tmp_path / "model.safetensors")
    assert loaded.text_encoders[0].config.num_hidden_layers == 23
    ids = torch.tensor([[49406, 320, 49407]])
    expected = tower.final_layer_norm(tower(ids, output_hidden_states=True).hidden_states[-2])
    torch.testing.assert_close(loaded.text_encoders[0](ids).last_hidden_state, expected)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_full_size_tensors_give_the_published_configs(family):
    """Tensors of the published shapes, on the meta device; the parameter counts are those of the published models."""
    bundled = single_file.bundled_config(family)
    with init_empty_weights(include_buffers=True):
        unet = UNet2DConditionModel.from_config(bundled["unet"])
        vae = AutoencoderKL.from_config(bundled["vae"])
        text_encoders = {
            slot: {"CLIPTextModel": CLIPTextModel, "CLIPTextModelWithProjection": CLIPTextModelWithProjection}[slot.class_name](
                CLIPTextConfig(**bundled[slot.folder])
            )
            for slot in FAMILIES[family].text_encoders
        }
    assert isinstance(unet, UNet2DConditionModel) and isinstance(vae, AutoencoderKL)
    published = {"sd1": 859_520_964, "sd2": 865_910_724, "sdxl": 2_567_463_684}
    assert sum(parameter.numel() for parameter in unet.parameters()) == published[family]
    assert sum(parameter.numel() for parameter in vae.parameters()) == 83_653_863

    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in unet_to_ldm(unet).items()}
    for slot, text_encoder in text_encoders.items():
        own = {name.removeprefix("text_model."): tensor for name, tensor in text_encoder.state_dict().items()}
        tensors |= {slot.prefix + name: tensor for name, tensor in (transformers_to_openclip(own) if slot.open_clip else own).items()}
        derived = single_file.text_encoder_config(single_file.text_encoder_tensors(tensors, slot), bundled[slot.folder])
        assert derived == bundled[slot.folder]
    derived = single_file.unet_config(tensors, FAMILIES[family])
    with init_empty_weights():  # so that the defaults are filled in on both sides
        assert dict(UNet2DConditionModel.from_config(derived).config) == dict(unet.config)
    assert single_file.vae_config(vae_to_ldm(vae), FAMILIES[family]) == bundled["vae"]


@pytest.fixture(scope="module")
def sd1_file(tmp_path_factory):
    return save_single_file(tiny_model("sd1", full=True), tmp_path_factory.mktemp("sd1") / "model.safetensors")


@pytest.fixture(scope="module")
def sd1_folder(tmp_path_factory):
    return save_folder(tiny_model("sd1", full=True), tmp_path_factory.mktemp("sd1") / "model")


def without_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}


def test_missing_path():
    with pytest.raises(UserError, match="no file or folder owner/name, the Hugging Face cache .* has no such model, and it cannot be"):
        load_model("owner/name")
    with pytest.raises(UserError, match=r"no file or folder models/a.safetensors; give a checkpoint file"):
        load_model("models/a.safetensors")


def test_unknown_and_wrong_family(sd1_file, sd1_folder):
    with pytest.raises(UserError, match="no model family 'flux'; model_family is one of .*sd1, sd2, sdxl"):
        load_model(sd1_file, family="flux")
    for path in (sd1_file, sd1_folder):
        with pytest.raises(UserError, match=r"is a Stable Diffusion 1.x model \(sd1\), but family 'sdxl' was given"):
            load_model(path, family="sdxl")
        assert load_model(path, family="sd1").spec.family == "sd1"


def test_truncated_files(sd1_file, tmp_path):
    content = sd1_file.read_bytes()
    for size in (4, 1000, len(content) - 10):
        (tmp_path / "cut.safetensors").write_bytes(content[:size])
        with pytest.raises(UserError, match="not a whole safetensors file"):
            load_model(tmp_path / "cut.safetensors")
    for changed in (content[:-10], content + b"0123456789"):
        (tmp_path / "cut.safetensors").write_bytes(changed)
        with pytest.raises(UserError, match=f"has {len(changed):,} bytes, and {len(content):,} by its header"):
            load_model(tmp_path / "cut.safetensors")
    torch.save({"state_dict": {"a": torch.zeros(1000)}}, tmp_path / "whole.ckpt")
    (tmp_path / "cut.ckpt").write_bytes((tmp_path / "whole.ckpt").read_bytes()[:-100])
    with pytest.raises(UserError, match="not a whole file of torch.save"):
        load_model(tmp_path / "cut.ckpt")


@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt"])
def test_what_stands_in_the_place_of_a_file_is_named(name: str, tmp_path):
    for text, what in (("version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS"), ("\n<!DOCTYPE html>", "a web page")):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=what):
            load_model(tmp_path / name)


class Opener:
    def __reduce__(self):
        return (open, ("never.txt", "w"))


def test_a_pickle_with_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"a": torch.zeros(1)}, "callback": Opener()}, tmp_path / "model.ckpt")
    with pytest.raises(UserError, match="plain tensors"):
        load_model(tmp_path / "model.ckpt")
    assert not (tmp_path / "never.txt").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lora_unet_mid_block_attentions_0_proj_in.lora_down.weight", "is a LoRA, not a model"),
        ("unet.mid_block.attentions.0.proj_in.lora_A.weight", "is a LoRA, not a model"),
        ("double_blocks.0.img_attn.qkv.weight", "has no network that is known here"),
    ],
)
def test_files_that_are_something_else(name, message, tmp_path):
    save_file({name: torch.zeros(4, 4)}, tmp_path / "file.safetensors")
    with pytest.raises(UserError, match=message):
        load_model(tmp_path / "file.safetensors")


def test_other_endings(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="does not end in .safetensors or .ckpt"):
        load_model(tmp_path / "model.gguf")


def test_file_without_text_encoder_or_with_missing_tensors(tmp_path):
    tensors = single_file_tensors(tiny_model("sd1", full=True))
    save_file(without_prefix(tensors, "cond_stage_model."), tmp_path / "unet.safetensors")
    with pytest.raises(UserError, match="not the text encoders"):
        load_model(tmp_path / "unet.safetensors")
    save_file(without_prefix(tensors, "first_stage_model."), tmp_path / "no_vae.safetensors")
    with pytest.raises(UserError, match="has no VAE"):
        load_model(tmp_path / "no_vae.safetensors")
    save_file(without_prefix(tensors, "model.diffusion_model.output_blocks.3."), tmp_path / "gap.safetensors")
    with pytest.raises(UserError, match="The U-Net in .* is not complete"):
        load_model(tmp_path / "gap.safetensors")


def test_inpainting_models(tmp_path):
    tensors = single_file_tensors(tiny_model("sd1", full=True))
    tensors["model.diffusion_model.input_blocks.0.0.weight"] = torch.zeros(32, 9, 3, 3)
    save_file(tensors, tmp_path / "inpaint.safetensors")
    with pytest.raises(UserError, match="takes 9 channels"):
        load_model(tmp_path / "inpaint.safetensors")


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_folders_that_are_something_else(sd1_folder, tmp_path):
    with pytest.raises(UserError, match="has no model_index.json"):
        load_model(tmp_path)
    broken = shutil.copytree(sd1_folder, tmp_path / "broken")
    vae = json.loads((broken / "model_index.json").read_text())["vae"]
    edit_json(broken / "model_index.json", _class_name="FluxPipeline", vae=["diffusers", "AutoencoderKLFlux2"])
    with pytest.raises(UserError, match="holds a FluxPipeline; the models that can be trained are .*Stable Diffusion 1.x"):
        load_model(broken)
    edit_json(broken / "model_index.json", _class_name="StableDiffusionPipeline", vae=vae, unet=3)
    with pytest.raises(UserError, match="says StableDiffusionPipeline, but lists no unet of the class UNet2DConditionModel; download"):
        load_model(broken)
    for nameless in ("{}", '{"_class_name": 5}'):
        (tmp_path / "model_index.json").write_text(nameless)
        with pytest.raises(UserError, match=f"The model index of {re.escape(str(tmp_path))} names no pipeline by _class_name; download"):
            load_model(tmp_path)
    edit_json(broken / "model_index.json", unet=["diffusers", "UNet2DConditionModel"])
    edit_json(broken / "unet" / "config.json", in_channels=9)
    with pytest.raises(UserError, match="takes 9 channels"):
        load_model(broken)
    edit_json(broken / "unet" / "config.json", in_channels=4, sample_size="large")
    assert load_model(broken).spec.resolution == load_model(sd1_folder).vae.config["sample_size"]
    shutil.rmtree(broken / "tokenizer")
    with pytest.raises(UserError, match="The tokenizer in .* has 0 tokens and the text encoder 49408"):
        load_model(broken)
    (broken / "tokenizer").mkdir()
    with pytest.raises(UserError, match="The tokenizer in .* has 2 tokens and the text encoder 49408"):
        load_model(broken)
    (broken / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match="vae has no weights"):
        load_model(broken)
    (broken / "vae").rename(broken / "not a vae")
    with pytest.raises(UserError, match="vae has no config.json; give the VAE by vae, or a model that is complete"):
        load_model(broken)
    (broken / "not a vae").rename(broken / "vae")
    unet = broken / "unet" / "diffusion_pytorch_model.safetensors"
    unet.write_bytes(unet.read_bytes()[:-50])
    with pytest.raises(UserError, match="unet cannot be loaded"):
        load_model(broken)
    (broken / "model_index.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        load_model(broken)


def test_folder_with_only_the_fp16_variant(tmp_path):
    original = tiny_model("sd1", full=True)
    folder = save_folder(original, tmp_path / "model")
    for part in ("unet", "vae", "text_encoder"):
        (file,) = (folder / part).glob("*.safetensors")
        file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    assert_same_model(load_model(folder), original)


def vae_sources(tmp_path, vae):
    """The same VAE in every form it comes in."""
    vae.save_pretrained(tmp_path / "vae_folder")
    ldm = {name: tensor.clone().contiguous() for name, tensor in vae_to_ldm(vae).items()}
    save_file(ldm, tmp_path / "bare.safetensors")
    save_file({f"first_stage_model.{name}": tensor for name, tensor in ldm.items()}, tmp_path / "prefixed.safetensors")
    torch.save({"state_dict": ldm | {"loss.logvar": torch.zeros(1)}}, tmp_path / "training.pt")
    return [
        tmp_path / "vae_folder",
        tmp_path / "vae_folder" / "diffusion_pytorch_model.safetensors",
        tmp_path / "bare.safetensors",
        tmp_path / "prefixed.safetensors",
        tmp_path / "training.pt",
    ]


def test_vae_option_replaces_the_vae(sd1_file, tmp_path):
    other = tiny_vae(seed=5, channels=FULL_VAE)
    for source in vae_sources(tmp_path, other):
        model = load_model(sd1_file, vae=source, dtype=torch.bfloat16)
        assert_same_weights(model.vae, other)
        assert model.vae.dtype == torch.float32
        assert model.vae_fingerprint().matches(VaeFingerprint.of(other))


def test_vae_folder_brings_its_scaling_factor_and_must_fit(sd1_file, tmp_path):
    tiny_vae(scaling_factor=0.5).save_pretrained(tmp_path / "other")
    assert load_model(sd1_file, vae=tmp_path / "other").spec.latent_space.scaling_factor == 0.5
    AutoencoderKL(latent_channels=16, block_out_channels=(32,)).save_pretrained(tmp_path / "wide")
    with pytest.raises(UserError, match=r"16 channels\), and model.safetensors draws SD1 and SD2 latents"):
        load_model(sd1_file, vae=tmp_path / "wide")


def test_load_vae(sd1_file, sd1_folder, tmp_path):
    original = tiny_model("sd1", full=True).vae
    assert_same_weights(load_vae(sd1_file), original)
    assert_same_weights(load_vae(sd1_folder), original)
    *_, bare, _, _ = vae_sources(tmp_path, original)
    with pytest.raises(UserError, match="does not say its scaling factor"):
        load_vae(bare)
    assert load_vae(bare, family="sdxl").config["scaling_factor"] == 0.13025
    with pytest.raises(UserError, match="has no VAE: neither config.json nor vae/config.json"):
        load_vae(sd1_folder / "tokenizer")
    save_file({"lora_unet_a.lora_down.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="has no VAE"):
        load_vae(tmp_path / "other.safetensors", family="sd1")
    with pytest.raises(UserError, match="is a LoRA, not a model"):
        load_vae(tmp_path / "other.safetensors")
    save_file({"backbone.stem.weight": torch.zeros(1)}, tmp_path / "scorer.safetensors")
    with pytest.raises(UserError, match="has no VAE; give a checkpoint with one, a VAE file or the folder of a VAE"):
        load_vae(tmp_path / "scorer.safetensors")
