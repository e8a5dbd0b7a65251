"""Optimizers and learning-rate schedules by the names that sd-scripts uses, or by the dotted name of any class.

An optimizer is one entry of `OPTIMIZERS`, a schedule one of `SCHEDULES`; the tests run every entry.
"""

import ast
import importlib
import inspect
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from library.errors import UserError
from library.settings.option_values import did_you_mean
from library.settings.options import key_value_pairs
from library.settings.registry import Registry
from library.settings.shared import OptimizerConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class OptimizerRow:
    """One optimizer.

    Attributes:
        path: package.module.Class, imported on use.
        package: what to pip install.
        defaults: arguments that optimizer_args may override.
        finds_learning_rate: it estimates the step size, and the learning rate is a factor near 1, one for all groups.
    """

    path: str
    package: str
    defaults: Mapping[str, object] = field(default_factory=dict)
    finds_learning_rate: bool = False


OPTIMIZERS: Registry[OptimizerRow] = Registry("optimizer_type")
OPTIMIZERS.register("AdamW")(OptimizerRow(path="torch.optim.AdamW", package="torch"))
for _name in ("AdamW8bit", "PagedAdamW", "PagedAdamW8bit", "PagedAdamW32bit", "Adam8bit", "Lion8bit", "PagedLion8bit"):
    OPTIMIZERS.register(_name)(OptimizerRow(path=f"bitsandbytes.optim.{_name}", package="bitsandbytes"))
OPTIMIZERS.register("Lion")(OptimizerRow(path="lion_pytorch.Lion", package="lion-pytorch"))
OPTIMIZERS.register("SGDNesterov")(OptimizerRow(path="torch.optim.SGD", package="torch", defaults={"momentum": 0.9, "nesterov": True}))
OPTIMIZERS.register("Prodigy")(OptimizerRow(path="prodigyopt.Prodigy", package="prodigyopt", finds_learning_rate=True))
OPTIMIZERS.register("Adafactor")(
    OptimizerRow(path="transformers.optimization.Adafactor", package="transformers", defaults={"relative_step": True})
)
OPTIMIZERS.register("SGDNesterov8bit")(
    OptimizerRow(path="bitsandbytes.optim.SGD8bit", package="bitsandbytes", defaults={"momentum": 0.9, "nesterov": True})
)
for _name in ("AdamWScheduleFree", "SGDScheduleFree", "RAdamScheduleFree"):
    OPTIMIZERS.register(_name)(OptimizerRow(path=f"schedulefree.{_name}", package="schedulefree"))
for _name in ("DAdaptAdaGrad", "DAdaptAdam", "DAdaptAdan", "DAdaptLion", "DAdaptSGD"):
    OPTIMIZERS.register(_name)(OptimizerRow(path=f"dadaptation.{_name}", package="dadaptation", finds_learning_rate=True))
for _name, _class in {
    "DAdaptation": "DAdaptAdamPreprint",
    "DAdaptAdamPreprint": "DAdaptAdamPreprint",
    "DAdaptAdanIP": "DAdaptAdanIP",
}.items():
    OPTIMIZERS.register(_name)(OptimizerRow(path=f"dadaptation.experimental.{_class}", package="dadaptation", finds_learning_rate=True))

SCHEDULES: Registry[str] = Registry("lr_scheduler")  # package.module.function of an optimizer that returns an LRScheduler
for _name, _path in {
    "constant": "transformers.get_constant_schedule",
    "constant_with_warmup": "transformers.get_constant_schedule_with_warmup",
    "linear": "transformers.get_linear_schedule_with_warmup",
    "cosine": "transformers.get_cosine_schedule_with_warmup",
    "cosine_with_restarts": "transformers.get_cosine_with_hard_restarts_schedule_with_warmup",
    "polynomial": "transformers.get_polynomial_decay_schedule_with_warmup",
    "inverse_sqrt": "transformers.get_inverse_sqrt_schedule",
    "cosine_with_min_lr": "transformers.get_cosine_with_min_lr_schedule_with_warmup",
    "warmup_stable_decay": "transformers.get_wsd_schedule",
    "piecewise_constant": "diffusers.optimization.get_piecewise_constant_schedule",
    "adafactor": "transformers.optimization.AdafactorSchedule",
}.items():
    SCHEDULES.register(_name)(_path)


