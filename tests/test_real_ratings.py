"""The benchmark of real ratings: its table is read, and its cross-validation knows what can be known."""

import numpy as np
import torch
from PIL import Image

from benchmarks.photographs import Opinions, read_oasis
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
