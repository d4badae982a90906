"""A process that takes lines on stdin and answers in JSON."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

# Seconds that a process has to end after its stdin is closed. One that is compiling does not read it.
GRACE = 5.0


class WorkerError(RuntimeError):
    """A worker ended without an answer."""


class Worker:
    """A process that answers every line with an object in JSON.

    Args:
        command: The program and its arguments.
        errors: The file that its stderr is written to; None leaves it with this process's.
        environment: Variables that the process gets in addition to this one's.
    """

    def __init__(self, command: Sequence[str], errors: Path | None = None, **environment: str) -> None:
        pipe = subprocess.PIPE
        with errors.open("w") if errors else contextlib.nullcontext() as log:
            self._process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=log, text=True, env=os.environ | environment
            )
        self._errors = errors

    def ask(self, line: str = "") -> dict[str, Any]:
        """Send a line, and return the answer."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `answer` says that the process has ended.
            print(line, file=self._process.stdin, flush=True)
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """Return the next object that the process prints, and skip other output."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                return found
        written = self._errors.read_text().strip().splitlines() if self._errors else []
        said = f": {written[-1]}" if written else ""
        raise WorkerError(f"the process ended with status {self._process.wait()}{said}")

    def stop(self) -> None:
        """End the process, by killing it if it goes on."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # of a line that the process has not read
            self._process.stdin.close()
        try:
            self._process.wait(GRACE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
