"""`python -m int8compile`, the same as the command `int8compile`."""

from __future__ import annotations

import sys

from int8compile.app.cli import main

if __name__ == "__main__":
    sys.exit(main())
