"""Has another process measure, and starts it again, behind the case it was at, when that hangs or breaks it.

A kernel that reads where it must not leaves a CUDA context in which nothing runs any more; one that waits for ever
cannot be interrupted from Python; and a compiler may crash. None of these may end a day whose minutes are counted.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.day import FILE, Result, load
from benchmarks.gpu.facts import ROOT

# Seconds that the measuring process has behind the end of the day for what it is at, and then to end.
GRACE = 5.0
POLL = 0.25


class Stopped(BaseException):
    """The process was asked to end. Not an `Exception`: a case may end with any of these, and the day goes on."""


def stop_on_signals() -> None:
    """Has SIGTERM and SIGINT raise `Stopped`."""

    def stop(number: int, frame: Any) -> None:
        raise Stopped(signal.Signals(number).name)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)


def supervise(command: Sequence[str], folder: Path, until: float) -> int:
    """Runs a process that measures, as often as it takes.

    Args:
        command: Starts it. It must go on with the result file where `--resume` is added.
        folder: Of the result file.
        until: When the day ends, as `time.time` tells it.

    Returns:
        The exit status of the last one.
    """
    resume: list[str] = []
    while True:
        # A session of its own, so that its compilers and tests can be ended with it.
        process = subprocess.Popen([*command, *resume], cwd=ROOT, start_new_session=True)
        try:
            why = _wait(process, folder, until)
        finally:
            _end(process)
        running = _running(folder, process.pid)
        status = process.returncode
        if running is None:
            return status if status >= 0 else 1
        result = Result(folder / FILE, load(folder))
        if time.time() >= until:
            # The case it was at counts as left out.
            del result.data["running"]
            result.write()
            return 1
        error = running.get("error") or why or f"the process ended with status {status}"
        result.record(running["stage"], running["case"], {"error": error})
        print(f"{running['stage']}: {running['case']}: {error}; starting again", flush=True)
        resume = ["--resume"]


def kill_group(process: subprocess.Popen[Any]) -> None:
    """Kills a process that leads a session, and those it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _wait(process: subprocess.Popen[bytes], folder: Path, until: float) -> str:
    """Waits until the process ends or has to be ended.

    Returns:
        Why it has to be ended, if it hangs.
    """
    while process.poll() is None and time.time() <= until + GRACE:
        running = _running(folder, process.pid)
        if running is not None and time.time() > running["until"]:
            kill_group(process)
            return "it ran past its time limit and was ended"
        time.sleep(POLL)
    return ""


def _running(folder: Path, pid: int) -> dict[str, Any] | None:
    """What a measuring process is at, or was at when it ended."""
    if not (folder / FILE).exists():
        return None
    running: dict[str, Any] | None = load(folder).get("running")
    return running if running is not None and running["pid"] == pid else None


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
    kill_group(process)
