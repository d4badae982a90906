"""Programs that do not import int8compile load int8 models of transformers and diffusers."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

import int8compile_autoload as autoload
from tests.helpers.installed import environment

pytest.importorskip("transformers")

from int8compile.integrations.transformers import Int8CompileConfig
from tests.helpers.int8_transformers import llama


def printed(folder: Path, code: str, **variables: str) -> list[str]:
    """Run code in a process with the entry points of the working tree, and return the lines it prints."""
    env = environment(folder, **variables)
    return subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=folder, capture_output=True, text=True, check=True
    ).stdout.splitlines()


MODULES = """
import sys
import torch
print(*sorted({name.partition(".")[0] for name in sys.modules} - set(sys.stdlib_module_names)))
"""


def test_importing_torch_imports_one_module_more(tmp_path: Path) -> None:
    off = printed(tmp_path, MODULES, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    on = printed(tmp_path, MODULES)
    assert set(on[0].split()) - set(off[0].split()) == {"int8compile_autoload"}


LOADS = """
import sys
{first}
from transformers import AutoModelForCausalLM
import transformers.modeling_utils
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as table
print(table["int8compile"].__module__, "int8compile" in sys.modules)
model = AutoModelForCausalLM.from_pretrained({folder!r})
print(table["int8compile"].__module__, type(model.model.layers[0].mlp.up_proj).__name__)
"""


# In the second order, importing the table is what imports torch.
@pytest.mark.parametrize("first", ["import torch", "import transformers.quantizers.auto"])
def test_a_program_of_transformers(tmp_path: Path, first: str) -> None:
    from int8compile import quantize_

    model = llama()
    quantize_(model, progress=False)
    model.save_pretrained(tmp_path / "int8")
    assert printed(tmp_path, LOADS.format(first=first, folder=str(tmp_path / "int8"))) == [
        "int8compile_autoload False",
        "int8compile.integrations.transformers.config Int8Linear",
    ]


def test_a_program_of_diffusers(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    code = """
import sys
from diffusers.quantizers import auto
print(auto.AUTO_QUANTIZATION_CONFIG_MAPPING["int8compile"].module, "int8compile" in sys.modules)
config = auto.DiffusersAutoQuantizer.from_dict({"quant_method": "int8compile"})
print(type(auto.DiffusersAutoQuantizer.from_config(config)).__name__)
"""
    assert printed(tmp_path, code) == [
        "int8compile.integrations.diffusers False",
        "Int8CompileDiffusersQuantizer",
    ]


@pytest.fixture
def waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the name of a module with a table, which the installed finder awaits."""
    (tmp_path / "some_tables.py").write_text("AUTO_QUANTIZATION_CONFIG_MAPPING = {}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(autoload, "TABLES", {"some_tables": "int8compile.integrations.transformers"})
    monkeypatch.setattr(autoload, "_AWAITED", {"some_tables"})
    monkeypatch.setattr(sys, "meta_path", [each for each in sys.meta_path if not isinstance(each, autoload.Finder)])
    monkeypatch.delitem(sys.modules, "some_tables", raising=False)
    autoload.install()
    return "some_tables"


def test_a_table_that_is_imported_later(waiting: str) -> None:
    autoload.install()
    assert [type(finder) for finder in sys.meta_path].count(autoload.Finder) == 1
    module: Any = importlib.import_module(waiting)
    # Nothing of the finder is left in the module.
    assert type(module.__spec__.loader) is importlib.machinery.SourceFileLoader
    assert module.__loader__ is module.__spec__.loader
    entered = module.AUTO_QUANTIZATION_CONFIG_MAPPING["int8compile"]
    made = entered.from_dict({"quant_method": "int8compile", "threshold": 3.0})
    assert (type(made), made.threshold) == (Int8CompileConfig, 3.0)
    assert type(entered(threshold=4.0)) is Int8CompileConfig


def test_a_table_that_is_there_already(waiting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = importlib.import_module(waiting)
    monkeypatch.setattr(module, "AUTO_QUANTIZATION_CONFIG_MAPPING", {})
    autoload.install()
    assert issubclass(module.AUTO_QUANTIZATION_CONFIG_MAPPING["int8compile"], autoload.Deferred)


def test_what_a_table_has_stays(waiting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = importlib.import_module(waiting)
    monkeypatch.setattr(module, "AUTO_QUANTIZATION_CONFIG_MAPPING", {"int8compile": Int8CompileConfig})
    autoload.install()
    assert {"int8compile": Int8CompileConfig} == module.AUTO_QUANTIZATION_CONFIG_MAPPING


class Shared:
    """A loader that all its modules share, as that of zip files and of pytest."""

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        return None

    def exec_module(self, module: Any) -> None:
        module.ran = True
        module.AUTO_QUANTIZATION_CONFIG_MAPPING = {}


class Old:
    """A loader with the interface of Python 3.3."""

    def load_module(self, name: str) -> Any:
        sys.modules[name] = types.ModuleType(name)
        return sys.modules[name]


@pytest.mark.filterwarnings("ignore:.*load_module.*:ImportWarning")
@pytest.mark.parametrize("loader", [Shared(), Old()], ids=lambda loader: type(loader).__name__)
def test_an_import_never_fails(waiting: str, loader: Any) -> None:
    class Others:
        @staticmethod
        def find_spec(name: str, path: object, target: object = None) -> importlib.machinery.ModuleSpec | None:
            return importlib.machinery.ModuleSpec(name, loader) if name == waiting else None

    class Ancient:
        """A finder with the interface of Python 3.3, which importlib leaves out."""

    sys.meta_path[1:1] = [Ancient(), Others]  # type: ignore[list-item]
    for _ in range(2):  # A spec may be asked for, to see whether a module is there, and not be used.
        assert importlib.util.find_spec(waiting) is not None
    module: Any = importlib.import_module(waiting)
    assert module.__spec__.loader is loader
    if isinstance(loader, Shared):
        assert module.ran
        assert "int8compile" in module.AUTO_QUANTIZATION_CONFIG_MAPPING
        module.AUTO_QUANTIZATION_CONFIG_MAPPING = None
        assert "int8compile" in importlib.reload(module).AUTO_QUANTIZATION_CONFIG_MAPPING
    (found,) = [each for each in sys.meta_path if isinstance(each, autoload.Finder)]
    assert found.find_spec("another_module", None) is None


def test_a_module_that_is_missing(waiting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autoload, "_AWAITED", {"no_such_module"})
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("no_such_module")
