"""Run the measurements in a child process, and start it again behind the case that hung or crashed.

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.day import BROKEN, FILE, Result, ResultError, load
from benchmarks.gpu.facts import ROOT, scrubbed

# What the measuring process prints, of all calls.
LOG = "day.txt"
# Seconds that a process that is asked to end has for that.
GRACE = 2.0
POLL = 0.25
# Seconds between two copies.
EVERY = 3.0
# Times that a process which ended between two cases is started again.
RESTARTS = 2


class Stopped(BaseException):
    """The process was asked to end. Not an `Exception`: a case may end with any of these, and the day goes on."""


def stop_on_signals() -> None:
    """Has SIGTERM and SIGINT raise `Stopped`."""

    def stop(number: int, frame: Any) -> None:
        raise Stopped(signal.Signals(number).name)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)


# Loaded before it is needed: between fork and exec nothing should be.
_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


def start(command: Sequence[str], **options: Any) -> subprocess.Popen[str]:
    """Start a process that leads a session, and that the system kills when this process ends, however that ends.

    A command that runs past its limit may be killed without those it started; what they leave on a GPU would disturb
    the next call.

    Args:
        command: The program and its arguments.
        options: Others of `subprocess.Popen`.
    """

    def end_with_parent() -> None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        preexec_fn=end_with_parent,  # noqa: PLW1509 - it calls nothing that could wait for another thread
        **options,
    )


def run_logged(
    command: Sequence[str],
    log: Path,
    seconds: float,
    *,
    each: Callable[[str], object] = lambda line: None,
    **options: Any,
) -> tuple[int | None, str]:
    """Run a process for a time at most, with what it prints in a file line by line, without folders.

    Args:
        command: The program and its arguments.
        log: The file; the text is appended.
        seconds: After so many it is killed, with those it started.
        each: Takes each line.
        options: Others of `subprocess.Popen`.

    Returns:
        Its exit status, None if it was killed for the time, and what it printed.
    """
    lines: list[str] = []
    process = start(command, cwd=ROOT, **options)

    def read() -> None:
        assert process.stdout is not None
        with log.open("a") as file:
            for line in map(scrubbed, process.stdout):
                file.write(line)
                file.flush()
                lines.append(line)
                each(line)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        status: int | None = process.wait(max(0.0, seconds))
    except subprocess.TimeoutExpired:
        status = None
    finally:
        kill_group(process)
    reader.join(GRACE)
    return status, "".join(lines)


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
    for each in (folder, *([copy] if copy else [])):
        try:
            each.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ResultError(f"{str(each)!r} cannot be made: {error.strerror or error}") from error
    with copied(folder, copy, EVERY):
        return _supervise(command, folder, until, {**os.environ, **environment})


def _supervise(command: Sequence[str], folder: Path, until: float, environment: Mapping[str, str]) -> int:
    resume: list[str] = []
    restarts = 0
    while True:
        process = start([*command, *resume], cwd=ROOT, env=environment)
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
            ended = status >= 0 and status != BROKEN
            if ended or restarts == RESTARTS or time.time() >= until:
                return status if ended else 1
            restarts += 1
            print(f"the process ended with status {status} between two cases; starting again", flush=True)
            resume = ["--resume"] if (folder / FILE).exists() else []
            continue
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
        try:
            # Before it is read: what is written meanwhile is copied the next time.
            written = path.stat().st_mtime_ns
            if target.exists() and target.stat().st_mtime_ns == written:
                continue
            shutil.copyfile(path, part)
            os.utime(part, ns=(written, written))
            os.replace(part, target)
        except OSError as error:  # The next copy may go through.
            print(f"{path.name} could not be copied: {error.strerror or error}", flush=True)


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
