"""The table of configurations: complete, and what it gives can run."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed", exc_type=ImportError)
pytest.importorskip("hypothesis")

from hypothesis import given
from hypothesis import strategies as st

from int8compile import hardware, triton_kernels
from int8compile.errors import ConfigError
from int8compile.ops import digits
from int8compile.triton_kernels import autotune, tables
from int8compile.triton_kernels.tables import ARCHITECTURES
from tests.triton_problems import Problem

WITH_INT8 = [arch for arch in ARCHITECTURES.values() if arch.instruction]
SIZES = st.integers(1, 200_000)


@given(arch=st.sampled_from(WITH_INT8), m=SIZES, n=SIZES, k=st.integers(1, 131071), by_column=st.booleans(),
       multiprocessors=st.integers(1, 200))  # fmt: skip
def test_every_product_has_a_configuration(
    arch: tables.Architecture, m: int, n: int, k: int, by_column: bool, multiprocessors: int
) -> None:
    lists = m > (1 if by_column else arch.planes_rows)
    configs = tables.candidates(arch, m, k, lists=lists)
    config = tables.choose(configs, m, n, multiprocessors)
    assert config in configs
    if config.kernel == "gemv":
        assert m == 1
    else:
        # What takes planes gets planes, what takes lists gets lists.
        assert (config.kernel == "small_gemm") == (not lists)
    assert config.kernel != "tma_gemm" or k % 16 == 0
    # The largest tile that keeps every multiprocessor busy, or the smallest.
    larger = configs[: configs.index(config)]
    assert all(each.tiles(m, n) < multiprocessors for each in larger)
    assert config.tiles(m, n) >= multiprocessors or config is configs[-1]


@pytest.mark.parametrize("arch", WITH_INT8, ids=lambda arch: arch.name)
def test_tiles_fit_the_kernels(arch: tables.Architecture) -> None:
    assert set(arch.rows) == set(tables.BUCKETS)
    assert arch.planes_rows in (32, 64)
    assert set(arch.lists) == {bucket for bucket in tables.BUCKETS if 1 < bucket <= arch.planes_rows}
    for bucket, configs in [*arch.rows.items(), *arch.lists.items()]:
        for config in configs:
            assert digits.LIST_ROWS % config.bm == 0
            sizes = (config.bm, config.bn, config.bk, config.bf)
            assert all(size & (size - 1) == 0 for size in sizes)
            following = min([other for other in tables.BUCKETS if other > bucket], default=bucket + 1)
            # Few rows are one tile: the weight is read once.
            assert config.kernel not in ("small_gemm", "gemv") or config.bm >= following - 1
            if arch.instruction == "wgmma" and config.bm >= 64:
                assert config.num_warps % 4 == 0


@pytest.mark.parametrize(("isa", "family"), [
    ("sm_70", ""), ("sm_75", "sm_75"), ("sm_80", "sm_80"), ("sm_86", "sm_86"), ("sm_89", "sm_86"), ("sm_90", "sm_90"),
    ("sm_100", "sm_100"), ("sm_103", "sm_100"), ("sm_120", "sm_86"), ("gfx942:sramecc+:xnack-", "gfx942"),
    ("gfx950", "gfx942"), ("gfx1100", ""), ("avx2", ""), ("", ""),
])  # fmt: skip
def test_families(isa: str, family: str) -> None:
    assert hardware.kernel_family(isa) == family
    assert not family or family in ARCHITECTURES
    assert hardware.weight_only(isa) == (family == "sm_75")


class Recorded:
    """A launch that counts its runs."""

    def __init__(self, config: tables.Config) -> None:
        self.config = config

    def run(self) -> None:
        pass


def tuned(path: Path, times: dict[str, float], calls: list[str]) -> autotune.Cache:
    def measure(call: object) -> float:
        config = str(call.__self__.config)  # type: ignore[attr-defined]
        calls.append(config)
        return times.get(config, 1.0)

    return autotune.Cache(path, measure)


def product(m: int = 20) -> autotune.Product:
    arch = ARCHITECTURES["sm_90"]
    problem = Problem.random(m, 64, 64, torch.bfloat16)
    x = problem.quantize_by_definition(arch)
    y = torch.empty(m, 64)
    return autotune.Product(x, problem.qweight, problem.scale, None, y, digits.NONE, 0, 0, problem.policy(arch))


def launch_of(product: autotune.Product, config: tables.Config) -> Recorded:
    return Recorded(config)


def test_autotune_measures_once_and_remembers(tmp_path: Path) -> None:
    configs = ARCHITECTURES["sm_90"].rows[17]
    calls: list[str] = []
    path = tmp_path / "folder" / "device.json"
    times = {str(configs[1]): 0.5}
    for _ in range(2):
        found = tuned(path, times, calls).choose(product(), configs, 1, launch_of)  # type: ignore[arg-type]
        assert found == configs[1]
    assert calls == [str(config) for config in configs]
    assert list(json.loads(path.read_text()).values()) == [str(configs[1])]
    # Another bucket is another question; more rows of this one are not.
    cache = tuned(path, times, calls)
    cache.choose(product(32), configs, 1, launch_of)  # type: ignore[arg-type]
    assert len(calls) == len(configs)
    cache.choose(product(33), configs, 1, launch_of)  # type: ignore[arg-type]
    assert len(calls) == 2 * len(configs)
    assert len(json.loads(path.read_text())) == 2


@pytest.mark.parametrize("content", ["{", "[]", '{"17 64 64 21100": "a kernel of another table"}'])
def test_autotune_survives_its_file(content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    configs = ARCHITECTURES["sm_90"].rows[17]
    path = tmp_path / "device.json"
    path.write_text(content)
    calls: list[str] = []
    with caplog.at_level(logging.WARNING):
        cache = tuned(path, {str(configs[0]): 0.5}, calls)
    assert cache.choose(product(), configs, 1, launch_of) == configs[0]  # type: ignore[arg-type]
    assert len(calls) == len(configs)
    assert str(configs[0]) in json.loads(path.read_text()).values()
    assert ("cannot be read" in caplog.text) == (content == "{")


def test_autotune_without_a_place_to_write(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    cache = tuned(tmp_path / "file" / "device.json", {}, [])
    configs = ARCHITECTURES["sm_90"].rows[17]
    assert cache.choose(product(), configs, 1, launch_of) in configs  # type: ignore[arg-type]
    assert "cannot be written" in caplog.text


def test_autotune_is_an_option(monkeypatch: pytest.MonkeyPatch) -> None:
    configs = ARCHITECTURES["sm_90"].rows[17]
    monkeypatch.delenv("INT8COMPILE_AUTOTUNE", raising=False)
    monkeypatch.setattr(autotune, "_cache", lambda device: pytest.fail("nobody asked for measurements"))
    assert autotune.choose(product(), configs, 1, launch_of) == configs[0]  # type: ignore[arg-type]
    monkeypatch.setenv("INT8COMPILE_AUTOTUNE", "yes")
    with pytest.raises(ConfigError, match=r"INT8COMPILE_AUTOTUNE='yes': allowed are 0 .* and 1"):
        autotune.choose(product(), configs, 1, launch_of)  # type: ignore[arg-type]


def test_another_table_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    before = autotune.path_for("NVIDIA H100 80GB HBM3")
    assert before.name.startswith("NVIDIA-H100-80GB-HBM3-triton-")
    changed = dataclasses.replace(ARCHITECTURES["sm_90"], planes_rows=16)
    monkeypatch.setitem(ARCHITECTURES, "sm_90", changed)
    assert autotune.path_for("NVIDIA H100 80GB HBM3") != before


def test_the_kernels_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    assert triton_kernels.available()
    monkeypatch.setenv("INT8COMPILE_TRITON", "0")
    assert triton_kernels.failure() == "INT8COMPILE_TRITON=0 turns them off"
    assert not triton_kernels.load()
    monkeypatch.setenv("INT8COMPILE_TRITON", "no")
    with pytest.raises(ConfigError, match=r"INT8COMPILE_TRITON='no': allowed are 1 .* and 0"):
        triton_kernels.available()
