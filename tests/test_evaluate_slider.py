"""The script as a person runs it: files in, files out, and one sentence for what is wrong."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from library.errors import UserError
from library.scorers.base import SCORER_KINDS, ScorerSpec, build_scorer
from library.scorers.io import save_scorer
from networks.lora import create_network
from tests.helpers.tiny_models import save_folder, tiny_model
from tools import evaluate_slider

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tiny model, two sliders, a scorer and prompts on disk."""
    folder = tmp_path_factory.mktemp("slider")
    model = tiny_model()
    save_folder(model, folder / "model")
    for seed, name in enumerate(["first", "second"]):
        network = create_network(1.0, 4, 4.0, model.vae, None, model.unet, generator=torch.Generator().manual_seed(seed))
        for key, parameter in network.named_parameters():
            if "lora_up" in key:
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(seed))
        network.save_weights(folder / f"{name}.safetensors")
    architecture = SCORER_KINDS["latent_resnet"].preset("tiny") | {"in_channels": 4}
    torch.manual_seed(0)
    scorer = build_scorer(ScorerSpec(kind="latent_resnet", architecture=architecture, vae=model.vae_fingerprint()))
    save_scorer(folder / "scorer.safetensors", scorer)
    (folder / "prompts.txt").write_text("a cat\na dog --w 96\na star\n")
    (folder / "judge.py").write_text("def brightness(pixels):\n    return pixels.mean((1, 2, 3))\n")
    return folder


def arguments(files: Path, output_dir: Path, **changes: list[str]) -> list[str]:
    options = {
        "pretrained_model_name_or_path": [str(files / "model")],
        "network_weights": [str(files / "first.safetensors")],
        "scorer": [str(files / "scorer.safetensors")],
        "judges": [f"{files / 'judge.py'}:brightness"],
        "prompts_file": [str(files / "prompts.txt")],
        "num_prompts": ["2"],
        "seeds_per_prompt": ["2"],
        "multipliers": ["-1", "1"],
        "num_steps": ["2"],
        "num_threads": ["1"],
        "output_dir": [str(output_dir)],
    } | changes
    return [word for name, words in options.items() for word in (f"--{name}", *words)]


