"""Where files are kept that can be made again, and whose files there may be used."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

_ANYBODY = stat.S_IWGRP | stat.S_IWOTH


def cache_folder() -> Path:
    """The cache folder: `INT8COMPILE_CACHE`, or `int8compile` in the user's cache folder.

    A user without a home folder has `private_folder`.
    """
    if named := os.environ.get("INT8COMPILE_CACHE"):
        return Path(os.path.expanduser(named)).absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):  # The XDG specification: a relative path is to be ignored.
        return Path(base) / "int8compile"
    try:
        return Path.home() / ".cache" / "int8compile"
    except RuntimeError:  # Neither HOME nor an entry in the table of users.
        return private_folder()


def private_folder() -> Path:
    """A folder for this user among the temporary files, for where the cache folder cannot be used."""
    return Path(tempfile.gettempdir()) / f"int8compile-{os.getuid()}"


def make_folder(path: Path) -> None:
    """Make a folder that only this user can write to; one of his that others can write to becomes such a folder.

    Raises:
        OSError: It cannot be made.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    about = path.stat()
    if about.st_uid == os.getuid() and about.st_mode & _ANYBODY:
        path.chmod(stat.S_IMODE(about.st_mode) & ~_ANYBODY)


def distrust(path: Path) -> str:
    """Why a file or folder may hold what another user has put there; "" if only this user and root can write to it.

    Raises:
        OSError: It is not there, or may not be looked at.
    """
    about = path.stat()
    if about.st_uid not in (os.getuid(), 0):
        return f"{path} belongs to another user (uid {about.st_uid})"
    if about.st_mode & _ANYBODY:
        return f"{path} can be written by other users (mode {stat.S_IMODE(about.st_mode):o})"
    return ""
