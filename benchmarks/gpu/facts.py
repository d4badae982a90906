"""Facts that a time depends on, without names of machines and folders."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from int8compile import hardware
from int8compile.app.machine import RESTRICTIONS, software, version, versions

ROOT = Path(__file__).parents[2]
PACKAGES = ("bitsandbytes", "torchao", "transformers")
# Variables that change the kernels of either side.
SETTINGS = (
    *RESTRICTIONS,
    "CUDA_LAUNCH_BLOCKING",
    "CUDA_VISIBLE_DEVICES",
    "INT8COMPILE_AUTOTUNE",
    "INT8COMPILE_TRITON",
    "NVIDIA_TF32_OVERRIDE",
    "PYTORCH_CUDA_ALLOC_CONF",
    "TORCHINDUCTOR_MAX_AUTOTUNE",
)
# Folders of an absolute path: of "/opt/x/y.py", "/opt/x/".
_FOLDERS = re.compile(r"(?<![\w.:/~-])/(?:[^\s/:'\"<>()]+/)+")


def machine(device: torch.device) -> dict[str, Any]:
    """Return the device and the versions of packages."""
    facts: dict[str, Any] = {
        "device": hardware.of(device).name,
        "capability": None,
        "driver": None,
        **software(),
        "cuda": torch.version.cuda,
        "triton": version("triton"),
        "packages": versions(*PACKAGES),
        "environment": {name: scrubbed(os.environ[name]) for name in SETTINGS if name in os.environ},
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "capability": f"{properties.major}.{properties.minor}",
            "driver": _driver(),
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
        }
    return facts


def commit() -> str | None:
    """Return the checkout's commit, with "-changed" appended if files differ; None without a git history."""
    head = _output("git", "log", "-1", "--format=%H")
    if not head:
        return None
    # Without locks, so that git commands of others do not find the index locked.
    changed = _output("git", "--no-optional-locks", "status", "--porcelain", "--untracked-files=no")
    return head + ("-changed" if changed else "")


def described(error: BaseException) -> str:
    """Return the beginning and the end of an error's text; compilers state the cause at the end."""
    text = scrubbed(f"{type(error).__name__}: {error}".strip())
    return text if len(text) <= 1500 else f"{text[:500]}\n...\n{text[-1000:]}"


def scrubbed(text: str) -> str:
    """Return a text without folders and without the machine's name."""
    names = {str(ROOT): ".", str(Path.home()): "~", sys.prefix: "python"}
    for folder in sorted(names, key=len, reverse=True):  # The longest first: a folder may be inside another.
        text = text.replace(folder, names[folder])
    text = _FOLDERS.sub("", text)
    name = platform.node()
    return re.sub(rf"\b{re.escape(name)}\b", "<host>", text) if name else text


def _driver() -> str | None:
    lines = (_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "").splitlines()
    return lines[0] if lines else None


def _output(*command: str) -> str | None:
    try:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
