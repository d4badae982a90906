"""The day on a GPU, as far as it can run without one: a dry run, and each rule of the runner separately."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_day
from benchmarks.gpu import (
    bars,
    candidates,
    checks,
    clock,
    decode,
    facts,
    kernels,
    linear,
    parts,
    predictions,
    sizes,
    summary,
)
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.day import BROKEN, FILE, Day, Result, ResultError, Stage, load
from benchmarks.gpu.supervisor import LOG
from tests.helpers.gpu_day import H100_L2, fail

# Other packages give warnings while they quantize and compile, which would be errors here.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder written by a dry run of the first call; its copy is beside it in "copied"."""
    folder = tmp_path_factory.mktemp("gpu") / "day"
    assert gpu_day.main(["--out", str(folder), "--copy", str(folder.parent / "copied"), "--dry-run"]) == 0
    return folder


def make_day(folder: Path, until: float, **options: Callable[..., Any]) -> Day:
    result = Result.begun(folder, {"dry_run": True, "machine": {}, "commit": None}, resume=False)
    chosen: dict[str, Callable[..., Any]] = {
        "healthy": lambda: None,
        "say": lambda line: None,
        "shown": lambda result: "",
        **options,
    }
    return Day(result, until, **chosen)


def assert_whole(stages: dict[str, Any]) -> None:
    """Require that every stage has cases or says why it has none, and that no case failed."""
    for name, stage in stages.items():
        assert stage["cases"] or stage["notes"], name
        assert stage["left_out"] == []
        for case, result in stage["cases"].items():
            assert "error" not in result, (name, case, result)
            assert not result.get("errors"), (name, case, result)


def test_every_stage_of_the_first_call_has_its_cases(dry_run: Path) -> None:
    data = load(dry_run)
    assert data["dry_run"] is True
    assert tuple(data["stages"]) == gpu_day.FIRST
    assert_whole(data["stages"])
    small = sizes.dry_run()
    assert len(data["stages"][linear.FIRST]["cases"]) == len(small.first_rows) * len(small.shapes)
    assert data["stages"][kernels.NAME]["notes"] == ["there is no bundle: all kernels are compiled here"]


def test_what_was_written_and_printed_is_copied(dry_run: Path) -> None:
    copied = dry_run.parent / "copied"
    names = {path.name for path in dry_run.iterdir() if path.is_file()}
    assert {FILE, LOG, checks.LOG} <= names
    # Only so many files come back from the machine.
    assert len(names) <= 8
    assert {path.name for path in copied.iterdir()} == names
    for name in names:
        assert (copied / name).read_text() == (dry_run / name).read_text()
    assert "tier4: pytest -m gpu: passed" in (copied / LOG).read_text()


def scheduled(*arguments: str) -> list[Stage]:
    """Return the stages of a call on a GPU."""
    chosen = gpu_day._parser().parse_args(["--out", "unused", *arguments])
    chosen_sizes = sizes.with_rows(sizes.for_gpu(8), tuple(chosen.rows)) if chosen.rows else sizes.for_gpu(8)
    result = Result(Path("unused") / FILE, {"stages": {}})
    stages = gpu_day._stages(chosen, Bench(chosen_sizes, clock.HostClock(), torch.device("cpu"), H100_L2), result)
    return gpu_day.schedule(stages, chosen)


@pytest.mark.parametrize(
    ("arguments", "names", "seconds"),
    [([], gpu_day.FIRST, gpu_day.SECONDS), (["--second"], gpu_day.SECOND, gpu_day.SECOND_SECONDS)],
)
def test_the_limits_of_a_call_fit(arguments: list[str], names: tuple[str, ...], seconds: float) -> None:
    stages = scheduled(*arguments)
    assert tuple(stage.name for stage in stages) == names
    assert sum(stage.seconds for stage in stages) + gpu_day.ENDS <= seconds
    assert (gpu_day.SECONDS, gpu_day.SECOND_SECONDS) == (530, 170)


