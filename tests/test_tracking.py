import errno
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from library.errors import UserError
from library.settings.shared import LoggingConfig
from library.training.tracking import Tracker, read_metrics, to_floats


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_line_a_step_in_the_order_given(tmp_path: Path):
    with Tracker(LoggingConfig(), tmp_path / "new" / "metrics.jsonl") as tracker:
        tracker.log({"loss": 0.5, "reward/mean": torch.tensor(0.25, requires_grad=True)}, step=0)
        tracker.log({"count": 3, "half": torch.tensor([0.125], dtype=torch.float16)}, step=1)
        assert [list(line) for line in lines(tmp_path / "new")] == [
            ["step", "time", "loss", "reward/mean"],
            ["step", "time", "count", "half"],
        ], "flushed before the tracker is closed"
    first, second = lines(tmp_path / "new")
    assert (first["step"], first["loss"], first["reward/mean"]) == (0, 0.5, 0.25)
    assert (second["step"], second["count"], second["half"]) == (1, 3.0, 0.125)


def test_what_json_cannot_say_is_null(tmp_path: Path):
    with Tracker(LoggingConfig(), tmp_path / "metrics.jsonl") as tracker:
        tracker.log({"a": math.nan, "b": torch.tensor(math.inf), "c": -math.inf, "d": 1.0}, step=0)
    (line,) = lines(tmp_path)
    assert (line["a"], line["b"], line["c"], line["d"]) == (None, None, None, 1.0)


def test_resuming_drops_the_steps_that_are_run_again(tmp_path: Path):
    with Tracker(LoggingConfig(), tmp_path / "metrics.jsonl") as tracker:
        for step in range(6):
            tracker.log({"loss": step}, step)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # a crash in the middle of a line
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 6
    with Tracker(LoggingConfig(), tmp_path / "metrics.jsonl", first_step=4) as tracker:
        tracker.log({"loss": 40}, 4)
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(0, 0), (1, 1), (2, 2), (3, 3), (4, 40)]
    with Tracker(LoggingConfig(), tmp_path / "metrics.jsonl") as tracker:
        tracker.log({"loss": 1}, 0)
    assert len(lines(tmp_path)) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_lines_that_cannot_be_written_are_lost_and_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    class Full:
        def write(self, content: bytes) -> None:
            real.write(content[:7])
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self) -> None: ...

    with Tracker(LoggingConfig(), tmp_path / "metrics.jsonl") as tracker:
        (sink,) = tracker._sinks
        tracker.log({"loss": 1}, 0)
        real, sink._file = sink._file, Full()
        tracker.log({"loss": 2}, 1)
        tracker.log({"loss": 3}, 2)
        sink._file = real  # somebody has made room
        tracker.log({"loss": 4}, 3)
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [0, 3]
    (said,) = [record.getMessage() for record in caplog.records]
    assert "No space left on device" in said


def test_lines_of_other_programs_are_passed_over_and_no_link_is_followed(tmp_path: Path):
    (tmp_path / "elsewhere").write_text('[1]\nnull\n{"a": 1}\n{"step": "x"}\n{"step": 0}\n{"step": true}\n\xff{{\n')
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.jsonl").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "out" / "metrics.tmp").symlink_to(tmp_path / "precious")
    with Tracker(LoggingConfig(), tmp_path / "out" / "metrics.jsonl", first_step=5) as tracker:
        tracker.log({"loss": 1}, 5)
    assert [line["step"] for line in read_metrics(tmp_path / "out" / "metrics.jsonl")] == [0, 5]
    assert (tmp_path / "elsewhere").read_text().startswith("[1]") and not (tmp_path / "precious").exists()
    with pytest.raises(UserError, match="cannot be read"):
        read_metrics(tmp_path)


def test_nothing_is_touched_before_there_is_a_first_line(tmp_path: Path):
    path, kept = tmp_path / "run.metrics.jsonl", tmp_path / "run-1.metrics.jsonl"
    path.write_text('{"step": 0, "loss": 5}\n')
    with Tracker(LoggingConfig(), path, begin=lambda: path.rename(kept)) as tracker:
        assert path.exists()
        for step in range(2):
            tracker.log({"loss": 1}, step)
    assert [len(read_metrics(other)) for other in (path, kept)] == [2, 1]


def test_resuming_without_a_file(tmp_path: Path):
    with Tracker(LoggingConfig(), tmp_path / "metrics.jsonl", first_step=4) as tracker:
        tracker.log({"loss": 1}, 4)
    assert [line["step"] for line in lines(tmp_path)] == [4]


