"""train_latent_scorer.py on a handful of pictures: what it learns, writes and says."""

import logging
import os
import signal
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from library.errors import UserError
from library.scorer_data import encoding
from library.scorer_training.trainer import PATIENCE
from library.scorer_training.validation import TABLE_SIGMAS, format_table
from library.scorers.io import load_scorer
from library.training.tracking import Tracker, read_metrics
from tests.helpers.processes import run_processes
from tests.helpers.tiny_scorer_run import make_workplace, pool, train, write_mixture


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("scorer"))


def test_it_learns_and_the_file_says_how_well(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(encoding, "encode_images", pool)
    marks = {"marks_worth": (0.8, 0.6, 0.9)}  # as if the scores were what another scorer says
    path = train(workplace, tmp_path, cache_dir=None, max_train_steps=40, train_batch_size=16, validate_every_n_steps=20, **marks)
    scorer = load_scorer(path)
    table, worth = scorer.spec.training["validation"], scorer.spec.training["worth"]
    assert [worth["srcc"], *worth["interval"]] == pytest.approx([table[0]["srcc"] * number for number in marks["marks_worth"]])
    assert [row["sigma"] for row in table] == list(TABLE_SIGMAS)
    assert table[0]["srcc"] > 0.8 and table[0]["srcc"] > table[-1]["srcc"]
    assert scorer.spec.noise_aware and scorer.spec.training["tasks"]["score"]["pictures"] == {"train": 72, "validation": 24}
    assert scorer.spec.std == pytest.approx(scorer.spec.head().std, rel=0.3)
    assert format_table(table) in capsys.readouterr().out
    assert [record["step"] for record in read_metrics(tmp_path / "scorer.metrics.jsonl")] == list(range(40))


def test_it_stops_when_validation_no_longer_improves(workplace: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    path = train(workplace, tmp_path, learning_rate=1e-12, max_train_steps=20, validate_every_n_steps=1)  # it learns nothing
    record = load_scorer(path).spec.training
    assert (record["best_step"], record["steps"]) == (1, 1 + PATIENCE)
    assert f"training ends after step {1 + PATIENCE}: {PATIENCE} validations in a row were no better than that of step 1" in caplog.text
    assert len(read_metrics(tmp_path / "scorer.metrics.jsonl")) == 1 + PATIENCE


def test_the_same_seed_gives_the_same_bits(workplace: Path, tmp_path: Path) -> None:
    first, second, other = (
        load_scorer(train(workplace, tmp_path / name, seed=seed, max_train_steps=3)) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    weights, again, different = (scorer.state_dict() for scorer in (first, second, other))
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert not all(torch.equal(weights[name], different[name]) for name in weights)
    assert first.spec.training["validation"] == second.spec.training["validation"]


def test_labels_first_and_a_backbone_to_start_from(workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = train(
        workplace, tmp_path / "a", pretrain_data_file=workplace / "ratings.csv", pretrain_steps=3, max_train_steps=2, output_name="bright"
    )
    pretraining = load_scorer(path).spec.training["pretraining"]
    assert {"sigma", "top1", "top5"} <= set(pretraining["validation_by_task"]["pretraining"][0]) and pretraining["steps"] == 3
    assert "TOP5" in capsys.readouterr().out
    assert [record["step"] for record in read_metrics(tmp_path / "a" / "bright.metrics.jsonl")] == list(range(5))

    still = {"learning_rate": 1e-12, "weight_decay": 0.0, "max_train_steps": 1}
    start = load_scorer(train(workplace, tmp_path / "b", backbone_weights=path.with_name("bright-backbone.safetensors"), **still))
    other = load_scorer(train(workplace, tmp_path / "c", **still))
    backbone = load_file(path.with_name("bright-backbone.safetensors"))
    assert all(torch.allclose(start.state_dict()[f"backbone.{name}"], tensor, atol=1e-5) for name, tensor in backbone.items())
    assert not torch.allclose(other.state_dict()["backbone.stem.weight"], backbone["stem.weight"], atol=1e-5)


@pytest.mark.parametrize("balancing", ["sum", "independent"])
def test_several_things_at_once_each_with_its_head(workplace: Path, tmp_path: Path, balancing: str) -> None:
    changes = [("weight = 0.5\n", "")] if balancing == "independent" else []  # which sums no losses
    mixture = write_mixture(workplace, tmp_path / "mixture.toml", *changes)
    path = train(workplace, tmp_path, train_data_file=None, dataset_config=mixture, balancing=balancing, max_train_steps=2)
    scorer = load_scorer(path)
    assert [head.name for head in scorer.spec.heads] == ["bright", "backdrop", "words", "pairs"]
    assert scorer.spec.score_head == "bright" and scorer.spec.head("backdrop").target_class == "dark"
    record = scorer.spec.training
    assert set(record["validation_by_task"]) == {"backdrop", "bright", "words", "pairs"} and "srcc" in record["validation"][0]
    assert record["tasks"]["bright"]["pictures"]["train"] == 144  # repeated
    assert record["optimizer"] == ("Lion" if balancing == "independent" else "AdamW")
    metrics = read_metrics(tmp_path / "scorer.metrics.jsonl")[-1]
    assert all(f"loss/{name}" in metrics for name in ("backdrop", "bright", "words", "pairs"))
    scores, uncertainty = scorer.score_and_uncertainty(torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(3))
    assert scores.shape == (3,) and (uncertainty == 0).all()


def test_an_ensemble_disagrees_and_says_so(workplace: Path, tmp_path: Path) -> None:
    scorer = load_scorer(train(workplace, tmp_path, head_members=4, max_train_steps=3))
    latents = torch.randn(5, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    scores, uncertainty = scorer.score_and_uncertainty(latents, torch.zeros(5))
    assert (uncertainty > 0).all() and torch.equal(scores, scorer(latents, torch.zeros(5)))


def test_a_transformer_first_fills_in_pictures_that_nobody_rated(workplace: Path, tmp_path: Path) -> None:
    settings = {
        "pretrain_data_file": workplace,
        "pretrain_criterion": "masked",
        "pretrain_steps": 30,
        "learning_rate": 3e-3,
        "max_train_steps": 1,
    }
    scorer = load_scorer(train(workplace, tmp_path, scorer_kind="latent_vit", validate_every_n_steps=30, **settings))
    pretraining = scorer.spec.training["pretraining"]
    assert pretraining["tasks"]["pretraining"]["criterion"] == "masked"
    assert sum(pretraining["tasks"]["pretraining"]["pictures"].values()) == 96
    losses = [record["loss/pretraining"] for record in read_metrics(tmp_path / "scorer.metrics.jsonl")[:30]]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    with pytest.raises(UserError, match="scorer_kind to latent_vit"):
        train(workplace, tmp_path / "resnet", **settings)
    with pytest.raises(UserError, match="give a folder"):
        train(workplace, tmp_path / "table", scorer_kind="latent_vit", **{**settings, "pretrain_data_file": workplace / "ratings.csv"})


def test_a_scorer_that_saw_no_noise_says_so(workplace: Path, tmp_path: Path) -> None:
    assert load_scorer(train(workplace, tmp_path, clean_fraction=1.0, max_train_steps=1)).spec.noise_aware is False


def test_a_picture_weighs_what_its_row_says(workplace: Path, tmp_path: Path) -> None:
    lines = (workplace / "ratings.csv").read_text(encoding="utf-8").splitlines()
    (workplace / "weighted.csv").write_text("\n".join([lines[0] + ",weight", *(line + ",3" for line in lines[1:])]), encoding="utf-8")
    settings = {"optimizer_type": "torch.optim.SGD", "weight_decay": 0.0, "max_grad_norm": 0, "max_train_steps": 1}
    runs = [("weighted.csv", 0.1), ("ratings.csv", 0.3), ("ratings.csv", 0.1)]
    heavier, faster, plain = (
        load_scorer(train(workplace, tmp_path / f"{name} {rate}", train_data_file=workplace / name, learning_rate=rate, **settings))
        for name, rate in runs
    )
    weights, others = faster.state_dict(), plain.state_dict()
    for name, weight in heavier.state_dict().items():
        torch.testing.assert_close(weight, weights[name], rtol=0, atol=1e-6)
    assert not torch.allclose(weights["backbone.stem.weight"], others["backbone.stem.weight"], atol=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="POSIX only")
def test_an_interrupted_run_saves_itself_and_goes_on_to_the_same_bits(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Once in the pretraining and once after it, with dropout, pairs, votes of several heads and what is saved on the way."""
    caplog.set_level(logging.INFO)
    settings = {
        "train_data_file": None,
        "dataset_config": write_mixture(workplace, tmp_path / "mixture.toml"),
        "pretrain_data_file": workplace / "ratings.csv",
        "pretrain_steps": 3,
        "scorer_args": ["dropout=0.1"],
        "head_members": 2,
        "validate_every_n_steps": 4,
        "save_every_n_steps": 7,
        "save_state": True,
    }
    train(workplace, tmp_path / "whole", **settings)
    log = Tracker.log

    def log_and_end(self: Tracker, metrics: dict, step: int) -> None:
        log(self, metrics, step)
        if step == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Tracker, "log", log_and_end)
    folder, parts = tmp_path / "parts", []
    for stop_after in (0, 4, -1):
        with pytest.raises(SystemExit) if stop_after >= 0 else nullcontext() as caught:
            train(workplace, folder, resume="auto", **settings)
        parts.append(sorted(path.name for path in folder.glob("scorer-step*")))
        assert caught is None or caught.value.code == 143
        assert not list(folder.glob(".*"))
    assert parts[0] == ["scorer-step00000002-state"]  # of the pretraining there is no scorer yet
    assert parts[1][1:] == ["scorer-step00000006-state", "scorer-step00000006.safetensors"]
    assert load_scorer(folder / "scorer-step00000006.safetensors").spec.training["steps"] == 3
    assert "the same command with --resume auto goes on from there" in caplog.text
    for name in ("scorer", "scorer-step00000007", "scorer-backbone"):
        whole, resumed = (load_file(tmp_path / own / f"{name}.safetensors") for own in ("whole", "parts"))
        assert all(torch.equal(resumed[key], tensor) for key, tensor in whole.items())
    whole, resumed = (load_scorer(tmp_path / own / "scorer.safetensors").spec for own in ("whole", "parts"))
    assert resumed == whole
    whole, resumed = (
        [record | {"time": 0} for record in read_metrics(tmp_path / own / "scorer.metrics.jsonl")] for own in ("whole", "parts")
    )
    assert resumed == whole

    with pytest.raises(UserError, match="was saved by another run: seed is 1 and was 0; give what it had, or --resume_with_changes"):
        train(workplace, folder, resume=folder / "scorer-state", seed=1, **settings)
    with pytest.raises(UserError, match="was saved after step 6 of 5 of the training; raise max_train_steps"):
        train(workplace, folder, resume=folder / "scorer-state", **{**settings, "max_train_steps": 5})
    train(
        workplace,
        folder,
        resume=folder / "scorer-state",
        resume_with_changes=True,
        **{**settings, "train_batch_size": 9, "max_train_steps": 7},
    )
    assert "resumed with a change: pictures in a step is 9 and was 8" in caplog.text


def test_other_settings_of_a_resumed_run_hold_and_are_named(workplace: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(workplace, tmp_path, save_state_on_train_end=True, validation_split=0.3)
    assert "validation_split 0.3 does nothing here: every picture's source says which split it is in" in caplog.messages
    longer = {"resume": tmp_path / "scorer-state", "max_train_steps": 7}
    train(workplace, tmp_path, **longer, validation_split=0.3)
    assert "other settings" not in caplog.text
    train(workplace, tmp_path, **longer, learning_rate=0.5, criterion="huber", lr_scheduler="constant_with_warmup", validation_split=0.3)
    (said,) = [text for text in caplog.messages if "with other settings" in text]
    assert all(change in said for change in ("learning_rate is 0.5 and was 0.001", "criterion is huber and was mse", "lr_scheduler is c"))
    assert said.count(" and was ") == 3 and read_metrics(tmp_path / "scorer.metrics.jsonl")[-1]["lr"] == 0.5


def write_few(workplace: Path, count: int) -> Path:
    rows = (workplace / "ratings.csv").read_text(encoding="utf-8").splitlines()[1 : count + 1]
    path = workplace / f"{count}.csv"
    path.write_text("\n".join(["path,score", *(",".join(row.split(",")[:2]) for row in rows)]), encoding="utf-8")
    return path


@pytest.mark.slow
def test_few_ratings_are_validated_by_folds_and_all_are_trained_on(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(encoding, "encode_images", pool)
    few = {"train_data_file": write_few(workplace, 12), "cache_dir": None, "validate_every_n_steps": 3, "learning_rate": 3e-3}
    path = train(workplace, tmp_path, max_train_steps=6, validation_split=0.3, **few)
    folds = "the 12 pictures of score are validated by 5 folds (validation_folds 0 has it read)"
    assert f"validation_split 0.3 does nothing here: {folds}" in caplog.messages
    record = load_scorer(path).spec.training
    steps, worth = record["folds"]["steps"], record["worth"]
    assert record["steps"] == record["best_step"] == steps and steps in (3, 6) and record["folds"]["folds"] == [5, 2]
    assert record["tasks"]["score"]["pictures"] == {"train": 12, "validation": 0} and worth["pictures"] == 12
    assert record["validation"][0]["srcc"] == worth["srcc"] and worth["interval"][0] < worth["srcc"] < worth["interval"][1]
    assert f"rank correlation {worth['srcc']:.2f} (" in caplog.text and "on 12 pictures that it never saw: " in caplog.text
    assert len(read_metrics(tmp_path / "scorer.metrics.jsonl")) == steps
    with pytest.raises(UserError, match="dataset score has 9 pictures that can be used, which are too few to learn from; rate 10 at least"):
        train(workplace, tmp_path / "9", **{**few, "train_data_file": write_few(workplace, 9)})


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="fork")
def test_a_batch_is_the_same_however_it_is_parted(workplace: Path, tmp_path: Path) -> None:
    """By two processes, which torchrun started on a machine without a GPU, or by accumulation: the weights of one process to 1e-6."""
    settings = {
        "optimizer_type": "torch.optim.SGD",
        "learning_rate": 0.1,
        "save_state_on_train_end": True,
        "head_members": 2,
        "cache_dir": None,
        "validate_every_n_steps": 6,  # the last step alone: of two that are nearly as good, the last digits would choose
    }
    whole = load_scorer(train(workplace, tmp_path / "whole", train_batch_size=8, **settings)).state_dict()
    path = train(workplace, tmp_path / "accumulated", train_batch_size=4, gradient_accumulation_steps=2, **settings)
    accumulated = load_scorer(path).state_dict()
    folder = tmp_path / "processes"
    run_processes(2, lambda: train(workplace, folder, train_batch_size=4, num_threads=1, **settings))
    processes = load_scorer(folder / "scorer.safetensors").state_dict()
    for parted in (accumulated, processes):
        for name, weight in whole.items():
            torch.testing.assert_close(parted[name], weight, rtol=0, atol=1e-6)
    assert len(list((folder / "latent_cache").glob("*/0032x0032*.safetensors"))) == 2  # each process encoded its share
    assert read_metrics(folder / "scorer.metrics.jsonl")[-1]["step"] == 5  # written by one of them
    # and a state of two processes is one that one process goes on from
    train(workplace, folder, train_batch_size=8, resume=folder / "scorer-state", **{**settings, "max_train_steps": 7})
