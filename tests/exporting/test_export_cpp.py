"""An exported language model in the two programs of examples/, which use PyTorch but not int8compile."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import int8compile

transformers = pytest.importorskip("transformers")

from int8compile.integrations.decoder import StaticCacheDecoder  # noqa: E402 - it imports transformers

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

# The system's program, or the one installed beside this Python.
CMAKE = shutil.which("cmake", path=os.pathsep.join([os.environ.get("PATH", ""), os.path.dirname(sys.executable)]))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CMAKE is None, reason="needs cmake"),
    pytest.mark.skipif(
        torch.version.cuda is not None and shutil.which("nvcc") is None,
        reason="CMake finds a PyTorch for CUDA only where the CUDA toolkit is",
    ),
]

LENGTH = 32
# The ten following tokens differ, and each leads its runner-up by more than int8 changes a logit.
PROMPT = list(range(226, 238))
COUNT = 10


@pytest.fixture(scope="module")
def decoder() -> StaticCacheDecoder:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        tie_word_embeddings=False,
    )
    return StaticCacheDecoder(transformers.LlamaForCausalLM(config).eval(), length=LENGTH)


@pytest.fixture(scope="module")
def exported(decoder: StaticCacheDecoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "model.pt2"
    args, shapes = decoder.example()
    report = int8compile.export(decoder, args, path, dynamic_shapes=shapes)
    assert len(report.rewritten) == 14
    return path


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("build")
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    for command in (["-S", str(EXAMPLES / "cpp"), "-B", str(folder), prefix], ["--build", str(folder)]):
        done = subprocess.run([str(CMAKE), *command], capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "generate"


def run(folder: Path, *command: object) -> subprocess.CompletedProcess[str]:
    """Run a program in a folder outside the repository; files that torch unpacks there are removed with it."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"TMPDIR": str(folder)}
    return subprocess.run(
        [str(word) for word in command], cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=300
    )


@torch.no_grad()
def one_by_one(model: Callable[..., Tensor], cache: list[Tensor]) -> list[int]:
    """Generate with calls of one token each, for the prompt too."""
    tokens = list(PROMPT)
    for position in range(len(PROMPT) + COUNT - 1):
        logits = model(torch.tensor([[tokens[position]]]), torch.tensor(position), cache)
        if position == len(tokens) - 1:
            tokens.append(int(logits.argmax()))
    return tokens[len(PROMPT) :]


def test_both_programs_generate_what_torch_compile_does(
    decoder: StaticCacheDecoder, exported: Path, program: Path, tmp_path: Path
) -> None:
    expected = one_by_one(torch.compile(decoder, backend="int8"), decoder.new_cache())
    assert len(set(expected)) == COUNT
    in_cpp = run(tmp_path, program, exported, COUNT, *PROMPT)
    assert (in_cpp.returncode, in_cpp.stderr) == (0, "")
    assert in_cpp.stdout == " ".join(map(str, expected)) + "\n"
    script = (
        "import runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__'); "
        "print({name.partition('.')[0] for name in sys.modules} & {'int8compile', 'transformers'})"
    )
    in_python = run(tmp_path, sys.executable, "-c", script, EXAMPLES / "generate.py", exported, COUNT, *PROMPT)
    assert in_python.returncode == 0, in_python.stderr
    assert in_python.stdout == in_cpp.stdout + "set()\n"


def changed(package: bytes, path: Path) -> bytes:
    """Flip a bit in the middle of a package's library, and return the new package."""
    with zipfile.ZipFile(path) as archive:
        (library,) = [info for info in archive.infolist() if info.filename.endswith(".so")]
    # The local header's lengths differ from those in the directory at the end, which zipfile reports.
    name, extra = struct.unpack_from("<HH", package, library.header_offset + 26)
    start = library.header_offset + 30 + name + extra
    assert package[start : start + 4] == b"\x7fELF"
    edited = bytearray(package)
    edited[start + library.file_size // 2] ^= 1
    return bytes(edited)


def test_program_says_in_a_line_why_a_package_cannot_be_loaded(exported: Path, program: Path, tmp_path: Path) -> None:
    package = exported.read_bytes()
    (tmp_path / "truncated.pt2").write_bytes(package[: len(package) // 2])
    (tmp_path / "changed.pt2").write_bytes(changed(package, exported))
    for name, why in {
        "missing.pt2": "no such file",
        "truncated.pt2": "Failed to initialize zip archive: .+",
        "changed.pt2": r"int8compile: the package is damaged or was edited: \w+\.wrapper\.so has changed .+",
    }.items():
        done = run(tmp_path, program, name, COUNT, *PROMPT)
        assert (done.returncode, done.stdout) == (1, "")
        assert re.fullmatch(f"generate: {re.escape(name)}: {why}\n", done.stderr), done.stderr


def test_program_refuses_more_tokens_than_the_cache_holds(exported: Path, program: Path, tmp_path: Path) -> None:
    full = run(tmp_path, program, exported, 1, *range(LENGTH - 1))
    assert (full.returncode, full.stderr) == (0, "")
    for count, prompt in ((1, LENGTH), (LENGTH, 1)):
        done = run(tmp_path, program, exported, count, *range(prompt))
        why = f"the cache has room for {LENGTH} tokens, not for {prompt} and {count} more"
        assert (done.returncode, done.stdout, done.stderr) == (1, "", f"generate: {exported}: {why}\n")


def test_a_token_that_does_not_exist_is_refused(exported: Path, program: Path, tmp_path: Path) -> None:
    # Inductor's own check ends the process.
    done = run(tmp_path, program, exported, 1, 3, 256)
    assert (done.returncode, done.stderr) == (1, f"generate: {exported}: there is no token 256, only 256\n")
    done = run(tmp_path, sys.executable, EXAMPLES / "generate.py", exported, 1, 3, 256)
    assert done.returncode == 1
    assert "there are tokens from 0 to 255, not all of [3, 256]" in done.stderr


def test_program_says_how_to_call_it(program: Path, tmp_path: Path) -> None:
    for arguments in ((), ("model.pt2", 1), ("model.pt2", "x", 1), ("model.pt2", 1, -1)):
        done = run(tmp_path, program, *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == "usage: generate model.pt2 COUNT TOKEN...\n"
