"""Scorers: every registered kind keeps the contract, survives its file, and is refused where it does not belong."""

import dataclasses
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.errors import UserError
from library.models.vae import VaeFingerprint
from library.scorer_training.setup import default_size
from library.scorers.base import SCORER_KINDS, BackboneScorer, Scorer, ScorerSpec, build_scorer
from library.scorers.conditioning import noise_angle
from library.scorers.heads import HeadSpec
from library.scorers.io import (
    FORMAT_KEY,
    SPEC_KEY,
    check_scorer_fits,
    load_backbone_weights,
    load_scorer,
    save_backbone,
    save_scorer,
)
from library.scorers.judges import load_judge
from tests.helpers.scorers import VAE

OTHER_VAE = VaeFingerprint(scaling_factor=0.13025, probe=(0.7, 0.2, -0.3))
# Those that begin with random weights at a size "tiny"; the others have files of tests of their own.
RANDOM_KINDS = [kind for kind, backbone in SCORER_KINDS.items() if "tiny" in backbone.presets]


def make_scorer(kind: str = "latent_resnet", seed: int = 0, **changes: float) -> BackboneScorer:
    torch.manual_seed(seed)
    architecture = {"in_channels": 4, **SCORER_KINDS[kind].preset("tiny")}
    spec = ScorerSpec(kind=kind, architecture=architecture, vae=VAE, training={"steps": 3})
    scorer = build_scorer(dataclasses.replace(spec, **changes))
    assert isinstance(scorer, BackboneScorer)
    return scorer.eval()


def some_latents(rows: int = 3, height: int = 8, width: int = 8) -> torch.Tensor:
    return torch.randn(rows, 4, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", RANDOM_KINDS)
def test_one_score_per_picture_in_float32(kind: str) -> None:
    scores = make_scorer(kind)(some_latents(), torch.tensor([0.0, 1.0, 10.0]))
    assert scores.shape == (3,) and scores.dtype == torch.float32 and scores.isfinite().all() and scores.unique().numel() == 3


@pytest.mark.parametrize("kind", RANDOM_KINDS)
def test_gradient_equals_finite_difference(kind: str) -> None:
    scorer = make_scorer(kind).double()
    latents, sigmas = some_latents(1).double().requires_grad_(), torch.tensor([0.5]).double()
    (gradient,) = torch.autograd.grad(scorer(latents, sigmas).sum(), latents)
    direction = gradient / gradient.norm()
    step = 1e-2  # the result is float32 by contract
    difference = (scorer(latents + step * direction, sigmas) - scorer(latents - step * direction, sigmas)) / (2 * step)
    assert gradient.norm() > 1e-3
    torch.testing.assert_close(difference.double(), gradient.norm().view(1), rtol=2e-2, atol=0)


def test_mean_and_std_give_the_scores_own_units() -> None:
    plain, scaled = make_scorer(), make_scorer(heads=(HeadSpec(mean=5.0, std=2.0),))
    latents, sigmas = some_latents(), torch.zeros(3)
    torch.testing.assert_close(scaled(latents, sigmas), plain(latents, sigmas) * 2 + 5)


def test_noise_angle_is_bounded_and_monotone() -> None:
    angles = noise_angle(torch.tensor([0.0, 1.0, 14.6, float("inf")]))
    torch.testing.assert_close(angles[[0, 1, 3]], torch.tensor([0.0, 500.0, 1000.0]))
    assert (angles.diff() > 0).all()


@pytest.mark.parametrize(("latents", "sigmas"), [(torch.zeros(4, 8, 8), torch.zeros(4)), (torch.zeros(2, 4, 8, 8), torch.zeros(1))])
def test_wrong_shapes_are_refused(latents: torch.Tensor, sigmas: torch.Tensor) -> None:
    with pytest.raises(AssertionError):
        make_scorer()(latents, sigmas)


def test_a_scorer_that_uses_the_prompt_must_be_given_one() -> None:
    with pytest.raises(AssertionError, match="needs the prompts"):
        make_scorer(uses_prompt=True)(some_latents(), torch.zeros(3))


@pytest.mark.parametrize("kind", RANDOM_KINDS)
@pytest.mark.parametrize("size", ["tiny", "base"])
def test_every_kind_has_these_sizes(kind: str, size: str) -> None:
    with torch.device("meta"):
        backbone = SCORER_KINDS[kind](in_channels=4, **SCORER_KINDS[kind].preset(size))
    parameters = sum(parameter.numel() for parameter in backbone.parameters())
    low, high = {"tiny": (3e5, 6e5), "base": (1e7, 2.5e7)}[size]
    assert low <= parameters <= high


@pytest.mark.parametrize(("side", "size"), [(8, "tiny"), (16, "tiny"), (24, "small"), (32, "small"), (64, "base"), (128, "base")])
def test_the_size_that_nobody_set_follows_the_latents(side: int, size: str) -> None:
    assert default_size(SCORER_KINDS["latent_resnet"], side**2) == size


def test_unknown_kind_and_size_are_named() -> None:
    with pytest.raises(UserError, match="latent_resnet"):
        SCORER_KINDS["resnet"]
    with pytest.raises(UserError, match="tiny"):
        SCORER_KINDS["latent_resnet"].preset("huge")


# -- files ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", RANDOM_KINDS)
def test_a_saved_scorer_scores_the_same(kind: str, tmp_path: Path) -> None:
    scorer = make_scorer(kind, mean=0.3, std=0.1)
    save_scorer(tmp_path / "nice.safetensors", scorer, {"note": "by a test"})
    loaded = load_scorer(tmp_path / "nice.safetensors")
    latents, sigmas = some_latents(), torch.tensor([0.0, 1.0, 10.0])
    assert torch.equal(loaded(latents, sigmas), scorer(latents, sigmas))
    assert loaded.spec == scorer.spec and loaded.name == "nice"
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())
    assert [file.name for file in tmp_path.iterdir()] == ["nice.safetensors"]


