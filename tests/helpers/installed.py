"""An environment in which the working tree counts as installed, wherever the tests run."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def environment(folder: Path, **variables: str) -> dict[str, str]:
    """Return the environment of a process that finds the entry points of this pyproject.toml.

    Args:
        folder: A folder for the metadata of a distribution.
        **variables: More variables.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    metadata = folder / f"{project['name']}-{project['version']}.dist-info"
    metadata.mkdir(parents=True, exist_ok=True)
    (metadata / "METADATA").write_text(f"Name: {project['name']}\nVersion: {project['version']}\n")
    sections = [
        "\n".join([f"[{group}]", *(f"{name} = {value}" for name, value in made.items())])
        for group, made in project["entry-points"].items()
    ]
    (metadata / "entry_points.txt").write_text("\n\n".join(sections) + "\n")
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])} | variables
