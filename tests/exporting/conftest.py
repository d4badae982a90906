"""Fixtures of the tests of packages for GPUs."""

from __future__ import annotations

try:
    import triton  # noqa: F401
except ImportError:
    pass
else:
    from tests.helpers.gpu_packages import driver, gpu, libraries, loaded_driver  # noqa: F401
