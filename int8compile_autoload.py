"""Lets transformers and diffusers load int8 models in programs that do not import int8compile.

Neither library looks for plugins. PyTorch does: `import torch` calls the functions of the entry-point group
`torch.backends`, unless TORCH_DEVICE_BACKEND_AUTOLOAD is 0. `install` is one of them. It waits for the tables in which
the libraries look up the quantization method of a config.json, and enters `int8compile` there. The package is imported
only when a program loads an int8 model, so this module must stay outside of it and import little.

PYTEST_DONT_REWRITE: `import torch` may come before pytest, which warns of modules that it cannot rewrite any more.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
import types
from collections.abc import Sequence
from typing import Any

# The quantization method that config.json names.
METHOD = "int8compile"
# A library's module with the table of quantization configs, and the module of int8compile for that library.
TABLES = {
    "transformers.quantizers.auto": "int8compile.integrations.transformers",
    "diffusers.quantizers.auto": "int8compile.integrations.diffusers",
}
# After these modules a table may be there that was not before. The libraries' models count too: where importing a table
# is what imports torch, the import of the table has begun too early to be seen.
_AWAITED = {*TABLES, "transformers.modeling_utils", "diffusers.models.modeling_utils"}


def install() -> None:
    """Enter int8compile in the tables of transformers and diffusers, now or once they have been imported."""
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder())
    _enter()


def _enter() -> None:
    for name, module in TABLES.items():
        table = getattr(sys.modules.get(name), "AUTO_QUANTIZATION_CONFIG_MAPPING", None)
        if table is not None:
            table.setdefault(METHOD, type("Int8CompileConfig", (Deferred,), {"module": module}))


class Deferred:
    """Stands for `Int8CompileConfig` until a model needs it; importing that module replaces it in the table.

    Attributes:
        module: The module to import.
    """

    module: str

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Return an `Int8CompileConfig`."""
        return cls._real()(*args, **kwargs)

    @classmethod
    def from_dict(cls, *args: Any, **kwargs: Any) -> Any:
        """Return the `Int8CompileConfig` of an entry in a config.json."""
        return cls._real().from_dict(*args, **kwargs)

    @classmethod
    def _real(cls) -> Any:
        return importlib.import_module(cls.module).Int8CompileConfig


class Finder:
    """Finds the awaited modules as the other finders do, and has `_enter` called after they have run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return the specification of an awaited module, None for any other."""
        if fullname not in _AWAITED:
            return None
        for finder in sys.meta_path:
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec: importlib.machinery.ModuleSpec | None = find and find(fullname, path, target)
            if spec is not None:
                # Another kind of loader stays as it is: the model then needs the import of int8compile.
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = Loader(spec.loader)  # type: ignore[assignment]
                return spec
        return None


class Loader:
    """Loads a module as another loader does, which takes its place when the module runs, and calls `_enter` then."""

    def __init__(self, loader: Any) -> None:
        self._other = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._other, name)

    def exec_module(self, module: Any) -> None:
        """Run a module."""
        module.__spec__.loader = module.__loader__ = self._other
        self._other.exec_module(module)
        _enter()
