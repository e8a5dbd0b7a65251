import os
from types import SimpleNamespace

import accelerate
import pytest
import torch

from library.errors import UserError
from library.settings.shared import TrainingConfig
from library.training import runtime
from library.training.runtime import (
    all_reduce_grads,
    any_process,
    choose_precision,
    create_accelerator,
    describe_device,
    free_cores,
    generator,
    set_num_threads,
    weight_dtype,
)


@pytest.fixture(autouse=True)
def same_threads_after():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerator(precision: str):
    accelerator = create_accelerator(TrainingConfig(mixed_precision=precision, gradient_accumulation_steps=4))
    assert accelerator.mixed_precision == precision
    assert accelerator.gradient_accumulation_steps == 1


def test_a_precision_that_the_device_lacks(monkeypatch: pytest.MonkeyPatch):
    def refuse(**kwargs: object) -> None:
        raise ValueError("bf16 needs a supported device.")

    monkeypatch.setattr(accelerate, "Accelerator", refuse)
    with pytest.raises(UserError, match="^mixed_precision bf16 cannot be used here: bf16 needs a supported device.$"):
        create_accelerator(TrainingConfig(mixed_precision="bf16"))


def test_processes_that_do_not_meet_are_refused(monkeypatch: pytest.MonkeyPatch):
    """Not two runs that each believe to be alone, as torchrun on a machine without a GPU would start them."""
    given: dict = {}

    def alone(**kwargs: object) -> SimpleNamespace:
        given.update(kwargs)
        return SimpleNamespace(num_processes=1)

    monkeypatch.setattr(accelerate, "Accelerator", alone)
    for launcher in runtime.LAUNCHERS:
        with monkeypatch.context() as patch, pytest.raises(UserError, match="^2 processes were started together, but this one has met 0"):
            patch.setenv(launcher, "2")
            create_accelerator(TrainingConfig())
        assert given["cpu"] is not torch.accelerator.is_available()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert create_accelerator(TrainingConfig()).num_processes == 1 and given["cpu"] is False


def test_a_process_that_has_ended_is_one_sentence():
    def broken(flat: torch.Tensor, reduction: str) -> torch.Tensor:
        raise RuntimeError("Connection closed by peer [127.0.0.1]:1\nmore")

    accelerator = SimpleNamespace(num_processes=2, device="cpu", reduce=broken)
    with pytest.raises(UserError, match=r"^another process .* does not answer any more \(Connection closed .*:1\); .*--resume auto"):
        any_process(True, accelerator)  # type: ignore[arg-type]


def test_a_precision_that_nobody_chose_is_float32_on_a_cpu():
    assert create_accelerator(TrainingConfig()).mixed_precision == "no"


@pytest.mark.parametrize(
    ("asked", "launched", "has_bf16", "expected"),
    [
        (None, None, True, "bf16"),
        (None, "no", True, "bf16"),  # what accelerate launch says without a config
        (None, None, False, "fp16"),
        (None, "fp16", True, "fp16"),
        ("no", "fp16", True, "no"),
        ("bf16", None, False, "bf16"),
    ],
)
def test_the_precision_on_a_gpu(asked: str | None, launched: str | None, has_bf16: bool, expected: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if launched is not None:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    assert choose_precision(asked, torch.device("cuda")) == expected


@pytest.mark.parametrize(("precision", "on_gpu", "expected"), [(None, True, "high"), ("no", True, "highest"), (None, False, "highest")])
def test_tf32_is_for_a_gpu_on_which_nobody_asked_for_float32(precision: str | None, on_gpu: bool, expected: str, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(accelerate, "Accelerator", lambda **_: SimpleNamespace(num_processes=1))
    try:
        create_accelerator(TrainingConfig(mixed_precision=precision))
        assert torch.get_float32_matmul_precision() == expected
    finally:
        torch.set_float32_matmul_precision("highest")


def test_weight_dtype():
    assert [weight_dtype(name) for name in ("no", "float", "fp16", "bf16")] == [
        torch.float32,
        torch.float32,
        torch.float16,
        torch.bfloat16,
    ]


@pytest.mark.parametrize(
    "asked, environment, expected",
    [(None, None, 3), (2, None, 2), (8, None, 3), (2, "1", 2), (None, "1", 1)],
)
def test_threads(asked: int | None, environment: str | None, expected: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runtime, "free_cores", lambda: 3)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    torch.set_num_threads(1)
    if environment is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", environment)
    assert set_num_threads(asked) == expected == torch.get_num_threads()


def test_free_cores_are_those_of_this_process(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 5}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert free_cores() == 2
    monkeypatch.delattr(os, "sched_getaffinity")
    assert free_cores() == 7


def test_generators_are_told_apart_by_seed_and_stream():
    streams = [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, "0"), (0, "rollout"), (0, "rollout", 1), (2**63,)]
    draws = [torch.randint(2**62, (), generator=generator(*stream)).item() for stream in streams]
    assert len(set(draws)) == len(streams)
    again = [torch.randint(2**62, (), generator=generator(*stream)).item() for stream in streams]
    assert draws == again


def test_a_generator_is_the_same_on_every_machine():
    # the first 8 bytes of `printf '[7, "rollout", 0]' | sha256sum`
    assert generator(7, "rollout", 0).initial_seed() == 0xC5EC553113BECA75 >> 1


def test_gradients_are_averaged():
    params = [torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(4)), torch.zeros(1)]
    params[0].grad = torch.full((2, 3), 2.0)
    others = torch.cat([torch.full((6,), 4.0), torch.full((4,), 1.0)])
    fake = SimpleNamespace(num_processes=2, reduce=lambda flat, reduction: {"mean": (flat + others) / 2}[reduction])
    all_reduce_grads(iter(params), fake)  # type: ignore[arg-type]
    assert torch.equal(params[0].grad, torch.full((2, 3), 3.0))
    assert torch.equal(params[1].grad, torch.full((4,), 0.5))
    assert params[2].grad is None


def test_one_process_keeps_its_gradients():
    param = torch.nn.Parameter(torch.zeros(2))
    all_reduce_grads([param], create_accelerator(TrainingConfig()))
    assert param.grad is None


def test_the_device_in_words():
    torch.set_num_threads(2)
    cpu = SimpleNamespace(device=torch.device("cpu"), mixed_precision="no", num_processes=1)
    assert describe_device(cpu) == "CPU (2 threads), float32, 1 process"  # type: ignore[arg-type]
    other = SimpleNamespace(device=torch.device("mps"), mixed_precision="fp16", num_processes=2)
    assert describe_device(other) == "mps, fp16, 2 processes"  # type: ignore[arg-type]
