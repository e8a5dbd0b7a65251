"""How train_leco_score.py refuses bad input, and what it does about losses that are not finite."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import train_leco_score
from library.errors import UserError
from library.models.config import ModelConfig
from library.models.loading import load_model
from library.models.vae import VaeFingerprint
from library.objectives.terms.score import ScoreTerm
from library.scorers.io import save_scorer
from library.training.tracking import read_metrics
from library.types import LossOutput
from tests.helpers.tiny_leco_run import (
    foreign_vae_fingerprint,
    run,
    settings,
    tiny_scorer,
    write_toml,
)


def never(*_: Any, **__: Any) -> None:
    raise AssertionError("this comes too early")


def cut(path: Path, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    content = path.read_bytes()
    target.write_bytes(content[: len(content) // 2])
    return target


@pytest.fixture(scope="module")
def broken(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that are wrong, each in its way."""
    folder = tmp_path_factory.mktemp("broken")
    fingerprint = load_model(workplace / "model").vae_fingerprint()
    save_scorer(folder / "foreign.safetensors", tiny_scorer(foreign_vae_fingerprint()))
    save_scorer(folder / "blind.safetensors", tiny_scorer(fingerprint, noise_aware=False))
    with_nan = tiny_scorer(fingerprint)
    torch.nn.init.constant_(with_nan.get_parameter("heads.score.members.0.weight"), torch.nan)
    save_scorer(folder / "nan.safetensors", with_nan)
    cut(workplace / "scorer.safetensors", folder / "cut.safetensors")
    (folder / "words.toml").write_text('[[targets]]\ntarget_class = "a"\npositive = "b"\n', encoding="utf-8")
    (folder / "empty.txt").write_text("# nothing but a comment\n\n", encoding="utf-8")
    unet = Path("unet/diffusion_pytorch_model.safetensors")
    for file in (workplace / "model").rglob("*"):
        if file.is_file():
            target = folder / "model" / file.relative_to(workplace / "model")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    cut(workplace / "model" / unet, folder / "model" / unet)
    cut(workplace / "model" / unet, folder / "cut_checkpoint.safetensors")
    return folder


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"pretrained_model_name_or_path": "{broken}/none.safetensors"}, ["none.safetensors"]),
        ({"pretrained_model_name_or_path": "{broken}/cut_checkpoint.safetensors"}, ["cut_checkpoint.safetensors"]),
        ({"pretrained_model_name_or_path": "{broken}/model"}, ["model", "unet"]),
        ({"learning_rat": 1e-4}, ["learning_rat", "learning_rate"]),
        ({"max_train_steps": "many"}, ["max_train_steps", "'many'", "whole number"]),
        ({"max_train_steps": 0}, ["max_train_steps is 0", "at least 1"]),
        ({"scorer": ["{broken}/none.safetensors"]}, ["none.safetensors"]),
        ({"scorer": ["{broken}/foreign.safetensors"]}, ["foreign", "another VAE"]),
        ({"scorer": ["{broken}/cut.safetensors"]}, ["cut.safetensors", "truncated"]),
        ({"scorer": ["{broken}/blind.safetensors"]}, ["blind.safetensors", "score_estimator x0"]),
        ({"scorer": []}, ["scorer is not set"]),
        ({"prompts_file": "{broken}/empty.txt"}, ["empty.txt", "no prompts"]),
        ({"prompts_file": "{broken}/none.txt"}, ["none.txt", "does not exist"]),
        (
            {
                "objective": ["leco"],
                "scorer": [],
                "prompts_file": "",
                "leco_prompts_file": "{broken}/words.toml",
                "sample_every_n_steps": 1,
            },
            ["no prompts to make previews of", "eval_prompts_file"],
        ),
        ({"network_args": ["conv_dimm=4"]}, ["conv_dimm", "conv_dim"]),
        ({"network_module": "lycoris.nothing"}, ["lycoris.nothing", "networks.lora"]),
        ({"network_weights": "{broken}/none.safetensors"}, ["network_weights", "does not exist"]),
        ({"network_weights": "{broken}/cut.safetensors"}, ["cut.safetensors"]),
        ({"optimizer_type": "AdamWW"}, ["AdamWW", "AdamW"]),
        ({"optimizer_args": ["betta=1"]}, ["betta"]),
        ({"lr_scheduler": "cosin"}, ["cosin", "cosine"]),
        ({"resume": "{broken}"}, ["no saved training state"]),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(
    workplace: Path, broken: Path, tmp_path: Path, refused: Callable[..., str], changes: dict[str, Any], says: list[str]
) -> None:
    def filled(value: Any) -> Any:
        return [filled(item) for item in value] if isinstance(value, list) else str(value).format(broken=broken)

    changes = {name: filled(value) if isinstance(value, (str, list)) else value for name, value in changes.items()}
    output = tmp_path / "out"
    config = write_toml(tmp_path / "x.toml", settings(workplace, output, **changes))
    sentence = refused(train_leco_score.main, "--config_file", config)
    assert all(word in sentence for word in says), sentence
    assert not output.exists() or not list(output.iterdir())


