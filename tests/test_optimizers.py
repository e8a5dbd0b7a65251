import copy
import io
import logging
import math
import sys

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from library.errors import UserError
from library.settings.shared import OptimizerConfig
from library.training.optimizers import (
    OPTIMIZERS,
    SCHEDULES,
    check_optimizer,
    create_optimizer,
    create_scheduler,
    evaluating,
    is_schedule_free,
    optimizer_eval_mode,
    optimizer_train_mode,
    own_settings,
    warmup_steps,
)

EXTRA_SCHEDULE_ARGS = {
    "warmup_stable_decay": ("num_decay_steps=4",),
    "cosine_with_min_lr": ("min_lr_rate=0.1",),
    "piecewise_constant": ("step_rules='1:4,0.5'",),
}
pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


def config_of(name: str, **values) -> OptimizerConfig:
    rate = 1.0 if name in OPTIMIZERS and OPTIMIZERS[name].finds_learning_rate else 1e-2
    return OptimizerConfig(**{"optimizer_type": name, "learning_rate": rate, **values})


def start() -> torch.nn.Parameter:
    """8192 numbers: enough for bitsandbytes to really keep 8-bit state (it takes 4096 and more)."""
    return torch.nn.Parameter(torch.randn(64, 128, generator=torch.Generator().manual_seed(0)))


def step(optimizer: Optimizer, param: Tensor) -> None:
    """One step on the quadratic |p - 3|^2 / 2."""
    param.grad = param.detach() - 3
    optimizer.step()
    optimizer.zero_grad()


def loss_of(param: Tensor) -> float:
    return float((param.detach() - 3).square().mean() / 2)


def sgd(rate: float = 1.0) -> Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)


def error_of(config: OptimizerConfig, params: list | None = None) -> str:
    with pytest.raises(UserError) as caught:
        create_optimizer(config, params or [start()])
    return str(caught.value)


def schedule_error_of(num_training_steps: int = 10, **values) -> str:
    with pytest.raises(UserError) as caught:
        create_scheduler(OptimizerConfig(**values), sgd(), num_training_steps)
    return str(caught.value)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_lowers_a_quadratic(name: str):
    param = start()
    before = loss_of(param)
    optimizer = create_optimizer(config_of(name), [param])
    for _ in range(10):
        step(optimizer, param)
    with evaluating(optimizer):
        assert math.isfinite(loss_of(param)) and loss_of(param) < before


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_restored_state_gives_the_same_next_step(name: str):
    param = start()
    optimizer = create_optimizer(config_of(name), [param])
    for _ in range(3):
        step(optimizer, param)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    restored_param = copy.deepcopy(param)
    restored = create_optimizer(config_of(name), [restored_param])
    buffer.seek(0)
    restored.load_state_dict(torch.load(buffer, weights_only=False))
    before = param.detach().clone()
    for _ in range(2):
        step(optimizer, param)
        step(restored, restored_param)
    assert torch.equal(param, restored_param)
    assert not torch.equal(param, before)


def test_eight_bit_optimizers_keep_eight_bit_state():
    param = start()
    optimizer = create_optimizer(config_of("AdamW8bit"), [param])
    step(optimizer, param)
    assert optimizer.state[param]["state1"].dtype == torch.uint8


@pytest.mark.parametrize("given, expected", [("adamw8BIT", "AdamW8bit"), ("prodigy", "Prodigy"), ("", "AdamW"), ("LION", "Lion")])
def test_names_ignore_case(given: str, expected: str):
    assert type(create_optimizer(OptimizerConfig(optimizer_type=given), [start()])).__name__ == expected


def test_arguments_and_learning_rate_reach_the_optimizer():
    config = OptimizerConfig(learning_rate=0.5, optimizer_args=("weight_decay=0.25", "betas=(0.5, 0.75)", "amsgrad=True"))
    (group,) = create_optimizer(config, [start()]).param_groups
    assert (group["lr"], group["weight_decay"], group["betas"], group["amsgrad"]) == (0.5, 0.25, (0.5, 0.75), True)


def test_arguments_beat_the_row():
    config = OptimizerConfig(optimizer_type="SGDNesterov", optimizer_args=("momentum=0.5",))
    (group,) = create_optimizer(config, [start()]).param_groups
    assert (group["momentum"], group["nesterov"]) == (0.5, True)


def test_groups_keep_their_learning_rates():
    groups = [{"params": [start()], "lr": 0.5}, {"params": [start()]}]
    optimizer = create_optimizer(OptimizerConfig(learning_rate=0.25), groups)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.25]
    assert "lr" not in groups[1]


