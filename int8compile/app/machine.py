"""Facts about this machine that a time depends on, without its name and folders."""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

from int8compile import cpu, hardware

STATUS = Path("/proc/self/status")
# Other packages whose kernels are measured, and which change how models run.
PACKAGES = ("transformers", "bitsandbytes", "torchao", "llama_cpp_python")
# Variables that can make PyTorch's own kernels, the baselines, use less than the machine has.
RESTRICTIONS = (
    "ATEN_CPU_CAPABILITY",
    "CXX",
    "GOMP_CPU_AFFINITY",
    "INT8COMPILE_CPU_KERNEL",
    "INT8COMPILE_ISA",
    "KMP_AFFINITY",
    "LD_PRELOAD",
    "MKL_ENABLE_INSTRUCTIONS",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "ONEDNN_MAX_CPU_ISA",
    "TORCHINDUCTOR_FREEZING",
)


def facts() -> dict[str, Any]:
    """Return the CPU, the kernels, the versions, the date and the variables that restrict kernels, as plain data."""
    this = hardware.of(torch.device("cpu"))
    return {
        "cpu": this.name + _cpu_model(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "kernel": cpu.variant(),
        "kernels": list(cpu.variants()),
        "torch_isa": this.isa,
        **software(),
        "packages": versions(*PACKAGES),
        "environment": {name: os.environ[name] for name in RESTRICTIONS if name in os.environ},
    }


def software() -> dict[str, str]:
    """Return the versions of PyTorch, Python and the system, and the date."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
    }


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of those packages that are installed."""
    return {name: found for name in packages if (found := version(name)) is not None}


def version(package: str) -> str | None:
    """Return the version of a package, None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def read_bytes(file: Path, key: str) -> int | None:
    """Return a size in a file of /proc with lines like `VmHWM: 12 kB`, in bytes; None if the system does not tell."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:")), None)


def _cpu_model() -> str:
    # The CPU names of virtual machines ("Intel(R) Xeon(R) Processor") do not distinguish generations.
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
    found = [re.search(rf"^{key}\s*: (\d+)$", text, re.MULTILINE) for key in ("cpu family", "model")]
    return " (family {}, model {})".format(*(match[1] for match in found if match)) if all(found) else ""