def test_a_shorter_call_has_shorter_stages() -> None:
    stages = scheduled("--seconds", "110")
    assert [stage.name for stage in stages] == list(gpu_day.FIRST)
    assert sum(stage.seconds for stage in stages) == pytest.approx(110 - gpu_day.ENDS)
    # A call with enough time keeps its stages as they are.
    assert scheduled("--only", "decode")[1].seconds == 90


def test_rows_and_stages_are_chosen() -> None:
    # The kernels come first in every call, because all other stages use them.
    _, *stages = scheduled("--only", "candidates", "linear", "--rows", "3", "100")
    assert [stage.name for stage in stages] == ["linear", "candidates"]
    for stage in stages:
        assert {name.split()[0] for name in stage.cases} == {"M=3", "M=100"}
    kernel, first = scheduled("--only", "linear")
    assert (kernel.name, kernel.always) == (kernels.NAME, True)
    assert [name.split()[0] for name in first.cases][::4] == ["M=2048", "M=1", "M=64", "M=16", "M=256"]
    autotuned = scheduled("--only", linear.AUTOTUNED)[1]
    assert list(autotuned.cases) == ["M=2048 o 4096x4096", "M=2048 gate_up 4096x28672"]


def test_the_second_call_goes_on(dry_run: Path, tmp_path: Path) -> None:
    """The second call does what failed, what was left out, and the rest; the next test runs all of it."""
    folder = tmp_path / "day"
    shutil.copytree(dry_run, folder)
    data = load(folder)
    (name,) = data["stages"]["launch"]["cases"]
    data["stages"]["launch"]["cases"].clear()
    data["stages"]["launch"]["left_out"] = [name]
    data["stages"][checks.TESTS]["cases"]["pytest -m gpu"] |= {"passed": False, "failed": ["tests/test_config.py::x"]}
    (folder / FILE).write_text(json.dumps(data))
    stages = [checks.FAILED, "launch", linear.REST]
    assert gpu_day.main(["--out", str(folder), "--dry-run", "--second", "--only", *stages]) == 1  # A test had failed.
    found = load(folder)["stages"]
    assert list(found) == [*gpu_day.FIRST, checks.FAILED, linear.REST]
    assert list(found["launch"]["cases"]) == [name]
    assert found[linear.FIRST] == data["stages"][linear.FIRST]
    assert found[checks.FAILED]["notes"] == [f"{checks.SANITIZER} is not installed"]
    assert list(found[linear.REST]["cases"]) == ["M=2 o 64x64", "M=2 down 192x64"]