def run(monkeypatch, words: list[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate_slider.py", *words])
    evaluate_slider.run_main(evaluate_slider.main)


def test_two_sliders_side_by_side(files, tmp_path, monkeypatch, capsys):
    both = [str(files / "first.safetensors"), str(files / "second.safetensors")]
    run(monkeypatch, arguments(files, tmp_path, network_weights=both))
    assert {path.name for path in tmp_path.iterdir()} == {
        "evaluation.json",
        "curve.png",
        "grid_first.png",
        "grid_second.png",
        "report.html",
        *(f"{name}{ending}" for name in ("first", "second") for ending in (".json", ".metadata.json", ".preview.png")),
    }
    first, second = json.loads((tmp_path / "evaluation.json").read_text())["sliders"]
    assert (first["name"], second["name"]) == ("first", "second") and first["multipliers"] == [-1, 0, 1]
    assert first["seeds"] == [[0, 1], [2, 3]] and set(first["responses"]) == {"scorer", "brightness"}
    values = {slider["name"]: torch.tensor(slider["responses"]["brightness"]["values"]) for slider in (first, second)}
    torch.testing.assert_close(values["first"][:, :, 1], values["second"][:, :, 1])  # the base model: the first LoRA was taken off
    assert (values["first"] - values["second"]).abs().max() > 1e-4
    printed = capsys.readouterr().out
    assert "training score, std" in printed and str(tmp_path / "report.html") in printed


def test_steps_by_a_pattern_with_a_scorer_as_judge_beyond_weight_1(files, tmp_path, monkeypatch, capsys):
    steps = tmp_path / "steps"
    steps.mkdir()
    for step, source in ((40, "first"), (9, "second")):
        (steps / f"tiny-step{step}.safetensors").write_bytes((files / f"{source}.safetensors").read_bytes())
    (tmp_path / "other.safetensors").write_bytes((files / "scorer.safetensors").read_bytes())
    changes = {
        "network_weights": [str(steps / "tiny-step*.safetensors")],
        "judge_scorers": [str(tmp_path / "other.safetensors")],
        "judges": [],
        "multipliers": ["-1", "1", "2"],
        "num_prompts": ["1"],
        "num_grid_prompts": ["1"],
        "title": ["My slider"],
    }
    run(monkeypatch, arguments(files, tmp_path / "out", **changes))
    content = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    early, late = content["sliders"]
    assert (early["name"], late["name"]) == ("tiny-step9", "tiny-step40") and late["multipliers"] == [-1, 0, 1, 2]
    assert late["responses"]["other"]["role"] == "judge" and late["responses"]["scorer"]["role"] == "scorer"
    assert late["responses"]["other"]["values"] == late["responses"]["scorer"]["values"]  # it is the same file
    assert late["summary"]["hack_index"] == pytest.approx(0, abs=1e-6) and len(late["per_prompt"]) == 1
    difference = content["comparison"]["gain_differences_std"]["tiny-step40"]["scorer"][3][0]
    gains = [slider["responses"]["scorer"]["gains_std"][3][0] for slider in (early, late)]
    assert content["comparison"]["against"] == "tiny-step9" and difference == pytest.approx(gains[1] - gains[0], abs=1e-4)
    report = (tmp_path / "out" / "report.html").read_text()
    assert "<h1>My slider</h1>" in report and "Side by side" in report
    assert "tiny-step40 - tiny-step9, scorer: " in capsys.readouterr().out


def test_what_a_slider_says_of_itself_is_in_the_report(files, tmp_path, monkeypatch):
    metadata = {"ss_leco_scorer": '["bright.safetensors"]', "modelspec.description": "Weight 1 is strong.", "ss_secret": "no"}
    save_file(load_file(files / "first.safetensors"), tmp_path / "told.safetensors", metadata)
    changes = {"network_weights": [str(tmp_path / "told.safetensors")], "num_prompts": ["1"], "multipliers": ["1"]}
    run(monkeypatch, arguments(files, tmp_path / "out", **changes))
    (slider,) = json.loads((tmp_path / "out" / "evaluation.json").read_text())["sliders"]
    assert slider["origin"] == {"scorer": "bright.safetensors", "what it promises": "Weight 1 is strong."}
    report = (tmp_path / "out" / "report.html").read_text()
    assert "Weight 1 is strong." in report and "ss_secret" not in report


def test_a_loha_in_a_pickle_is_measured_also_with_other_samplings_and_an_empty_lora_is_told_so(files, tmp_path, monkeypatch, capsys):
    """The LoHa is the first slider (rank 4) written as two factors of which the second is a matrix of ones."""
    first, loha = load_file(files / "first.safetensors"), {}
    for name in {key.partition(".")[0] for key in first}:
        down, up = first[f"{name}.lora_down.weight"].flatten(1), first[f"{name}.lora_up.weight"].flatten(1)
        rows, columns = torch.zeros(len(up), 4), torch.zeros(4, down.shape[1])
        rows[:, 0], columns[0] = 1, 1
        loha |= {f"{name}.hada_w1_a": up, f"{name}.hada_w1_b": down, f"{name}.hada_w2_a": rows, f"{name}.hada_w2_b": columns}
    torch.save(loha, tmp_path / "loha.pt")
    save_file({key: value * ("lora_up" not in key) for key, value in first.items()}, tmp_path / "empty.safetensors")
    sliders = [str(files / "first.safetensors"), str(tmp_path / "loha.pt"), str(tmp_path / "empty.safetensors")]
    changes = {"network_weights": sliders, "num_prompts": ["1"], "multipliers": ["1"], "also": ["guidance_scale=1", "num_steps=3"]}
    run(monkeypatch, arguments(files, tmp_path / "out", **changes))
    one, two, empty = json.loads((tmp_path / "out" / "evaluation.json").read_text())["sliders"]
    for there in (lambda slider: slider, lambda slider: slider["elsewhere"][0], lambda slider: slider["elsewhere"][1]):
        ours, theirs = (torch.tensor(there(slider)["responses"]["brightness"]["values"]) for slider in (one, two))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)  # float32 in another order, through two or three steps
    assert [other["name"] for other in one["elsewhere"]] == ["guidance_scale 1", "num_steps 3"]
    assert [other["settings"]["num_steps"] for other in one["elsewhere"]] == [2, 3]
    output = capsys.readouterr().out
    assert output.count("with guidance_scale 1: scorer ") == 3 and output.count("This LoRA changes nothing") == 1
    assert empty["summary"]["recommended_weight"] is None
    card = json.loads((tmp_path / "out" / "empty.json").read_text())
    assert card["preferred weight"] == 0.01 and "This LoRA changes nothing" in card["notes"]
    assert "with num_steps 3: " in json.loads((tmp_path / "out" / "first.json").read_text())["notes"]
    assert "Sampled otherwise" in (tmp_path / "out" / "report.html").read_text()


def test_patterns_are_sorted_by_number_and_name_each_file_once(tmp_path):
    for name in ("a-step10", "a-step9", "a", "b-step1"):
        (tmp_path / f"{name}.safetensors").touch()
    found = evaluate_slider.expand([str(tmp_path / "a.safetensors"), str(tmp_path / "a*.safetensors")])
    assert [path.stem for path in found] == ["a", "a-step9", "a-step10"]


def test_sliders_are_named_by_what_tells_them_apart():
    names = evaluate_slider.slider_names([Path("/runs/a/bright/x.safetensors"), Path("/runs/b/bright/x.safetensors")])
    assert names == ["a/bright/x", "b/bright/x"]
    assert evaluate_slider.slider_names([Path("x-step1.safetensors"), Path("x.safetensors")]) == ["x-step1", "x"]
    with pytest.raises(UserError, match="twice"):
        evaluate_slider.slider_names([Path("x.safetensors"), Path("./x.safetensors")])


def test_config_file_alone_is_enough(files, tmp_path, monkeypatch, capsys):
    words = arguments(files, tmp_path / "out")
    toml = tmp_path / "evaluation.toml"
    settings = {
        "pretrained_model_name_or_path": str(files / "model"),
        "network_weights": [str(files / "first.safetensors")],
        "judges": [f"{files / 'judge.py'}:brightness"],
        "prompts_file": str(files / "prompts.txt"),
        "seeds_per_prompt": 2,
        "num_prompts": 1,
        "num_steps": 1,
        "num_threads": 1,
        "multipliers": [1.0],
        "output_dir": str(tmp_path / "out"),
    }
    assert {f"--{name}" for name in settings} <= set(words)
    toml.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items()))
    run(monkeypatch, ["--config_file", str(toml)])
    assert (tmp_path / "out" / "grid.png").is_file() and "report.html" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network_weights": ["missing.safetensors"]}, "missing.safetensors does not exist"),
        ({"prompts_file": ["missing.txt"]}, "missing.txt does not exist"),
        ({"judges": ["nowhere:function"]}, "no module 'nowhere'"),
        ({"judges": ["examples.shapes.scores:size"] * 2}, "is called 'size' as another judge"),
        ({"multipliers": ["0"]}, "no weight but 0"),
        ({"seeds_per_prompt": ["1"]}, "seeds_per_prompt"),
        ({"resolution": ["100"]}, "multiples of 8"),
        ({"network_weights": []}, "network_weights"),
        ({"network_weights": ["nothing-*.safetensors"]}, "nothing-*.safetensors does not exist"),
        ({"guidance_rescale": ["1.5"]}, "between 0 and 1"),
        ({"also": ["guidance=3"]}, "'guidance=3' is no way of sampling; give guidance_scale, num_steps or sampler"),
        ({"also": ["sampler=best"]}, "samplers are ddim"),
        ({"also": ["num_steps="]}, "'num_steps=' is no way of sampling"),
    ],
)
def test_bad_input_ends_with_one_sentence_and_writes_nothing(files, tmp_path, refused, changes, message):
    assert message in refused(evaluate_slider.main, *arguments(files, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_a_score_that_is_no_number_is_one_sentence(files, tmp_path, refused):
    path = tmp_path / "broken.safetensors"
    weights = {name: torch.full_like(weight, torch.nan) for name, weight in load_file(files / "scorer.safetensors").items()}
    with safe_open(files / "scorer.safetensors", "pt") as file:
        save_file(weights, path, file.metadata())
    sentence = refused(evaluate_slider.main, *arguments(files, tmp_path / "out", scorer=[str(path)]))
    assert "first: broken is not finite at weight -1; the model" in sentence


def test_a_scorer_for_another_vae_is_refused(files, tmp_path, refused):
    other = tiny_model(seed=5)
    architecture = SCORER_KINDS["latent_resnet"].preset("tiny") | {"in_channels": 4}
    save_scorer(
        tmp_path / "scorer.safetensors",
        build_scorer(ScorerSpec(kind="latent_resnet", architecture=architecture, vae=other.vae_fingerprint())),
    )
    words = arguments(files, tmp_path / "out", scorer=[str(tmp_path / "scorer.safetensors")])
    assert "another VAE" in refused(evaluate_slider.main, *words) and not (tmp_path / "out").exists()
