"""Folders of checkpoints are replaced whole or not at all, even by killed processes and on failing disks."""

from __future__ import annotations

import concurrent.futures
import errno
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

import int8compile
from int8compile import CheckpointError, atomic
from int8compile.stored import checkpoint, description
from tests.helpers.checkpoint_saver import SHARD_BYTES, version
from tests.helpers.checkpoints import ROOT, assert_same, load, quantized, save, shard, truncate
from tests.helpers.models import Stack


def test_a_folder_of_other_things_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    save(quantized(Stack), folder)
    (folder / "config.json").write_text("{}")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(CheckpointError, match=r"holds files that do not belong to an int8 checkpoint: config\.json"):
        save(quantized(Stack), folder)
    assert before == {file.name: file.read_bytes() for file in folder.iterdir()}
    assert list(tmp_path.iterdir()) == [folder]
    # Loading ignores other files.
    load(folder, Stack)
    with pytest.raises(CheckpointError, match=r"config\.json is a file"):
        save(quantized(Stack), folder / "config.json")


def test_save_replaces_a_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "model"
    for seed in (0, 1, 0):
        model = version(seed)
        save(model, folder, max_shard_bytes=SHARD_BYTES[seed])
        assert_same(load(folder, Stack), model)
        assert list(folder.parent.iterdir()) == [folder]
    folder = tmp_path / "empty"
    folder.mkdir()
    save(version(0), folder)
    assert_same(load(folder, Stack), version(0))
    # A link stays; the folder it points to is replaced.
    (tmp_path / "link").symlink_to(folder)
    save(version(1), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert_same(load(folder, Stack), version(1))


def test_where_folders_cannot_be_exchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Test the fallback of two renames, and the state that a process dying between them leaves."""
    folder = tmp_path / "model"
    save(version(0), folder)
    monkeypatch.setattr(atomic, "_exchange", lambda first, second: False)
    save(version(1), folder)
    assert_same(load(folder, Stack), version(1))
    assert list(tmp_path.iterdir()) == [folder]
    rename = os.rename

    def fails_once(source: Path, target: Path) -> None:
        if target == folder and not folder.exists() and ".tmp-" in source.name:
            raise OSError(errno.EIO, "of the test")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fails_once)
        with pytest.raises(CheckpointError, match="of the test"):
            save(version(0), folder)
    assert_same(load(folder, Stack), version(1))
    assert list(tmp_path.iterdir()) == [folder]
    # The state a killed process leaves: no process has this number.
    old = tmp_path / f".model.old-{dead_process()}-0123abcd"
    folder.rename(old)
    with pytest.raises(CheckpointError, match=rf"does not exist.*whole, in {old}: rename it to model"):
        load(folder, Stack)
    save(version(0), folder)
    assert list(tmp_path.iterdir()) == [folder]


def dead_process() -> int:
    with subprocess.Popen(["true"]) as process:
        process.wait()
    return process.pid


def test_leftovers_of_dead_processes_are_removed_and_no_others(tmp_path: Path) -> None:
    kept = [
        tmp_path / f".model.tmp-{os.getpid()}-0123abcd",  # In use.
        tmp_path / f".other.tmp-{dead_process()}-0123abcd",  # Belongs to another checkpoint.
        tmp_path / ".model.tmp-mine",
    ]
    dead = [tmp_path / f".model.{kind}-{dead_process()}-0123abcd" for kind in ("tmp", "old")]
    for folder in (*kept, *dead):
        folder.mkdir()
        (folder / "file").touch()
    save(version(0), tmp_path / "model")
    assert sorted(tmp_path.iterdir()) == sorted((*kept, tmp_path / "model"))


def test_a_folder_in_use_by_a_process_that_is_not_visible_is_kept(tmp_path: Path) -> None:
    """Containers that share a disk do not see each other's processes; the lock shows that the folder is in use."""
    with atomic.temporary_folder(tmp_path / "model") as used:
        hidden = used.rename(used.with_name(f".model.tmp-{dead_process()}-0123abcd"))
        save(version(0), tmp_path / "model")
        assert hidden.exists()
    save(version(0), tmp_path / "model")
    assert not hidden.exists()


# Starts a process that saves to a folder in a loop and dies before a given step (0: never).
Start: TypeAlias = Callable[[Path, int], tuple[int, Callable[[], None]]]


@pytest.fixture(scope="module")
def start() -> Iterator[Start]:
    """Return a function that starts a saving process; it gives the process ID and a function that waits for the end."""
    command = [sys.executable, "-m", "tests.helpers.checkpoint_saver"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def ask(line: str) -> str:
            process.stdin.write(f"{line}\n")
            process.stdin.flush()
            return process.stdout.readline().strip()

        def begin(folder: Path, step: int) -> tuple[int, Callable[[], None]]:
            def wait() -> None:
                assert ask("wait") == "ended"

            return int(ask(f"{step} {folder}")), wait

        yield begin
        process.stdin.close()


def which_version(folder: Path, versions: list[nn.Module]) -> int:
    """Load a checkpoint and return its version, which it must equal bit by bit."""
    state = load(folder, Stack).state_dict()
    same = [all(torch.equal(state[name], tensor) for name, tensor in v.state_dict().items()) for v in versions]
    assert sum(same) == 1
    return same.index(True)


@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_any_moment(kills: int, start: Start, tmp_path: Path) -> None:
    """The folder is one version or the other, whole, and leftovers beside it do no harm."""
    folder, versions, chance = tmp_path / "model", [version(0), version(1)], random.Random(0)
    save(versions[0], folder)
    found, left = [], 0
    for _ in range(kills):
        child, wait = start(folder, 0)
        time.sleep(chance.uniform(0.005, 0.1))
        os.kill(child, signal.SIGKILL)
        wait()
        left += len(list(tmp_path.glob(".model.tmp-*")))
        found.append(which_version(folder, versions))
    # The processes were killed while saving, not between saves.
    assert left > 0
    assert kills < 50 or set(found) == {0, 1}
    save(versions[1], folder)
    assert list(tmp_path.iterdir()) == [folder]


def test_killed_before_each_step(start: Start, tmp_path: Path) -> None:
    """The process is killed before each file that two saves open, rename or delete."""
    folder, versions = tmp_path / "model", [version(0), version(1)]
    save(versions[0], folder)
    found = []
    for step in range(1, 61):
        for file in tmp_path.iterdir():
            shutil.rmtree(file)
        save(versions[0], folder, max_shard_bytes=SHARD_BYTES[0])
        _, wait = start(folder, step)
        wait()
        found.append(which_version(folder, versions))
    # The child saves version 1, then version 0: both replacements are among the steps.
    assert [which for which, _ in itertools.groupby(found)][:3] == [0, 1, 0]


def test_files_that_appear_while_it_is_written_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exchanging folders would remove any file in the old one."""
    model = Stack()
    int8compile.quantize_(model, progress=False)
    folder = tmp_path / "model"
    int8compile.save(model, folder, progress=False)
    write = checkpoint._write

    def meanwhile(*args: Any) -> None:
        (folder / "thesis.txt").write_text("mine")
        write(*args)

    monkeypatch.setattr(checkpoint, "_write", meanwhile)
    with pytest.raises(CheckpointError, match=r"holds files that do not belong to an int8 checkpoint: thesis\.txt"):
        int8compile.save(model, folder, progress=False)
    assert (folder / "thesis.txt").read_text() == "mine"


def test_loading_in_several_threads(tmp_path: Path) -> None:
    """torch shares its parameter registration hooks among all threads."""
    model = Stack()
    int8compile.quantize_(model, progress=False)
    int8compile.save(model, tmp_path / "model", progress=False)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        loads = [pool.submit(int8compile.load, tmp_path / "model", Stack, progress=False) for _ in range(80)]
        others = [pool.submit(Stack) for _ in range(80)]
    for each in loads:
        for name, tensor in each.result().state_dict().items():
            assert torch.equal(tensor, model.state_dict()[name])
    assert not any(parameter.is_meta for other in others for parameter in other.result().parameters())


# Errors of the file system


class Disk:
    """Makes file system calls fail with an error number, for files whose name contains a part."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch = monkeypatch

    def fail(self, owner: Any, name: str, number: int, part: str = "") -> None:
        original = getattr(owner, name)

        def failing(*args: Any, **kwargs: Any) -> Any:
            if any(part in str(arg) for arg in args if isinstance(arg, str | Path)):
                raise OSError(number, os.strerror(number), *map(str, args[:1]))
            return original(*args, **kwargs)

        self._patch.setattr(owner, name, failing)


def full_for_safetensors(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(tensors: object, file: Path, metadata: object) -> None:
        file.write_bytes(b"half of it")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", failing)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize(
    ("break_", "message"),
    [
        pytest.param(full_for_safetensors, "I/O error: No space left on device", id="disk full, shards"),
        pytest.param(
            lambda patch: Disk(patch).fail(Path, "write_text", errno.ENOSPC, checkpoint.INDEX),
            "No space left on device",
            id="disk full, index",
        ),
        pytest.param(
            lambda patch: Disk(patch).fail(checkpoint, "sync", errno.EIO), "Input/output error", id="sync fails"
        ),
        pytest.param(
            lambda patch: Disk(patch).fail(os, "rename", errno.EACCES), "Permission denied", id="rename refused"
        ),
        pytest.param(
            lambda patch: Disk(patch).fail(Path, "mkdir", errno.EROFS), "Read-only file system", id="read-only"
        ),
    ],
)
def test_a_disk_that_fails_while_saving(
    break_: Callable[[pytest.MonkeyPatch], None], message: str, before: bool, tmp_path: Path
) -> None:
    """A failed save leaves nothing behind, and the former checkpoint stays."""
    model, folder = quantized(Stack), tmp_path / "int8"
    if before:
        save(model, folder)
        files = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.MonkeyPatch.context() as patch:
        break_(patch)
        with pytest.raises(CheckpointError, match=rf"/int8 cannot be written: .*{message}.*Make room or name another"):
            save(quantized(Stack), folder)
    assert [path.name for path in tmp_path.iterdir()] == (["int8"] if before else [])
    if before:
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == files
        assert_same(load(folder, Stack), model)


def circle(file: Path) -> None:
    file.symlink_to(file)


@pytest.mark.parametrize(
    ("put", "message"),
    [
        pytest.param(lambda folder: folder.write_text(""), "is a file. Name a folder", id="a file"),
        pytest.param(circle, "int8 cannot be written: .*Not a directory", id="links in a circle"),
        pytest.param(
            lambda folder: folder.parent.joinpath("up").write_text(""),
            r"/up/int8 cannot be written: .*",
            id="up a file",
        ),
    ],
)
def test_folders_that_cannot_be_saved_to(put: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    put(tmp_path / "int8")
    folder = tmp_path / "up" / "int8" if (tmp_path / "up").exists() else tmp_path / "int8"
    with pytest.raises(CheckpointError, match=message):
        save(quantized(Stack), folder)


def replaced_by(new: Callable[[Path], object]) -> Callable[[Path], object]:
    def replace(file: Path) -> None:
        file.unlink()
        new(file)

    return replace


UNREADABLE = {
    "a folder": replaced_by(Path.mkdir),
    "a link to nothing": replaced_by(lambda file: file.symlink_to("nothing")),
    "a link to itself": replaced_by(circle),
    "a pipe": replaced_by(os.mkfifo),
    "missing": Path.unlink,
    "empty": lambda file: file.write_bytes(b""),
    "cut off": lambda file: truncate(file, 10),
    "not UTF-8": lambda file: file.write_bytes(b"\xff\xfe\x00{"),
    "of zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
}


@pytest.mark.parametrize("which", ["index", "shard"])
@pytest.mark.parametrize("how", UNREADABLE)
def test_unreadable_files(how: str, which: str, tmp_path: Path) -> None:
    folder = tmp_path / "int8"
    save(quantized(Stack), folder, max_shard_bytes=5000)
    file = shard(folder) if which == "shard" else folder / checkpoint.INDEX
    UNREADABLE[how](file)
    with pytest.raises(CheckpointError, match=file.name.replace(".", r"\.")):
        load(folder, Stack)


@pytest.mark.parametrize(
    ("owner", "name"), [(Path, "read_bytes"), (Path, "iterdir"), (description, "safe_open"), (Path, "stat")]
)
@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
def test_a_disk_that_fails_while_loading(
    owner: Any, name: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "int8"
    save(quantized(Stack), folder)
    Disk(monkeypatch).fail(owner, name, number, str(folder))
    with pytest.raises(CheckpointError, match=rf"{folder}.* cannot be read: .*{os.strerror(number)}"):
        load(folder, Stack)


def other() -> nn.Module:
    torch.manual_seed(1)
    return Stack()


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda folder: save(quantized(other), folder), id="replaced"),
        pytest.param(lambda folder: save(quantized(other), folder, max_shard_bytes=5000), id="replaced, other shards"),
        pytest.param(shutil.rmtree, id="removed"),
    ],
)
@pytest.mark.parametrize("when", ["check_shards", "_check_names"])
def test_a_folder_that_changes_while_it_is_loaded(
    change: Callable[[Path], object], when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors of two checkpoints are never mixed."""
    folder = tmp_path / "int8"
    save(quantized(Stack), folder)
    original = getattr(checkpoint, when)

    def changing(*args: Any) -> Any:
        change(folder)
        return original(*args)

    monkeypatch.setattr(checkpoint, when, changing)
    with pytest.raises(CheckpointError, match=f"{folder} was replaced or removed while it was loaded. Load it again"):
        load(folder, Stack)