def create_optimizer(config: OptimizerConfig, params: Iterable[Tensor] | Iterable[dict[str, Any]]) -> Optimizer:
    """The optimizer that the config names, in training mode.

    Args:
        params: parameters, or groups ({"params": ..., "lr": ...}; a group without "lr" takes config.learning_rate).

    Raises:
        UserError: an unknown name, a missing package, or arguments that the optimizer does not take.
    """
    name, row = _optimizer_row(config.optimizer_type)
    optimizer_class = _import_object(row.path, f"optimizer_type {name}", row.package)
    if not (inspect.isclass(optimizer_class) and issubclass(optimizer_class, Optimizer)):
        raise UserError(f"optimizer_type {name} is not a torch.optim.Optimizer; name an optimizer class")
    given = _parse_arguments("optimizer_args", config.optimizer_args)
    _check_arguments("optimizer_args", given, f"optimizer_type {name}", optimizer_class)
    kwargs: dict[str, Any] = {"lr": config.learning_rate, **row.defaults, **given}

    entries = list(params)
    assert entries, "there is nothing to train"
    groups = [dict(entry) for entry in entries if isinstance(entry, dict)] or [{"params": entries}]
    if name == "Adafactor" and (kwargs["relative_step"] or kwargs.get("warmup_init")):
        # as sd-scripts: warmup_init implies relative_step, which chooses the rate itself and refuses any that is given
        kwargs |= {"lr": None, "relative_step": True}
        groups = [{**group, "lr": None} for group in groups]
    if row.finds_learning_rate:
        _check_one_learning_rate(name, {group.get("lr", kwargs["lr"]) for group in groups})
    try:
        optimizer = optimizer_class(groups, **kwargs)
    except (TypeError, ValueError) as error:
        raise UserError(f"optimizer_type {name} refuses its arguments: {error}") from error
    optimizer_train_mode(optimizer)
    return optimizer


def create_scheduler(config: OptimizerConfig, optimizer: Optimizer, num_training_steps: int) -> LRScheduler:
    """The learning-rate schedule that the config names; step it once after every optimizer step.

    An optimizer that schedules itself (schedule-free, or Adafactor's relative step) keeps its own schedule, with a warning
    when the config names another.

    Raises:
        UserError: an unknown name, or arguments that the schedule does not take or lacks.
    """
    num_warmup_steps = warmup_steps(config, num_training_steps)
    relative_step = any(group.get("relative_step") for group in optimizer.param_groups)
    if relative_step or is_schedule_free(optimizer):
        if config.lr_scheduler not in ("constant", "adafactor") or num_warmup_steps:
            logger.warning("%s keeps its own schedule; lr_scheduler and lr_warmup_steps do nothing", config.optimizer_type)
        name = "adafactor" if relative_step else "constant"
        arguments = {"initial_lr": config.learning_rate} if relative_step else {}
        return _import_object(SCHEDULES[name], f"lr_scheduler {name}", "transformers")(optimizer, **arguments)

    name, path = _schedule_path(config.lr_scheduler)
    if name == "adafactor":
        raise UserError("lr_scheduler adafactor only reports the rate that Adafactor's relative step chooses; use another lr_scheduler")
    make = _import_object(path, f"lr_scheduler {name}", path.partition(".")[0])
    accepted = inspect.signature(make).parameters
    if num_warmup_steps and "num_warmup_steps" not in accepted:
        raise UserError(f"lr_warmup_steps is {config.lr_warmup_steps}, but lr_scheduler {name} has no warmup; try constant_with_warmup")
    given = _parse_arguments("lr_scheduler_args", config.lr_scheduler_args)
    _check_arguments("lr_scheduler_args", given, f"lr_scheduler {name}", make)
    decay = given.get("num_decay_steps")
    if isinstance(decay, float):
        given["num_decay_steps"] = _steps(decay, num_training_steps)
    if num_warmup_steps > num_training_steps:
        logger.warning(
            "lr_warmup_steps is %d, but the run has %d steps, so the learning rate never gets to its height; lower lr_warmup_steps",
            num_warmup_steps,
            num_training_steps,
        )
    kwargs = {"num_warmup_steps": num_warmup_steps, "num_training_steps": num_training_steps}
    kwargs = {key: value for key, value in kwargs.items() if key in accepted} | given
    try:
        scheduler = make(optimizer, **kwargs)
    except (TypeError, ValueError) as error:
        raise UserError(f"lr_scheduler {name} refuses its arguments: {error}") from error
    if not isinstance(scheduler, LRScheduler) or isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise UserError(f"lr_scheduler {name} is not a schedule over steps; name a subclass of torch.optim.lr_scheduler.LRScheduler")
    return scheduler


def check_optimizer(config: OptimizerConfig, num_training_steps: int) -> None:
    """Refuse what `create_optimizer` and `create_scheduler` would refuse, before a model is loaded: make both for one number."""
    logger.disabled = True  # what they warn of is said when they are made for the training
    try:
        create_scheduler(config, create_optimizer(config, [torch.nn.Parameter(torch.zeros(1))]), num_training_steps)
    finally:
        logger.disabled = False


def warmup_steps(config: OptimizerConfig, num_training_steps: int) -> int:
    """lr_warmup_steps as a number of steps: below 1 it is a share of all steps."""
    return _steps(config.lr_warmup_steps, num_training_steps)


