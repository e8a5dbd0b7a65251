"""A slider's training goes on from its state to the bit: after it was stopped, in several processes, and not from another's state."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import train_leco_score
from library.errors import UserError
from library.scorer_training.trainer import ScorerState
from library.settings.cli import run_main
from library.slider_training.early_stop import EarlyStop
from library.slider_training.files import SliderState
from library.training.checkpoints import STATE_FILE, load_state, save_state
from library.training.output_files import only_process
from library.training.tracking import Tracker, read_metrics
from tests.helpers.processes import run_processes
from tests.helpers.tiny_leco_run import run, settings, write_toml
from tests.helpers.two_processes import SETTINGS, run_alone


@pytest.mark.parametrize("optimizer", [{}, {"optimizer_type": "AdamWScheduleFree", "max_grad_norm": 0.0}], ids=["AdamW", "schedule_free"])
def test_a_resumed_run_ends_in_the_same_bits(workplace: Path, tmp_path: Path, optimizer: dict) -> None:
    """With dropout, fresh noise in every sampler step, a schedule, accumulation, two sizes, and previews and measurements in between."""
    common = {"max_train_steps": 4, "gradient_accumulation_steps": 2, "network_dropout": 0.3, "sampler": "euler_a", "save_every_n_steps": 2}
    common |= {
        "save_state": True,
        "sample_every_n_steps": 2,
        "evaluate_every_n_steps": 2,
        "measure": "light",
        "calibrate": "off",
        **optimizer,
    }
    if optimizer.get("optimizer_type") != "AdamWScheduleFree":
        common["lr_scheduler"] = "cosine"
    straight = load_file(run(workplace, tmp_path / "a", **common))
    resumed = load_file(run(workplace, tmp_path / "b", resume=tmp_path / "a" / "tiny-step00000002-state", **common))
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in straight.items())
    halfway = load_file(tmp_path / "a" / "tiny-step00000002.safetensors")
    assert not all(torch.equal(tensor, halfway[name]) for name, tensor in straight.items())
    first, second = (read_metrics(tmp_path / name / "tiny.metrics.jsonl")[-2:] for name in "ab")
    for one, two in zip(first, second, strict=True):
        assert {key: value for key, value in one.items() if key != "time"} == {key: value for key, value in two.items() if key != "time"}


def test_a_run_that_died_between_its_last_step_and_its_end_goes_on_to_that(workplace: Path, tmp_path: Path) -> None:
    common = {"max_train_steps": 2, "save_every_n_steps": 1, "save_state": True}
    path = run(workplace, tmp_path, **common)
    whole = load_file(path)
    shutil.rmtree(tmp_path / "tiny-state")
    path.unlink()  # killed after the state of the last step
    resumed = load_file(run(workplace, tmp_path, resume="auto", **common))
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    shutil.copy(tmp_path / "tiny-step00000002.safetensors", path)  # killed after the slider as trained, before what the run came to
    run(workplace, tmp_path, resume="auto", **common)
    with safe_open(path, framework="pt") as file:
        assert "ss_leco_conclusion" in file.metadata()
    with pytest.raises(UserError, match="nothing is left to train"):
        run(workplace, tmp_path, resume="auto", **common)


def test_ctrl_c_while_the_end_is_measured_says_what_the_file_is(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("library.slider_training.monitor.Monitor.finish", lambda *_: signal.raise_signal(signal.SIGINT))
        run(workplace, tmp_path, max_train_steps=1, save_state=True)
    assert f"{tmp_path / 'tiny.safetensors'} is as trained, neither chosen nor calibrated" in caplog.text
    with safe_open(run(workplace, tmp_path, max_train_steps=1, save_state=True, resume="auto"), framework="pt") as file:
        assert "ss_leco_conclusion" in file.metadata()


def test_a_run_that_had_stopped_by_itself_and_died_before_its_end_trains_no_more(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enough = "it is enough"
    monkeypatch.setattr(EarlyStop, "_reason", lambda self, *_: enough if self.history[-1].step == 2 else None)
    common = {"max_train_steps": 4, "evaluate_every_n_steps": 2, "measure": "light", "calibrate": "off", "save_state": True}
    path = run(workplace, tmp_path, **common)
    whole, lines = load_file(path), read_metrics(tmp_path / "tiny.metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1]
    path.unlink()  # killed while it measured for the last time
    resumed = load_file(run(workplace, tmp_path, resume="auto", **common))
    assert read_metrics(tmp_path / "tiny.metrics.jsonl") == lines
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["ss_steps"] == "2" and enough in str(file.metadata())
    run(workplace, tmp_path, resume="auto", **common)  # a run that came to its end is trained on, where somebody asks for it
    assert [line["step"] for line in read_metrics(tmp_path / "tiny.metrics.jsonl")] == [0, 1, 2, 3]


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="fork")
def test_two_processes_are_one_with_the_batches_of_both_and_one_goes_on_from_them(workplace: Path, tmp_path: Path) -> None:
    run_processes(2, lambda: run(workplace, tmp_path / "two", save_state_on_train_end=True, **SETTINGS))
    two, one = load_file(tmp_path / "two" / "tiny.safetensors"), load_file(run_alone(workplace, tmp_path / "one"))
    assert two.keys() == one.keys()
    for name, weight in two.items():
        torch.testing.assert_close(weight, one[name], atol=1e-6, rtol=0)
    assert max(weight.abs().max() for name, weight in two.items() if "lora_up" in name) > 1e-4

    again = run(workplace, tmp_path / "two", **SETTINGS | {"max_train_steps": 4}, resume=str(tmp_path / "two" / "tiny-state"))
    assert [record["step"] for record in read_metrics(tmp_path / "two" / "tiny.metrics.jsonl")] == [0, 1, 2, 3]
    assert any(not torch.equal(weight, two[name]) for name, weight in load_file(again).items())


@pytest.fixture(scope="module")
def state(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """After the last of two steps."""
    return run(workplace, tmp_path_factory.mktemp("state"), save_state_on_train_end=True).parent / "tiny-state"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"max_train_steps": 2}, "nothing is left to train"),
        ({"train_batch_size": 3}, "batch size"),
        ({"network_dim": 3}, "network"),
        ({"optimizer_type": "Prodigy"}, "optimizer"),
        ({"seed": 7}, "seed is 7 and was 0"),
        ({"sampler": "euler"}, "sampler is 'euler' and was 'ddim'"),
        ({"network_alpha": 3.0}, "network_alpha is [3.0] and was [2.0]"),
        ({"max_denoising_steps": 4}, "max_denoising_steps is 4 and was 3"),
    ],
)
def test_a_state_of_other_settings_is_refused(
    workplace: Path, state: Path, tmp_path: Path, refused: Callable[..., str], changes: dict[str, Any], says: str
) -> None:
    values = settings(workplace, tmp_path / "out", resume=str(state), **{"max_train_steps": 3, **changes})
    sentence = refused(train_leco_score.main, "--config_file", write_toml(tmp_path / "x.toml", values))
    assert says in sentence and "resume" in sentence or "nothing is left" in sentence
    assert not (tmp_path / "out").exists()


def test_a_state_of_the_other_training_is_called_by_its_name(tmp_path: Path) -> None:
    SliderState.of({}, step=1, unet_evaluations=0, watched=False, shared={}).save(tmp_path / "slider")
    ScorerState.of({}, step=1, pretraining=False, record={}, shared={}).save(tmp_path / "scorer")
    assert SliderState.load(tmp_path / "slider").step == ScorerState.load(tmp_path / "scorer").step == 1
    with pytest.raises(
        UserError, match="scorer is a state of the training of a scorer, and this trains a slider: resume from one of its own"
    ):
        SliderState.load(tmp_path / "scorer")
    with pytest.raises(UserError, match="slider is a state of the training of a slider, and this trains a scorer"):
        ScorerState.load(tmp_path / "slider")


@pytest.mark.parametrize("seed", [6, 8])
def test_a_smaller_value_is_a_change_as_a_larger_one_is(seed: int) -> None:
    saved = SliderState.of({}, step=1, unet_evaluations=0, watched=False, shared={"seed": 7})
    with pytest.raises(UserError, match=f"seed is {seed} and was 7"):
        saved.check_shared({"seed": seed}, Path("x-state"), with_changes=False)


def test_on_purpose_a_run_goes_on_with_another_seed(workplace: Path, state: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = run(workplace, tmp_path, resume=state, seed=7, max_train_steps=3, resume_with_changes=True)
    assert path.is_file() and "resumed with a change: seed is 7 and was 0" in caplog.text


def test_other_settings_of_a_resumed_run_hold_and_are_named(
    workplace: Path, state: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    again = load_file(run(workplace, tmp_path / "again", resume=state, max_train_steps=3))
    assert "other settings" not in caplog.text
    changed = load_file(run(workplace, tmp_path / "changed", resume=state, max_train_steps=3, learning_rate=5e-2, guidance_rescale=0.5))
    (said,) = [text for text in caplog.messages if "with other settings" in text]
    assert "learning_rate is 0.05 and was 0.01" in said and "guidance_rescale is 0.5 and was 0.0" in said and said.count(" and was ") == 2
    before = load_state(state)["parts"]["network"]["state"]
    moves = [max((own[name].float() - before[name].float()).abs().max() for name in before) for own in (again, changed)]
    assert moves[1] > 2 * moves[0]


@pytest.mark.parametrize("part", ["step", "rng", "parts", "term score", "negative", "generators"])
def test_a_state_that_lacks_something_is_one_sentence(workplace: Path, state: Path, tmp_path: Path, part: str) -> None:
    content = load_state(state)
    if part == "negative":
        content["step"] = -1
    elif part == "generators":
        content["rng"] = {"python": (1,)}
    else:
        del (content if part in content else content["parts"])[part]
    save_state(tmp_path / "tiny-state", content)
    with pytest.raises(UserError, match="no usable|does not fit|are none"):
        run(workplace, tmp_path, resume=tmp_path / "tiny-state", max_train_steps=3)


def test_resume_auto_passes_a_broken_state_over_and_begins_where_there_is_none(
    workplace: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    common: dict[str, Any] = {"max_train_steps": 3, "save_every_n_steps": 1, "save_state": True, "resume": "auto"}
    caplog.set_level("INFO")
    whole = load_file(run(workplace, tmp_path, **common))
    assert "no state of tiny yet, training begins" in caplog.text
    shutil.rmtree(tmp_path / "tiny-state")
    for step in (2, 3):
        (tmp_path / f"tiny-step0000000{step}-state" / STATE_FILE).write_bytes(b"cut")
    caplog.clear()
    again = load_file(run(workplace, tmp_path, **common))
    assert caplog.text.count("passed over") == 2 and "resume auto: " in caplog.text and "tiny-step00000001-state" in caplog.text
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())


def test_a_second_run_of_the_same_name_is_refused(workplace: Path, tmp_path: Path) -> None:
    with only_process(tmp_path / ".tiny.lock", "it"), pytest.raises(UserError, match="tiny in .* is trained by process"):
        run(workplace, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="POSIX only")
def test_an_interrupted_run_saves_itself_and_goes_on_to_the_same_bits(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """SIGTERM, SIGINT and SIGHUP one after the other, each in the middle of what is left, with measurements in between."""
    caplog.set_level("INFO")
    common: dict[str, Any] = {
        "max_train_steps": 12,
        "evaluate_every_n_steps": 4,
        "measure": "light",
        "calibrate": "off",
        "early_stop_gain": 1e6,
        "resume": "auto",
    }
    straight = load_file(run(workplace, tmp_path / "whole", **common))
    output = tmp_path / "out"
    config = write_toml(tmp_path / "x.toml", settings(workplace, output, **common))
    monkeypatch.setattr("sys.argv", ["train_leco_score.py", "--config_file", str(config)])
    log = Tracker.log

    def log_and_end(self: Tracker, metrics: dict, step: int) -> Any:
        logged = log(self, metrics, step)
        if step == stop_after:
            os.kill(os.getpid(), number)
        return logged

    monkeypatch.setattr(Tracker, "log", log_and_end)
    for number, stop_after in ((signal.SIGTERM, 1), (signal.SIGINT, 5), (signal.SIGHUP, 9)):
        with pytest.raises(SystemExit) as caught:
            run_main(train_leco_score.main)
        assert caught.value.code == 128 + number
        assert caplog.text.count("--resume auto goes on from there") == 1
        caplog.clear()
        step = max(load_state(path)["step"] for path in output.glob("*-state"))
        assert stop_after < step <= stop_after + 2
        assert (output / f"tiny-step{step:08d}.safetensors").is_file() and not (output / "tiny.safetensors").exists()
    stop_after = -1
    run_main(train_leco_score.main)
    resumed = load_file(output / "tiny.safetensors")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in straight.items())
    assert [record["step"] for record in read_metrics(output / "tiny.metrics.jsonl")] == list(range(12))
