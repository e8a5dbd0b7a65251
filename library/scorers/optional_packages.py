"""Packages that only some scorers need: imported when one asks for them."""

import importlib
import sys
from types import ModuleType

import torch

from library.errors import UserError

_OPERATORS = ("nms", "qnms")  # those of torchvision's that its Python code looks up while it is imported
_libraries: list[torch.library.Library] = []  # an operator is known for as long as the library that defined it lives


def import_optional(name: str, pip_name: str) -> ModuleType:
    """Import a module of a package that is not among the requirements. Raises UserError, with its name for pip, if it is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(f"this needs the Python module {name}, and {error.name} is not installed; run: pip install {pip_name}") from error


def import_torchvision() -> ModuleType:
    """torchvision, also where its compiled part does not fit the build of torch: all but its own operators (nms, roi_align ...) works.

    PyPI's torchvision is compiled for CUDA. Beside a torch for the CPU its library does not load, its operators stay undefined, and the
    Python code that looks them up ends the import. So they are declared here, and the import tried once more.
    """
    try:
        return import_optional("torchvision", "torchvision")
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")
    for operator in _OPERATORS:
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _libraries.append(library)
    return import_optional("torchvision", "torchvision")


def import_timm() -> ModuleType:
    """timm, which imports torchvision."""
    import_torchvision()
    return import_optional("timm", "timm")


def import_onnx2torch() -> ModuleType:
    """onnx2torch, which imports torchvision."""
    import_torchvision()
    return import_optional("onnx2torch", "onnx2torch")
