"""int8 inference for PyTorch: `torch.compile(model, backend="int8")`.

torch.compile finds the backend by its name. The package is imported only for the names in `__all__`.

PYTEST_DONT_REWRITE (For pytest, which otherwise rewrites the assertions of packages that bring a plugin.)
"""

from int8compile.backend import register as _register
from int8compile.config import Int8Config
from int8compile.errors import (
    BadWeightError,
    CheckpointError,
    ConfigError,
    ExportError,
    FreedWeightError,
    InputError,
    Int8CompileError,
    Int8Warning,
    Int8WeightError,
    KernelBuildError,
    ModelError,
    PackageError,
)
from int8compile.explaining import explain
from int8compile.exporting.exporter import export
from int8compile.exporting.package import inspect, load_exported
from int8compile.integrations import register as _register_libraries
from int8compile.moved import install as _install
from int8compile.report import Report, Site, SkipReason
from int8compile.stored.checkpoint import load, save
from int8compile.stored.convert import dequantize_, memory_footprint, quantize_
from int8compile.stored.modules import Int8Embedding, Int8Experts, Int8Linear
from int8compile.tuning.advice import Advice, advise
from int8compile.tuning.calibration import Calibration, calibrate
from int8compile.tuning.evaluation import Evaluation, evaluate
from int8compile.version import __version__ as __version__
from int8compile.weights import refresh

_register()
_register_libraries()
_install()

__all__ = [
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
