"""`int8compile doctor`: its report on the CPU kernel."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from int8compile import cpu
from int8compile.app import cli
from int8compile.cache import cache_folder
from tests.helpers.cpu_build import Compiler

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def test_doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert text.endswith("The CPU kernel works.\n")
    assert "every variant equals the reference, bit for bit" in text
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    library = cpu.load()
    assert library is not None
    assert found["versions"]["torch"] == torch.__version__
    assert found["machine"]["torch_threads"] == torch.get_num_threads()
    assert found["kernel"]["problem"] == ""
    assert found["kernel"]["library"] == str(library.path)
    assert found["kernel"]["variants_that_run_here"] == list(library.variants)
    assert found["kernel"]["variant_used"] == library.variant
    assert found["cache"]["folder"] == str(cache_folder())
    assert found["cache"]["libraries"] >= 1
    assert found["environment"]["OMP_NUM_THREADS"] == "3"
    for section, values in found.items():
        assert f"\n{section}\n" in f"\n{text}"
        for value in values.values():
            if isinstance(value, str) and value and section != "kernel":
                assert value in text


@pytest.mark.parametrize(
    ("variable", "value", "problem"),
    [
        ("CXX", "no-such-compiler", "CXX names 'no-such-compiler', which is not a program"),
        ("INT8COMPILE_CPU_KERNEL", "0", "INT8COMPILE_CPU_KERNEL=0 turns it off"),
        ("INT8COMPILE_ISA", "sse9", "INT8COMPILE_ISA: kernel variant 'sse9' cannot be used"),
    ],
)
def test_doctor_says_why_there_is_no_kernel(
    compiler: Compiler,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    value: str,
    problem: str,
) -> None:
    monkeypatch.setenv(variable, value)
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"The CPU kernel cannot be used: {problem}")
    assert cli.main(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["kernel"]["problem"].startswith(problem)


def test_doctor_finds_wrong_results(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from int8compile.ops import reference

    monkeypatch.setattr(reference, "linear", lambda x, qweight, *rest: torch.zeros(x.shape[0], qweight.shape[0]))
    assert cli.main(["doctor"]) == 1
    library = cpu.load()
    assert library is not None
    assert f"these variants differ from the reference: {', '.join(library.variants)}" in capsys.readouterr().out