@pytest.mark.parametrize("scorer", ["none", "blind", "of_sdxl", "of_flux"])
def test_what_a_scorers_file_says_is_refused_before_the_model_is_loaded(
    workplace: Path, broken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str], scorer: str
) -> None:
    for name, scaling, channels in (("of_sdxl", 0.13025, 4), ("of_flux", 0.3611, 16)):
        save_scorer(broken / f"{name}.safetensors", tiny_scorer(VaeFingerprint(scaling, (0.0,) * 64 * channels)))
    monkeypatch.setattr(ModelConfig, "load", never)
    config = write_toml(tmp_path / "x.toml", settings(workplace, tmp_path / "out", scorer=[str(broken / f"{scorer}.safetensors")]))
    sentence = refused(train_leco_score.main, "--config_file", config)
    assert f"{scorer}.safetensors" in sentence or f"scorer {scorer} reads {'SDXL' if 'sdxl' in scorer else 'FLUX.1'} latents" in sentence


def test_an_output_dir_that_cannot_be_written_to(workplace: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "out").write_text("a file")
    sentence = refused(train_leco_score.main, "--config_file", write_toml(tmp_path / "x.toml", settings(workplace, tmp_path / "out")))
    assert f"{tmp_path / 'out'} is a file" in sentence and "choose another folder" in sentence
    assert (tmp_path / "out").read_text() == "a file"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"scorer": "nan"}, ["step 1:", "scorer nan", "not finite", "timestep", "--check_reward"]),
        ({"learning_rate": 1e30, "max_grad_norm": 0.0, "max_train_steps": 20}, ["step 2:", "nor were 8 more", "timestep", "learning_rate"]),
        ({"learning_rate": 1e6, "max_train_steps": 1, "save_precision": "fp16"}, ["step 1:", "not finite in fp16"]),
    ],
)
def test_what_is_never_finite_stops_the_run_and_no_slider_is_written(
    workplace: Path, broken: Path, tmp_path: Path, refused: Callable[..., str], changes: dict[str, Any], says: list[str]
) -> None:
    if "scorer" in changes:
        changes = {"scorer": [str(broken / "nan.safetensors")]}
    (tmp_path / "one.txt").write_text("a green star\n", encoding="utf-8")
    values = settings(workplace, tmp_path / "out", prompts_file=str(tmp_path / "one.txt"), **changes)
    sentence = refused(train_leco_score.main, "--config_file", write_toml(tmp_path / "x.toml", values))
    assert all(word in sentence for word in says), sentence
    assert "timestep" not in says or "'a green star'" in sentence
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_an_optimizer_that_does_not_exist_is_told_before_the_model_is_loaded(workplace: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(ModelConfig, "load", never)
    with pytest.raises(UserError, match="optimizer_type"):
        run(workplace, tmp_path / "out", optimizer_type="none.None")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"objective": ["leco"]}, "a scorer is given, but objective is leco"),
        ({"objective_weights": ["leco=2"]}, "objective_weights has leco"),
    ],
)
def test_terms_that_contradict_the_settings_are_told_at_once(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], says: str
) -> None:
    monkeypatch.setattr(train_leco_score, "check_optimizer", never)
    with pytest.raises(UserError, match=says):
        run(workplace, tmp_path / "out", **changes)


@pytest.mark.parametrize("option", ["prompts_file", "eval_prompts_file", "pretrained_model_name_or_path", "scorer", "resume"])
def test_a_file_that_is_not_there_is_told_before_anything_is_imported_for_the_rest(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    monkeypatch.setattr(train_leco_score, "check_optimizer", never)
    file = str(tmp_path / "gone.safetensors")
    with pytest.raises(UserError, match="gone.safetensors"):
        run(workplace, tmp_path / "out", **{option: [file] if option == "scorer" else file})
    assert not list(tmp_path.iterdir())


def with_nan_at(monkeypatch: pytest.MonkeyPatch, bad: Callable[[int], bool]) -> None:
    """Make the loss of one sample of a batch NaN; `bad` is asked with the number of the update, from 1."""
    call, updates = ScoreTerm.__call__, itertools.count(1)

    def spoiled(self: ScoreTerm) -> LossOutput:
        out = call(self)
        if bad(next(updates)):
            spoil = torch.tensor([torch.nan, *[0.0] * (len(out.sample_losses) - 1)])
            out = replace(out, loss=out.loss * spoil[0], sample_losses=out.sample_losses + spoil)
        return out

    monkeypatch.setattr(ScoreTerm, "__call__", spoiled)


def test_one_sample_without_a_finite_loss_is_named_and_does_not_count(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with_nan_at(monkeypatch, lambda update: update == 2)
    path = run(workplace, tmp_path, max_train_steps=4)
    assert all(tensor.isfinite().all() for tensor in load_file(path).values())
    assert [record["loss"] is None for record in read_metrics(tmp_path / "tiny.metrics.jsonl")] == [False, True, False, False]
    (said,) = [record.getMessage() for record in caplog.records if "finite" in record.getMessage()]
    assert said.startswith("step 2: the score loss of prompt 'a ") and "(scorer scorer)" in said


def test_losses_that_stop_being_finite_end_the_run_with_the_last_good_weights(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = load_file(run(workplace, tmp_path / "whole", max_train_steps=3))
    with_nan_at(monkeypatch, lambda update: update > 4)
    with pytest.raises(UserError, match="step 5: .* nor were 8 more, .* the weights of step 3, the last good ones") as caught:
        run(workplace, tmp_path / "out", max_train_steps=50)
    assert "lower learning_rate" in str(caught.value)
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == ["tiny-step00000003.safetensors"]
    kept = load_file(tmp_path / "out" / "tiny-step00000003.safetensors")
    assert all(torch.equal(tensor, kept[name]) for name, tensor in whole.items())
