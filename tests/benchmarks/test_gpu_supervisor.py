"""The process that restarts the measuring process on a GPU, and copies its results."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_day
from benchmarks.gpu import facts, supervisor
from benchmarks.gpu.day import FILE, load
from benchmarks.gpu.supervisor import LOG, supervise

# Other packages give warnings while they quantize and compile, which would be errors here.
pytestmark = pytest.mark.filterwarnings("ignore")

# Acts like a measuring process, without the seconds that importing torch takes.
MEASURING = """
import json, os, pathlib, signal, sys, time
path = pathlib.Path(sys.argv[1])
data = json.loads(path.read_text()) if path.exists() else {"stages": {"s": {"cases": {}, "left_out": list("abcd")}}}
stage = data["stages"]["s"]

def write():
    part = path.with_suffix(".part")
    part.write_text(json.dumps(data))
    os.replace(part, path)

for name in list(stage["left_out"]):
    until = time.time() + (0.5 if name == "b" else 60)
    data["running"] = {"stage": "s", "case": name, "pid": os.getpid(), "until": until}
    write()
    if name == "a":
        os.kill(os.getpid(), signal.SIGKILL)
    if name in sys.argv[2]:
        time.sleep(60)
    stage["left_out"].remove(name)
    stage["cases"][name] = {"resumed": "--resume" in sys.argv}
    del data["running"]
    write()
