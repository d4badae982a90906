"""The Triton kernels for GPUs, one folder per kernel: `kernel.py` is the device code, `launch.py` its call.

Read `tables.py` (which kernel when), `operators.py` (what the operators do) and `numerics.py` (what kernels share).

The folder is installed as ``int8compile.triton_kernels``. Its bare name belongs to another project, so importing it
as ``triton_kernels`` is refused rather than silently answered with the wrong package. Importing it does not import
Triton, which need not be installed; `load` does.
"""

if __name__ != "int8compile.triton_kernels":
    raise ImportError(
        f"this folder was imported as {__name__!r}; its import name is 'int8compile.triton_kernels': "
        "write `import int8compile.triton_kernels`, and take the repository root off sys.path if another "
        "project's package of the bare name was meant"
    )

from int8compile.triton_kernels.loading import available, failure, gluon_failure, load, switched_off

__all__ = ["available", "failure", "gluon_failure", "load", "switched_off"]