def test_tensors_are_fetched_together(monkeypatch: pytest.MonkeyPatch):
    calls = []
    original = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: calls.append(1) or original(self))
    monkeypatch.setattr(torch.Tensor, "item", lambda self: pytest.fail("one wait for each tensor"))
    monkeypatch.setattr(torch.Tensor, "__float__", lambda self: pytest.fail("one wait for each tensor"))
    metrics = {"a": torch.tensor(1.0), "b": 2, "c": torch.tensor([[3]])}
    assert list(to_floats(metrics).items()) == [("a", 1.0), ("b", 2.0), ("c", 3.0)]
    assert len(calls) == 1


def test_the_progress_bar_shows_the_chosen_metrics(tmp_path: Path):
    with Tracker(LoggingConfig(), tmp_path / "metrics.jsonl") as tracker:
        bar = tracker.progress(total=10, initial=4, desc="train", show=("loss", "reward"))
        tracker.log({"loss": torch.tensor(0.25), "hidden": 1.0}, 4)
        bar.update()
        assert (bar.total, bar.n, bar.postfix) == (10, 5, "loss=0.25")
    assert bar.disable or bar.fp.closed or bar.pos <= 0  # closed with the tracker


def test_a_disabled_tracker_does_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with Tracker(LoggingConfig(log_with="all"), tmp_path / "out" / "metrics.jsonl", enabled=False) as tracker:
        bar = tracker.progress(total=2)
        tracker.log({"loss": 1.0}, 0)
        tracker.image("x", tmp_path / "missing.png", 0)
        bar.update()
    assert not (tmp_path / "out").exists()
    assert capsys.readouterr().err == ""


def test_tensorboard(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = LoggingConfig(logging_dir=tmp_path / "logs", log_args=("log_prefix=try-", "log_tracker_name=slider"))
    Image.new("RGB", (8, 4), "red").save(tmp_path / "red.png")
    with Tracker(config, tmp_path / "metrics.jsonl") as tracker:
        tracker.log({"loss": torch.tensor(0.5)}, 3)
        tracker.image("sample", tmp_path / "red.png", 3)
        tracker.image("sample", Image.new("L", (8, 4)), 4)
    (run,) = (tmp_path / "logs").iterdir()
    assert run.name.startswith("try-20")
    events = EventAccumulator(str(run / "slider"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(3, 0.5)]
    assert [(event.step, event.width, event.height) for event in events.Images("sample")] == [(3, 8, 4), (4, 8, 4)]
    assert lines(tmp_path)[0]["loss"] == 0.5


def test_tensorboard_writes_to_output_dir_unless_told_where(tmp_path: Path):
    with Tracker(LoggingConfig(log_with="tensorboard"), tmp_path / "metrics.jsonl") as tracker:
        tracker.log({"loss": 1.0}, 0)
    assert len(list((tmp_path / "logs").rglob("events.out.*"))) == 1


class FakeRun:
    def __init__(self) -> None:
        self.logged: list[tuple[dict, int]] = []
        self.finished = False

    def log(self, data: dict, step: int) -> None:
        self.logged.append((data, step))

    def finish(self) -> None:
        self.finished = True


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run, calls = FakeRun(), {}
    fake = SimpleNamespace(
        login=lambda key: calls.update(key=key),
        init=lambda **kwargs: calls.update(kwargs) or run,
        Image=lambda image: ("image", image.size),
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = LoggingConfig(log_with="wandb", log_args=("wandb_run_name=first", "wandb_api_key=hunter2"))
    with Tracker(config, tmp_path / "metrics.jsonl", settings={"seed": 3}) as tracker:
        tracker.log({"loss": 0.5}, 2)
        tracker.image("sample", Image.new("RGB", (8, 4)), 2)
    assert calls == {
        "key": "hunter2",
        "project": "leco_score",
        "name": "first",
        "config": {"seed": 3},
        "dir": str(tmp_path / "logs"),
    }
    assert run.logged == [({"loss": 0.5}, 2), ({"sample": ("image", (8, 4))}, 2)]
    assert run.finished
    assert "hunter2" not in (tmp_path / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    "log_with, module, package", [("wandb", "wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard", "tensorboard")]
)
def test_a_missing_tracker_names_its_package(log_with: str, module: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError) as caught:
        Tracker(LoggingConfig(log_with=log_with), tmp_path / "metrics.jsonl")
    assert str(caught.value).startswith(f"log_with = {log_with} needs a package (")
    assert str(caught.value).endswith(f"; try: pip install {package}")
