"""Readers of scorers, LoRAs, states and models under random input: a UserError or a result, and nothing is written."""

import json
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from library.models.loading import load_model
from library.scorers.io import FORMAT_KEY, SPEC_KEY, load_scorer
from library.settings.shared import OptimizerConfig
from library.slider_training.files import SliderState
from library.training.checkpoints import STATE_FILE, _checksums, save_state
from library.training.optimizers import create_optimizer, create_scheduler
from networks.lora_files import read_lora
from tests.helpers.context import make_context
from tests.helpers.fuzzing import edited_bytes, edited_json, file_of, fuzzed, only_user_errors, values
from tests.helpers.scorer_headers import HEADER, REACHING, SPEC
from tests.helpers.tiny_leco_run import tiny_scorer
from tests.helpers.tiny_models import save_folder, tiny_model
from tests.helpers.tiny_networks import lora_for

PLACES = [(key,) for key in HEADER] + [("heads", 0, key) for key in HEADER["heads"][0]]
PLACES += [("architecture", key) for key in (*SPEC.architecture, "image_model", "decoder")] + [("vae", key) for key in HEADER["vae"]]
WORDS = ("pixel", "timm", *HEADER, *REACHING)


@fuzzed()
@given(changes=st.lists(st.tuples(st.sampled_from(PLACES), values(*WORDS)), min_size=1, max_size=3))
def test_a_scorers_header(changes: list[tuple[tuple[Any, ...], Any]]) -> None:
    header = json.loads(SPEC.to_json())
    for (*outer, key), value in changes:
        place: Any = header
        try:
            for step in outer:
                place = place[step]
            place[key] = value
        except (TypeError, LookupError):
            continue  # an earlier change has put something else there
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.safetensors")
        save_file({"x": torch.zeros(2)}, path, {FORMAT_KEY: "scorer/2", SPEC_KEY: json.dumps(header)})
        only_user_errors(folder, lambda: load_scorer(path))


@lru_cache
def scorer_bytes() -> bytes:
    scorer = tiny_scorer(SPEC.vae)
    return save(scorer.saved_state(), {FORMAT_KEY: "scorer/2", SPEC_KEY: scorer.spec.to_json()})


@fuzzed(0.5)
@given(data=st.data())
def test_a_scorers_bytes(data: st.DataObject) -> None:
    with file_of(data.draw(edited_bytes(scorer_bytes())), "x.safetensors") as path:
        only_user_errors(path.parent, lambda: load_scorer(path)(torch.zeros(1, 4, 8, 8), torch.zeros(1)))


# ---- LoRA weights ----

MODULE = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
DOTTED = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
KEYS = [f"{MODULE}.{end}" for end in ("lora_down.weight", "lora_up.weight", "alpha", "dora_scale", "hada_w1_a", "lora_mid.weight", "")]
KEYS += [f"base_model.model.unet.{DOTTED}.lora_{letter}.weight" for letter in "AB"] + [f"unet.{DOTTED}.processor.to_q_lora.down.weight"]
KEYS += ["lora_te_text_model_encoder_layers_0_self_attn_k_proj.lora_up.weight", "bundle_emb.x", ".alpha", "lora_down.weight", ""]
SHAPES = st.sampled_from([(), (1,), (2,), (2, 32), (32, 2), (2, 32, 1, 1), (0, 32), (32, 0), (2, 32, 3, 3), (1, 1, 1), (4, 7)])
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64])
TENSORS = st.builds(
    lambda shape, dtype, fill: torch.full(shape, fill).to(dtype),
    SHAPES,
    DTYPES,
    st.sampled_from([0.0, 1.0, 2.0, float("nan"), float("inf")]),
)


@lru_cache
def places() -> list[Any]:
    return list(lora_for(tiny_model("sd1")).loras)


