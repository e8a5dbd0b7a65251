"""The benchmarks run on a tiny model on the CPU, and count and time what they say they do."""

import importlib
import itertools
import json
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import ROOT, compare, gpu_check, gpu_sections, objectives, run, step
from benchmarks.earlier import Tree, sharing
from benchmarks.gpu_check import Section, judge_section, judge_step
from benchmarks.meter import Meter, peak_resident
from benchmarks.random_models import random_model
from examples.shapes.scores import SCORES
from library.errors import UserError
from library.measuring.record import EvaluationRecord
from library.measuring.statistics import summarise_response
from library.objectives.estimator import ESTIMATORS
from library.objectives.score import ScoreConfig
from library.rollouts.config import RolloutConfig
from library.settings.cli import parse_config, read_config_file
from library.settings.options import options
from library.slider_training.setup import leco_score_config
from library.types import LossOutput

TINY = ["--random_weights", "sd1", "--tiny", "--scorer_size", "tiny"]
QUICK = ["--max_denoising_steps", "3", "--num_threads", "1"]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def tiny_step(*words: str) -> step.Step:
    given, settings = step.parse([*TINY, *QUICK, *words])
    return step.build_step(given, ["--train_batch_size", "2", *settings])[0]


@pytest.mark.slow
def test_every_combination_is_measured_and_written(tmp_path: Path) -> None:
    several = ["--gradient_checkpointing", "on", "--train_batch_size", "1", "2", "--warm_up_steps", "1", "--timed_steps", "1"]
    result = step.run(*step.parse([*TINY, *QUICK, *several, "--output", str(tmp_path / "result.json")]))
    cells = json.loads((tmp_path / "result.json").read_text())["cells"]
    assert [cell["batch_size"] for cell in cells] == [1, 2] and cells == json.loads(json.dumps(result["cells"]))
    for cell in cells:
        assert cell["count_agrees"] is True and "error" not in cell
        assert set(cell["part_seconds"]) == set(step.PARTS)
        assert all(seconds["median"] > 0 for seconds in cell["part_seconds"].values())
        assert cell["samples_per_second"] == pytest.approx(cell["batch_size"] / cell["step_seconds"]["median"])
        assert cell["unet_evaluations_per_sample"] == 5.0  # uncond, frozen, cond, and the backward as two
    assert step.table(result).count("belt batch") == 2


def test_the_trainers_own_defaults_are_measured() -> None:
    given, settings = step.parse([*TINY, *QUICK])
    assert given.train_batch_size == [RolloutConfig().batch_size]
    made = step.build_step(given, settings)[0]
    assert type(made.terms["score"].objective.estimator) is ESTIMATORS[ScoreConfig().score_estimator]  # type: ignore[attr-defined]
    assert made.batch_size == RolloutConfig().batch_size


def test_what_a_rollout_samples_counts_into_its_evaluations() -> None:
    found = step.measure(tiny_step("--score_estimator", "direct_align"), warm_up_steps=1, timed_steps=2)
    assert found["unet_evaluations_per_sample"] > 5.0


def test_a_wrong_count_is_noticed() -> None:
    measured = tiny_step()
    term = measured.terms["score"]

    def forgetful() -> LossOutput:
        measured.model.num_unet_evaluations -= 1
        return term()

    measured.terms["score"] = forgetful  # type: ignore[assignment]
    forgetful.weight = 1.0  # type: ignore[attr-defined]
    assert step.measure(measured, warm_up_steps=1, timed_steps=1)["count_agrees"] is False


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    measured = tiny_step()
    torch.nn.init.constant_(measured.network.loras[0].lora_up.weight, torch.nan)
    with pytest.raises(UserError, match="not finite"):
        step.measure(measured, warm_up_steps=1, timed_steps=1)


