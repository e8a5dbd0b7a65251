"""Where a run happens: processes, devices, precision, threads, random numbers."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.errors import UserError
from library.settings.shared import TrainingConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"no": torch.float32, "float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
)


def create_accelerator(config: TrainingConfig) -> Accelerator:
    """accelerate's view of this process. Gradient accumulation is the loop's own business, so accelerate does not know of it.

    Raises:
        UserError: the device cannot compute in the precision asked for.
    """
    from accelerate import Accelerator
    from accelerate.utils import parse_flag_from_env

    # not by accelerate's state, which would be made before Accelerator knows whether processes are to meet on the CPU
    device = "cuda" if torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU") else "cpu"
    precision = choose_precision(config.mixed_precision, torch.device(device))
    try:
        return Accelerator(mixed_precision=precision)
    except ValueError as error:
        raise UserError(f"mixed_precision {precision} cannot be used here: {error}") from error


def choose_precision(asked: str | None, device: torch.device) -> str:
    """`mixed_precision` as it was asked for, or else what accelerate was launched with, or else what suits the device: bf16 on a GPU that
    computes in it, fp16 on another, "no" (float32) elsewhere."""
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # "no" is also what accelerate says when nobody chose
    if asked is not None or launched in DTYPES and launched != "no":
        return asked or launched
    if device.type != "cuda":
        return "no"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def weight_dtype(precision: str) -> torch.dtype:
    """The dtype of a `mixed_precision` ("no" | "fp16" | "bf16") or a `save_precision` ("float" | "fp16" | "bf16")."""
    return DTYPES[precision]


def set_num_threads(num_threads: int | None) -> int:
    """Set torch's CPU threads and return their number, never more than the cores that this process may run on.

    Args:
        num_threads: None takes all of those cores, unless OMP_NUM_THREADS is set (accelerate launch sets it), which torch
            has then obeyed.
    """
    if num_threads is None:
        num_threads = torch.get_num_threads() if "OMP_NUM_THREADS" in os.environ else free_cores()
    torch.set_num_threads(min(num_threads, free_cores()))
    return torch.get_num_threads()


def free_cores() -> int:
    """The number of cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def generator(seed: int, *stream: int | str) -> torch.Generator:
    """A CPU generator for one purpose of a run, e.g. generator(seed, "rollout", process_index).

    Its seed is a hash of them all, the same on every machine: streams do not run into each other as seed + 1 would, and the
    draws of one do not depend on how many another made.
    """
    digest = hashlib.sha256(json.dumps([seed, *stream]).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)  # 63 bits: manual_seed takes a signed 64-bit integer


def all_reduce_grads(params: Iterable[Tensor], accelerator: Accelerator) -> None:
    """Replace every gradient by its mean over the processes.

    A LoRA is reached through the U-Net and never through DDP's forward, so nobody else does it. A parameter without a gradient
    counts as 0: all processes must send tensors of the same shape.
    """
    if accelerator.num_processes == 1:
        return
    params = [param for param in params if param.requires_grad]
    for param in params:
        if param.grad is None:
            param.grad = torch.zeros_like(param)
    grads = [param.grad for param in params if param.grad is not None]
    flat = torch.cat([grad.reshape(-1) for grad in grads])  # one message rather than one for each of a LoRA's hundreds
    mean = accelerator.reduce(flat, reduction="mean")
    assert isinstance(mean, Tensor)
    for grad, part in zip(grads, mean.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(part.view_as(grad))


def any_process(wanted: bool, accelerator: Accelerator) -> bool:
    """Whether any process of the run wants something, so that all do it together."""
    if accelerator.num_processes == 1:
        return wanted
    votes = accelerator.reduce(torch.tensor(float(wanted), device=accelerator.device), reduction="sum")
    assert isinstance(votes, Tensor)
    return bool(votes > 0)


def describe_device(accelerator: Accelerator) -> str:
    """One line for the log: "NVIDIA H100 (78 GiB), bf16, 2 processes" or "CPU (4 threads), float32, 1 process"."""
    device = accelerator.device
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name = f"{properties.name} ({properties.total_memory / 2**30:.0f} GiB)"
    elif device.type == "cpu":
        name = f"CPU ({torch.get_num_threads()} threads)"
    else:
        name = str(device)
    precision = "float32" if accelerator.mixed_precision == "no" else accelerator.mixed_precision
    processes = accelerator.num_processes
    return f"{name}, {precision}, {processes} process{'es' if processes > 1 else ''}"