"""


def test_a_process_that_crashes_or_hangs_is_started_again(tmp_path: Path) -> None:
    command = [sys.executable, "-c", MEASURING, str(tmp_path / FILE), "b"]
    assert supervise(command, tmp_path, time.time() + 60, environment={}) == 0
    stage = load(tmp_path)["stages"]["s"]
    assert stage["left_out"] == []
    assert stage["cases"]["a"]["error"] == f"the process ended with status {-signal.SIGKILL}"
    assert "time limit" in stage["cases"]["b"]["error"]
    assert stage["cases"]["d"] == {"resumed": True}


def test_a_process_that_ends_between_two_cases_is_started_again(tmp_path: Path) -> None:
    """It is started again at most twice; a process that cannot start at all ends the day."""
    program = (
        "import json, os, pathlib, signal, sys; path = pathlib.Path(sys.argv[1])\n"
        "data = json.loads(path.read_text()) if path.exists() else {'starts': []}\n"
        "data['starts'].append('--resume' in sys.argv)\n"
        "path.write_text(json.dumps(data))\n"
        "if len(data['starts']) < int(sys.argv[2]): os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    for dies, status, starts in ((2, 0, [False, True]), (9, 1, [False, True, True])):
        folder = tmp_path / str(dies)
        command = [sys.executable, "-c", program, str(folder / FILE), str(dies)]
        assert supervise(command, folder, time.time() + 60, environment={}) == status
        assert load(folder)["starts"] == starts


def test_the_supervisor_ends_the_day_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.gpu.supervisor.GRACE", 0.3)
    data = {"stages": {"s": {"cases": {}, "left_out": ["c", "d"]}}}
    (tmp_path / FILE).write_text(json.dumps(data))
    command = [sys.executable, "-c", MEASURING, str(tmp_path / FILE), "c"]
    began = time.time()
    assert supervise(command, tmp_path, began + 0.7, environment={}) == 1
    assert time.time() - began < 3
    assert load(tmp_path) == data


def test_files_are_copied_while_a_process_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.gpu.supervisor.EVERY", 0.05)
    program = (
        "import os, pathlib, sys, time; folder, copy = map(pathlib.Path, sys.argv[1:])\n"
        "print('begun ' + os.environ['SET'], flush=True)\n"
        "(folder / 'a.txt').write_text('x'); (folder / 'b.part').write_text('y')\n"
        "until = time.time() + 20\n"
        "while not (copy / 'a.txt').exists() and time.time() < until: time.sleep(0.05)\n"
        "sys.exit(0 if (copy / 'a.txt').read_text() == 'x' else 3)\n"
    )
    folder, copy = tmp_path / "day", tmp_path / "copy"
    command = [sys.executable, "-c", program, str(folder), str(copy)]
    assert supervise(command, folder, time.time() + 30, environment={"SET": "here"}, copy=copy) == 0
    assert {path.name for path in copy.iterdir()} == {"a.txt", LOG}
    assert (copy / LOG).read_text() == "begun here\n"


def test_a_file_that_changes_while_it_is_copied_is_copied_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, copy = tmp_path / "day", tmp_path / "copy"
    folder.mkdir()
    copy.mkdir()
    (folder / FILE).write_text("old")
    copyfile = shutil.copyfile

    def then_written(source: Path, target: Path) -> None:
        copyfile(source, target)
        (folder / FILE).write_text("new")
        os.utime(folder / FILE, ns=(1, 1))

    monkeypatch.setattr(shutil, "copyfile", then_written)
    supervisor._copy(folder, copy)
    assert (copy / FILE).read_text() == "old"
    monkeypatch.setattr(shutil, "copyfile", copyfile)
    supervisor._copy(folder, copy)
    assert (copy / FILE).read_text() == "new"

    def full(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    # A failed copy does not end copying.
    (folder / FILE).write_text("newer")
    monkeypatch.setattr(shutil, "copyfile", full)
    supervisor._copy(folder, copy)
    assert f"{FILE} could not be copied: No space left on device" in capsys.readouterr().out
    monkeypatch.setattr(shutil, "copyfile", copyfile)
    supervisor._copy(folder, copy)
    assert (copy / FILE).read_text() == "newer"


PARENT = """
import sys, time
from pathlib import Path
from benchmarks.gpu.supervisor import run_logged
log = Path(sys.argv[1])
print(run_logged([sys.executable, "-uc", "import os, time; print(os.getpid()); time.sleep(600)"], log, 600))
"""


def test_what_a_case_starts_ends_with_the_process(tmp_path: Path) -> None:
    """Child processes end however the process ends; all output is in the log by then."""
    log = tmp_path / "log"
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(log)], cwd=facts.ROOT)
    while not (log.exists() and log.read_text().endswith("\n")):
        assert parent.poll() is None
        time.sleep(0.05)
    child = Path("/proc") / log.read_text().strip() / "exe"
    assert child.exists()
    parent.kill()
    parent.wait()
    until = time.time() + 10
    while child.exists() and time.time() < until:
        time.sleep(0.05)
    assert not child.exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--second"], "there is no gpu-day.json in --out to continue"),
        (["--resume"], "there is no gpu-day.json in --out to continue"),
        (["--report"], "there is no gpu-day.json in --out; measure first"),
        (["--bundle", "missing.tar.xz"], "--bundle missing.tar.xz does not exist; `make gpu-bundle`"),
        (["--rows", "0"], "argument --rows: 0 is not allowed; give a number of at least 1"),
        (["--layers", "-1"], "argument --layers: -1 is not allowed; give a number of at least 1"),
        (["--seconds", "3"], "argument --seconds: 3 is not allowed; give more than 5"),
        (["--only", "linaer"], "argument --only: invalid choice: 'linaer'"),
        (["--copy", "/proc/nothing"], "'/proc/nothing' cannot be made"),
    ],
)
def test_what_cannot_be_done_is_said(
    arguments: list[str], says: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    try:
        status = gpu_day.main(["--out", str(tmp_path), "--dry-run", *arguments])
    except SystemExit as left:
        status = int(left.code or 0)
    captured = capfd.readouterr()
    assert says in captured.out + captured.err
    assert "Traceback" not in captured.out + captured.err
    assert status == 2


@pytest.mark.parametrize(
    ("content", "says"), [('{"stages": {', "gpu-day.json in --out is damaged"), ("{}", "has no dry_run, machine")]
)
def test_a_damaged_result_is_refused(
    content: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / FILE).write_text(content)
    assert gpu_day.main(["--out", str(tmp_path), "--report"]) == 2
    assert says in capsys.readouterr().err
    assert gpu_day.main(["--out", str(tmp_path / FILE), "--dry-run"]) == 2
    assert "cannot be made" in capsys.readouterr().err


def test_without_a_gpu_the_day_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="--dry-run"):
        gpu_day.measure(gpu_day._parser().parse_args(["--out", str(tmp_path)]), time.time())
