"""int8 inference for PyTorch: `torch.compile(model, backend="int8")`.

The backend is found by its name; importing this package is needed only for what is listed in `__all__`.
"""

from int8compile.backend import register as _register
from int8compile.config import Int8Config
from int8compile.errors import (
    BadWeightError,
    ConfigError,
    FreedWeightError,
    InputError,
    Int8CompileError,
    Int8Warning,
    KernelBuildError,
    ModelError,
)
from int8compile.explain import explain
from int8compile.report import Report, Site, SkipReason
from int8compile.weights import refresh

_register()

__version__ = "0.1.0"

__all__ = [
    "BadWeightError",
    "ConfigError",
    "FreedWeightError",
    "InputError",
    "Int8CompileError",
    "Int8Config",
    "Int8Warning",
    "KernelBuildError",
    "ModelError",
    "Report",
    "Site",
    "SkipReason",
    "explain",
    "refresh",
]
