"""Import timm without torchvision.

PyPI builds torchvision for CUDA only. timm uses it for images; its models do not need it.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from typing import Any

import pytest
from torch import nn


class _Name(type(nn.Module)):
    """A class that has every attribute: a member of an enumeration, or a function."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Module(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Name(name, (nn.Module,), {})


class _Torchvision(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds empty modules for torchvision; no object is an instance of their classes."""

    def find_spec(self, name: str, path: object, target: object = None) -> importlib.machinery.ModuleSpec | None:
        if name.split(".")[0] != "torchvision":
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None: ...


def timm() -> Any:
    """Return timm, imported beside a stand-in for torchvision; skip the test where timm is not installed."""
    if importlib.util.find_spec("torchvision") is not None or "timm" in sys.modules:
        return pytest.importorskip("timm")
    finder = _Torchvision()
    sys.meta_path.append(finder)
    try:
        return pytest.importorskip("timm")
    finally:
        # Other libraries ask whether torchvision is installed.
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