@contextmanager
def own_settings(optimizer: Optimizer, scheduler: LRScheduler) -> Iterator[None]:
    """Around the loading of a state: rates and arguments are then those that this run's settings ask for at its step, not the saved ones.

    They differ where the run has become longer, or its settings others. A schedule that steps from one rate to the next, as some classes
    of torch do, goes on from the saved rate.
    """
    names = inspect.signature(type(optimizer)).parameters.keys() - {"params", "lr"}  # what else a group holds is the optimizer's state
    arguments = [{name: group[name] for name in names & group.keys()} for group in optimizer.param_groups]
    base_rates = scheduler.base_lrs
    yield
    for group, own in zip(optimizer.param_groups, arguments, strict=True):
        group.update(own)
    if isinstance(scheduler, LambdaLR):
        scheduler.base_lrs = base_rates
        rates = [base * factor(scheduler.last_epoch) for base, factor in zip(base_rates, scheduler.lr_lambdas, strict=True)]
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        scheduler._last_lr = rates


def _steps(given: float, num_training_steps: int) -> int:
    return math.floor(given * num_training_steps) if given < 1 else int(given)


def is_schedule_free(optimizer: object) -> bool:
    """Whether the weights must be switched between training and evaluation (arXiv 2405.15682)."""
    return callable(getattr(getattr(optimizer, "optimizer", optimizer), "eval", None))  # accelerate's wrapper always has eval


def optimizer_train_mode(optimizer: object) -> None:
    """Put a schedule-free optimizer's weights where gradients are taken; nothing for the others."""
    if is_schedule_free(optimizer):
        optimizer.train()  # type: ignore[attr-defined]


def optimizer_eval_mode(optimizer: object) -> None:
    """Put a schedule-free optimizer's weights where they are to be used and saved; nothing for the others."""
    if is_schedule_free(optimizer):
        optimizer.eval()  # type: ignore[attr-defined]


@contextmanager
def evaluating(optimizer: object) -> Iterator[None]:
    """The weights as they are to be used and saved, then back to training."""
    optimizer_eval_mode(optimizer)
    try:
        yield
    finally:
        optimizer_train_mode(optimizer)


def _optimizer_row(given: str) -> tuple[str, OptimizerRow]:
    by_lower_case = {name.lower(): name for name in OPTIMIZERS}
    name = by_lower_case.get((given or "AdamW").lower())  # sd-scripts writes "" for AdamW
    if name is not None:
        return name, OPTIMIZERS[name]
    if "." in given:
        return given, OptimizerRow(path=given, package=given.partition(".")[0])
    raise UserError(_unknown("optimizer_type", given, OPTIMIZERS))


def _schedule_path(given: str) -> tuple[str, str]:
    name = given.lower()
    if name in SCHEDULES:
        return name, SCHEDULES[name]
    if "." in given:
        return given, given
    if hasattr(torch.optim.lr_scheduler, given):
        return given, f"torch.optim.lr_scheduler.{given}"
    raise UserError(_unknown("lr_scheduler", given, SCHEDULES))


def _unknown(option: str, given: str, known: Iterable[str]) -> str:
    return f"{option} is {given!r}, but it must be one of {', '.join(known)}, or package.module.Class{did_you_mean(given, known)}"


def _import_object(path: str, what: str, package: str) -> Any:
    """The object called package.module.name; UserError when it cannot be had."""
    module_name, _, name = path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(f"{what} needs {path}, which cannot be imported ({error}); try: pip install {package}") from error
    if not hasattr(module, name):
        raise UserError(f"{what}: the module {module_name} has no {name}; check the name, or update the package {package}")
    return getattr(module, name)


def _parse_arguments(option: str, pairs: tuple[str, ...]) -> dict[str, Any]:
    """ "key=value" words, with the values as Python literals."""
    arguments = {}
    for key, text in key_value_pairs(option, pairs).items():
        try:
            arguments[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            raise UserError(
                f"{option} has {key}={text}, but a value must be a Python literal: a number, True, False, None, (0.9, 0.99), or 'text'"
            ) from None
    return arguments


def _check_arguments(option: str, given: Mapping[str, object], what: str, target: Callable[..., Any]) -> None:
    """Refuse names that `target` does not take."""
    parameters = inspect.signature(target).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    allowed = [parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_POSITIONAL][1:]
    for name in given:
        if name not in allowed:
            raise UserError(f"{option} has {name!r}, but {what} takes {', '.join(allowed)}{did_you_mean(name, allowed)}")


def _check_one_learning_rate(name: str, rates: set[float]) -> None:
    rates = rates - {0}  # a group at rest
    if len(rates) > 1:
        shown = ", ".join(map(str, sorted(rates)))
        raise UserError(f"{name} takes one learning rate for all, but got {shown}; leave out unet_lr and text_encoder_lr")
    if rates and max(rates) <= 0.1:
        logger.warning("%s finds the learning rate and multiplies it with learning_rate = %g; use 1.0", name, max(rates))
