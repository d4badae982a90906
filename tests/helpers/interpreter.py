"""Tell whether this process interprets Triton kernels."""

from __future__ import annotations

import os

# Triton reads the variable when it is imported: a process that interprets kernels compiles none and uses no GPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
