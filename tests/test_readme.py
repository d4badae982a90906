"""README's code runs, and its table of options is the config's."""

import dataclasses
import pathlib
import re

import pytest

import int8compile
from int8compile import Int8Config

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text()


def test_examples_run_in_order(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 11
    names: dict[str, object] = {}
    for block in blocks[1:]:  # The first is the one line that the others spell out.
        exec(block, names)
    assert names["logits"].shape == (1, 10, 256)
    assert names["y"].shape == (1, 512)
    assert isinstance(names["model"][0], int8compile.Int8Linear)
    assert isinstance(names["again"].model.layers[0].mlp.up_proj, int8compile.Int8Linear)
    assert blocks[0].startswith('model.compile(backend="int8")')


def test_the_table_of_options_is_complete() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `(.*?)` \|", README, re.MULTILINE)
    defaults = {field.name: getattr(Int8Config(), field.name) for field in dataclasses.fields(Int8Config)}
    assert [name for name, _ in rows] == list(defaults)
    for name, shown in rows:
        value = defaults[name]
        assert eval(shown) == (list(value) if isinstance(value, tuple) else value)


def test_every_command_is_a_target_of_the_makefile() -> None:
    makefile = (pathlib.Path(__file__).parents[1] / "Makefile").read_text()
    commands = set(re.findall(r"\bmake ([a-z-]+)", README)) - {"demo.", "it"}
    assert {"demo", "test"} <= commands
    assert all(re.search(rf"^{command}:", makefile, re.MULTILINE) for command in commands), commands
