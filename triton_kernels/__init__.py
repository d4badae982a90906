"""Triton kernels for GPUs, one folder per kernel: `kernel.py` is the device code, `launch.py` builds its call.

Start with `tables.py` (the choice of kernel and tile), `operators.py` (the operators on GPUs) and `numerics.py` (the
device code that kernels share).

The folder is installed as ``int8compile.triton_kernels``. Another project owns the name ``triton_kernels``, so
importing this folder under it raises an error. Importing the package does not import Triton, which is optional; `load`
does.
"""

if __name__ != "int8compile.triton_kernels":
    raise ImportError(
        f"this folder was imported as {__name__!r}; its import name is 'int8compile.triton_kernels': "
        "write `import int8compile.triton_kernels`, and take the repository root off sys.path if another "
        "project's package of the bare name was meant"
    )

from int8compile.triton_kernels.loading import available, failure, gluon_failure, load, switched_off

__all__ = ["available", "failure", "gluon_failure", "load", "switched_off"]
