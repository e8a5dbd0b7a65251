"""The parts of benchmarks/gpu_check.py that are not training steps, each runnable by itself:

python -m benchmarks.gpu_sections scorer --output scorer.json
"""

import argparse
import gc
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.benchmark import Timer

from benchmarks import ROOT
from benchmarks.memory import counted, taken
from benchmarks.meter import count_flops
from benchmarks.random_models import PROMPTS, random_model, untrained_scorer
from benchmarks.step import build_step, check_attention, parse
from library.atomic_files import atomic_write_text
from library.errors import UserError
from library.rollouts.sample import model_autocast
from library.settings.cli import run_main
from library.settings.presets import PRESETS
from library.settings.shared import OptimizerConfig, TrainingConfig
from library.training.optimizers import OPTIMIZERS, create_optimizer
from library.training.runtime import create_accelerator


def attention(device: torch.device, tiny: bool) -> dict[str, Any]:
    """How far xformers' prediction is from sdpa's (relative RMS, SD1, half precision on CUDA), and the seconds of each."""
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    model = random_model("sd1", tiny=tiny, dtype=dtype, device=device)
    side = model.spec.resolution // model.spec.vae_scale_factor
    latents = torch.randn(4, model.spec.latent_channels, side, side, generator=torch.Generator().manual_seed(0)).to(device)
    timesteps = torch.tensor([10, 300, 600, 990], device=device)
    cond = model.encode_prompts(PROMPTS[:4])
    result: dict[str, Any] = {"batch_size": 4, "dtype": str(dtype)}
    predictions = {}
    for name in ("sdpa", "xformers"):
        try:
            model.set_attention(name)
            check_attention(model, name)
        except UserError as error:
            return result | {"skipped": str(error)}
        with torch.no_grad(), model_autocast(model):
            predictions[name] = model.predict_eps(latents, timesteps, cond)
            result[f"{name}_seconds"] = _seconds(lambda: model.predict_eps(latents, timesteps, cond), tiny)
    difference = predictions["xformers"] - predictions["sdpa"]
    result["relative_rms_difference"] = (difference.square().mean() / predictions["sdpa"].square().mean()).sqrt().item()
    return result | {"ok": result["relative_rms_difference"] < 0.01}


def optimizers(device: torch.device, tiny: bool) -> dict[str, Any]:
    """Every bitsandbytes optimizer halves the distance from a target; parameters are large enough to have 8-bit states (above 4,096)."""
    result: dict[str, Any] = {}
    target = torch.randn(2**13 if tiny else 2**20, generator=torch.Generator().manual_seed(0)).to(device)
    for name in [name for name, row in OPTIMIZERS.items() if row.package == "bitsandbytes"]:
        rate = 1.0 if name.startswith("SGD") else 0.02
        parameter = torch.nn.Parameter(torch.zeros_like(target))
        try:
            optimizer = create_optimizer(OptimizerConfig(optimizer_type=name, learning_rate=rate), [{"params": [parameter], "lr": rate}])
            for _ in range(100):
                optimizer.zero_grad()
                (0.5 * (parameter - target).square()).sum().backward()
                optimizer.step()
        except (UserError, RuntimeError, NotImplementedError) as error:
            result[name] = {"ok": False, "error": str(error)[:300]}
            continue
        distance = ((parameter - target).square().mean() / target.square().mean()).sqrt().item()
        dtypes = {str(value.dtype) for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)}
        result[name] = {"ok": distance < 0.5, "relative_distance": distance, "state_dtypes": sorted(dtypes)}
    return {"ok": all(row["ok"] for row in result.values()), "optimizers": result}


def scorer(device: torch.device, tiny: bool) -> dict[str, Any]:
    """Latents a second that an untrained latent ResNet scores, and scores with the gradient towards them, in float32."""
    torch.manual_seed(0)
    model = random_model("sd1", tiny=True, device=device)  # only its VAE's record is used
    size, side = ("tiny", 8) if tiny else ("base", 64)
    network = untrained_scorer(model, size)
    rows = []
    for batch_size in (1, 4) if tiny else (1, 8, 32, 128):
        latents = torch.randn(batch_size, 4, side, side, generator=torch.Generator().manual_seed(0)).to(device)
        sigmas = torch.linspace(0, 10, batch_size, device=device)

        def forward(latents: torch.Tensor = latents, sigmas: torch.Tensor = sigmas) -> torch.Tensor:
            with torch.no_grad():
                return network(latents, sigmas)

        def gradient(latents: torch.Tensor = latents, sigmas: torch.Tensor = sigmas) -> torch.Tensor:
            latents = latents.detach().requires_grad_()
            return torch.autograd.grad(network(latents, sigmas).sum(), latents)[0]

        assert forward().isfinite().all() and gradient().isfinite().all()
        speeds = {f"{name}_per_second": batch_size / _seconds(run, tiny) for name, run in (("scores", forward), ("gradients", gradient))}
        rows.append({"batch_size": batch_size, **speeds})
    return {"ok": True, "scorer_size": size, "latent_size": side, "rows": rows}


