"""The transformer over latents: places, sizes, memory, and learning from hidden patches."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from library.errors import UserError
from library.scorer_training.criteria.masked import MaskedLatentPretraining, draw_visible
from library.scorers.kinds.latent_resnet import LatentResNet
from library.scorers.kinds.latent_vit import LatentViT, axial_angles, grid_positions, rotate
from tests.helpers.scorers import noise

PLAIN = {"stem": 0, "registers": 0}
VARIANTS = [{"patch": 2}, PLAIN]


def make_vit(seed: int = 0, **changes: Any) -> LatentViT:
    torch.manual_seed(seed)
    return LatentViT(**{"in_channels": 4, "width": 32, "depth": 2, "heads": 2, "patch": 1, **changes}).eval()


# -- places --------------------------------------------------------------------------------------------------------------


def test_positions_are_centred_and_keep_the_aspect() -> None:
    square = grid_positions(4, 4, torch.device("cpu")).view(4, 4, 2)
    torch.testing.assert_close(square[:, 0, 0], torch.tensor([-0.75, -0.25, 0.25, 0.75]))
    torch.testing.assert_close(square[0, :, 1], torch.tensor([-0.75, -0.25, 0.25, 0.75]))
    wide = grid_positions(2, 8, torch.device("cpu")).view(2, 8, 2)
    torch.testing.assert_close(wide[0, 1] - wide[0, 0], torch.tensor([0.0, 0.5]))  # as far apart as those of a 4 x 4 grid
    torch.testing.assert_close(wide[1, 0] - wide[0, 0], torch.tensor([0.5, 0.0]))


def test_a_rotated_product_depends_on_the_offset_alone() -> None:
    query, key = noise(1, 1, 1, 16, seed=2), noise(1, 1, 1, 16, seed=3)

    def product(query_at: tuple[float, float], key_at: tuple[float, float]) -> float:
        turned = [rotate(x, axial_angles(torch.tensor([[at]]), 0, 16)) for x, at in ((query, query_at), (key, key_at))]
        return (turned[0] * turned[1]).sum().item()

    assert product((0.1, 0.2), (0.4, -0.3)) == pytest.approx(product((-0.5, 0.7), (-0.2, 0.2)), abs=1e-5)
    assert abs(product((0.1, 0.2), (0.4, -0.3)) - product((0.1, 0.2), (-0.3, 0.4))) > 1e-3  # y and x are told apart
    assert rotate(query, axial_angles(torch.tensor([[(0.3, 0.9)]]), 0, 16)).norm().item() == pytest.approx(query.norm().item(), rel=1e-5)


def test_the_place_of_a_patch_matters() -> None:
    vit, latents = make_vit(stem=0), noise(1, 4, 4, 4)
    shuffled = latents.flatten(2)[:, :, torch.randperm(16, generator=torch.Generator().manual_seed(0))].view_as(latents)
    assert (vit(latents, torch.zeros(1)) - vit(shuffled, torch.zeros(1))).abs().max() > 1e-3


# -- sizes ---------------------------------------------------------------------------------------------------------------


def test_a_patch_that_sticks_out_repeats_the_border() -> None:
    vit, latents = make_vit(patch=2), noise(1, 4, 5, 7)
    filled = torch.cat([latents, latents[:, :, -1:]], dim=2)
    filled = torch.cat([filled, filled[:, :, :, -1:]], dim=3)
    torch.testing.assert_close(vit(latents, torch.zeros(1)), vit(filled, torch.zeros(1)))


@pytest.mark.parametrize("changes", [{"heads": 3}])
def test_an_impossible_architecture_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(changes))} is "):
        make_vit(**changes)


# -- cost ----------------------------------------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """Remembers the most numbers that any operation put out, and the names of the operations."""

    def __init__(self) -> None:
        super().__init__()
        self.numel, self.names = 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        outputs = result if isinstance(result, tuple | list) else [result]
        self.numel = max([self.numel, *(output.numel() for output in outputs if isinstance(output, Tensor))])
        self.names.add(str(func))
        return result


@pytest.mark.parametrize("patch", [1, 2])
def test_no_tensor_grows_with_the_square_of_the_tokens(patch: int) -> None:
    largest = []
    for side in (32, 64):
        with LargestTensor() as seen:
            make_vit(depth=1, patch=patch)(noise(1, 4, side, side).requires_grad_(), torch.zeros(1)).sum().backward()
        assert any("flash_attention" in name and "backward" in name for name in seen.names)
        largest.append(seen.numel)
    assert largest[1] <= 4.1 * largest[0]  # four times the tokens


def test_checkpointing_changes_memory_and_nothing_else() -> None:
    gradients, saved = [], []
    for checkpointing in (False, True):
        vit, latents = make_vit(), noise(2, 4, 8, 8).requires_grad_()
        if checkpointing:
            vit.enable_gradient_checkpointing()
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x):
            loss = vit(latents, torch.ones(2)).square().sum()
        gradients.append(torch.autograd.grad(loss, [latents, *vit.parameters()]))
        saved.append(sum(sizes))
    torch.testing.assert_close(gradients[0], gradients[1])
    assert saved[1] < saved[0] / 3


def test_it_compiles_in_one_piece() -> None:
    vit, latents, sigmas = make_vit(patch=2), noise(2, 4, 6, 8), torch.tensor([0.0, 2.0])
    compiled = torch.compile(vit, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(latents, sigmas), vit(latents, sigmas))


# -- training ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_layers_hold_every_parameter_once(changes: dict[str, Any]) -> None:
    vit = make_vit(**changes)
    ids = [id(parameter) for layer in vit.layers() for parameter in layer]
    assert sorted(ids) == sorted(map(id, vit.parameters()))


def test_every_parameter_learns() -> None:
    vit = make_vit()
    vit(noise(2, 4, 6, 6), torch.ones(2)).square().sum().backward()
    assert [name for name, parameter in vit.named_parameters() if parameter.grad is None or not parameter.grad.any()] == []


@pytest.mark.parametrize("stem", [0, 2, 4])
def test_tokens_differ_from_picture_to_picture_from_the_start(stem: int) -> None:
    """With torch's own initialisation of convolutions they would be a constant, from 7 % at two down to 1 % at four."""
    vit = make_vit(stem=stem, width=96)
    tokens = vit.to_tokens(vit.stem(noise(16, 4, 8, 8)))
    assert 0.25 < tokens.std((0, 2, 3)).mean() < 1.5