@pytest.mark.slow
def test_the_whole_second_call(dry_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "day"
    shutil.copytree(dry_run, folder)
    assert gpu_day.main(["--out", str(folder), "--dry-run", "--second"]) == 0
    stages = load(folder)["stages"]
    assert set(stages) == set(gpu_day.SECOND)
    assert_whole(stages)
    assert stages[checks.FAILED]["notes"] == ["nothing failed"]
    package = stages["export"]["cases"]["MLP"]
    assert package["form"] == "fast"
    assert set(package["rows"]) == {"1", "5"}


def group_of(process: subprocess.Popen[bytes]) -> list[int]:
    """Return the processes that a day has started, including itself."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found = [process.pid]
    for pid in found:  # The list grows inside the loop.
        found += [child for child, parent in parents.items() if parent == pid]
    return found


@pytest.mark.parametrize("cases", [1, pytest.param(4, marks=pytest.mark.slow), pytest.param(9, marks=pytest.mark.slow)])
def test_a_killed_day_leaves_what_it_had_and_can_go_on(cases: int, tmp_path: Path) -> None:
    """The day is killed without warning once this many cases are copied; no process of it survives."""
    folder, copied = tmp_path / "day", tmp_path / "copied"
    # The rest must take longer than the seconds between two copies, as tests and compiling do.
    stages = ["ceilings", "gates", checks.TESTS, "linear", "launch"]
    if cases > 1:
        stages += ["decode", "candidates"]
    command = ["--out", str(folder), "--dry-run", "--only", *stages]
    stages.append(kernels.NAME)
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.gpu_day", *command, "--copy", str(copied)],
        cwd=facts.ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def done(where: Path) -> int:
        with contextlib.suppress(ResultError):
            return sum(len(stage["cases"]) for stage in load(where)["stages"].values())
        return 0

    try:
        while done(copied) < cases:
            assert process.poll() is None
            time.sleep(0.05)
        started = group_of(process)
        assert len(started) > 1
    finally:
        process.kill()
        process.wait()
    until = time.time() + 10
    while any(Path(f"/proc/{pid}/exe").exists() for pid in started) and time.time() < until:
        time.sleep(0.05)
    assert [pid for pid in started if Path(f"/proc/{pid}/exe").exists()] == []
    before = load(copied)
    assert set(before["stages"]) == set(stages)
    assert sum(len(stage["cases"]) for stage in before["stages"].values()) >= cases
    assert gpu_day.main([*command, "--resume"]) == 0
    after = load(folder)["stages"]
    assert_whole(after)
    for name, stage in before["stages"].items():
        assert stage["cases"].items() <= after[name]["cases"].items()


def test_a_case_of_a_linear_layer_holds_what_readme_needs(dry_run: Path) -> None:
    stages = load(dry_run)["stages"]
    assert "bf16 max-autotune" in stages[linear.AUTOTUNED]["cases"]["M=80 down 192x64"]["medians"]
    case = stages[linear.FIRST]["cases"]["M=80 o 64x64"]
    assert (case["m"], case["k"], case["n"], case["shape"]) == (80, 64, 64, "o")
    baselines = {"bf16 eager", "bf16 Inductor"}
    assert case["fastest_baseline"] in baselines
    assert set(case["medians"]) == set(case["spreads"]) == baselines | {linear.OURS}
    assert set(case["ratios"]) == {linear.OURS}
    assert set(case["roofline_share"]) == {case["fastest_baseline"], linear.OURS}
    assert case["copies"]["int8"] > case["copies"]["bf16"] >= 2
    judged = case["bars"]["times faster"]
    assert judged["at_least"] == bars.linear(80)
    assert judged["value"] == case["ratios"][linear.OURS]["ratio"]


def test_candidates_are_the_tables(dry_run: Path) -> None:
    from int8compile.triton_kernels import tables

    case = load(dry_run)["stages"][candidates.NAME]["cases"]["M=1 o 64x64"]
    arch = tables.ARCHITECTURES[candidates.DRY_RUN]
    shape = sizes.Shape("o", 64, 64)
    configs = candidates.configs_of(arch, 1, shape, 132)
    assert set(tables.candidates(arch, 1, 64)) <= set(configs)
    assert list(case["medians"]) == [str(config) for config in configs]
    assert {case["choice"], case["best"]} <= set(case["medians"])


@pytest.mark.parametrize("m", [1, 16, 64, 128, 512])
def test_candidates_are_launches_of_kernels(m: int) -> None:
    pytest.importorskip("triton")
    from int8compile.ops import quantize_rows
    from int8compile.triton_kernels import tables

    arch = tables.ARCHITECTURES["sm_90"]
    x = quantize_rows(torch.randn(m, 256, dtype=torch.bfloat16), None, 6.0)
    qweights, scale = [torch.ones(128, 256, dtype=torch.int8) for _ in range(2)], torch.ones(128)
    for config in candidates.configs_of(arch, m, sizes.Shape("o", 256, 128), 132):
        first, second = (call.__self__ for call in candidates._launches(x, qweights, scale, config))
        assert first.kernel.__name__ == config.kernel
        for call, qweight in zip((first, second), qweights, strict=True):
            given = call.args["weight_desc"].base if "weight_desc" in call.args else call.args["weight_ptr"]
            assert given.data_ptr() == qweight.data_ptr()
        assert first.args["y_ptr"] is second.args["y_ptr"]
        assert list(first.args["y_ptr"].shape) == [m, 128]


def test_candidates_have_their_sums_split_and_not() -> None:
    pytest.importorskip("triton")
    from int8compile.triton_kernels import tables

    arch = tables.ARCHITECTURES["sm_90"]
    for m in sizes.for_gpu(1).candidate_rows:
        for shape in sizes.for_gpu(1).shapes:
            configs = candidates.configs_of(arch, m, shape, 132)
            assert len(set(map(str, configs))) == len(configs)
            whole = {(each.kernel, each.bm, each.bn, each.bk) for each in configs if each.splits == 1}
            assert whole == {(each.kernel, each.bm, each.bn, each.bk) for each in tables.candidates(arch, m, shape.k)}
            assert tables.choose(tables.candidates(arch, m, shape.k), m, shape.n, shape.k, 132) in configs


def test_the_decoder_is_compared_with_the_fastest_baseline(dry_run: Path) -> None:
    (case,) = load(dry_run)["stages"]["decode"]["cases"].values()
    assert set(case["medians"]) == set(case["tokens_per_second"]) == {"bf16 reduce-overhead", "int8"}
    assert case["bars"]["cosine to bfloat16"]["met"]
    assert case["sizes"]["layers"] == 1
    # A CPU has no CUDA graphs, and Inductor says so.
    assert case["bars"][decode.SKIPPED]["met"] is False


def test_a_model_decoded_without_cuda_graphs_fails_the_day(dry_run: Path) -> None:
    data = load(dry_run)
    assert summary.passed(data)
    data["dry_run"] = False
    assert not summary.passed(data)
    (case,) = data["stages"]["decode"]["cases"].values()
    case["bars"][decode.SKIPPED]["met"] = True
    assert summary.passed(data)


def test_a_dry_run_names_nothing_private(dry_run: Path) -> None:
    for path in (dry_run / FILE, dry_run / checks.LOG, dry_run / LOG):
        text = path.read_text()
        for private in (str(Path.home()), str(facts.ROOT), sys.prefix, str(dry_run)):
            assert private not in text
    machine = load(dry_run)["machine"]
    assert machine["torch"] == torch.__version__
    assert machine["python"] == platform.python_version()


def test_predictions_stand_beside_measurements() -> None:
    assert predictions.of("cpu") is None
    predicted = predictions.of("NVIDIA H200")
    assert predicted is not None
    assert predicted["about"] == "Prediction, not measured"
    name, ratio = "M=16 o 4096x4096", predicted["linear"]["M=16 o 4096x4096"]["ratio"]
    cases: dict[str, Any] = {
        linear.FIRST: {name: {"ratios": {linear.OURS: {"ratio": ratio / 2}}}, "M=3 other 1x1": {"ratios": {}}},
        parts.OUTLIERS: {name: {"medians": {parts.WITHOUT: 1e-5}}},
        decode.NAME: {"all": {"sizes": {"layers": 8}, "ratios": {decode.OURS: {"ratio": 1.0}}}},
    }
    data: dict[str, Any] = {"stages": {stage: {"cases": found} for stage, found in cases.items()}}
    assert predictions.lines(data) == []  # A day before predictions were made.
    _, title, *lines = predictions.lines({**data, "predicted": predicted})
    assert title == "predictions beside measurements (H200; prediction, not measured):"
    assert lines[0] == f"  linear {name}, times bfloat16: measured {ratio / 2:.4g}, predicted {ratio:.4g} (+100%)"
    assert lines[1].startswith(f"  product {name}, us: measured 10, predicted ")
    assert lines[2].startswith("  decode, 8 layers, times bfloat16: measured 1, predicted ")
    assert len(lines) == 3


def test_plots_and_a_report_are_drawn(dry_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    shutil.copy(dry_run / FILE, tmp_path)
    assert gpu_day.main(["--out", str(tmp_path), "--report"]) == 0
    for name in (summary.SPEED_UPS, summary.DECODING):
        assert (tmp_path / name).stat().st_size > 1000
    printed = capsys.readouterr().out
    assert "DRY RUN" in printed
    assert "bars are met" in printed


def test_without_matplotlib_there_is_a_note(dry_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(summary.importlib.util, "find_spec", lambda name: None)
    assert "matplotlib" in summary.plot(load(dry_run), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_results_are_not_overwritten(dry_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_day.main(["--out", str(dry_run), "--dry-run"]) == 2
    assert "--resume" in capsys.readouterr().out


def test_a_resumed_day_measures_only_what_is_left(dry_run: Path, tmp_path: Path) -> None:
    data = load(dry_run)
    stage = data["stages"]["launch"]
    (name,) = stage["cases"]
    kept = data["stages"][linear.FIRST]["cases"]
    del stage["cases"][name]
    data["running"] = {"stage": "launch", "case": name, "pid": 0, "until": 0.0}
    (tmp_path / FILE).write_text(json.dumps(data))
    assert gpu_day.main(["--out", str(tmp_path), "--dry-run", "--resume", "--only", "launch", "linear"]) == 0
    data = load(tmp_path)
    assert set(data["stages"]["launch"]["cases"]) == {name}
    assert data["stages"][linear.FIRST]["cases"] == kept
    assert "running" not in data


def test_a_day_cannot_be_resumed_elsewhere(tmp_path: Path) -> None:
    header = {"dry_run": True, "commit": "a", "machine": {"device": "H100", "torch": "2.11", "triton": "3.6"}}
    Result.begun(tmp_path, header, resume=False).write()
    Result.begun(tmp_path, {**header, "machine": {**header["machine"], "date": "today"}}, resume=True)
    with pytest.raises(ResultError, match="commit"):
        Result.begun(tmp_path, {**header, "commit": "b"}, resume=True)
    with pytest.raises(ResultError, match="H200"):
        Result.begun(tmp_path, {**header, "machine": {**header["machine"], "device": "H200"}}, resume=True)


def test_without_time_every_case_is_left_out_by_name(tmp_path: Path) -> None:
    chosen = gpu_day._parser().parse_args(["--out", str(tmp_path), "--dry-run"])
    assert gpu_day.measure(chosen, time.time()) == 1  # No test and no gate has run.
    stages = load(tmp_path)["stages"]
    assert tuple(stages) == gpu_day.FIRST
    # The kernels stage is not left out, because the others would be slower without it.
    assert {name for name, stage in stages.items() if stage["cases"]} == {kernels.NAME}
    assert stages[linear.FIRST]["left_out"][:2] == ["M=80 o 64x64", "M=80 down 192x64"]
    assert stages[checks.TESTS]["left_out"] == ["pytest -m gpu"]


def test_a_failing_case_is_recorded_and_others_go_on(tmp_path: Path) -> None:
    said: list[str] = []
    day = make_day(tmp_path, time.time() + 60, say=said.append, shown=summary.in_words)
    day.run(
        [
            Stage("a", "", 1, {"bad": fail, "good": lambda: {"x": 1}}),
            Stage("b", "", 1, {"nan": lambda: {"y": torch.nan}}),
        ]
    )
    stages = load(tmp_path)["stages"]
    assert stages["a"]["cases"]["bad"]["error"] == "RuntimeError: out of memory in kernel.py"
    assert stages["a"]["cases"]["good"]["x"] == 1
    assert stages["b"]["cases"]["nan"]["y"] == "nan"
    assert "running" not in load(tmp_path)
    assert "bad: RuntimeError" in said[0]


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """Replace the day's time by one that only cases advance."""
    times = types.SimpleNamespace(value=100.0)
    monkeypatch.setattr("benchmarks.gpu.day.time", types.SimpleNamespace(time=lambda: times.value))
    return times


def taking(now: types.SimpleNamespace, seconds: float) -> Callable[[], dict[str, Any]]:
    def case() -> dict[str, Any]:
        now.value += seconds
        return {}

    return case


def test_a_stage_ends_when_those_behind_it_need_the_time(tmp_path: Path, now: types.SimpleNamespace) -> None:
    slow = {str(i): taking(now, 3) for i in range(9)}
    stages = [Stage("a", "", 4, slow, expected=3), Stage("b", "", 4, {"one": taking(now, 1)}, expected=1)]
    make_day(tmp_path, 110.0).run(stages)
    found = load(tmp_path)["stages"]
    # The limit is 106, since the second stage needs its 4 seconds: a third case would have ended at 109.
    assert list(found["a"]["cases"]) == ["0", "1"]
    assert found["a"]["left_out"] == [str(i) for i in range(2, 9)]
    assert list(found["b"]["cases"]) == ["one"]


def test_what_a_stage_does_not_use_goes_to_those_behind_it(tmp_path: Path, now: types.SimpleNamespace) -> None:
    slow = {str(i): taking(now, 3) for i in range(3)}
    stages = [Stage("a", "", 5, {"one": taking(now, 1)}), Stage("b", "", 5, slow, expected=3)]
    make_day(tmp_path, 110.0).run(stages)
    assert list(load(tmp_path)["stages"]["b"]["cases"]) == ["0", "1", "2"]


@pytest.mark.parametrize(("seconds", "until"), [(90.0, 140.0), (30.0, 130.0)])
def test_a_case_hangs_after_some_times_of_what_was_expected_or_at_its_stages_end(
    seconds: float, until: float, tmp_path: Path, now: types.SimpleNamespace
) -> None:
    def look() -> dict[str, Any]:
        return {"until": load(tmp_path)["running"]["until"]}

    make_day(tmp_path, 100 + seconds).run([Stage("a", "", seconds, {"one": look}, expected=10)])
    assert load(tmp_path)["stages"]["a"]["cases"]["one"]["until"] == until


def test_the_file_is_right_while_a_case_runs(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []

    def look() -> dict[str, Any]:
        seen.append(load(tmp_path))
        return {}

    make_day(tmp_path, time.time() + 60).run([Stage("a", "", 1, {"first": dict, "second": look, "third": dict})])
    (data,) = seen
    assert list(data["stages"]["a"]["cases"]) == ["first"]
    assert data["stages"]["a"]["left_out"] == ["second", "third"]
    assert (data["running"]["case"], data["running"]["pid"]) == ("second", os.getpid())


def test_failed_gates_mark_what_is_measured(tmp_path: Path) -> None:
    gate = Stage("gates", "", 1, {"wrong": lambda: {"passed": False}, "crash": fail}, measures=False)
    make_day(tmp_path, time.time() + 60).run([gate, Stage("linear", "", 1, {"one": dict})])
    data = load(tmp_path)
    assert data["stages"]["linear"]["marked"] == "correctness gates failed: wrong; crash"
    assert "marked" not in data["stages"]["gates"]
    assert not summary.passed(data)


@pytest.mark.parametrize(
    ("stage", "case", "result"),
    [
        (checks.TESTS, "pytest -m gpu", {"error": "it ran past its time limit"}),
        (checks.TESTS, "pytest -m gpu", {"passed": False}),
        ("gates", "M=1", {"passed": False}),
        ("decode", "bf16", {"error": "out of memory"}),
        ("decode", "bf16", {"bars": {decode.SIMILAR: {"met": False}, decode.SKIPPED: {"met": True}}}),
        ("export", "MLP", {"error": "the package's outputs are others than torch.compile's"}),
        (checks.TESTS, None, None),
        ("gates", None, None),
    ],
)
def test_what_fails_the_day(stage: str, case: str | None, result: dict[str, Any] | None) -> None:
    """Wrong or missing results fail the day; slow results do not."""
    good = {"bars": {decode.SIMILAR: {"met": True}, decode.SKIPPED: {"met": True}, "times faster": {"met": False}}}
    data: dict[str, Any] = {
        "dry_run": False,
        "stages": {
            checks.TESTS: {"cases": {"pytest -m gpu": {"passed": True}}, "left_out": []},
            "gates": {"cases": {"M=1": {"passed": True}}, "left_out": []},
            "decode": {"cases": {"bf16": good}, "left_out": []},
            "export": {"cases": {"MLP": {}}, "left_out": []},
        },
    }
    assert summary.passed(data)
    if case is None:
        data["stages"][stage]["left_out"] = ["another"]
    else:
        data["stages"][stage]["cases"][case] = result
    assert not summary.passed(data)


def test_a_broken_device_ends_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit) as left:
        make_day(tmp_path, time.time() + 60, healthy=fail).run([Stage("a", "", 1, {"one": dict, "two": dict})])
    assert left.value.code == BROKEN
    data = load(tmp_path)
    assert data["running"]["case"] == "one"
    assert "out of memory" in data["running"]["error"]
    assert data["stages"]["a"]["left_out"] == ["one", "two"]
