"""The table of configurations is complete, and its configurations can run."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed", exc_type=ImportError)
pytest.importorskip("hypothesis")

from hypothesis import example, given
from hypothesis import strategies as st

from int8compile import hardware, triton_kernels
from int8compile.errors import ConfigError
from int8compile.ops.quantized import BLOCK, COUNTERS, NONE
from int8compile.triton_kernels import autotune, loading, tables
from int8compile.triton_kernels.tables import ARCHITECTURES
from tests.helpers.triton_problems import Problem

WITH_INT8 = [arch for arch in ARCHITECTURES.values() if arch.matrix_instruction]
SIZES = st.integers(1, 200_000)


@given(arch=st.sampled_from(WITH_INT8), m=SIZES, n=SIZES, k=st.integers(1, 131071), multiprocessors=st.integers(1, 200))
# Gluon's kernel with a tile for every multiprocessor, with the lowest cost, and split.
@example(arch=ARCHITECTURES["sm_90"], m=4096, n=4096, k=4096, multiprocessors=132)
@example(arch=ARCHITECTURES["sm_90"], m=300, n=4096, k=4096, multiprocessors=132)
@example(arch=ARCHITECTURES["sm_90"], m=256, n=4096, k=14336, multiprocessors=132)
def test_every_product_has_a_configuration(
    arch: tables.Architecture, m: int, n: int, k: int, multiprocessors: int
) -> None:
    configs = tables.candidates(arch, m, k)
    config = tables.choose(configs, m, n, k, multiprocessors)
    assert dataclasses.replace(config, splits=1, programs=0) in configs
    assert (config.kernel == "gemv") == (m == 1)
    gluon = config.kernel == "gluon_gemm"
    assert not gluon or k % 16 == 0
    assert config.programs == (multiprocessors if gluon else 0)
    # Each tile whose sums are split has a counter, and each split has work to do.
    assert config.splits == 1 or (config.tiles(m, n) <= COUNTERS and config.kernel in ("gemm", "gluon_gemm"))
    assert config.splits == 1 or config.bn <= 128
    assert config.splits * max(config.bk, BLOCK) < k + max(config.bk, BLOCK)
    if m >= 256 and configs[0].tiles(m, n) >= multiprocessors:
        assert dataclasses.replace(config, programs=0) == configs[0]


@pytest.mark.skipif(bool(loading.gluon_failure()), reason=loading.gluon_failure() or "Gluon can be used")
@pytest.mark.parametrize(("m", "n", "k", "first", "split"), [
    (4096, 4096, 4096, True, False), (300, 4096, 4096, False, False), (256, 4096, 14336, False, True),
])  # fmt: skip
def test_gluon_is_chosen(m: int, n: int, k: int, first: bool, split: bool) -> None:
    configs = tables.candidates(ARCHITECTURES["sm_90"], m, k)
    config = tables.choose(configs, m, n, k, 132)
    assert (config.kernel, config.programs) == ("gluon_gemm", 132)
    assert (dataclasses.replace(config, splits=1, programs=0) == configs[0]) == first
    assert (config.splits > 1) == split


@pytest.mark.parametrize("m", [1, 2, 16, 17, 32, 33, 64, 65, 128, 129, 255, 256, 2048])
@pytest.mark.parametrize(("n", "k"), [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)])
def test_products_of_a_large_model_fill_an_h100(n: int, k: int, m: int) -> None:
    config = tables.choose(tables.candidates(ARCHITECTURES["sm_90"], m, k), m, n, k, 132)
    programs = config.tiles(m, n) * config.splits
    assert programs >= 0.72 * 132
    if 1 < m <= 64:
        # Each row tile reads the weight, each column tile reads x, and each split stores its sums, which are then read.
        partials = 8 * config.splits * m * n if config.splits > 1 else 0
        assert programs * k / config.splits * (m + config.bn) + partials < 3.1 * n * k


@pytest.mark.parametrize("arch", WITH_INT8, ids=lambda arch: arch.name)
def test_tiles_fit_the_kernels(arch: tables.Architecture) -> None:
    assert set(arch.by_bucket) == set(tables.BUCKETS)
    for bucket, configs in arch.by_bucket.items():
        for config in configs:
            sizes = (config.bm, config.bn, config.bk)
            assert all(size & (size - 1) == 0 for size in sizes)
            following = min([other for other in tables.BUCKETS if other > bucket], default=bucket + 1)
            # Few rows are one tile: the weight is read once.
            assert config.bm >= min(following - 1, 64)
            if arch.matrix_instruction == "wgmma" and config.bm >= 64:
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
    problem = Problem.random(m, 64, 64, torch.bfloat16)
    x = problem.quantize_by_definition()
    return autotune.Product(*x, problem.qweight, problem.scale, None, torch.empty(m, 64), NONE, 0, 0)


def launch_of(product: autotune.Product, config: tables.Config) -> Recorded:
    return Recorded(config)


def test_autotune_measures_once_and_remembers(tmp_path: Path) -> None:
    configs = ARCHITECTURES["sm_90"].by_bucket[17]
    calls: list[str] = []
    path = tmp_path / "folder" / "device.json"
    times = {str(configs[1]): 0.5}
    for _ in range(2):
        found = tuned(path, times, calls).choose(product(), configs, 1, launch_of)  # type: ignore[arg-type]
        assert found == configs[1]
    assert calls == [str(config) for config in configs]
    assert list(json.loads(path.read_text()).values()) == [str(configs[1])]
    # Another bucket is measured anew; more rows in the same bucket are not.
    cache = tuned(path, times, calls)
    cache.choose(product(32), configs, 1, launch_of)  # type: ignore[arg-type]
    assert len(calls) == len(configs)
    cache.choose(product(33), configs, 1, launch_of)  # type: ignore[arg-type]
    assert len(calls) == 2 * len(configs)
    assert len(json.loads(path.read_text())) == 2


def test_autotune_measures_with_the_tables_splits(tmp_path: Path) -> None:
    """Splits follow from the number of rows, so measurements for a range of rows cannot decide them."""
    configs = ARCHITECTURES["sm_80"].by_bucket[33]
    problem = Problem.random(1, 512, 4096, torch.bfloat16)
    measured: list[str] = []
    path = tmp_path / "device.json"
    found = []
    for m in (34, 64):
        problem.x = torch.randn(m, 4096, dtype=torch.bfloat16)
        x, y = problem.quantize_by_definition(), torch.empty(m, 512)
        given = autotune.Product(*x, problem.qweight, problem.scale, None, y, NONE, 0, 0)
        found.append(tuned(path, {}, measured).choose(given, configs, 132, launch_of))  # type: ignore[arg-type]
        assert found[-1] == tables.choose(configs[:1], m, 512, 4096, 132)
    assert found[0].splits > 1
    assert measured == [str(tables.choose((config,), 34, 512, 4096, 132)) for config in configs]
    assert list(json.loads(path.read_text()).values()) == [str(configs[0])]


@pytest.mark.parametrize("content", ["{", "[]", '{"17 64 64 20": "a kernel of another table"}'])
def test_autotune_survives_its_file(content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    configs = ARCHITECTURES["sm_90"].by_bucket[17]
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
    configs = ARCHITECTURES["sm_90"].by_bucket[17]
    assert cache.choose(product(), configs, 1, launch_of) in configs  # type: ignore[arg-type]
    assert "cannot be written" in caplog.text


def test_autotune_is_an_option(monkeypatch: pytest.MonkeyPatch) -> None:
    configs = ARCHITECTURES["sm_90"].by_bucket[17]
    monkeypatch.delenv("INT8COMPILE_AUTOTUNE", raising=False)
    monkeypatch.setattr(autotune, "_cache", lambda device: pytest.fail("nobody asked for measurements"))
    assert autotune.choose(product(), configs, 1, launch_of) == configs[0]  # type: ignore[arg-type]
    monkeypatch.setenv("INT8COMPILE_AUTOTUNE", "yes")
    with pytest.raises(ConfigError, match=r"INT8COMPILE_AUTOTUNE='yes': allowed are 0 .* and 1"):
        autotune.choose(product(), configs, 1, launch_of)  # type: ignore[arg-type]


def test_another_table_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    before = autotune.path_for("NVIDIA H100 80GB HBM3")
    assert before.name.startswith("NVIDIA-H100-80GB-HBM3-triton-")
    changed = dataclasses.replace(ARCHITECTURES["sm_90"], shared_memory=1)
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
