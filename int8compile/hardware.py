"""Facts about devices, looked up and never measured."""

from __future__ import annotations

import dataclasses
import platform

import torch


@dataclasses.dataclass(frozen=True)
class Hardware:
    """The facts about a device.

    Attributes:
        name: The vendor's name.
        kind: "cpu", "cuda", ...
        isa: Instruction set level: "avx2", "avx512", ... on a CPU, "sm_90" on a GPU.
        bandwidth: Memory bandwidth in bytes per second; None where unknown.
        float_peak: Dense 16-bit matrix operations per second (a multiply-add counts two); None where unknown.
        int8_peak: Dense int8 matrix operations per second; None where unknown.
    """

    name: str
    kind: str
    isa: str
    bandwidth: float | None = None
    float_peak: float | None = None
    int8_peak: float | None = None


# From vendors' data sheets: bandwidth in GB/s, dense bfloat16 (float16 for T4) and int8 in TOP/s. Of the names that are
# part of a device's name, the longest counts.
_GPUS = {
    "T4": (320, 65, 130),
    "A10": (600, 125, 250),
    "A100": (1555, 312, 624),
    "A100-SXM4-80GB": (2039, 312, 624),
    "L4": (300, 121, 242),
    "L40S": (864, 362, 733),
    "RTX 4090": (1008, 165, 330),
    "H100": (3350, 989, 1979),
    "H200": (4800, 989, 1979),
}


def of(device: torch.device) -> Hardware:
    """Return the facts of a device of this machine."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        isa = (
            getattr(properties, "gcnArchName", "") if torch.version.hip else f"sm_{properties.major}{properties.minor}"
        )
        return gpu(properties.name, isa)
    if device.type == "cpu":
        return Hardware(_cpu_name(), "cpu", torch.backends.cpu.get_cpu_capability().lower())
    return Hardware(device.type, device.type, "")


def gpu(name: str, isa: str) -> Hardware:
    """Return the facts of a GPU by its name. Speeds are unknown where the table does not have it."""
    known = max((entry for entry in _GPUS if entry in name), key=len, default=None)
    if known is None:
        return Hardware(name, "cuda", isa)
    gigabytes, float_tops, int8_tops = _GPUS[known]
    return Hardware(
        name, "cuda", isa, bandwidth=gigabytes * 1e9, float_peak=float_tops * 1e12, int8_peak=int8_tops * 1e12
    )


def kernel_family(isa: str) -> str:
    """Return the architecture whose Triton kernels a GPU runs, by its instruction set: "sm_80", "gfx942"; "" for none.

    `sm_75` has int8 matrix instructions, but Triton does not use them, so only weights become int8 there.
    """
    if isa.startswith(("gfx94", "gfx95")):
        return "gfx942"
    if not isa.startswith("sm_"):
        return ""
    version = int(isa.removeprefix("sm_"))
    if version < 75:
        return ""
    if version in (86, 87, 89) or version >= 120:
        return "sm_86"  # They have the same shared memory, and no useful copy engine.
    return f"sm_{max(known for known in (75, 80, 90, 100) if known <= version)}"


def weight_only(isa: str) -> bool:
    """Return whether a GPU runs int8 weights only, because Triton has no int8 matrix instructions for it."""
    return kernel_family(isa) == "sm_75"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
