"""Int8Config: its accepted values, its refusals, and their messages."""

import copy
import dataclasses
import json
import pickle

import pytest

from int8compile import ConfigError, Int8Config
from int8compile.config import read_options


def test_defaults_are_the_specification() -> None:
    config = Int8Config()
    assert (config.threshold, config.outliers, config.rotate, config.lm_head) == (None, "row", True, "native")
    assert (config.threshold_of(rotated=True), config.threshold_of(rotated=False)) == (12.0, 6.0)
    assert Int8Config(threshold=3).threshold_of(rotated=True) == 3.0


def test_columns_are_those_of_x_itself() -> None:
    assert Int8Config().rotates
    assert not Int8Config(rotate=False).rotates
    assert not Int8Config(outliers="column").rotates
    assert Int8Config(outliers="column", threshold=0.5).threshold == 0.5  # The column policy's threshold is absolute.


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"treshold": 3.0}, "did you mean 'threshold'"),
        ({"xyzzy": 1}, "Allowed: threshold, outliers"),
        ({"threshold": -1.0}, r"threshold=-1.0: give a finite number >= 0"),
        ({"threshold": float("nan")}, "threshold=nan"),
        ({"threshold": float("inf")}, "threshold=inf"),
        ({"threshold": "6"}, "threshold='6'"),
        ({"threshold": True}, "threshold=True"),
        ({"threshold": 0.5}, r"threshold=0.5: it counts in mean magnitudes of a row.*Give a number >= 1"),
        ({"rotate": 1}, "rotate=1: give True or False"),
        ({"outliers": "col"}, "did you mean 'column'"),
        ({"lm_head": "float"}, "allowed are 'native', 'int8_weight', 'int8'"),
        ({"skip_modules": "lm_head"}, r"give a list of patterns, e.g. \['lm_head'\]"),
        ({"skip_modules": [3]}, "skip_modules holds 3"),
        ({"modules": ["o_proj"]}, "modules=.*give a dictionary"),
        ({"modules": {"": {}}}, "modules holds the pattern ''"),
        ({"modules": {"mlp": 6.0}}, r"modules\['mlp'\]=6.0: give a dictionary"),
        ({"modules": {"mlp": {"treshold": 6.0}}}, r"modules\['mlp'\] sets 'treshold' \(did you mean 'threshold'"),
        ({"modules": {"mlp": {"lm_head": "int8"}}}, "Allowed: threshold, outliers, rotate; skip_modules leaves"),
        ({"modules": {"mlp": {"threshold": -1}}}, r"modules\['mlp'\]: threshold=-1: give a finite number"),
        ({"modules": {"mlp": {"rotate": "no"}}}, r"modules\['mlp'\]: rotate='no': give True or False"),
        ({"modules": {"mlp": {"outliers": "col"}}}, r"modules\['mlp'\]: outliers='col'.*did you mean 'column'"),
        ({"modules": {"mlp": {"threshold": 0.5}}}, r"modules\['mlp'\]: threshold=0.5: it counts in mean magnitudes"),
        ({"min_features": 0}, "min_features=0"),
        ({"min_features": 2.5}, "min_features=2.5"),
        ({"free_weights": 1}, "free_weights=1"),
        ({"mode": "max-autotun"}, "did you mean 'max-autotune'"),
        ({"inductor": {"max_autotun": True}}, "did you mean 'max_autotune'"),
        ({"inductor": {"epilogue_fusion": "no"}}, "give a bool"),
        ({"inductor": ["max_autotune"]}, "give a dictionary"),
    ],
)
def test_bad_options_are_refused_with_what_to_do(options: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Int8Config.from_options(options)


def test_mode_can_be_given_with_options_but_not_twice() -> None:
    assert Int8Config.from_options({"threshold": 5}, mode="max-autotune").mode == "max-autotune"
    assert Int8Config.from_options({"mode": "max-autotune"}, mode="max-autotune").mode == "max-autotune"
    with pytest.raises(ConfigError, match="given twice"):
        Int8Config.from_options({"mode": "max-autotune"}, mode="reduce-overhead")


def test_inductor_options_override_those_of_the_mode() -> None:
    config = Int8Config(mode="max-autotune", inductor={"max-autotune": False, "epilogue_fusion": False})
    patches = config.inductor_patches()
    assert patches["max_autotune"] is False
    assert patches["triton.cudagraphs"] is True
    assert patches["epilogue_fusion"] is False
    assert Int8Config().inductor_patches() == {}


def test_config_is_frozen_and_keeps_patterns_as_a_tuple() -> None:
    config = Int8Config(skip_modules=["mlp"])  # type: ignore[arg-type]
    assert config.skip_modules == ("mlp",)
    with pytest.raises(AttributeError):
        config.threshold = 1.0  # type: ignore[misc]


def test_a_config_is_taken_as_options() -> None:
    config = Int8Config(threshold=3.0, skip_modules=("mlp",))
    assert Int8Config.from_options(config) == config
    with pytest.raises(ConfigError, match="mode is given twice"):
        Int8Config.from_options(config, mode="max-autotune")


def test_settings_of_some_modules() -> None:
    config = Int8Config(
        threshold=8, modules={"mlp": {"rotate": False, "threshold": None}, "layers.*.up": {"threshold": 3}}
    )
    assert config.of("layers.0.q") == Int8Config(threshold=8)
    assert config.of("layers.0.mlp.down") == Int8Config(rotate=False)
    assert config.of("layers.0.mlp.up") == Int8Config(rotate=False, threshold=3), "later patterns win"
    assert config.of("layers.0.mlp.up").of("layers.0.mlp.up").modules == {}
    assert Int8Config().of("mlp") == Int8Config()
    assert config.patterns == ("mlp", "layers.*.up")


def test_a_threshold_belongs_to_its_outliers() -> None:
    config = Int8Config(
        threshold=3, modules={"a": {"outliers": "column"}, "b": {"outliers": "column", "threshold": 0.5}}
    )
    assert config.of("a").threshold is None
    assert config.of("b").threshold == 0.5
    assert Int8Config(outliers="column", threshold=0.5, modules={"a": {"outliers": "row"}}).of("a") == Int8Config()


def test_whether_anything_is_rotated() -> None:
    assert Int8Config(modules={"a": {"rotate": False}}).may_rotate
    assert not Int8Config(rotate=False, modules={"a": {"threshold": 3}}).may_rotate
    assert Int8Config(rotate=False, modules={"a": {"rotate": True}}).may_rotate
    assert Int8Config(outliers="column", modules={"a": {"outliers": "row"}}).may_rotate


def test_settings_are_copied() -> None:
    given = {"mlp": {"threshold": 3}}
    config = Int8Config(modules=given)
    given["mlp"]["threshold"] = -1
    assert config.modules == {"mlp": {"threshold": 3.0}}
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config
    assert Int8Config(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_options_in_a_file(tmp_path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"threshold": 3, "modules": {"mlp": {"rotate": false}}}')
    assert Int8Config(**read_options(file)) == Int8Config(threshold=3, modules={"mlp": {"rotate": False}})
    file.write_text("[3]")
    with pytest.raises(ConfigError, match=r"config.json' holds \[3\]; give options"):
        read_options(file)
    file.write_text("{")
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        read_options(file)
    with pytest.raises(ConfigError, match=r"cannot be read as JSON: .*No such file"):
        read_options(tmp_path / "none.json")
