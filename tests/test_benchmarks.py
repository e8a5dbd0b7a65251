"""The benchmarks run on a tiny model on the CPU, and count and time what they say they do."""

import json
import time
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from benchmarks import gpu_check, gpu_sections, step
from benchmarks.gpu_check import Section, judge_section, judge_step, judge_tests, read_junit
from benchmarks.measured_step import MeasuredStep, StepSettings, measure
from benchmarks.random_models import random_model
from benchmarks.timing import Stopwatch
from library.errors import UserError
from library.settings.options import build
from library.settings.shared import NetworkConfig, OptimizerConfig, TrainingConfig
from library.training.runtime import create_accelerator

TINY = {"model_family": "sd1", "random_weights": True, "tiny": True, "scorer_size": "tiny", "num_threads": 1}
QUICK = TINY | {"max_denoising_steps": 3, "warm_up_steps": 1, "timed_steps": 1}


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch):
    """accelerate keeps its state for the process: later tests must not find this one's."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def tiny_step(**settings) -> MeasuredStep:
    accelerator = create_accelerator(TrainingConfig())
    chosen = StepSettings(**{"batch_size": 2, "num_steps": 3, "scorer_size": "tiny", **settings})
    return MeasuredStep(random_model("sd1", tiny=True), accelerator, chosen, NetworkConfig(), OptimizerConfig())


@pytest.mark.slow
def test_every_combination_is_measured_and_written(tmp_path: Path) -> None:
    values = QUICK | {"gradient_checkpointing": ["on"], "train_batch_size": [1, 2]}
    result = step.run(build(step.Config, values | {"output": str(tmp_path / "result.json")}))
    cells = json.loads((tmp_path / "result.json").read_text())["cells"]
    assert len(cells) == 2 and cells == json.loads(json.dumps(result["cells"]))
    for cell in cells:
        assert cell["count_agrees"] is True and "error" not in cell
        parts = cell["part_seconds"]
        assert list(parts) == [
            "belt batch",
            "no-grad predictions",
            "graded forward",
            "score and its gradient",
            "backward",
            "optimizer",
            "advance",
        ]
        assert all(seconds["median"] > 0 for seconds in parts.values())
        assert cell["samples_per_second"] == pytest.approx(cell["batch_size"] / cell["step_seconds"]["median"])
        assert cell["unet_evaluations_per_sample"] == 5.0  # uncond, frozen, cond, and the backward as two
    assert step.table(result).count("belt batch") == 2


def test_what_a_rollout_samples_counts_into_its_evaluations() -> None:
    found = measure(tiny_step(score_estimator="direct_align", batch_size=1, num_steps=4), warm_up_steps=1, timed_steps=2)
    assert found["unet_evaluations_per_sample"] > 5.0


def test_a_wrong_count_is_noticed() -> None:
    measured = tiny_step()
    objective = measured.objective

    def forgetful(batch, generator):
        found = objective(batch, generator)
        measured.model.num_unet_evaluations -= 1
        return found

    measured.objective = forgetful  # type: ignore[assignment]
    assert measure(measured, warm_up_steps=1, timed_steps=1)["count_agrees"] is False


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    measured = tiny_step()
    torch.nn.init.constant_(measured.network.loras[0].lora_up.weight, torch.nan)
    with pytest.raises(UserError, match="not finite"):
        measure(measured, warm_up_steps=1, timed_steps=1)


def test_xformers_that_is_not_used_is_not_measured_as_xformers() -> None:
    result = step.run(build(step.Config, QUICK | {"attention": ["xformers"], "train_batch_size": [1]}))
    assert "xformers cannot be used" in result["cells"][0]["error"]
    assert "xformers cannot be used" in step.table(result)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "set either"),
        ({"pretrained_model_name_or_path": "x", "random_weights": True}, "set either"),
        ({"random_weights": True}, "model_family is auto"),
        ({"pretrained_model_name_or_path": "x", "tiny": True}, "without random_weights"),
        (TINY | {"timed_steps": 0}, "timed_steps"),
    ],
)
def test_bad_settings(values: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        build(step.Config, values)


@pytest.mark.parametrize(("family", "millions"), [("sd1", 859.5), ("sd2", 865.9), ("sdxl", 2567.5)])
def test_random_models_have_the_published_size(family: str, millions: float) -> None:
    """The U-Nets' published numbers of parameters; on the meta device nothing is allocated."""
    model = random_model(family, device="meta")
    assert sum(parameter.numel() for parameter in model.unet.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)
    assert not any(parameter.requires_grad for parameter in model.unet.parameters())


