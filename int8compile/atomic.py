"""Replace folders in one step of the file system: readers see the old folder or the new one."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def temporary_folder(folder: Path) -> Iterator[Path]:
    """Make a folder beside another, locked while it is in use, and remove it afterwards."""
    new = _beside(folder, "tmp")
    new.mkdir()
    descriptor = os.open(new, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # Not every file system has locks.
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield new
    finally:
        # After `put_in_place` it holds the folder that was replaced.
        shutil.rmtree(new, ignore_errors=True)
        os.close(descriptor)


def _beside(folder: Path, kind: str) -> Path:
    return folder.with_name(f".{folder.name}.{kind}-{os.getpid()}-{secrets.token_hex(4)}")


def put_in_place(new: Path, folder: Path) -> None:
    """Put a finished folder in the place of another; afterwards `new` is gone or holds the old folder."""
    try:
        os.rename(new, folder)  # Replaces an empty folder, but no other.
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if not _exchange(new, folder):
            old = _beside(folder, "old")
            os.rename(folder, old)
            # If the process is killed here, no checkpoint has the name; load() says where the old one is.
            try:
                os.rename(new, folder)
            except OSError:
                os.rename(old, folder)
                raise
            sync(folder.parent)
            shutil.rmtree(old, ignore_errors=True)
    # Before the old folder is deleted: a power failure must not undo the exchange afterwards.
    sync(folder.parent)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two folders in one step; return False if the system or the file system cannot."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return False
    at_cwd, rename_exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux.
    if function(at_cwd, os.fsencode(first), at_cwd, os.fsencode(second), rename_exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(second))


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary folders that killed saves to this folder have left."""
    name = re.compile(re.escape(f".{folder.name}.") + r"(?:tmp|old)-(\d+)-[0-9a-f]{8}")
    for file in folder.parent.iterdir():
        match = name.fullmatch(file.name)
        if match and not _in_use(file, int(match[1])):
            shutil.rmtree(file, ignore_errors=True)


def _in_use(folder: Path, pid: int) -> bool:
    with contextlib.suppress(OSError, OverflowError):
        os.kill(pid, 0)
        return True
    # Process numbers differ between containers and machines, locks do not.
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    finally:
        os.close(descriptor)
    return False


def sync(file: Path) -> None:
    """Write a file's or folder's content to the disk, not only to its cache."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
