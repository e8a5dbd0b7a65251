"""What the tensors of LyCORIS and DoRA add to a weight, against their definitions written out by element."""

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from library.errors import UserError
from networks.lora import create_network_from_weights
from networks.lora_changes import change_of, factors_of
from tests.helpers.tiny_models import tiny_model


def drawn(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def check(part: dict[str, Tensor], expected: Tensor) -> None:
    change = change_of(part, torch.zeros(expected.shape))
    torch.testing.assert_close(change, expected, rtol=1e-5, atol=1e-5)
    down, up = factors_of(change)
    assert torch.equal((up.flatten(1) @ down.flatten(1)).reshape(change.shape), change)


@pytest.mark.parametrize("shape", [(2, 6), (6, 2), (4, 4), (3, 5, 3, 3)])
def test_a_change_of_full_rank_has_no_more_factors_than_the_weight_has_rows_or_columns(shape: tuple[int, ...]) -> None:
    down, up = factors_of(drawn(change=shape)["change"])
    assert len(down) == up.shape[1] == min(shape[:2])


def test_loha() -> None:
    part = drawn(hada_w1_a=(6, 2), hada_w1_b=(2, 4), hada_w2_a=(6, 2), hada_w2_b=(2, 4))
    first, second, expected = part["hada_w1_a"], part["hada_w2_a"], torch.zeros(6, 4)
    for row in range(6):
        for column in range(4):
            both = (first[row] @ part["hada_w1_b"][:, column], second[row] @ part["hada_w2_b"][:, column])
            expected[row, column] = both[0] * both[1] * 3 / 2
    check(part | {"alpha": torch.tensor(3.0)}, expected)


def test_loha_of_a_convolution_with_a_core() -> None:
    part = drawn(hada_t1=(2, 2, 3, 3), hada_w1_a=(2, 5), hada_w1_b=(2, 4), hada_t2=(2, 2, 3, 3), hada_w2_a=(2, 5), hada_w2_b=(2, 4))
    kernels = [part[f"hada_w{which}_a"].T @ (part[f"hada_t{which}"].permute(2, 3, 0, 1) @ part[f"hada_w{which}_b"]) for which in (1, 2)]
    check(part | {"alpha": torch.tensor(2.0)}, (kernels[0] * kernels[1]).permute(2, 3, 0, 1))


@pytest.mark.parametrize("low_rank", [False, True])
def test_lokr_is_scaled_where_a_factor_is_low_rank(low_rank: bool) -> None:
    part = drawn(lokr_w1=(2, 3), lokr_w2_a=(3, 2), lokr_w2_b=(2, 4))
    second = part["lokr_w2_a"] @ part["lokr_w2_b"]
    expected = torch.cat([torch.cat([part["lokr_w1"][row, column] * second for column in range(3)], dim=1) for row in range(2)])
    if not low_rank:
        part = {"lokr_w1": part["lokr_w1"], "lokr_w2": second}
    check(part | {"alpha": torch.tensor(5.0)}, expected * (5 / 2 if low_rank else 1))


def test_locon_with_a_core_between_its_factors() -> None:
    part = drawn(down=(2, 4, 1, 1), up=(5, 2, 1, 1)) | drawn(**{"lora_mid.weight": (2, 2, 3, 3)})
    convolved = torch.nn.functional.conv2d(torch.eye(4)[:, :, None, None], part["down"])  # what the three layers do to an impulse
    convolved = torch.nn.functional.conv2d(torch.nn.functional.pad(convolved, (2, 2, 2, 2)), part["lora_mid.weight"])
    expected = torch.nn.functional.conv2d(convolved, part["up"]).flip(2, 3).transpose(0, 1)
    check(part | {"alpha": torch.tensor(2.0)}, expected)


@pytest.mark.parametrize(("shape", "dim"), [((6, 1), 1), ((1, 4), 0), ((6,), 1)])
def test_dora_gives_the_changed_weight_the_norm_that_is_learned(shape: tuple[int, ...], dim: int) -> None:
    """By output (LyCORIS, and PEFT as a vector) or by input."""
    part, weight = drawn(down=(2, 4), up=(6, 2)), drawn(weight=(6, 4))["weight"]
    name = "dora_scale" if len(shape) == 2 else "lora_magnitude_vector"
    learned = drawn(learned=shape)["learned"].abs() + 1
    changed = weight + change_of(part | {name: learned, "alpha": torch.tensor(2.0)}, weight)
    torch.testing.assert_close(changed.norm(dim=dim), learned.flatten())
    direction = weight + part["up"] @ part["down"]
    torch.testing.assert_close(torch.nn.functional.normalize(changed, dim=dim), torch.nn.functional.normalize(direction, dim=dim))


def test_what_is_malformed_is_told_with_its_module(tmp_path: Path) -> None:
    model = tiny_model()
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    save_file({f"{name}.hada_w1_a": torch.ones(3, 2), f"{name}.hada_w1_b": torch.ones(2, 5)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=rf"{name}, LoHa: its tensors .* do not make a change of a weight of shape"):
        create_network_from_weights(1.0, tmp_path / "a.safetensors", None, None, model.unet, for_inference=True)


def test_a_full_difference_of_weights_is_a_network_that_adds_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    model, changed = tiny_model(), tiny_model()
    tensors = {}
    for path in ("mid_block.attentions.0.proj_in", "mid_block.resnets.0.conv1"):
        weight = changed.unet.get_submodule(path).weight
        assert isinstance(weight, Tensor)
        tensors[f"lora_unet_{path.replace('.', '_')}.diff"] = difference = 0.1 * torch.randn_like(weight)
        weight.add_(difference)
    save_file(tensors, tmp_path / "a.safetensors")
    network, _ = create_network_from_weights(1.0, tmp_path / "a.safetensors", None, None, model.unet, for_inference=True)
    network.apply_to(None, model.unet)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    ours, expected = (each.predict_eps(latents, torch.tensor([100, 700]), each.encode_prompts(["a", "b"])) for each in (model, changed))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)
    assert not caplog.records