def test_stopwatch_adds_up_what_is_called_alike() -> None:
    stopwatch = Stopwatch(torch.device("cpu"))
    for _ in range(2):
        with stopwatch.part("sleep"):
            time.sleep(0.02)
    assert stopwatch.seconds["sleep"] >= 0.04


@pytest.mark.parametrize("name", list(gpu_sections.SECTIONS))
def test_sections(name: str) -> None:
    result = json.loads(json.dumps(gpu_sections.SECTIONS[name](torch.device("cpu"), True)))
    assert judge_section(result) == ("skipped" if name == "attention" else "passed")  # xformers needs CUDA


def test_no_gpu_is_said_with_an_exit_code_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main(["--output_dir", str(tmp_path)]) == 3
    assert "no CUDA GPU" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def python(code: str, **settings) -> Section:
    """A section that runs Python code, which finds its output file's path in sys.argv[-1]."""
    return Section(name="code", arguments=("-c", code), judge=judge_section, **settings)


@pytest.mark.slow
def test_a_section_that_fails_or_hangs_does_not_end_the_rest(tmp_path: Path) -> None:
    write = "import sys; open(sys.argv[-1], 'w').write({!r})"
    chosen = [
        python("import os; os._exit(9)"),
        python("import time; print('here', flush=True); time.sleep(600)", timeout=3),
        python(write.format("no json")),
        python(write.format('{"ok": true}')),
        python(write.format('{"ok": false}')),
    ]
    records = gpu_check.check(chosen, tmp_path / "result.json", {"device": "cpu"}, {})
    assert [record["status"] for record in records] == ["failed", "timed out", "failed", "passed", "failed"]
    assert "here" in records[1]["output_tail"]
    written = json.loads((tmp_path / "result.json").read_text())
    assert written["device"] == "cpu" and len(written["sections"]) == 5


def test_a_section_whose_package_is_missing_is_skipped_with_the_reason(tmp_path: Path) -> None:
    [record] = gpu_check.check([python("", package="no_such_package")], tmp_path / "result.json", {}, {})
    assert record["status"] == "skipped" and "no_such_package is not installed" in record["reason"]
    assert [section.package for section in gpu_check.sections(False) if "pytest" in section.arguments] == ["pytest"]


@pytest.mark.slow
def test_the_command_runs_its_sections_in_processes_of_their_own(tmp_path: Path) -> None:
    words = ["--device", "cpu", "--tiny", "--sections", "scorer", "--output_dir", str(tmp_path)]
    assert gpu_check.main(words) == 0
    [path] = tmp_path.glob("gpu_cpu_*.json")
    [section] = json.loads(path.read_text())["sections"]
    assert section["status"] == "passed" and section["result"]["scorer_size"] == "tiny"


def test_the_result_of_pytest_is_read() -> None:
    text = """<testsuites><testsuite><testcase name="a" time="1.5"/><testcase name="b" time="0"><skipped message="no GPU"/></testcase>
    <testcase name="c" time="0"><failure message="assert 1 == 2">long</failure></testcase></testsuite></testsuites>"""
    outcomes = read_junit(text)
    assert [row["outcome"] for row in outcomes.values()] == ["passed", "skipped", "failure"]
    assert outcomes["c"]["message"] == "assert 1 == 2"
    assert judge_tests(outcomes) == "failed" and judge_tests({}) == "failed"
    assert judge_tests({"b": outcomes["b"]}) == "skipped" and judge_tests({"a": outcomes["a"], "b": outcomes["b"]}) == "passed"


def test_judging_a_step() -> None:
    good, too_large = {"count_agrees": True}, {"error": "out of memory"}
    assert judge_step({"cells": [good, too_large]}) == "passed"
    assert judge_step({"cells": [good, {"error": "the loss is not finite"}]}) == "failed"
    assert judge_step({"cells": [{"count_agrees": False}]}) == "failed"
    assert judge_step({"cells": []}) == "failed"


def test_every_command_line_of_the_check_is_understood() -> None:
    for tiny in (False, True):
        for section in gpu_check.sections(tiny):
            _, module, *words = section.arguments
            if module == "benchmarks.step":
                config = step.parse_config(step.Config, words)
                assert config.measurement.random_weights and config.measurement.tiny is tiny
            elif module == "benchmarks.gpu_sections":
                assert words[0] in gpu_sections.SECTIONS
            else:
                assert module == "pytest" and (gpu_check.ROOT / next(word for word in words if word.endswith(".py"))).is_file()
