"""Progress bars: where they are shown, and where not."""

from __future__ import annotations

import sys

import pytest

from int8compile.progress import progress_bar


@pytest.mark.parametrize(
    ("terminal", "disable", "shown", "expected"),
    [
        (True, "", True, True),
        (True, "", False, False),
        (True, "1", True, False),
        (False, "", True, False),
    ],
)
def test_bars_need_a_terminal_and_heed_the_environment(
    monkeypatch: pytest.MonkeyPatch, terminal: bool, disable: str, shown: bool, expected: bool
) -> None:
    monkeypatch.setenv("TQDM_DISABLE", disable)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with progress_bar(range(2), "Working", shown=shown) as bar:
        assert bar.disable is not expected
        assert list(bar) == [0, 1]