def rewrite(path: Path, **changes: str) -> None:
    """Give a scorer file another header."""
    header = {FORMAT_KEY: "scorer/2", SPEC_KEY: make_scorer().spec.to_json(), **changes}
    save_file(load_file(path), path, {key: value for key, value in header.items() if value})


@pytest.mark.parametrize(
    ("header", "complaint"),
    [
        ({FORMAT_KEY: ""}, "is not a scorer"),
        ({FORMAT_KEY: "backbone/2"}, "is not a scorer"),
        ({SPEC_KEY: "{"}, "cannot be read"),
        ({SPEC_KEY: make_scorer().spec.to_json().replace('"latent_resnet"', '"latent_mlp"')}, "does not know"),
        ({SPEC_KEY: make_scorer().spec.to_json().replace("96", "64")}, "does not hold the weights"),
    ],
)
def test_a_file_that_is_not_a_scorer_is_refused(header: dict[str, str], complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "scorer.safetensors"
    save_scorer(path, make_scorer())
    rewrite(path, **header)
    with pytest.raises(UserError, match=complaint):
        load_scorer(path)


def test_missing_and_truncated_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "scorer.safetensors"
    with pytest.raises(UserError, match="there is no scorer file"):
        load_scorer(path)
    save_scorer(path, make_scorer())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="truncated"):
        load_scorer(path)


def test_a_scorer_is_refused_for_another_vae() -> None:
    check_scorer_fits(make_scorer(), VAE)
    with pytest.raises(UserError, match="another VAE"):
        check_scorer_fits(make_scorer(), OTHER_VAE)


def test_a_backbone_carries_over_and_the_head_does_not(tmp_path: Path) -> None:
    source, latents, sigmas = make_scorer(seed=1), some_latents(), torch.zeros(3)
    save_backbone(tmp_path / "backbone.safetensors", source.backbone, source.spec)
    save_scorer(tmp_path / "scorer.safetensors", source)
    for name in ("backbone", "scorer"):
        target = make_scorer(seed=2)
        head = target.heads["score"].members[0].weight.clone()
        assert not torch.equal(target.backbone(latents, sigmas), source.backbone(latents, sigmas))
        load_backbone_weights(tmp_path / f"{name}.safetensors", target.backbone, target.spec)
        assert torch.equal(target.backbone(latents, sigmas), source.backbone(latents, sigmas))
        assert torch.equal(target.heads["score"].members[0].weight, head)
    with pytest.raises(UserError, match="another VAE"):
        load_backbone_weights(tmp_path / "backbone.safetensors", source.backbone, dataclasses.replace(source.spec, vae=OTHER_VAE))
    freer = dataclasses.replace(source.spec, architecture={**source.spec.architecture, "dropout": 0.3})
    load_backbone_weights(tmp_path / "backbone.safetensors", make_scorer(seed=2).backbone, freer)  # the weights are the same
    wide = dataclasses.replace(source.spec, architecture={**source.spec.architecture, "channels": [64, 96]})
    with pytest.raises(UserError, match="same scorer_kind and scorer_size"):
        load_backbone_weights(tmp_path / "backbone.safetensors", source.backbone, wide)


