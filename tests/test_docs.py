"""The pages of the documentation: their Python and their commands run, their links lead somewhere.

The Python blocks of a page run in order and share their names. Comments in the Markdown, which readers do not see, say
more about a block or stand for one:

    <!-- run
    model = ...                    Python that runs there: what a page needs beforehand, or an assertion
    -->
    <!-- not run: WHY -->          before a block that no test can run
    <!-- slow: WHY -->             before a block that runs in the slow test only

The commands of `console` blocks run as `run_command` says. HUB_MODEL is on a hub of this test's own: a tiny random
model, or the real one in the slow test.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from int8compile import Int8Config, Int8Linear
from int8compile.app import cli, loading
from int8compile.weights import STORE
from tests.helpers.letters import byte_tokenizer

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
HUB_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
# The C++ of a page is an excerpt of examples/cpp/main.cpp; tests/plugin checks the YAML.
LANGUAGES = {"python", "console", "cpp", "yaml"}
BLOCK = re.compile(
    r"^<!-- run\n(?P<hidden>.*?)^-->$"
    r"|(?:^<!-- (?P<mark>slow|not run): (?P<why>.+?) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    """A block of a page.

    Attributes:
        language: As behind the fence.
        text: Its lines, below as many empty ones as are above it in the page, so that tracebacks show the page's lines.
        mark: "slow", "not run" or "".
    """

    language: str
    text: str
    mark: str


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text()
    found = []
    for match in BLOCK.finditer(text):
        hidden = match["hidden"] is not None
        above = "\n" * text.count("\n", 0, match.start("hidden" if hidden else "text"))
        found.append(
            Block("python", above + match["hidden"], "")
            if hidden
            else Block(match["language"], above + match["text"], match["mark"] or "")
        )
    return found


def commands_of(block: Block) -> list[str]:
    return [line.removeprefix("$ ") for line in block.text.splitlines() if line.startswith("$ ")]


def page_name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def put_on_the_hub(cache: Path, name: str) -> Path:
    """A folder of a cache of the Hugging Face hub, for a model's files."""
    entry = cache / f"models--{name.replace('/', '--')}"
    (entry / "refs").mkdir(parents=True)
    (entry / "refs" / "main").write_text("0" * 40)
    return entry / "snapshots" / ("0" * 40)


def save_tiny_model(folder: Path) -> None:
    """A random model of two layers, with a tokenizer of bytes."""
    transformers = pytest.importorskip("transformers")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=8192,  # The pages name tokens of the real model.
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("hub")
    save_tiny_model(put_on_the_hub(cache, HUB_MODEL))
    return cache


@pytest.fixture(scope="session")
def real_hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("hub")
    folder, file = put_on_the_hub(cache, HUB_MODEL), loading.smollm2_file()
    loading.load_gguf(file).save_pretrained(folder)
    loading.load_tokenizer(file).save_pretrained(folder)
    return cache