def memory(device: torch.device, tiny: bool) -> dict[str, Any]:
    """For every preset, GiB by part as `benchmarks.memory` counts them without values, and as the run takes them here."""
    rows = []
    name, size = ("sd1", 64) if tiny else ("sdxl", 1024)
    for preset in PRESETS:
        config: dict[str, Any] = {"preset": preset, "mixed_precision": "no" if tiny else "bf16"}
        guess = counted(name, size, tiny=tiny, **config)
        torch.manual_seed(0)
        found = taken(name, size, tiny=tiny, device=device, **config)
        parts = {part: {"counted": guess.rises[part] / 2**30, "taken": own / 2**30} for part, own in found.items()}
        rows.append({"preset": preset, "counted_peak": guess.peak / 2**30, "rises": parts})
        print(json.dumps(rows[-1]), flush=True)  # what was found is seen, should the time be over
        gc.collect()
    return {"ok": True, "model": name, "size": size, "rows": rows}


def mfu(device: torch.device, tiny: bool) -> dict[str, Any]:
    """Of a training step of SD1: its FLOPs (torch's FlopCounterMode) a second, over those of a large product of matrices here."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    width = 512 if tiny else 8192
    one = torch.randn(width, width, device=device, dtype=dtype)
    peak = 2 * width**3 / _seconds(lambda: one @ one, tiny)
    words = ["--random_weights", "sd1", *(["--tiny", "--scorer_size", "tiny"] if tiny else [])]
    given, settings = parse([*words, "--mixed_precision", "bf16" if device.type == "cuda" else "no"])
    step, _ = build_step(given, ["--train_batch_size", "4", "--max_denoising_steps", "4", *settings])
    step()
    with count_flops() as flops:
        step()
    count = flops.get_total_flops()
    seconds = _seconds(step, tiny)
    result = {"flops_a_step": count, "step_seconds": seconds, "product_flops_a_second": peak, "mfu": count / seconds / peak}
    return result | {"ok": 0 < result["mfu"] < 1}


def tests(device: torch.device, tiny: bool) -> dict[str, Any]:
    """The CUDA tests, where pytest is installed: nothing else here asks for more than requirements.txt."""
    try:
        import pytest
    except ModuleNotFoundError:
        return {"skipped": "pytest is not installed; pip install -r requirements-test.txt -c constraints.txt adds it"}
    outcomes: dict[str, str] = {}

    class Outcomes:
        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.when == "call" or report.outcome != "passed":
                outcomes[report.nodeid] = report.outcome

    words = ["-q", "-m", "cuda", "-p", "no:cacheprovider", str(ROOT / "tests" / "test_cuda.py")]
    code = pytest.main(words, plugins=[Outcomes()])
    result: dict[str, Any] = {"ok": code == 0 and bool(outcomes), "tests": outcomes}
    return result | {"skipped": "every test was"} if outcomes and {*outcomes.values()} == {"skipped"} else result


SECTIONS: dict[str, Callable[[torch.device, bool], dict[str, Any]]] = {
    "attention": attention,
    "memory": memory,
    "mfu": mfu,
    "optimizers": optimizers,
    "scorer": scorer,
    "tests": tests,
}


def _seconds(run: Callable[[], object], quick: bool) -> float:
    """Median seconds of a call; torch's timer waits for the device."""
    return Timer("run()", globals={"run": run}).blocked_autorange(min_run_time=0.05 if quick else 1.0).median


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", choices=SECTIONS)
    parser.add_argument("--tiny", action="store_true", help="tiny models, to see that it runs")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    given = parser.parse_args(argv)
    device = create_accelerator(TrainingConfig()).device
    result = SECTIONS[given.section](device, given.tiny)
    atomic_write_text(given.output, json.dumps(result, indent=1))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    run_main(main)
