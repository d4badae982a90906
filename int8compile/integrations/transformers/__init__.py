"""int8 models in transformers: import this module, then pass an `Int8CompileConfig` to `from_pretrained`.

Each weight is quantized when it has been read, on its target device, together with the weights that share its
rotation. The whole float model is never in memory. A folder that `save_pretrained` writes loads without a config, and
also without an import of this module: see `int8compile_autoload`. Where torch's entry points are turned off, processes
without the import get a warning of an unknown quantization type and an error about the shape of a weight.
"""

from __future__ import annotations

import contextlib
import importlib
import sys

from int8compile.integrations.transformers.config import METHOD, Int8CompileConfig, bitsandbytes_config
from int8compile.integrations.transformers.quantizer import Int8CompileQuantizer, Quantize
from int8compile.integrations.transformers.saving import attach, detach

__all__ = [
    "METHOD",
    "Int8CompileConfig",
    "Int8CompileQuantizer",
    "Quantize",
    "attach",
    "bitsandbytes_config",
    "detach",
]

if "diffusers" in sys.modules:
    # Models of diffusers take the config too, and look it up in tables of their own.
    with contextlib.suppress(ImportError):  # A version that is not supported.
        importlib.import_module("int8compile.integrations.diffusers")
