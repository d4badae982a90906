"""Import modules under the names that they had before they moved into folders.

Importing an old name gives the module itself, not a copy, with a DeprecationWarning. Objects that were pickled under an
old name therefore get the current classes.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
import warnings
from collections.abc import Sequence

PACKAGE = __name__.partition(".")[0]
# Old and new names, without the package's.
MOVED = {
    "aot": "exporting.aot",
    "calibration": "tuning.calibration",
    "checkpoint": "stored.checkpoint",
    "cli": "app.cli",
    "convert": "stored.convert",
    "cpu.stub": "exporting.stub",
    "demo": "app.demo",
    "doctor": "app.doctor",
    "explain": "explaining",
    "export": "exporting.exporter",
    "models": "app.loading",
    "module_weight": "stored.module_weight",
    "modules": "stored.modules",
    "package": "exporting.package",
}


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds modules by their old names."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return the specification of an old name, None for any other."""
        package, _, old = fullname.partition(".")
        if package != PACKAGE or old not in MOVED:
            return None
        _warn(old)
        return importlib.machinery.ModuleSpec(fullname, self)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        """Return the module of the new name."""
        module = _module(spec.name.partition(".")[2])
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        """Restore the specification of the module, which has run already: the import has replaced it."""
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


class Package(types.ModuleType):
    """The package itself, with old names as attributes. Functions are not hidden by modules of their names."""

    def __getattr__(self, name: str) -> types.ModuleType:
        """Return a module by its old name."""
        if name not in MOVED:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        _warn(name)
        return _module(name)

    def __setattr__(self, name: str, value: object) -> None:
        """Set an attribute, as the import system does with a module in its package."""
        if not (name in MOVED and isinstance(value, types.ModuleType) and callable(vars(self).get(name))):
            super().__setattr__(name, value)


def _warn(old: str) -> None:
    message = f"{PACKAGE}.{old} is now {PACKAGE}.{MOVED[old]}; its old name will be removed"
    warnings.warn(message, DeprecationWarning, stacklevel=3)


def _module(old: str) -> types.ModuleType:
    return importlib.import_module(f"{PACKAGE}.{MOVED[old]}")


def install() -> None:
    """Install the finder of old names, in front of files that an older installation has left."""
    sys.meta_path.insert(0, Finder())
    sys.modules[PACKAGE].__class__ = Package