def test_a_dotted_class():
    optimizer = create_optimizer(OptimizerConfig(optimizer_type="torch.optim.RMSprop", optimizer_args=("alpha=0.5",)), [start()])
    assert isinstance(optimizer, torch.optim.RMSprop) and optimizer.param_groups[0]["alpha"] == 0.5


def test_mistakes_in_the_optimizer():
    def message(name: str, *args: str) -> str:
        return error_of(OptimizerConfig(optimizer_type=name, optimizer_args=args))

    assert message("AdamW9bit").startswith("optimizer_type is 'AdamW9bit', but it must be one of AdamW, AdamW8bit,")
    assert message("AdamW9bit").endswith("or package.module.Class (did you mean 'AdamW8bit'?)")
    assert message("torch.optim.Nothing") == (
        "optimizer_type torch.optim.Nothing: the module torch.optim has no Nothing; check the name, or update the package torch"
    )
    assert message("no_such_package.Lion").endswith("try: pip install no_such_package")
    assert message("torch.nn.Linear") == "optimizer_type torch.nn.Linear is not a torch.optim.Optimizer; name an optimizer class"
    assert message("AdamW", "beta=0.1").startswith("optimizer_args has 'beta', but optimizer_type AdamW takes lr, betas, eps,")
    assert message("AdamW", "beta=0.1").endswith("(did you mean 'betas'?)")
    assert message("AdamW", "weight_decay=abc") == (
        "optimizer_args has weight_decay=abc, but a value must be a Python literal: a number, True, False, None, (0.9, 0.99), or 'text'"
    )
    assert message("AdamW", "weight_decay=-1") == "optimizer_type AdamW refuses its arguments: Invalid weight_decay value: -1"


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "lion_pytorch", None)
    message = error_of(OptimizerConfig(optimizer_type="Lion"))
    assert message.startswith("optimizer_type Lion needs lion_pytorch.Lion, which cannot be imported (")
    assert message.endswith("); try: pip install lion-pytorch")


def test_a_config_can_be_refused_before_there_are_parameters():
    with pytest.raises(UserError, match="optimizer_args has 'beta'"):
        check_optimizer(OptimizerConfig(optimizer_args=("beta=1",)), 10)
    with pytest.raises(UserError, match="lr_scheduler is 'x'"):
        check_optimizer(OptimizerConfig(lr_scheduler="x"), 10)
    check_optimizer(OptimizerConfig(lr_scheduler="linear"), 10)


@pytest.mark.parametrize("name", ["Prodigy", "DAdaptAdam"])
def test_optimizers_that_find_the_rate_want_one_and_near_1(name: str, caplog: pytest.LogCaptureFixture):
    groups = [{"params": [start()], "lr": 1.0}, {"params": [start()], "lr": 0.5}]
    assert (
        error_of(config_of(name), groups)
        == f"{name} takes one learning rate for all, but got 0.5, 1.0; leave out unet_lr and text_encoder_lr"
    )
    create_optimizer(config_of(name), [{"params": [start()], "lr": 1.0}, {"params": [start()], "lr": 0.0}])
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        create_optimizer(OptimizerConfig(optimizer_type=name), [start()])
    assert caplog.messages == [f"{name} finds the learning rate and multiplies it with learning_rate = 0.0001; use 1.0"]


def test_adafactor_chooses_its_rate_unless_told_not_to():
    groups = [{"params": [start()], "lr": 0.5}]
    for args in ((), ("warmup_init=True",), ("relative_step=False", "warmup_init=True")):
        (group,) = create_optimizer(OptimizerConfig(optimizer_type="Adafactor", optimizer_args=args), groups).param_groups
        assert group["lr"] is None and group["relative_step"] is True
    args = ("relative_step=False", "scale_parameter=False")
    (group,) = create_optimizer(
        OptimizerConfig(optimizer_type="Adafactor", optimizer_args=args, learning_rate=0.25), [start()]
    ).param_groups
    assert group["lr"] == 0.25 and group["relative_step"] is False