class Reader:
    """Somebody who types what stands in the pages, in a folder with `examples` and a hub that needs no network."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
        self._monkeypatch, self._capsys, self.folder = monkeypatch, capsys, folder
        self.printed: dict[str, str] = {}
        (folder / "examples").symlink_to(ROOT / "examples")
        monkeypatch.chdir(folder)

    def use_hub(self, cache: Path) -> None:
        constants = pytest.importorskip("huggingface_hub").constants
        self._monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        self._monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def read(self, page: Path, *, slow: bool = False) -> dict[str, Any]:
        """Run a page; return the names that its Python has defined."""
        names: dict[str, Any] = {"__name__": "__main__"}
        for block in blocks_of(page):
            if block.mark == "not run" or (block.mark == "slow" and not slow):
                continue
            if block.language == "python":
                exec(compile(block.text, str(page), "exec"), names)
            for command in commands_of(block) if block.language == "console" else []:
                self._capsys.readouterr()
                if block.mark == "slow":
                    self.run_in_shell(command)
                else:
                    self.run_command(command)
                self.printed[command] = self._capsys.readouterr().out
        return names

    def run_command(self, command: str) -> None:
        """Run a command in this process; those that install, test or measure are only checked."""
        words = shlex.split(command, comments=True)
        with self._monkeypatch.context() as patch:
            while "=" in words[0]:
                patch.setenv(*words.pop(0).split("=", 1))
            words = [word.removeprefix(".venv/bin/") for word in words]
            match words:
                case ["int8compile", *arguments]:
                    assert cli.main(arguments) == 0
                case ["python", "-m", "pytest", file, *_]:
                    assert (ROOT / file).is_file()
                case ["pytest", *arguments]:
                    given = {word.partition("=")[0] for word in arguments if word.startswith("--")}
                    assert given <= options_of_pytest(self.folder)
                case ["python", "-m", module, *arguments]:
                    options = [argument for argument in arguments if argument.startswith("--")]
                    patch.setattr(sys, "argv", [module, "--help"])
                    patch.delitem(sys.modules, module, raising=False)  # Another test may have imported it.
                    # By its file: pytest's loader of modules of this distribution has no code for runpy.
                    spec = importlib.util.find_spec(module)
                    assert spec is not None
                    assert spec.origin is not None
                    with pytest.raises(SystemExit, match=r"^0$"):
                        runpy.run_path(spec.origin, run_name="__main__")
                    shown = self._capsys.readouterr().out
                    assert not [option for option in options if option not in shown]
                case ["python", file, *arguments]:
                    patch.setattr(sys, "argv", [file, *arguments])
                    runpy.run_path(file, run_name="__main__")
                case ["make", target]:
                    assert target in targets()
                case ["pip", "install", what]:
                    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
                    assert set(re.findall(r"\w+", what)) <= set(extras)
                case _:
                    pytest.fail(f"this test does not know how to run: {command}")

    def run_in_shell(self, command: str) -> None:
        path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
        done = subprocess.run(
            ["bash", "-c", command],
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
            env={**os.environ, "PATH": path},
        )
        assert done.returncode == 0, done.stdout + done.stderr
        print(done.stdout)


def options_of_pytest(folder: Path) -> set[str]:
    command = [sys.executable, "-m", "pytest", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100, cwd=folder).stdout
    return set(re.findall(r"--[\w-]+", shown))


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Reader]:
    return Reader(monkeypatch, capsys, tmp_path)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page)], ids=page_name)
def test_a_page_runs(page: Path, reader: Reader, tiny_hub: Path) -> None:
    reader.use_hub(tiny_hub)
    quantized = STORE.quantized
    names = reader.read(page)
    if page == README:
        assert STORE.quantized > quantized
        assert isinstance(names["model"].model.layers[0].mlp.up_proj, Int8Linear)
        assert (reader.folder / "smollm2-int8" / "config.json").is_file()
    if page.name == "int8-models.md":
        assert isinstance(names["model"][0], Int8Linear)
        assert isinstance(names["again"].model.layers[0].mlp.up_proj, Int8Linear)
    if page.name == "export.md":
        assert names["y"].shape == (1, 512)


@pytest.mark.slow
def test_readme_answers_with_the_real_model(reader: Reader, real_hub: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reader.use_hub(real_hub)
    reader.read(README)
    (promised,) = re.findall(r"^print\(answer\(.*  # (.*)$", README.read_text(), re.MULTILINE)
    assert promised in capsys.readouterr().out + "".join(reader.printed.values())


@pytest.mark.slow
def test_both_programs_write_the_same_tokens(reader: Reader, real_hub: Path) -> None:
    reader.use_hub(real_hub)
    reader.read(ROOT / "docs" / "export.md", slow=True)
    written = [text.split() for command, text in reader.printed.items() if "generate" in command.split(" smollm2")[0]]
    assert len(written[-1]) == 8
    assert written[0] == written[1]


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_block_is_found_and_of_a_known_language(page: Path) -> None:
    text = page.read_text()
    shown = [match for match in BLOCK.finditer(text) if match["hidden"] is None]
    assert {match["language"] for match in shown} <= LANGUAGES
    assert len(re.findall("^ *```", text, re.MULTILINE)) == 2 * len(shown)
    assert text.count("<!-- run") == len(blocks_of(page)) - len(shown)


def test_few_blocks_are_left_out() -> None:
    marked = [(page_name(page), block.mark) for page in PAGES for block in blocks_of(page) if block.mark]
    assert marked == [("docs/benchmarks.md", "not run"), ("docs/export.md", "slow"), ("docs/int8-models.md", "not run")]


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=page_name)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", without_blocks(page)):
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def without_blocks(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", without_blocks(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_is_reached_from_readme() -> None:
    text = README.read_text()
    assert not [page_name(page) for page in PAGES if page != README and f"({page_name(page)}" not in text]


def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_commands_within_the_text_exist(page: Path) -> None:
    code = re.findall(r"`([^`\n]+)`", page.read_text())
    modules = {words.group(1) for text in code if (words := re.match(r"python -m ([\w.]+)", text))}
    assert not [module for module in modules if importlib.util.find_spec(module) is None]
    made = {words.group(1) for text in code if (words := re.match(r"make ([a-z-]+)$", text))}
    assert made <= targets()


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_paths_within_the_text_exist(page: Path) -> None:
    paths = re.findall(
        r"`((?:int8compile|passes|triton_kernels|tests|benchmarks|docs|examples)/[\w./]*)`", page.read_text()
    )
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_readme_is_one_screen() -> None:
    lines = README.read_text().splitlines()
    assert len(lines) <= 150
    assert {"$ make demo", "$ make test"} <= {line.partition("  ")[0] for line in lines}


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_lines_are_short(page: Path) -> None:
    text = re.sub(r"<!-- generated .*?: begin.*?: end -->", "", page.read_text(), flags=re.DOTALL)
    assert not [line for line in text.splitlines() if len(line) > 120]


def test_the_table_of_options_is_complete() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `(.*?)` \|", README.read_text(), re.MULTILINE)
    defaults = {field.name: getattr(Int8Config(), field.name) for field in dataclasses.fields(Int8Config)}
    assert [name for name, _ in rows] == list(defaults)
    for name, shown in rows:
        value = defaults[name]
        assert eval(shown) == (list(value) if isinstance(value, tuple) else value)