def test_xformers_that_is_not_used_is_not_measured_as_xformers() -> None:
    result = step.run(*step.parse([*TINY, *QUICK, "--xformers", "--train_batch_size", "1"]))
    assert "xformers cannot be used" in result["cells"][0]["error"]
    assert "xformers cannot be used" in step.table(result)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [(["--tiny"], "without random_weights"), ([*TINY, "--timed_steps", "0"], "timed_steps")],
)
def test_bad_options(words: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        step.parse(words)


def test_bad_settings_of_the_trainer_are_its_own_sentence() -> None:
    assert "did you mean" in step.run(*step.parse([*TINY, "--max_denoising_step", "3"]))["cells"][0]["error"]


@pytest.mark.parametrize(("family", "millions"), [("sd1", 859.5), ("sd2", 865.9), ("sdxl", 2567.5)])
def test_random_models_have_the_published_size(family: str, millions: float) -> None:
    """The U-Nets' published numbers of parameters; on the meta device nothing is allocated."""
    model = random_model(family, device="meta")
    assert sum(parameter.numel() for parameter in model.unet.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)
    assert not any(parameter.requires_grad for parameter in model.unet.parameters())


def test_a_meter_gives_to_the_innermost_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "perf_counter", itertools.count().__next__)  # every look at the clock is a second later
    meter = Meter("outside", divisible=("outside", "whole"))
    with meter.part("whole"), meter.part("inner"), meter.part("ignored"):
        for _ in range(5):
            time.perf_counter()
    with meter.part("inner"):
        meter.current.decoded += 3
    meter.close()
    assert set(meter.parts) == {"outside", "whole", "inner"}
    assert meter.parts["inner"].seconds > 5 > meter.parts["whole"].seconds and meter.parts["inner"].decoded == 3


def test_the_peak_is_that_of_a_part() -> None:
    peak_resident()
    large = torch.ones(2**26)  # 256 MiB
    with_it = peak_resident()
    del large
    peak_resident()
    assert with_it - peak_resident() > 2**27


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="fork")
def test_a_whole_run_is_counted_by_part(workplace: Path) -> None:
    """In a process of its own, as the command does it, but forked: what the counts must be is known from the settings."""
    words = ["--pretrained_model_name_or_path", str(workplace / "model"), "--scorer", str(workplace / "scorer.safetensors")]
    words += [
        "--prompts_file",
        str(workplace / "prompts.txt"),
        "--train_batch_size",
        "2",
        "--max_denoising_steps",
        "3",
        "--resolution",
        "64",
    ]
    words += ["--max_train_steps", "2", "--evaluate_every_n_steps", "2", "--early_stop_gain", ""]
    words += ["--calibrate", "off", "--sample_every_n_steps", "2", "--num_threads", "1"]
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        row = pool.submit(run.measure, run.Case("tiny", tuple(words))).result()
    parts = row["parts"]
    assert list(parts) == list(run.PARTS) and (row["updates"], row["graded_samples"]) == (2, 4)
    assert parts[run.LOAD]["evaluations"] == parts[run.SAVE]["evaluations"] == 0
    assert parts[run.PREVIEW]["evaluations"] == 2 * 3 * 3 * 2 and parts[run.PREVIEW]["decoded"] == 6  # prompts x weights x steps x branches
    assert parts[run.TRAIN]["unet_rows_with_gradient"] == 4 and parts[run.TRAIN]["decoded"] == 0
    assert parts[run.TRAIN]["evaluations"] >= 4 * 5 and parts[run.TRAIN]["scored"] >= 4
    assert parts[run.OBSERVE]["evaluations"] > 0 and parts[run.OBSERVE]["unet_rows_with_gradient"] == 0
    assert row["evaluations"] == sum(part["evaluations"] for part in parts.values())
    assert row["evaluations_a_sample"] == row["evaluations"] / 4
    assert all(part["peak_resident"] > 2**20 for name, part in parts.items() if part["seconds"] > 0)
    assert f"| {run.PREVIEW} | 36 |" in run.table([row])


@pytest.mark.parametrize(("name", "family"), [("sd15", "sd1"), ("sdxl", "sdxl")])
def test_the_examples_counts_are_of_their_own_settings(name: str, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "FOLDER", tmp_path)
    config = parse_config(leco_score_config(), list(run.tiny_case(name, family).words))
    example = read_config_file(ROOT / "examples" / f"{name}_slider.toml", options(leco_score_config()))
    assert config.training.max_train_steps == example["max_train_steps"] and config.rollout.train_batch_size == example["train_batch_size"]
    assert config.monitor.sample_every_n_steps == example["sample_every_n_steps"] and config.rollout.resolution == (64, 64)
    assert config.model.load().spec.family == family


FAKE_LECO = """
from types import SimpleNamespace as RootConfig, SimpleNamespace as PromptSettings
import library, torch, train_util, wandb
assert library.WHOSE == "theirs"
model_util = RootConfig()
class LoRANetwork: pass
def train(config, prompts):
    unet, side, batch = model_util.load_models("")[2], prompts[0].resolution // 8, prompts[0].batch_size
    text = train_util.encode_prompts(None, None, ["a"]).repeat(batch, 1, 1)
    schedule = train_util.get_lr_scheduler()
    for _ in range(config.train["iterations"]):
        steps = torch.randint(1, 4, (1,)).item()
        with torch.no_grad():
            for _ in range(steps):
                unet(torch.zeros(2 * batch, 4, side, side), 500, text.repeat(2, 1, 1))
        unet(torch.zeros(batch, 4, side, side).requires_grad_(), 500, text).sample.sum().backward()
        schedule.step()
"""