@pytest.mark.parametrize("name", ["AdamWScheduleFree", "SGDScheduleFree", "RAdamScheduleFree"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_schedule_free_weights_are_switched_and_come_back(name: str, wrapped: bool, accelerator: Accelerator):
    param = start()
    raw = create_optimizer(config_of(name, learning_rate=0.1), [param])
    for _ in range(8):
        step(raw, param)
    optimizer = accelerator.prepare(raw) if wrapped else raw
    assert is_schedule_free(optimizer)
    in_training = param.detach().clone()
    with pytest.raises(RuntimeError, match="stop"), evaluating(optimizer):
        assert not torch.allclose(param, in_training, atol=1e-4)
        raise RuntimeError("stop")
    assert torch.allclose(param, in_training, atol=1e-5)


@pytest.mark.parametrize("wrapped", [False, True])
def test_other_optimizers_have_one_mode(wrapped: bool, accelerator: Accelerator):
    param = start()
    raw = create_optimizer(OptimizerConfig(), [param])
    optimizer = accelerator.prepare(raw) if wrapped else raw
    before = param.detach().clone()
    optimizer_eval_mode(optimizer)
    optimizer_train_mode(optimizer)
    assert not is_schedule_free(optimizer) and torch.equal(param, before)


def rates_of(config: OptimizerConfig, steps: int) -> list[float]:
    optimizer = sgd(config.learning_rate)
    scheduler = create_scheduler(config, optimizer, steps)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize(
    "name, values, expected",
    [
        ("constant", {}, lambda t: 1.0),
        ("constant_with_warmup", {"lr_warmup_steps": 4}, lambda t: min(1.0, t / 4)),
        ("linear", {"lr_warmup_steps": 0.2}, lambda t: t / 4 if t < 4 else (20 - t) / 16),
        ("cosine", {}, lambda t: (1 + math.cos(math.pi * t / 20)) / 2),
        ("cosine_with_restarts", {"lr_scheduler_args": ("num_cycles=2",)}, lambda t: (1 + math.cos(math.pi * (t % 10) / 10)) / 2),
        ("polynomial", {"lr_scheduler_args": ("power=2.0", "lr_end=0")}, lambda t: (1 - t / 20) ** 2),
        ("inverse_sqrt", {"lr_scheduler_args": ("timescale=4",)}, lambda t: 1 / math.sqrt((t + 4) / 4)),
        ("cosine_with_min_lr", {"lr_scheduler_args": ("min_lr=0.5",)}, lambda t: 0.5 + (1 + math.cos(math.pi * t / 20)) / 4),
        (
            "warmup_stable_decay",
            {"lr_warmup_steps": 5, "lr_scheduler_args": ("num_decay_steps=10", "decay_type='linear'")},
            lambda t: t / 5 if t < 5 else min(1.0, (20 - t) / 10),
        ),
        (
            "warmup_stable_decay",  # sd-scripts: below 1, a share of all steps
            {"lr_scheduler_args": ("num_decay_steps=0.5", "decay_type='linear'")},
            lambda t: min(1.0, (20 - t) / 10),
        ),
        (
            "piecewise_constant",
            {"lr_scheduler_args": ("step_rules='1:10,0.1:15,0.01'",)},
            lambda t: 1 if t < 10 else 0.1 if t < 15 else 0.01,
        ),
        ("torch.optim.lr_scheduler.ExponentialLR", {"lr_scheduler_args": ("gamma=0.5",)}, lambda t: 0.5**t),
        ("ExponentialLR", {"lr_scheduler_args": ("gamma=0.5",)}, lambda t: 0.5**t),
    ],
)
def test_schedules_follow_their_formulas(name: str, values: dict, expected):
    rates = rates_of(OptimizerConfig(lr_scheduler=name, learning_rate=1.0, **values), 20)
    assert rates == pytest.approx([expected(t) for t in range(20)])


def test_the_formulas_cover_every_row():
    (mark,) = (mark for mark in test_schedules_follow_their_formulas.pytestmark if mark.name == "parametrize")  # type: ignore[attr-defined]
    assert {row[0] for row in mark.args[1]} >= SCHEDULES.keys() - {"adafactor"}


@pytest.mark.parametrize("name", sorted(SCHEDULES.keys() - {"adafactor"}))
def test_a_restored_schedule_goes_on(name: str):
    config = OptimizerConfig(lr_scheduler=name, learning_rate=1.0, lr_scheduler_args=EXTRA_SCHEDULE_ARGS.get(name, ()))
    expected = rates_of(config, 10)
    optimizer = sgd()
    scheduler = create_scheduler(config, optimizer, 10)
    for _ in range(6):
        optimizer.step()
        scheduler.step()
    saved = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
    restored_optimizer = sgd()
    restored = create_scheduler(config, restored_optimizer, 10)
    restored_optimizer.load_state_dict(saved[0])
    restored.load_state_dict(saved[1])
    rates = []
    for _ in range(4):
        rates.append(restored_optimizer.param_groups[0]["lr"])
        restored_optimizer.step()
        restored.step()
    assert rates == pytest.approx(expected[6:])


def test_a_run_with_other_settings_goes_on_by_its_own():
    def made(rate: float, steps: int, *args: str) -> tuple[Optimizer, LRScheduler]:
        config = OptimizerConfig(lr_scheduler="cosine", learning_rate=rate, optimizer_args=args)
        optimizer = create_optimizer(config, [start()])
        return optimizer, create_scheduler(config, optimizer, steps)

    optimizer, scheduler = made(1.0, 10)
    for _ in range(6):
        optimizer.step()
        scheduler.step()
    longer, schedule = made(0.5, 20, "betas=(0.8, 0.9)", "weight_decay=0.2")
    with own_settings(longer, schedule):
        longer.load_state_dict(optimizer.state_dict())
        schedule.load_state_dict(scheduler.state_dict())
    (group,) = longer.param_groups
    expected = rates_of(OptimizerConfig(lr_scheduler="cosine", learning_rate=0.5), 20)
    assert group["lr"] == schedule.get_last_lr()[0] == pytest.approx(expected[6])
    assert group["betas"] == (0.8, 0.9) and group["weight_decay"] == 0.2
    longer.step()
    schedule.step()
    assert group["lr"] == pytest.approx(expected[7])


def test_a_warmup_longer_than_the_run_is_warned_of_once(caplog: pytest.LogCaptureFixture):
    config = OptimizerConfig(lr_scheduler="cosine", lr_warmup_steps=11)
    check_optimizer(config, 10)
    create_scheduler(config, sgd(), 10)
    assert caplog.messages == [
        "lr_warmup_steps is 11, but the run has 10 steps, so the learning rate never gets to its height; lower lr_warmup_steps"
    ]


def test_schedules_scale_every_group():
    params = [torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))]
    optimizer = torch.optim.SGD([{"params": [params[0]], "lr": 1.0}, {"params": [params[1]], "lr": 0.5}])
    scheduler = create_scheduler(OptimizerConfig(lr_scheduler="linear"), optimizer, 4)
    optimizer.step()
    scheduler.step()
    assert scheduler.get_last_lr() == pytest.approx([0.75, 0.375])


