"""Small sources that stand for those of the CPU kernel, and a compiler that counts its calls."""

from __future__ import annotations

from pathlib import Path

import pytest

from int8compile import cpu
from int8compile.cpu import build

# The functions that `Library` calls; the variants are listed as in the real sources.
OP = """
#include <cstring>
#include <string>
extern const char* const variants[];
static std::string used = variants[0];
extern "C" {
__attribute__((visibility("default"))) const char* int8compile_variants() {
  static std::string names;
  names = "";
  for (const char* const* each = variants; *each; ++each) names += std::string(names.empty() ? "" : " ") + *each;
  return names.c_str();
}
__attribute__((visibility("default"))) const char* int8compile_variant() { return used.c_str(); }
__attribute__((visibility("default"))) const char* int8compile_features() { return ""; }
__attribute__((visibility("default"))) int int8compile_use_variant(const char* name) {
  for (const char* const* each = variants; *each; ++each) {
    if (!std::strcmp(*each, name)) return used = name, 1;
  }
  return 0;
}
}
"""

VARIANTS = """
extern const char* const variants[] = {
#ifndef INT8COMPILE_NO_FAST
    "fast",
#endif
    "portable", nullptr};
"""

FAST = build.Unit("fast.cpp", variant="fast", needs="int f() { return 0; }")

UNITS = (build.Unit("op.cpp"), FAST, build.Unit("portable.cpp", variant="portable"), build.Unit("variants.cpp"))


class Compiler:
    """A script that stands for g++ and counts its compile and link calls."""

    def __init__(self, folder: Path, version: str = "stub 1.0") -> None:
        self.path = folder / "compiler"
        self.calls = folder / "calls"
        self.calls.touch()
        # Linking hangs while this file exists.
        self.hang = folder / "hang"
        self.process = folder / "process"
        self.path.write_text(
            f"""#!/bin/sh
if [ "$1" = --version ]; then echo '{version}'; exit; fi
echo "$@" >> {self.calls}
case " $* " in *" -shared "*) if [ -e {self.hang} ]; then echo $$ > {self.process}; exec sleep 60; fi;; esac
exec g++ "$@"
"""
        )
        self.path.chmod(0o755)

    @property
    def count(self) -> int:
        return len(self.calls.read_text().splitlines())


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Replace the sources by small ones; the cache is empty and nothing is loaded."""
    folder = tmp_path / "csrc"
    folder.mkdir()
    for name, text in {"op": OP, "fast": "", "portable": '#include "some.h"\n', "variants": VARIANTS}.items():
        (folder / f"{name}.cpp").write_text(text)
    (folder / "some.h").touch()
    monkeypatch.setattr(build, "SOURCES", folder)
    monkeypatch.setattr(build, "UNITS", UNITS)
    monkeypatch.setattr(build, "FLAGS", ("-fPIC", "-fvisibility=hidden"))
    monkeypatch.setattr(build, "LINK_FLAGS", ("-shared",))
    monkeypatch.setenv("INT8COMPILE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    forget(monkeypatch)
    return folder


@pytest.fixture
def compiler(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    made = Compiler(tmp_path)
    monkeypatch.setenv("CXX", str(made.path))
    return made


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reset the module to the state of a process that has loaded nothing."""
    for name, value in (("_library", None), ("_failure", ""), ("_isa_read", False)):
        monkeypatch.setattr(cpu, name, value)
    for name in ("INT8COMPILE_ISA", "INT8COMPILE_CPU_KERNEL"):
        monkeypatch.delenv(name, raising=False)
