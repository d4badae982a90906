"""Names that users import: the public names, and the former names of moved modules."""

from __future__ import annotations

import importlib
import pickle
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

import int8compile
from int8compile import Int8Linear, errors
from int8compile.moved import MOVED

# Removing or renaming one breaks programs.
PUBLIC = [
    "Advice",
    "BadWeightError",
    "Calibration",
    "CheckpointError",
    "ConfigError",
    "Evaluation",
    "ExportError",
    "FreedWeightError",
    "InputError",
    "Int8CompileError",
    "Int8Config",
    "Int8Embedding",
    "Int8Experts",
    "Int8Linear",
    "Int8Warning",
    "Int8WeightError",
    "KernelBuildError",
    "ModelError",
    "PackageError",
    "Report",
    "Site",
    "SkipReason",
    "advise",
    "calibrate",
    "dequantize_",
    "evaluate",
    "explain",
    "export",
    "inspect",
    "load",
    "load_exported",
    "memory_footprint",
    "quantize_",
    "refresh",
    "save",
]


def test_public_names() -> None:
    assert int8compile.__all__ == PUBLIC
    for name in PUBLIC:
        assert callable(getattr(int8compile, name))
        assert getattr(int8compile, name).__name__ == name


def test_every_error_is_public() -> None:
    kinds = [each for each in vars(errors).values() if isinstance(each, type) and each.__module__ == errors.__name__]
    assert {kind.__name__ for kind in kinds} <= set(PUBLIC)


@pytest.fixture(autouse=True)
def _unused() -> Iterator[None]:
    """Make each test start as if no old name had been used."""

    def forget() -> None:
        for old in MOVED:
            sys.modules.pop(f"int8compile.{old}", None)
            package, _, name = f"int8compile.{old}".rpartition(".")
            if isinstance(vars(sys.modules[package]).get(name), types.ModuleType):
                delattr(sys.modules[package], name)

    forget()
    yield
    forget()


@pytest.mark.parametrize("old", MOVED)
def test_an_old_name_is_the_module_itself(old: str) -> None:
    module = importlib.import_module(f"int8compile.{MOVED[old]}")
    specification = module.__spec__
    with pytest.warns(DeprecationWarning, match=rf"int8compile\.{old} is now int8compile\.{MOVED[old]}; its old name"):
        found = importlib.import_module(f"int8compile.{old}")
    assert found is module
    assert sys.modules[f"int8compile.{old}"] is module
    assert module.__spec__ is specification
    assert module.__name__ == f"int8compile.{MOVED[old]}"
    assert importlib.import_module(f"int8compile.{old}") is module  # There is no second warning.


def test_no_old_name_is_a_module_of_today() -> None:
    folder = Path(int8compile.__file__).parent
    for old in MOVED:
        path = folder.joinpath(*old.split("."))
        assert not path.exists()
        assert not path.with_suffix(".py").exists()


def test_the_warning_names_the_line_that_imports() -> None:
    with pytest.warns(DeprecationWarning, match="is now") as caught:
        from int8compile.convert import quantize_  # type: ignore[import-not-found]  # noqa: F401
    with pytest.warns(DeprecationWarning, match="is now") as attribute:
        _ = int8compile.modules
    assert [warning.filename for warning in (*caught, *attribute)] == [__file__] * 2


@pytest.mark.parametrize("name", ["export", "explain"])
def test_a_module_does_not_hide_the_function_of_its_old_name(name: str) -> None:
    function = getattr(int8compile, name)
    with pytest.warns(DeprecationWarning, match="is now"):
        module = importlib.import_module(f"int8compile.{name}")
    assert isinstance(module, types.ModuleType)
    assert getattr(int8compile, name) is function is getattr(module, name)


def test_attributes_that_were_there_without_an_import() -> None:
    with pytest.warns(DeprecationWarning, match="int8compile.modules is now int8compile.stored.modules"):
        module = int8compile.modules
    assert module.Int8Linear is Int8Linear
    with pytest.raises(AttributeError, match="module 'int8compile' has no attribute 'nothing'"):
        _ = int8compile.nothing
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'int8compile\.nothing'"):
        importlib.import_module("int8compile.nothing")


def test_functions_can_be_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8compile, "export", len)
    assert int8compile.export is len


def test_what_was_pickled_under_an_old_name_is_of_todays_class() -> None:
    with pytest.warns(DeprecationWarning, match="is now"):
        assert pickle.loads(b"cint8compile.modules\nInt8Linear\n.") is Int8Linear


def test_a_process_may_begin_with_an_old_name() -> None:
    program = (
        "from int8compile.models import example_inputs\n"
        "from int8compile.explain import explain\n"
        "import int8compile\n"
        "from int8compile.app import loading\n"
        "assert loading.example_inputs is example_inputs and int8compile.explain is explain\n"
    )
    done = subprocess.run([sys.executable, "-W", "always", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "<string>:1: DeprecationWarning: int8compile.models is now int8compile.app.loading" in done.stderr
    assert "<string>:2: DeprecationWarning: int8compile.explain is now int8compile.explaining" in done.stderr
