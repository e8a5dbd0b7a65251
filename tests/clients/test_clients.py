"""Other programs' own loader code, from folders that the user names, on files of every family, rank, precision and part.

    LECO_SCORE_COMFYUI=~/ComfyUI LECO_SCORE_CLIENTS_PYTHON=~/ComfyUI/venv/bin/python python -m pytest tests/clients

What is used whole, and the figures, stand in docs/compatibility.md, which `python -m tests.clients.compatibility` writes.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from networks.lora_changes import change_of
from networks.lora_metadata import Card, write_cards
from tests.clients.compare import VARIABLES, compare, run_client
from tests.clients.job import make_job
from tests.helpers.tiny_models import tiny_model

NAMED = {client: Path(os.environ[variable]) for client, variable in VARIABLES.items() if os.environ.get(variable)}


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("clients")
    return folder, make_job(folder)


@pytest.mark.slow
@pytest.mark.parametrize("client", VARIABLES)
def test_every_weight_of_every_file_is_changed_as_it_should_be(client: str, request: pytest.FixtureRequest) -> None:
    if client not in NAMED:
        pytest.skip(f"{VARIABLES[client]} names no folder")
    folder, files = request.getfixturevalue("job")
    found = run_client(client, NAMED[client], folder)
    assert [result.name for result in found] == sorted(name.removesuffix(".safetensors") for name in files)
    assert [result for result in found if not result.right] == []


def test_what_a_program_leaves_out_or_gets_wrong_is_seen(tmp_path: Path) -> None:
    """Three files of one family: as they should be; one weight missing; one weight of half the strength under a strange name beside it."""
    weights = {f"diffusers:unet.{name}.weight": torch.full((2, 2), 0.5) for name in ("a", "b")}
    for place in ("families/sd1/expected", "diffusers/sd1"):
        (tmp_path / place).mkdir(parents=True)
    made = {
        "right": weights,
        "missing": dict(list(weights.items())[:1]),
        "wrong": {**weights, "diffusers:unet.b.weight": torch.full((2, 2), 0.25), "diffusers:unet.c.weight": torch.ones(2, 2)},
    }
    for name, changes in made.items():
        save_file(weights, tmp_path / "families/sd1/expected" / f"{name}.safetensors")
        save_file(changes, tmp_path / "diffusers/sd1" / f"{name}.safetensors")
    missing, right, wrong = compare("diffusers", tmp_path)
    assert right.right and (right.wanted, right.used, right.error, right.peak) == (2, 2, 0.0, 0.5)
    assert not missing.right and missing.used == 1
    assert not wrong.right and (wrong.used, wrong.strange, wrong.error) == (2, 1, 0.25)


def test_the_card_is_read_by_lora_manager(tmp_path: Path) -> None:
    """A card that lacks one of its fields would hide the LoRA."""
    folder = os.environ.get("LECO_SCORE_LORA_MANAGER")
    if not folder:
        pytest.skip("LECO_SCORE_LORA_MANAGER names no folder")
    (tmp_path / "slider.safetensors").write_bytes(b"weights")
    _, card = write_cards(
        tmp_path / "slider.safetensors", tiny_model("sdxl").spec, Card(notes="n", preferred_weight=-0.5, usable=(-0.5, 0.0))
    )
    program = (
        "import json, sys; sys.path.insert(0, sys.argv[1]); from py.utils.models import LoraMetadata; "
        "read = LoraMetadata.from_dict(json.load(open(sys.argv[2], encoding='utf-8'))); "
        "print(json.dumps([read.base_model, json.loads(read.usage_tips), read.notes, read._unknown_fields]))"
    )
    python = os.environ.get("LECO_SCORE_CLIENTS_PYTHON", sys.executable)
    done = subprocess.run([python, "-c", program, folder, str(card)], capture_output=True, text=True, check=True)
    tips = {"strength": -0.5, "strength_min": -0.5, "strength_max": 0.0}
    assert json.loads(done.stdout.splitlines()[-1]) == ["SDXL 1.0", tips, "n", {}]


@pytest.mark.parametrize("name", ["LoConModule", "LohaModule", "LokrModule"])
@pytest.mark.parametrize("options", [{}, {"use_tucker": True}, {"weight_decompose": True, "wd_on_out": True}, {"weight_decompose": True}])
@pytest.mark.parametrize("kernel", [0, 1, 3])
def test_functions_of_lycoris_are_read_as_it_computes_them(name: str, options: dict[str, bool], kernel: int) -> None:
    """Against LyCORIS' own forward, where lycoris-lora is installed; float32 sums in another order."""
    modules = pytest.importorskip("lycoris.modules", reason="needs lycoris-lora")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = torch.nn.Conv2d(8, 12, kernel, padding=kernel // 2) if kernel else torch.nn.Linear(8, 12)
        own = getattr(modules, name)("module", base, 1.0, lora_dim=4, alpha=2, **options)
        for parameter in own.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    state = own.custom_state_dict() if hasattr(own, "custom_state_dict") else own.state_dict()
    part = {key.replace("lora_down.weight", "down").replace("lora_up.weight", "up"): value.detach() for key, value in state.items()}
    x = torch.randn(2, 8, *[5] * (2 if kernel else 0), generator=torch.Generator().manual_seed(0))
    changed = torch.func.functional_call(base, {"weight": base.weight.detach() + change_of(part, base.weight)}, x)
    own.apply_to()
    torch.testing.assert_close(own.eval()(x), changed, rtol=1e-5, atol=1e-5)
