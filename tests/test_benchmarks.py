"""Every benchmark runs: a name it imports may be gone, a shape it uses may not fit."""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


def test_every_benchmark_runs() -> None:
    files = sorted(path.name for path in (ROOT / "benchmarks").glob("bench_*.py"))
    assert files
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-disable", "-q", "-p", "no:cacheprovider"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
