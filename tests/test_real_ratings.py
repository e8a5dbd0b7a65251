"""The benchmarks of real ratings: their table is read, and their cross-validation knows what can be known."""

import numpy as np
import torch
from PIL import Image
from torch import nn

from benchmarks.photographs import Opinions, read_oasis
from benchmarks.real_kinds import EVERY, MOMENTS, TinyVae, fitted, learning_curve, make_run, rating_tables, table
from benchmarks.real_ratings import cross_validated


def test_oasis_is_read_without_the_themes_that_are_left_out(tmp_path):
    header = ",Theme,Category,Source,Valence_mean,Valence_SD,Valence_N,Arousal_mean,Arousal_SD,Arousal_N"
    rows = [f"I{n},{name},Object,x,{n}.5,1,100,2,0.5,100" for n, name in enumerate(("Dog 1", "Nude woman 3", "Gun 2", "Crosswalk "))]
    (tmp_path / "OASIS.csv").write_bytes("\r".join([header, *rows]).encode())
    (tmp_path / "images").mkdir()
    for name in ("Dog 1", "Nude woman 3", "Gun 2", "Crosswalk "):
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / f"{name}.jpg")
    files, people = read_oasis(tmp_path)
    assert [file.stem.strip() for file in files] == ["Dog 1", "Crosswalk"]
    assert people["valence"].mean.tolist() == [0.5, 3.5] and people["arousal"].spread.tolist() == [0.5, 0.5]


def test_ratings_that_the_features_know_are_learned_and_others_are_not():
    draw = np.random.default_rng(0)
    features, luck = draw.normal(size=(2, 150, 3)).astype(np.float32)
    opinions = Opinions(features @ np.array([1.0, 0.5, 0.0]), np.ones(150))
    found = cross_validated({0.0: torch.from_numpy(features), 1.0: torch.from_numpy(luck)}, opinions, [opinions.mean], 40)
    assert found[0.0][0] > 0.99 and abs(found[1.0][0]) < 0.2
    one = cross_validated({0.0: torch.from_numpy(features)}, opinions, [opinions.of_one_person(0)], None)
    assert 0.5 < one[0.0][0] < 1


def test_a_kind_learns_one_persons_ratings_of_four_fifths_and_is_measured_by_the_mean_on_the_last(tmp_path):
    torch.manual_seed(0)
    greys, files = torch.linspace(10, 240, 40).int().tolist(), []
    for number, grey in enumerate(greys):
        files.append(tmp_path / f"{number}.png")
        Image.new("RGB", (64, 48), (grey, grey, grey)).save(files[-1])
    opinions = Opinions(np.linspace(1, 7, 40), np.full(40, 0.1))
    tables = list(rating_tables(tmp_path, files, opinions, 20))
    rows = [line.split(",")[1:] for line in tables[1].read_text().splitlines()[1:]]
    assert [split for _, split in rows] == ["train"] * 20 + ["validation"] * 8
    assert all(float(score).is_integer() for score, split in rows if split == "train")

    settings = {"vae": str(tmp_path), "resolution": "64,48", "output_dir": str(tmp_path), "train_data_file": str(tables[1])}
    vae = TinyVae(nn.Conv2d(3, 32, 8, stride=8))
    curve = learning_curve(make_run(vae, settings), EVERY)
    assert len(curve) == 1 and curve[0] > 0.8

    blind = settings | {"scorer_kind": "latent_vit"}
    teaching = {"pretrain_data_file": str(tmp_path), "pretrain_criterion": "masked", "pretrain_steps": 2}
    plain, taught, again = (
        nn.utils.parameters_to_vector(make_run(vae, own).scorer.backbone.parameters())
        for own in (blind, blind | teaching, blind | teaching | {"seed": 1})
    )
    assert not plain.equal(taught) and taught.equal(again)  # it learned to see once

    moments = fitted(torch.tensor(greys)[:, None].float(), opinions, 20)
    assert all(own[0] > 0.99 for own in moments)
    cases = [{"kind": kind, "score": "valence", "count": 20, "srcc": own} for kind, own in ((MOMENTS, moments), ("x", [curve] * 5))]
    lines = table(cases).splitlines()
    assert lines[2].startswith("| moments of the latents, ridge | valence | 20 | 1.00 ± 0.00 |") and lines[3].startswith(
        "| x | valence | 20 |"
    )
