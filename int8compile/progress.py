"""Progress bars on stderr: none where stderr is not a terminal, or where the environment sets `TQDM_DISABLE`."""

from __future__ import annotations

import os
from typing import Any

from tqdm import tqdm

_TQDM: Any = tqdm  # Its overloads take no `*args`.


def progress_bar(*args: Any, shown: bool = True, **options: Any) -> tqdm[Any]:
    """Return a progress bar, which is removed when it is closed.

    Args:
        *args: The arguments of `tqdm`.
        shown: Whether the caller wants a bar.
        **options: The keyword arguments of `tqdm`.
    """
    # Passing `disable` makes tqdm ignore its own variable.
    hidden = not shown or bool(os.environ.get("TQDM_DISABLE"))
    made: tqdm[Any] = _TQDM(*args, disable=True if hidden else None, leave=False, **options)
    return made
