"""No setting for speed or memory changes what training computes by more than docs/method.md says: a golden run's beginning in each mode."""

import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from library.training.tracking import read_metrics
from tests.helpers.golden_run import PREV
from tests.helpers.tiny_leco_run import make_workplace, run

PAGE = Path(__file__).parents[1] / "docs" / "method.md"
MODES: dict[str, dict[str, Any]] = {
    "`gradient_checkpointing`": {"gradient_checkpointing": True},
    "`blocks_to_swap`": {"blocks_to_swap": 3},
    "attention that is not fused": {},
    '`mixed_precision = "bf16"`': {"mixed_precision": "bf16"},
    '`mixed_precision = "fp16"`': {"mixed_precision": "fp16"},
    '`quantize_base = "int8"`': {"quantize_base": "int8"},
    '`quantize_base = "fp8"`': {"quantize_base": "fp8"},
    '`quantize_base = "nf4"`': {"quantize_base": "nf4"},
    "`uncond_every_n_steps = 3`": {"uncond_every_n_steps": 3},
}


def numbers(workplace: Path, output: Path, **changes: Any) -> Tensor:
    """Reward and norm of the gradient in two updates [2, 2]. Loss and drift are differences that begin at 0."""
    AcceleratorState._reset_state(reset_partial_state=True)  # accelerate keeps the first run's precision
    run(workplace, output, **PREV | {"max_train_steps": 2, "uncond_every_n_steps": 1} | changes)
    return torch.tensor([[record["reward"], record["grad_norm"]] for record in read_metrics(output / "tiny.metrics.jsonl")])


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("modes"), full=True)


@pytest.fixture(scope="module")
def plain(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    return numbers(workplace, tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_changes_no_more_than_is_said(mode: str, workplace: Path, plain: Tensor, tmp_path: Path) -> None:
    found = re.search(rf"^\| {re.escape(mode)} \| (\S+) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None
    with sdpa_kernel(SDPBackend.MATH) if mode.startswith("attention") else nullcontext():
        away = ((numbers(workplace, tmp_path, **MODES[mode]) - plain).abs() / plain.abs()).max().item()
    allowed = float(found[1])
    assert away <= allowed
    assert away > allowed / 30 or allowed < 1e-4  # that it was on