def test_stochastic_depth_is_for_training_alone() -> None:
    vit, latents = make_vit(drop_path=0.5), noise(1, 4, 6, 6)
    assert torch.equal(vit(latents, torch.zeros(1)), make_vit()(latents, torch.zeros(1)))
    vit.train()
    assert len({vit(latents, torch.zeros(1)).sum().item() for _ in range(8)}) > 1


# -- masked pretraining --------------------------------------------------------------------------------------------------


def test_visible_patches_are_drawn_without_repetition() -> None:
    visible = draw_visible(50, 10, 0.6, torch.Generator().manual_seed(0))
    assert visible.shape == (50, 4) and all(row.unique().numel() == 4 for row in visible)
    assert visible.unique().tolist() == list(range(10))
    assert draw_visible(1, 4, 0.99, torch.Generator()).shape == (1, 1)


@pytest.mark.parametrize("patch", [1, 2])
def test_hidden_latents_are_not_seen_and_only_they_are_predicted(patch: int) -> None:
    """Changing what is hidden in the input changes nothing; changing what is visible in the target changes nothing."""
    torch.manual_seed(0)
    pretraining, latents, sigmas = MaskedLatentPretraining(make_vit(patch=patch)), noise(2, 4, 6, 8), torch.ones(2)
    visible = draw_visible(2, 48 // patch**2, 0.6, torch.Generator().manual_seed(5))
    hidden = torch.ones(2, 48 // patch**2).scatter(1, visible, 0.0).view(2, 1, 6 // patch, 8 // patch)
    hidden = nn.functional.interpolate(hidden, (6, 8), mode="nearest")

    def loss(given: Tensor, wanted: Tensor) -> Tensor:
        return pretraining(given, sigmas, wanted, visible)

    plain = loss(latents, latents)
    torch.testing.assert_close(loss(latents + 9 * hidden, latents), plain)
    torch.testing.assert_close(loss(latents, latents + 9 * (1 - hidden)), plain)
    assert ((loss(latents + 9 * (1 - hidden), latents) - plain).abs() > 1e-3).all()
    assert ((loss(latents, latents + 9 * hidden) - plain).abs() > 1).all()


def test_it_learns_to_fill_in_what_repeats() -> None:
    """In pictures of one colour each, a few patches say what the others are."""
    torch.manual_seed(0)
    pretraining, generator = MaskedLatentPretraining(make_vit()), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(pretraining.parameters(), lr=3e-3)
    losses = []
    for _ in range(80):
        clean = torch.randn(32, 4, 1, 1, generator=generator).expand(-1, -1, 4, 6)
        loss = pretraining(clean, torch.zeros(32), clean, pretraining.draw_visible(clean, generator)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.8 and sum(losses[-5:]) / 5 < 0.15


def test_what_has_no_patches_is_refused() -> None:
    with pytest.raises(UserError, match="latent_vit"):
        MaskedLatentPretraining(LatentResNet(in_channels=4, channels=[8], blocks=1, norm_groups=2))
