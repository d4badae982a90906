"""Has another process measure, and starts it again, behind the case it was at, when that hangs or breaks it.

A kernel that reads where it must not leaves a CUDA context in which nothing runs any more; one that waits for ever
cannot be interrupted from Python; and a compiler may crash. None of these may end a day whose minutes are counted. Nor
may the end of this process lose what was measured: results are copied all the time to where they are fetched from.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.day import FILE, Result, load
from benchmarks.gpu.facts import ROOT, scrubbed

# What the measuring process prints, of all calls.
LOG = "day.txt"
# Seconds that a process that is asked to end has for that.
GRACE = 2.0
POLL = 0.25
# Seconds between two copies.
EVERY = 3.0


class Stopped(BaseException):
    """The process was asked to end. Not an `Exception`: a case may end with any of these, and the day goes on."""


def stop_on_signals() -> None:
    """Has SIGTERM and SIGINT raise `Stopped`."""

    def stop(number: int, frame: Any) -> None:
        raise Stopped(signal.Signals(number).name)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)


def end_with_parent() -> None:
    """Has the system kill this process when the one that started it ends, however it ends.

    A command that runs past its limit may be killed without those it started; what they leave on a GPU would disturb
    the next call.
    """
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def supervise(
    command: Sequence[str], folder: Path, until: float, *, environment: Mapping[str, str], copy: Path | None = None
) -> int:
    """Runs a process that measures, as often as it takes.

    Args:
        command: Starts it. It must go on with the result file where `--resume` is added.
        folder: Of the result file.
        until: When the day ends, as `time.time` tells it; the process is ended then if it has not.
        environment: Variables of that process, besides this one's.
        copy: Where the files of the folder are copied to, every few seconds.

    Returns:
        The exit status of the last one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with copied(folder, copy, EVERY):
        return _supervise(command, folder, until, {**os.environ, **environment})


def _supervise(command: Sequence[str], folder: Path, until: float, environment: Mapping[str, str]) -> int:
    resume: list[str] = []
    while True:
        # A session of its own, so that its compilers and tests can be ended with it.
        process = subprocess.Popen(
            [*command, *resume],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        reader = threading.Thread(target=_relay, args=(process, folder / LOG), daemon=True)
        reader.start()
        try:
            why = _wait(process, folder, until)
        finally:
            _end(process)
            reader.join(GRACE)
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


@contextlib.contextmanager
def copied(folder: Path, to: Path | None, every: float) -> Iterator[None]:
    """Copies the files of a folder to another meanwhile, again and again, and once at the end."""
    if to is None:
        yield
        return
    to.mkdir(parents=True, exist_ok=True)
    over = threading.Event()

    def keep_copying() -> None:
        while not over.wait(every):
            _copy(folder, to)

    thread = threading.Thread(target=keep_copying, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        _copy(folder, to)


def kill_group(process: subprocess.Popen[Any]) -> None:
    """Kills a process that leads a session, and those it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _copy(folder: Path, to: Path) -> None:
    """Copies files that have changed, each in one step."""
    for path in folder.iterdir():
        if path.is_dir() or path.suffix == PART:
            continue
        target, part = to / path.name, to / f"{path.name}{PART}"
        with contextlib.suppress(FileNotFoundError):
            if target.exists() and target.stat().st_mtime_ns == path.stat().st_mtime_ns:
                continue
            shutil.copy2(path, part)
            os.replace(part, target)


# Ends the name of a file that is being written.
PART = ".part"


def _relay(process: subprocess.Popen[str], log: Path) -> None:
    """Prints what a process prints, and keeps it."""
    assert process.stdout is not None
    with log.open("a") as file:
        for line in process.stdout:
            print(line, end="", flush=True)
            file.write(scrubbed(line))
            file.flush()


def _wait(process: subprocess.Popen[str], folder: Path, until: float) -> str:
    """Waits until the process ends or has to be ended.

    Returns:
        Why it has to be ended, if it hangs.
    """
    while process.poll() is None and time.time() <= until:
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


def _end(process: subprocess.Popen[str]) -> None:
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
    kill_group(process)
