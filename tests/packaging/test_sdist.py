"""An sdist holds all that `make test` needs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINKS = ["int8compile/passes", "int8compile/triton_kernels"]
# Caches, environments and results: what git ignores.
IGNORED = ("__pycache__", ".*_cache", ".venv*", ".git", ".hypothesis", ".benchmarks", "*.egg-info", "build", "dist")

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def run(*command: str, cwd: Path, expect: tuple[int, ...] = (0,)) -> str:
    # PYTHONPATH names the checkout where the package is not installed: the unpacked one must find itself.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH" and "XDIST" not in name}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode in expect, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an sdist, as somebody has it who unpacks the file."""
    pytest.importorskip("build")
    base = tmp_path_factory.mktemp("sdist")
    # From a copy: setuptools leaves *.egg-info behind, and would take the list of files from one that is there.
    tree = base / "tree"
    shutil.copytree(ROOT, tree, symlinks=True, ignore=shutil.ignore_patterns(*IGNORED))
    run(sys.executable, "-m", "build", "--no-isolation", "--sdist", "--outdir", str(base), str(tree), cwd=base)
    (archive,) = base.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(base, filter="data")
    return base / archive.name.removesuffix(".tar.gz")


def test_an_sdist_holds_every_file_of_the_repository(unpacked: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not in a clone: nothing says which files are in the repository")
    tracked = {name for name in run("git", "ls-files", "-z", cwd=ROOT).split("\0") if name and (ROOT / name).exists()}
    packed = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()}
    assert tracked - packed == set(LINKS)
    made = {"PKG-INFO", "setup.cfg"}
    assert {name for name in packed - tracked if ".egg-info/" not in name} <= made


@pytest.mark.slow  # Two processes import every test file.
def test_all_tests_are_found_in_an_sdist(unpacked: Path) -> None:
    run("make", *LINKS, cwd=unpacked)  # As `make test` does first.
    where = run(sys.executable, "-c", "import int8compile.passes as p; print(p.__file__)", cwd=unpacked).strip()
    assert where == str(unpacked / "int8compile" / "passes" / "__init__.py")
    assert collected(unpacked) == collected(ROOT)


def collected(folder: Path) -> list[str]:
    """The names of all tests of a checkout."""
    # By a path of its own: the cache folder of the checkout stays as it is.
    shown = run(sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", cwd=folder)
    names = [line for line in shown.splitlines() if "::" in line and not line.startswith(("SKIPPED", " "))]
    assert len(names) > 1000
    return names