def test_mistakes_in_the_schedule():
    message = schedule_error_of(lr_scheduler="cosin")
    assert message.startswith("lr_scheduler is 'cosin', but it must be one of constant, constant_with_warmup, linear, cosine,")
    assert message.endswith("or package.module.Class (did you mean 'cosine'?)")
    assert schedule_error_of(lr_warmup_steps=3) == (
        "lr_warmup_steps is 3, but lr_scheduler constant has no warmup; try constant_with_warmup"
    )
    assert schedule_error_of(lr_scheduler="cosine", lr_scheduler_args=("cycles=3",)) == (
        "lr_scheduler_args has 'cycles', but lr_scheduler cosine takes num_warmup_steps, num_training_steps, num_cycles, last_epoch"
        " (did you mean 'num_cycles'?)"
    )
    assert schedule_error_of(lr_scheduler="warmup_stable_decay") == (
        "lr_scheduler warmup_stable_decay refuses its arguments: "
        "get_wsd_schedule() missing 1 required positional argument: 'num_decay_steps'"
    )
    assert schedule_error_of(lr_scheduler="torch.optim.lr_scheduler.ReduceLROnPlateau") == (
        "lr_scheduler torch.optim.lr_scheduler.ReduceLROnPlateau is not a schedule over steps; "
        "name a subclass of torch.optim.lr_scheduler.LRScheduler"
    )
    assert schedule_error_of(lr_scheduler="adafactor").startswith("lr_scheduler adafactor only reports the rate")


@pytest.mark.parametrize("given, steps", [(0, 0), (0.1, 50), (0.0011, 0), (1, 1), (30.0, 30)])
def test_warmup_is_steps_or_a_share(given: float, steps: int):
    assert warmup_steps(OptimizerConfig(lr_warmup_steps=given), 500) == steps


@pytest.mark.parametrize("name", ["AdamWScheduleFree", "Adafactor"])
def test_optimizers_that_schedule_themselves_ignore_the_schedule(name: str, caplog: pytest.LogCaptureFixture):
    for values, warns in ({}, False), ({"lr_scheduler": "cosine"}, True), ({"lr_warmup_steps": 3}, True):
        caplog.clear()
        param = start()
        config = config_of(name, **values)
        optimizer = create_optimizer(config, [param])
        scheduler = create_scheduler(config, optimizer, 10)
        assert caplog.messages == ([f"{name} keeps its own schedule; lr_scheduler and lr_warmup_steps do nothing"] if warns else [])
        for _ in range(3):
            param.grad = param.detach() - 3
            optimizer.step()
            scheduler.step()
        assert scheduler.get_last_lr()[0] > 0
        if name == "AdamWScheduleFree":
            assert scheduler.get_last_lr() == [config.learning_rate]


def test_adafactor_steps_the_same_with_its_reporting_schedule():
    results = []
    for with_schedule in (False, True):
        param = start()
        config = config_of("Adafactor")
        optimizer = create_optimizer(config, [param])
        scheduler = create_scheduler(config, optimizer, 5) if with_schedule else None
        for _ in range(5):
            param.grad = param.detach() - 3
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
        results.append(param)
    assert torch.equal(*results)
