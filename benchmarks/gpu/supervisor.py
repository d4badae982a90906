"""Run the measurements in a child process, and restart it after the case that hung or crashed.

After an illegal access of a kernel, nothing runs in its CUDA context any more; a kernel that hangs cannot be
interrupted from Python; and a compiler may crash. None of these may end the day, whose minutes are limited. Nor may the
end of this process lose measurements, so results are continuously copied to the folder that they are fetched from.
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

# Output of the measuring process, of all calls.
LOG = "day.txt"
# Seconds that a process has to end after SIGTERM.
GRACE = 2.0
POLL = 0.25
# Seconds between two copies.
EVERY = 3.0
# Number of restarts of a process that ends between two cases.
RESTARTS = 2


class Stopped(BaseException):
    """The process was asked to end. Not an `Exception`: after those, the day continues with the next case."""


def stop_on_signals() -> None:
    """Make SIGTERM and SIGINT raise `Stopped`."""

    def stop(number: int, frame: Any) -> None:
        raise Stopped(signal.Signals(number).name)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)


# Loaded here, since nothing should be loaded between fork and exec.
_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


def start(command: Sequence[str], **options: Any) -> subprocess.Popen[str]:
    """Start a process that leads a session. The system kills it when this process ends for any reason.

    A command that exceeds its time limit may be killed without its children, whose work on the GPU would disturb the
    next call.
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
        preexec_fn=end_with_parent,  # noqa: PLW1509 - it never waits for another thread
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
    """Run a process with a time limit, and append its output to a file line by line, without folders.

    Args:
        command: The program and its arguments.
        log: The file.
        seconds: Time limit, after which the process and its children are killed.
        each: Takes each line.
        options: Other options of `subprocess.Popen`.

    Returns:
        Its exit status, or None if it exceeded the limit; and its output.
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
    """Run a measuring process, and restart it as often as necessary.

    Args:
        command: Starts the process. With `--resume` appended, it must continue the result file.
        folder: Folder of the result file.
        until: End of the day, in seconds of `time.time`; a running process is ended then.
        environment: Variables of the process, in addition to this one's.
        copy: Folder that gets a copy of the files every few seconds.

    Returns:
        The exit status of the last process.
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
            print(f"the process ended with status {status} between two cases; restarting", flush=True)
            resume = ["--resume"] if (folder / FILE).exists() else []
            continue
        result = Result(folder / FILE, load(folder))
        if time.time() >= until:
            # The case that was running counts as left out.
            del result.data["running"]
            result.write()
            return 1
        error = running.get("error") or why or f"the process ended with status {status}"
        result.record(running["stage"], running["case"], {"error": error})
        print(f"{running['stage']}: {running['case']}: {error}; restarting", flush=True)
        resume = ["--resume"]


@contextlib.contextmanager
def copied(folder: Path, to: Path | None, every: float) -> Iterator[None]:
    """Copy the files of a folder to another at intervals meanwhile, and once at the end."""
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
    """Kill a process that leads a session, and its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _copy(folder: Path, to: Path) -> None:
    """Copy files that have changed, each atomically."""
    for path in folder.iterdir():
        if path.is_dir() or path.suffix == PART:
            continue
        target, part = to / path.name, to / f"{path.name}{PART}"
        try:
            # Taken before reading, so that a write meanwhile is copied the next time.
            written = path.stat().st_mtime_ns
            if target.exists() and target.stat().st_mtime_ns == written:
                continue
            shutil.copyfile(path, part)
            os.utime(part, ns=(written, written))
            os.replace(part, target)
        except OSError as error:  # The next copy may succeed.
            print(f"{path.name} could not be copied: {error.strerror or error}", flush=True)


# Suffix of files that are being written.
PART = ".part"


def _relay(process: subprocess.Popen[str], log: Path) -> None:
    """Print a process's output, and append it to a file."""
    assert process.stdout is not None
    with log.open("a") as file:
        for line in process.stdout:
            print(line, end="", flush=True)
            file.write(scrubbed(line))
            file.flush()


def _wait(process: subprocess.Popen[str], folder: Path, until: float) -> str:
    """Wait until the process ends, or kill it if it hangs.

    Returns:
        Why it was killed; "" if it was not.
    """
    while process.poll() is None and time.time() <= until:
        running = _running(folder, process.pid)
        if running is not None and time.time() > running["until"]:
            kill_group(process)
            return "it exceeded its time limit and was ended"
        time.sleep(POLL)
    return ""


def _running(folder: Path, pid: int) -> dict[str, Any] | None:
    """Return the case that a measuring process runs, or ran when it ended; None between cases."""
    if not (folder / FILE).exists():
        return None
    running: dict[str, Any] | None = load(folder).get("running")
    return running if running is not None and running["pid"] == pid else None


def _end(process: subprocess.Popen[str]) -> None:
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
    kill_group(process)
