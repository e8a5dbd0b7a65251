"""Where a run happens: processes, devices, precision, threads, random numbers."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
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

LAUNCHERS = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")


def create_accelerator(config: TrainingConfig) -> Accelerator:
    """accelerate's view of this process. Gradient accumulation is the loop's own business, so accelerate does not know of it.

    Processes that a launcher has started meet: on the GPUs, or where there are none, on the CPU (gloo).

    Raises:
        UserError: the device cannot compute in the precision asked for, or processes were started together and cannot meet.
    """
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs, parse_flag_from_env

    # not by accelerate's state, which would be made before Accelerator knows whether processes are to meet on the CPU
    device = "cuda" if torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU") else "cpu"
    precision = choose_precision(config.mixed_precision, torch.device(device))
    if device == "cuda" and precision != "no":
        torch.set_float32_matmul_precision("high")  # TF32 for what stays in float32, as cuDNN's convolutions have it
    launched = launched_processes()
    patience = InitProcessGroupKwargs(timeout=timedelta(days=1))  # one that waits for another's pictures is not stuck
    on_cpu = launched > 1 and not torch.accelerator.is_available()  # where accelerate would let each process be alone
    try:
        accelerator = Accelerator(mixed_precision=precision, cpu=on_cpu, kwargs_handlers=[patience])
    except ValueError as error:
        if launched > 1:
            raise UserError(f"{launched} processes were started together and cannot meet ({error}); start them by torchrun") from error
        raise UserError(f"mixed_precision {precision} cannot be used here: {error}") from error
    if accelerator.num_processes != max(launched, 1) and launched > 1:
        raise UserError(
            f"{launched} processes were started together, but this one has met {accelerator.num_processes - 1} others: each would train "
            "alone and write the same files; start them by torchrun, or start one"
        )
    return accelerator


def launched_processes() -> int:
    """How many processes a launcher (torchrun, accelerate, mpirun, srun) says that it has started together; 1 without one."""
    return max(int(text) for name in LAUNCHERS if (text := os.environ.get(name, "1")).isdecimal())


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


def upload(values: Tensor | Sequence[float], device: torch.device | str) -> Tensor:
    """Values on the device, without a wait for it: a copy from pinned memory is only put in its queue."""
    tensor = values if isinstance(values, Tensor) else torch.tensor(values)
    return (tensor.pin_memory() if torch.device(device).type == "cuda" else tensor).to(device, non_blocking=True)


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
    mean = _reduce(flat, accelerator, "mean")
    for grad, part in zip(grads, mean.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(part.view_as(grad))


def any_process(wanted: bool, accelerator: Accelerator) -> bool:
    """Whether any process of the run wants something, so that all do it together."""
    if accelerator.num_processes == 1:
        return wanted
    return bool(_reduce(torch.tensor(float(wanted), device=accelerator.device), accelerator, "sum") > 0)


def _reduce(tensor: Tensor, accelerator: Accelerator, reduction: str) -> Tensor:
    try:
        reduced = accelerator.reduce(tensor, reduction=reduction)
    except RuntimeError as error:  # the connection to a process that has ended
        raise UserError(
            f"another process of this run does not answer any more ({str(error).splitlines()[0]}); its own last words say why; the same "
            "command with --resume auto goes on from the last state"
        ) from error
    assert isinstance(reduced, Tensor)
    return reduced


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