@fuzzed()
@given(tensors=st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=20), TENSORS | values(), max_size=5), peft=st.none() | values())
def test_tensors_of_a_lora(tensors: dict[str, Any], peft: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        metadata = {"lora_adapter_metadata": json.dumps(peft)} if peft is not None else None
        path = Path(folder, "x.pt" if any(not isinstance(tensor, torch.Tensor) for tensor in tensors.values()) else "x.safetensors")
        if path.suffix == ".pt":
            torch.save(tensors, path)
        else:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
        only_user_errors(folder, lambda: read_lora(path).place(places()).warn_of_the_rest(missing_begin_at_zero=True))


@lru_cache
def lora_bytes() -> list[bytes]:
    own = {name: tensor.contiguous() for name, tensor in lora_for(tiny_model("sd1")).state_dict().items()}
    few = dict(list(own.items())[:6])
    with tempfile.TemporaryDirectory() as folder:
        torch.save(few, Path(folder, "x.pt"))
        return [
            save(few),
            save(few, {"lora_adapter_metadata": '{"unet.lora_alpha": 4, "unet.alpha_pattern": {"to_q": 2}}'}),
            Path(folder, "x.pt").read_bytes(),
        ]


@fuzzed()
@given(suffix=st.sampled_from([".safetensors", ".pt"]), data=st.data())
def test_bytes_of_a_lora(suffix: str, data: st.DataObject) -> None:
    with file_of(data.draw(edited_bytes(*lora_bytes())), "x" + suffix) as path:
        only_user_errors(path.parent, lambda: read_lora(path).place(places()))


# ---- states ----


@lru_cache
def run_parts() -> tuple[dict[str, Any], dict[str, Any]]:
    """Parts of a run by name, and the content of a state of them."""
    context = make_context(prompts=[])
    optimizer = create_optimizer(OptimizerConfig(), [{"params": list(context.network.parameters())[:2]}])
    parts = {"optimizer": optimizer, "scheduler": create_scheduler(OptimizerConfig(), optimizer, 10)}
    from library.rollouts.belt import Belt
    from library.types import PromptSpec

    parts["belt"] = Belt(context.trajectories([PromptSpec(prompt="a")], torch.Generator().manual_seed(0)))
    state = SliderState.of(parts, step=1, unet_evaluations=3, watched=True, shared={"seed": 0})
    return parts, {name: getattr(state, name) for name in ("step", "unet_evaluations", "watched", "shared", "rng", "parts")}


@fuzzed()
@given(data=st.data())
def test_a_state(data: st.DataObject) -> None:
    parts, content = run_parts()
    own = data.draw(edited_json(content))
    with tempfile.TemporaryDirectory() as folder:
        if not isinstance(own, dict):
            return
        save_state(Path(folder, "x-state"), own)

        def resume() -> None:
            state = SliderState.load(Path(folder, "x-state"))
            state.check_shared({"seed": 0}, Path(folder), with_changes=True)
            state.restore(parts, Path(folder))

        only_user_errors(folder, resume)
    SliderState(**content).restore(parts, Path())  # the next case begins with parts that are whole


@fuzzed(0.5)
@given(data=st.data())
def test_bytes_of_a_state(data: st.DataObject) -> None:
    parts, content = run_parts()
    with tempfile.TemporaryDirectory() as folder:
        save_state(folder + "/x-state", {"step": 1, "shared": {"a": torch.zeros(3)}})
        file = Path(folder, "x-state", STATE_FILE)
        file.write_bytes(data.draw(edited_bytes(file.read_bytes())))
        if data.draw(st.booleans()):  # by somebody who knows of the checksum
            (file.parent / "sha256sums").write_text(_checksums(file.parent))
        only_user_errors(folder, lambda: SliderState.load(file.parent))


# ---- model folders ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tiny_model("sd1"), tmp_path_factory.mktemp("fuzz") / "model")


def load(folder: Path) -> None:
    load_model(folder)


@fuzzed(0.1)
@given(data=st.data())
def test_configs_of_a_model(folder: Path, data: st.DataObject) -> None:
    configs = sorted(path for path in folder.rglob("*.json") if "tokenizer" not in path.name and "vocab" not in path.name)
    path = data.draw(st.sampled_from(configs))
    original = path.read_bytes()
    path.write_text(json.dumps(data.draw(edited_json(json.loads(original), "CLIPTextModel", "AutoencoderKL"))))
    try:
        only_user_errors(folder, lambda: load(folder))
    finally:
        path.write_bytes(original)


@fuzzed(0.1)
@given(data=st.data())
def test_files_of_a_model(folder: Path, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(sorted(path for path in folder.rglob("*") if path.is_file())))
    original = path.read_bytes()
    path.write_bytes(data.draw(edited_bytes(original)))
    try:
        only_user_errors(folder, lambda: load(folder))
    finally:
        path.write_bytes(original)


@lru_cache
def checkpoint() -> bytes:
    from tests.helpers.tiny_models import single_file_tensors

    few = {name: tensor[:1] if tensor.ndim else tensor for name, tensor in single_file_tensors(tiny_model("sd1", full=True)).items()}
    return save({name: tensor.contiguous() for name, tensor in few.items()})


@fuzzed(0.2)
@given(data=st.data())
def test_bytes_of_a_checkpoint(data: st.DataObject) -> None:
    with file_of(data.draw(edited_bytes(checkpoint())), "x.safetensors") as path:
        only_user_errors(path.parent, lambda: load(path))
