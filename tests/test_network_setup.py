"""From settings to an attached network."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from library.errors import UserError
from library.settings.shared import NetworkConfig
from library.slider_training.network import build_network, in_use, merge_base_weights
from library.training.optimizers import create_optimizer
from networks.lora import LoRANetwork
from networks.lora_options import Dropouts
from tests.helpers.tiny_models import tiny_model


def built(*, gradient_checkpointing: bool = False, seed: int = 0, **values) -> LoRANetwork:
    config = NetworkConfig(**{"network_dim": 2, "network_alpha": 1.0, **values})
    return build_network(config, tiny_model(), torch.Generator().manual_seed(seed), gradient_checkpointing=gradient_checkpointing)


def test_only_the_network_trains_and_in_float32() -> None:
    model = tiny_model().to(dtype=torch.bfloat16)
    network = build_network(NetworkConfig(network_dim=2), model, torch.Generator().manual_seed(0), gradient_checkpointing=False)
    assert not any(parameter.requires_grad for part in (model.unet, model.vae, *model.text_encoders) for parameter in part.parameters())
    assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in network.parameters())
    assert network.training and not model.unet.training
    assert network.unet_loras and not network.text_encoder_loras


def test_the_generator_decides_the_initial_weights() -> None:
    first, again, other = (built(seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    assert not all(torch.equal(tensor, other[name]) for name, tensor in first.items())


def test_text_encoders_and_network_args() -> None:
    network = built(network_train_unet_only=False, network_args=("conv_dim=3", "conv_alpha=1.5"), network_dropout=0.25)
    assert network.text_encoder_loras
    convs = [lora for lora in network.unet_loras if lora.lora_down.weight.shape[2:].numel() > 1]
    assert {(lora.rank, lora.alpha.item()) for lora in convs} == {(3, 1.5)}
    assert {lora.dropouts for lora in network.loras} == {Dropouts(neuron=0.25)}


def test_it_starts_from_a_file_and_takes_ranks_from_it(tmp_path: Path) -> None:
    start = built(network_dim=3)
    start.save_weights(tmp_path / "start.safetensors")
    same = built(network_dim=3, network_weights=tmp_path / "start.safetensors", seed=5)
    ranked = built(network_dim=7, network_weights=tmp_path / "start.safetensors", dim_from_weights=True)
    for network in (same, ranked):
        assert all(torch.equal(tensor, network.state_dict()[name]) for name, tensor in start.state_dict().items())


def test_dropouts_are_obeyed_when_ranks_come_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "start.safetensors"
    built().save_weights(path)

    def from_file(*network_args: str) -> LoRANetwork:
        return built(network_weights=path, dim_from_weights=True, network_dropout=0.25, network_args=network_args)

    assert {lora.dropouts for lora in from_file("rank_dropout=0.5", "module_dropout=0.125").loras} == {Dropouts(0.25, 0.5, 0.125)}
    with pytest.raises(UserError, match="nonsense is not an option of networks.lora"):
        from_file("nonsense=1")
    with pytest.raises(UserError, match="conv_dim is given, but modules and ranks come from the file"):
        from_file("conv_dim=2")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"network_dropout": 0.1, "network_args": ("dropout=0.2",)}, "two names of one setting"),
        ({"network_args": ("neuron_dropout=0.1",)}, "neuron_dropout is not an option"),
        ({"network_args": ("weights_sd=a",)}, "weights_sd is not an option"),
        ({"network_module": "networks.nothing"}, "cannot be imported"),
        ({"network_module": "json"}, "no per-sample multipliers"),
        ({"network_module": "lycoris.kohya"}, "one multiplier for a whole batch"),
        ({"base_weights": (Path("none"),), "base_weights_multiplier": (1.0, 2.0)}, "2 values for 1 files"),
        ({"network_weights": Path("none.safetensors")}, "does not exist"),
        ({"network_weights": Path(".")}, r"network_weights \. is a folder; give the LoRA file"),
    ],
)
def test_bad_settings(values: dict, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        built(**values)
    assert "\n" not in str(caught.value)


def test_base_weights_that_are_not_there() -> None:
    with pytest.raises(UserError, match=r"base_weights none.safetensors does not exist"):
        merge_base_weights(NetworkConfig(base_weights=(Path("none.safetensors"),)), tiny_model())


def test_text_encoders_alone() -> None:
    network = built(network_train_text_encoder_only=True)
    assert network.text_encoder_loras and not network.unet_loras
    groups, names = network.prepare_optimizer_params(None, None, 1e-4)
    assert names == ["textencoder"] and len(groups[0]["params"]) == 2 * len(network.text_encoder_loras)


@pytest.mark.parametrize("dim_from_weights", [False, True])
def test_a_file_for_text_encoders_alone(dim_from_weights: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    start = built(network_train_unet_only=False)
    start.save_weights(tmp_path / "a.safetensors")
    options = {"network_weights": tmp_path / "a.safetensors", "dim_from_weights": dim_from_weights}
    network = built(network_train_text_encoder_only=True, seed=5, **options)
    assert network.state_dict().keys() == {key for key in start.state_dict() if key.startswith("lora_te_")}
    assert all(torch.equal(value, start.state_dict()[key]) for key, value in network.state_dict().items())
    [warning] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert f"{len(start.unet_loras)} modules" in warning


def test_base_weights_are_merged_at_their_multipliers(tmp_path: Path) -> None:
    """Two files: the first at its multiplier, the second at 1. What is trained on top is not in them."""
    paths, deltas = [], {}
    for seed, multiplier in ((1, -0.5), (2, 1.0)):
        network = built(network_train_unet_only=False)
        for lora in network.loras:
            torch.nn.init.normal_(lora.lora_up.weight, std=0.1, generator=torch.Generator().manual_seed(seed))
            key = lora.part, lora.path
            deltas[key] = deltas.get(key, 0) + multiplier * lora.delta().detach()
        paths.append(tmp_path / f"{seed}.safetensors")
        network.save_weights(paths[-1])
    model, plain = tiny_model(), tiny_model()
    config = NetworkConfig(network_dim=2, base_weights=tuple(paths), base_weights_multiplier=(-0.5,))
    merge_base_weights(config, model)
    network = build_network(config, model, torch.Generator().manual_seed(0), gradient_checkpointing=False)
    assert not any(lora.lora_up.weight.any() for lora in network.loras)
    parts = {"unet": (model.unet, plain.unet), "text_encoder": (model.text_encoders[0], plain.text_encoders[0])}
    for (part, path), delta in deltas.items():
        merged, before = (whole.get_submodule(path).weight for whole in parts[part])
        assert delta.abs().max() > 0
        torch.testing.assert_close(merged, before + delta, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dim_from_weights", [False, True])
def test_weights_that_are_another_models(tmp_path: Path, dim_from_weights: bool) -> None:
    path = tmp_path / "foreign.safetensors"
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(2, 4), "lora_unet_x.lora_up.weight": torch.zeros(4, 2)}, path)
    with pytest.raises(UserError, match=r"foreign\.safetensors"):
        built(network_weights=path, dim_from_weights=dim_from_weights)


def test_gradient_checkpointing_recomputes_with_the_multipliers_of_the_forward() -> None:
    def gradients(checkpointing: bool) -> torch.Tensor:
        model = tiny_model()
        network = build_network(NetworkConfig(network_dim=2), model, torch.Generator().manual_seed(0), gradient_checkpointing=checkpointing)
        latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        network.set_multiplier(torch.tensor([1.0, -0.5]))
        loss = model.predict_eps(latents, torch.tensor([10, 500]), model.encode_prompts(["a", "b"])).square().mean()
        network.set_multiplier(torch.tensor([7.0, 7.0]))
        loss.backward()
        return torch.cat([lora.lora_up.weight.grad.flatten() for lora in network.loras])  # type: ignore[union-attr]

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.abs().max() > 0 and torch.allclose(plain, checkpointed, atol=1e-7)


def test_in_use_dropout_is_off_and_averaged_weights_are_on() -> None:
    from library.settings.shared import OptimizerConfig

    network = built(network_dropout=0.5)
    groups, _ = network.prepare_optimizer_params(None, None, 1e-2)
    optimizer = create_optimizer(OptimizerConfig(optimizer_type="AdamWScheduleFree"), groups)
    for _ in range(3):
        for parameter in network.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    training = network.loras[0].lora_up.weight.clone()
    with in_use(network, optimizer):
        assert not network.loras[0].training
        assert not torch.allclose(network.loras[0].lora_up.weight, training, atol=1e-5)
    assert network.loras[0].training
    assert torch.allclose(network.loras[0].lora_up.weight, training, atol=1e-6)


def test_torch_compile_takes_the_network_whole_and_obeys_its_multiplier() -> None:
    """fullgraph: a graph break in a LoRA module is an error. (The eager backend traces like any other, and needs no compiler.)"""
    model = tiny_model()
    network = build_network(NetworkConfig(network_dim=2), model, torch.Generator().manual_seed(0), gradient_checkpointing=False)
    for lora in network.loras:
        torch.nn.init.normal_(lora.lora_up.weight, std=0.1, generator=torch.Generator().manual_seed(1))
    layer = model.unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.ff")
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(2))
    outputs = []
    for multiplier in (torch.tensor([1.0, -1.0]), torch.tensor([2.0, 0.5]), 1.0, 0.0):
        network.set_multiplier(multiplier)
        outputs.append(compiled(x))
        assert torch.equal(outputs[-1], layer(x))
    assert not torch.allclose(outputs[0], outputs[1])
    with network.disabled():
        assert torch.equal(compiled(x), outputs[3])
