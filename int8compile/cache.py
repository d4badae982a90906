"""Folders for files that can be made again, and whether files found there can be trusted."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

_ANYBODY = stat.S_IWGRP | stat.S_IWOTH


def cache_folder() -> Path:
    """Return the cache folder: `INT8COMPILE_CACHE`, or `int8compile` in the user's cache folder.

    For a user without a home folder it is `private_folder`.
    """
    if named := os.environ.get("INT8COMPILE_CACHE"):
        return Path(os.path.expanduser(named)).absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):  # The XDG specification has relative paths ignored.
        return Path(base) / "int8compile"
    try:
        return Path.home() / ".cache" / "int8compile"
    except RuntimeError:  # Neither HOME nor an entry in the table of users.
        return private_folder()


def private_folder() -> Path:
    """Return a folder for this user among the temporary files, for use where the cache folder cannot be used."""
    return Path(tempfile.gettempdir()) / f"int8compile-{os.getuid()}"


def make_folder(path: Path) -> None:
    """Make a folder that only this user can write to. If it exists and is the user's, its permissions are corrected.

    Raises:
        OSError: It cannot be made.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    about = path.stat()
    if about.st_uid == os.getuid() and about.st_mode & _ANYBODY:
        path.chmod(stat.S_IMODE(about.st_mode) & ~_ANYBODY)


def distrust(path: Path) -> str:
    """Return why another user may have written a file or folder; "" if only this user and root can write to it.

    Raises:
        OSError: It does not exist, or its permissions cannot be read.
    """
    about = path.stat()
    if about.st_uid not in (os.getuid(), 0):
        return f"{path} belongs to another user (uid {about.st_uid})"
    if about.st_mode & _ANYBODY:
        return f"{path} can be written by other users (mode {stat.S_IMODE(about.st_mode):o})"
    return ""