@pytest.mark.slow
def test_another_programs_update_is_counted_and_timed_in_turn_with_ours_and_one_that_does_not_run_is_a_line(tmp_path: Path) -> None:
    unet: Any = random_model("sd1", tiny=True).unet
    unet.register_to_config(sample_size=8)
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "__init__.py").write_text("WHOSE = 'theirs'", encoding="utf-8")
    (tmp_path / "train_lora.py").write_text(FAKE_LECO, encoding="utf-8")
    (tmp_path / "train_util.py").write_text("", encoding="utf-8")
    ours, errors, randint, steps = sys.modules["library"], sys.modules["library.errors"], torch.randint, []

    def step() -> None:
        """Where ours runs, all is ours."""
        assert sys.modules["library"] is ours and importlib.import_module("library.errors") is errors and torch.randint is randint
        steps.append(time.process_time())

    def row(title: str, equal: bool) -> dict[str, Any]:
        found = compare.theirs(compare.PROGRAMS[title], tmp_path, sharing(unet), equal, step, pairs=2)
        return {"program": title, "width": "tiny", "equal": equal, "run_samples": 10, "forward_flops": {"unet": 1000}, **found}

    found, broken = row("p1atdev/LECO", False), row("ai-toolkit ConceptSliderTrainer", False)
    assert (found["samples"], found["rows"]) == (1, {"forward": 2 * 2 + 1, "with_gradient": 1}) and found["flops"] > 0
    assert len(found["seconds"]["theirs"]) == len(found["seconds"]["ours"]) == len(steps) == 2 and min(found["seconds"]["theirs"]) > 0
    assert broken["error"].startswith("does not run here: ModuleNotFoundError")
    assert sys.modules["library"] is ours and "train_lora" not in sys.modules and str(tmp_path) not in sys.path
    larger = row("p1atdev/LECO", True)
    assert larger["samples"] == 4 and larger["flops"] == pytest.approx(4 * found["flops"], rel=0.01)
    seconds = {"theirs": [2.0, 4.0], "ours": [1.0, 1.0]}  # one sample of theirs beside two of ours
    own = {**found, "program": "LECO score", "flops": 8000, "samples": 2, "seconds": {}, "beside": 60.0}
    text = compare.table([own, {**found, "flops": 12000, "seconds": seconds}, broken])
    assert "| LECO score | 2 | 2.5 | 0.5 | 4.0 | 1 x | 10 | 0.1 | 1 x | 1 |" in text
    assert "| p1atdev/LECO | 1 | 5.0 | 1.0 | 12.0 | 3 x | 10 | 0.1 | 1.2 x | 6 x (5 to 7) |" in text and "does not run here" in text


def test_what_a_run_costs_beside_its_training_is_told_in_forwards() -> None:
    part = {"evaluations": 100, "decoded": 4, "encoded": 6}
    run = {"parts": {"train": part, "measure while training": part, "save": dict.fromkeys(part, 0)}}
    assert compare.beside(run, {"unet": 10, "decoded": 20, "encoded": 5}) == 100 + 4 * 2 + 6 / 2


@pytest.mark.parametrize("name", ["mfu", "optimizers", "scorer"])
def test_sections(name: str) -> None:
    result = json.loads(json.dumps(gpu_sections.SECTIONS[name](torch.device("cpu"), True)))
    assert judge_section(result) == "passed"


def test_attention_is_skipped_where_xformers_cannot_be_had() -> None:
    assert judge_section(gpu_sections.attention(torch.device("cpu"), True)) == "skipped"


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