def test_a_subclass_needs_only_its_score() -> None:
    class MeanScorer(Scorer):
        def score(self, latents, sigmas, cond, prompts):  # noqa: ANN001, ANN202
            return latents.mean((1, 2, 3))

    spec = ScorerSpec(kind="mean", architecture={}, vae=VAE, mean=1.0, std=3.0)
    latents = some_latents()
    torch.testing.assert_close(MeanScorer(spec)(latents, torch.zeros(3)), latents.mean((1, 2, 3)))


# -- judges --------------------------------------------------------------------------------------------------------------

JUDGES = """
from dataclasses import dataclass
import torch
from library.errors import UserError

@dataclass
class Weights:
    red: float = 1.0

def redness(pixels): return pixels[:, 0].mean((1, 2)) * Weights().red
def length(pixels, prompts): return torch.tensor([float(len(prompt)) for prompt in prompts])
def optional(pixels, prompts=None): return torch.full((len(pixels),), float(prompts is not None))
def column(pixels): return pixels[:, 0].mean((1, 2)).unsqueeze(1)
def number(pixels): return 1.0
def broken(pixels): return pixels.mean((1, 2, 3)) / 0
def fails(pixels): return {}["key"]
def refuses(pixels): raise UserError("a sentence of its own")
def three(pixels, prompts, seeds): return pixels
constant = 3
"""


@pytest.fixture
def judges(tmp_path: Path) -> Path:
    path = tmp_path / "my judges.py"
    path.write_text(textwrap.dedent(JUDGES), encoding="utf-8")
    return path


def test_judges_from_a_file_and_a_module(judges: Path) -> None:
    pixels = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(load_judge(f"{judges}:redness")(pixels), pixels[:, 0].mean((1, 2)))
    assert load_judge(f"{judges}:redness").takes_prompts is False
    assert load_judge(f"{judges}:length")(pixels, ["a", "four"]).tolist() == [1.0, 4.0]
    assert load_judge(f"{judges}:optional")(pixels, ["a", "b"]).tolist() == [1.0, 1.0]
    brightness = load_judge("examples.shapes.scores:brightness")
    torch.testing.assert_close(brightness(torch.ones(2, 3, 8, 8)), torch.ones(2))


@pytest.mark.parametrize(
    ("function", "complaint"),
    [
        ("column", r"returned shape \[2, 1\]"),
        ("number", "returned float"),
        ("broken", "NaN or infinity"),
        ("fails", r"my judges.py:fails failed with KeyError: 'key' \(.*my judges.py, line \d+\)"),
        ("refuses", "^a sentence of its own$"),
        ("length", "takes prompts"),
        ("three", "takes 3 arguments"),
        ("constant", "has no function 'constant'"),
        ("rednes", "it has redness, length"),
    ],
)
def test_a_judge_that_cannot_judge_is_refused(judges: Path, function: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        load_judge(f"{judges}:{function}")(torch.rand(2, 3, 8, 8))


@pytest.mark.parametrize(
    ("name", "complaint"),
    [("brightness", "is not package.module"), ("no.such.module:f", "no module 'no'"), ("missing.py:f", "there is no file")],
)
def test_a_judge_that_is_not_there_is_refused(name: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        load_judge(name)


def test_a_judge_file_that_fails_says_why(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("import torch\nraise RuntimeError('no weights here')\n")
    with pytest.raises(UserError, match="RuntimeError: no weights here"):
        load_judge(f"{tmp_path / 'bad.py'}:f")
