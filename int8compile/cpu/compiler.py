"""Find and run the C++ compiler."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence

from int8compile.errors import KernelBuildError

# Seconds after which a compiler is taken to hang.
COMPILES = 600.0


@dataclasses.dataclass(frozen=True)
class Compiler:
    """A C++ compiler.

    Attributes:
        command: The program, and arguments if CXX has some.
        version: The output of `--version`.
    """

    command: tuple[str, ...]
    version: str

    @property
    def name(self) -> str:
        """The first line of the version, such as "g++ (Debian 12.2.0-14) 12.2.0"."""
        return self.version.partition("\n")[0]


def find_compiler() -> Compiler:
    """Return the compiler that CXX names, else the first of g++, clang++ and c++.

    Raises:
        KernelBuildError: There is no compiler, or it does not run.
    """
    named = os.environ.get("CXX", "").strip()
    if not named:
        found = next(filter(shutil.which, ("g++", "clang++", "c++")), None)
        if found is None:
            raise KernelBuildError("no C++ compiler found (g++, clang++, c++); install g++, or name one with CXX")
        named = found
    try:
        command = tuple(shlex.split(named))
    except ValueError as error:
        raise KernelBuildError(f"CXX={named!r} cannot be read as a command ({error}); correct or unset it") from error
    # With its path, so that a new compiler under the old name is noticed.
    return _identified(command, shutil.which(command[0]) or "")


@functools.cache
def _identified(command: tuple[str, ...], path: str) -> Compiler:
    if not path:
        raise KernelBuildError(f"CXX names {command[0]!r}, which is not a program; name a C++17 compiler, or unset CXX")
    code, output = run((*command, "--version"))
    if code != 0:
        raise KernelBuildError(
            f"`{shlex.join(command)} --version` fails: {essence(output)}; set CXX to a C++17 compiler"
        )
    return Compiler(command, output.strip())


def checked(command: Sequence[str], what: str, write: Callable[[str], object]) -> None:
    """Run a command of the build.

    Args:
        command: The command.
        what: What it works on, for the error.
        write: Takes the command and its output.

    Raises:
        KernelBuildError: The command failed.
    """
    code, output = run(command)
    write(f"$ {shlex.join(command)}\n{output}\n")  # In one call: several commands run at a time.
    if code != 0:
        raise KernelBuildError(f"{command[0]} fails at {what}: {essence(output) or f'exit code {code}'}")


def run(command: Sequence[str]) -> tuple[int, str]:
    """Run a command, and return its exit code and output."""
    try:
        # LC_ALL: messages in English, which `essence` reads.
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "LC_ALL": "C"},
            encoding="utf-8",
            errors="replace",
            timeout=COMPILES,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return 124, f"error: {command[0]} had not ended after {COMPILES:g} seconds"
    except OSError as error:
        return 127, f"error: cannot run {command[0]}: {error.strerror}"
    return done.returncode, done.stdout


def essence(output: str) -> str:
    """Return the line of a compiler's output that says what is wrong."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    # The linker's messages have no "error:", but the line that the compiler adds to them has.
    for pattern in (r"^(?!collect2|clang).*\berror:", r"\bld(\.\w+)?: (?!.*: in function)"):
        if found := next((line for line in lines if re.search(pattern, line)), ""):
            return found
    return lines[-1] if lines else ""