@pytest.mark.slow
def test_the_command_runs_a_section_in_a_process_of_its_own_and_needs_no_more_than_the_requirements(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every package of requirements-test.txt out of reach."""
    hidden = [line.split(">")[0].split("[")[0] for line in (ROOT / "requirements-test.txt").read_text().splitlines() if line[0] != "#"]
    blocked = {name.replace("-", "_"): None for name in hidden} | {"xdist": None}
    assert "pytest" in blocked and "peft" in blocked
    (tmp_path / "sitecustomize.py").write_text(f"import sys; sys.modules.update({blocked!r})\n", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert gpu_check.main(["--device", "cpu", "--tiny", "--sections", "scorer", "--output_dir", str(tmp_path)]) == 0
    [path] = tmp_path.glob("gpu_cpu_*.json")
    [section] = json.loads(path.read_text())["sections"]
    assert (section["name"], section["status"], section["result"]["scorer_size"]) == ("scorer", "passed", "tiny")


def test_without_pytest_the_cuda_tests_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytest", None)
    result = gpu_sections.tests(torch.device("cpu"), True)
    assert judge_section(result) == "skipped" and "requirements-test.txt" in result["skipped"]


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
                given, settings = step.parse(words)
                assert given.random_weights and given.tiny is tiny
                config = parse_config(leco_score_config(), ["--pretrained_model_name_or_path", "random", *settings])
                assert config.training.torch_compile is (section.name == "torch_compile")
            else:
                assert module == "benchmarks.gpu_sections" and words[0] in gpu_sections.SECTIONS


def test_packages_of_an_earlier_checkout_are_in_force_while_it_is_active(tmp_path: Path) -> None:
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "__init__.py").write_text("whose = 'theirs'\n")
    tree, ours = Tree(tmp_path), sys.modules["library.types"]
    with tree.active():
        assert importlib.import_module("library").whose == "theirs" and "library.types" not in sys.modules
    assert sys.modules["library.types"] is ours and not hasattr(sys.modules["library"], "whose")
    assert tree.modules["library"].whose == "theirs" and str(tmp_path) not in sys.path


def test_copies_share_their_weights() -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(2, 2))
    copied = sharing(layer)
    assert copied[0] is not layer[0] and copied[0].weight is layer[0].weight  # type: ignore[index]


def test_an_arm_is_measured_where_its_budget_is_spent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training of 60 updates at 40 evaluations each, whose gain is 2 for each weight; size moves half as much, captions are kept."""
    made = []

    def slider(name: str, **settings: Any) -> Path:
        made.append(settings)
        lines = [json.dumps({"step": step, "unet_evaluations": 40 * (step + 1)}) for step in range(60)]
        (tmp_path / "slider.metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return tmp_path / "slider.safetensors"

    def measure(path: Path, *, weights: tuple[float, ...], count: int, seeds: int = 2, judge_of: str | None = None) -> EvaluationRecord:
        at = np.array(sorted({0.0, *weights}))
        base = np.random.default_rng(0).standard_normal((count, seeds, 1))
        base = (base - base.mean(1, keepdims=True)) / base.std(1, ddof=1, keepdims=True)
        values = {name: base + at * gain for name, gain in {"brightness": 2.0, "size": 1.0, "judge": 2.0}.items()}
        values |= {name: base + 0 * at for name in SCORES if name not in values} | {"caption_obeyed": np.ones_like(base + at)}
        rng = np.random.default_rng(0)
        responses = {name: summarise_response(name, "judge", own, at.tolist(), rng) for name, own in values.items()}
        shown = {"prompts": tuple(map(str, range(count))), "seeds": (), "statistics": {"pixel_diversity": tuple(1.0 for _ in at)}}
        return EvaluationRecord(name=path.stem, multipliers=tuple(at.tolist()), responses=responses, **shown)

    monkeypatch.setattr(objectives, "slider", slider)
    monkeypatch.setattr(objectives, "measure", measure)
    monkeypatch.setattr(objectives, "SCORERS", {"scorer": lambda score: Path(f"{score}.safetensors")})
    found = objectives.run("brightness", "x0 + hinge", {"score_estimator": "x0"}, seed=1, budget=1920)
    assert made[0]["scorer"] == ["brightness.safetensors"] and made[0]["max_train_steps"] == 60 and made[0]["score_estimator"] == "x0"
    assert (found["updates"], found["evaluations"]) == (40, 1600)  # the last file whose evaluations are within the budget
    assert [spent for spent, _ in found["curve"]] == [0, 400, 800, 1200, 1600] and found["curve"][1][1] == pytest.approx(2)
    row = objectives.row("x0 + hinge", [found, found])
    assert row["true +1"][0] == pytest.approx(2) and row["evaluations to +1"] == pytest.approx(200) and row["captions"] == [1, 1, 1]
    assert row["side effects"] == pytest.approx([0.5 / (len(SCORES) - 1) ** 0.5] * 3)  # of size, where brightness has moved by 1
    assert "| x0 + hinge | -2.00 [-2.00, -2.00] | +2.00 [+2.00, +2.00] |" in objectives.markdown([row])
    assert objectives.crossing([(0.0, 0.0), (10.0, 0.5)], 1.0) is None
