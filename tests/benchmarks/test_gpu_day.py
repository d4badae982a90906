"""The day on a GPU, as far as a machine without one can tell: a dry run, and every rule of the runner by itself."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from benchmarks import gpu_day
from benchmarks.gpu import (
    bars,
    candidates,
    ceilings,
    checks,
    clock,
    decode,
    facts,
    inputs,
    kernels,
    linear,
    parts,
    predictions,
    profile,
    sizes,
    summary,
    supervisor,
)
from benchmarks.gpu.day import BROKEN, FILE, MARGIN, Day, Result, ResultError, Stage, load
from benchmarks.gpu.llama import Attention, LlamaConfig, rotated
from benchmarks.gpu.supervisor import LOG, supervise
from benchmarks.interleaved import Times

# Other packages warn of what is no concern of ours while they quantize and compile, and warnings are errors here.
pytestmark = pytest.mark.filterwarnings("ignore")

H100_L2 = 50 * 2**20


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a dry run of the first call wrote; beside it, "copied", what was copied."""
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


def fail() -> dict[str, Any]:
    raise RuntimeError("out of memory in /home/somebody/project/kernel.py")


def assert_whole(stages: dict[str, Any]) -> None:
    """Every stage has its cases, or says why it has none, and no case failed."""
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
    # So many files come back from the machine.
    assert len(names) <= 8
    assert {path.name for path in copied.iterdir()} == names
    for name in names:
        assert (copied / name).read_text() == (dry_run / name).read_text()
    assert "tier4: pytest -m gpu: passed" in (copied / LOG).read_text()


def scheduled(*arguments: str) -> list[Stage]:
    """The stages of a call on a GPU."""
    chosen = gpu_day._parser().parse_args(["--out", "unused", *arguments])
    chosen_sizes = sizes.with_rows(sizes.gpu(8), tuple(chosen.rows)) if chosen.rows else sizes.gpu(8)
    result = Result(Path("unused") / FILE, {"stages": {}})
    stages = gpu_day._stages(chosen, chosen_sizes, torch.device("cpu"), clock.HostClock(), H100_L2, result)
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
    # One with time enough has the stages that it has, no longer ones.
    assert scheduled("--only", "decode")[1].seconds == 90


def test_rows_and_stages_are_chosen() -> None:
    # The kernels, which all others use, always come first.
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
    """With what failed, what was left out, and the rest. (The whole of it takes a minute: the test below.)"""
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
    """The processes that a day has started, itself among them."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found = [process.pid]
    for pid in found:  # It grows meanwhile.
        found += [child for child, parent in parents.items() if parent == pid]
    return found


@pytest.mark.parametrize("cases", [1, pytest.param(4, marks=pytest.mark.slow), pytest.param(9, marks=pytest.mark.slow)])
def test_a_killed_day_leaves_what_it_had_and_can_go_on(cases: int, tmp_path: Path) -> None:
    """Killed without a warning, when so many cases had been copied; nothing of it runs on."""
    folder, copied = tmp_path / "day", tmp_path / "copied"
    # What is left when it is killed must take longer than the seconds between two copies: tests do, and compiling does.
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
    for m in sizes.gpu(1).candidate_rows:
        for shape in sizes.gpu(1).shapes:
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
    # There are none on a CPU, which Inductor says.
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
    assert predictions.lines(data) == []  # a day before there were any
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
    # What the others are slower without is not left out.
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
    """The day's time, which only moves where a case moves it."""
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
    # Until 106, when the second needs its 4 seconds: a third case would have ended at 109.
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
    """Wrong or missing results do; slow ones do not."""
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


# What the supervisor sees of a process that measures, without the seconds that importing torch takes.
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
    """Twice at most: one that cannot be started at all ends the day."""
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

    # One that fails does not end copying.
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
    """However that ends; what was printed is in the log by then."""
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
        (["--second"], "there is no gpu-day.json in --out to go on with"),
        (["--resume"], "there is no gpu-day.json in --out to go on with"),
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


TESTS = """
import time
import warnings

import pytest

pytestmark = pytest.mark.gpu


def test_right() -> None:
    # pytest's summary of warnings names tests as it does when they begin.
    warnings.warn("of something", stacklevel=1)


@pytest.mark.parametrize("name", ["a b"])
def test_wrong(name: str) -> None:
    raise AssertionError(name)


def test_that_hangs() -> None:
    time.sleep({hangs})
"""


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("hangs", [0, 600])
def test_tests_are_named_as_they_fail_and_end_in_time(
    hangs: int, workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "conftest.py").write_text(
        "def pytest_configure(config):\n    config.addinivalue_line('markers', 'gpu: x')\n"
    )
    (tmp_path / "test_x.py").write_text(TESTS.format(hangs=hangs))
    # Not this project's settings: these tests need no GPU.
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    monkeypatch.setattr(supervisor, "ROOT", tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(facts.ROOT))
    said: list[str] = []
    began = time.time()
    result = checks.run_tests(
        ["test_x.py"], tmp_path / "log", 12.0 if hangs else 60.0, workers=workers, none_is_fine=False, say=said.append
    )
    assert said == ["FAILED test_x.py::test_wrong[a b]"]
    assert result["failed"] == ["test_x.py::test_wrong[a b]"]
    assert result["passed"] is False
    if hangs:
        assert time.time() - began < 20
        assert result["status"] is None
        assert result["unfinished"] == ["test_x.py::test_that_hangs"]
        assert result["summary"] == "stopped after 12 s, at test_x.py::test_that_hangs"
    else:
        assert result["status"] == 1
        assert result["unfinished"] == []
        assert "1 failed, 2 passed" in result["summary"]
    assert "AssertionError: a b" in (tmp_path / "log").read_text() or hangs


BREAKING = """
import pytest
import torch

pytestmark = pytest.mark.gpu
torch.cuda.is_available = lambda: True
broken = False


def synchronize() -> None:
    if broken:
        raise RuntimeError("an illegal memory access was encountered")


torch.cuda.synchronize = synchronize


@pytest.mark.parametrize("number", range(6))
def test_it(number: int) -> None:
    global broken
    broken = broken or number == 2
    assert not broken or number == 2
"""


def test_a_test_that_breaks_the_gpu_ends_its_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the only one that fails: what comes after it has a new process."""
    (tmp_path / "conftest.py").write_text(
        "from tests.conftest import *\nfrom tests.conftest import pytest_runtest_teardown\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: x\n    interpreted: x\n")
    (tmp_path / "test_x.py").write_text(BREAKING)
    monkeypatch.setattr(supervisor, "ROOT", tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(facts.ROOT))
    log = tmp_path / "log"
    result = checks.run_tests(["test_x.py"], log, 100, workers=2, none_is_fine=False, say=lambda line: None)
    assert result["failed"] == ["test_x.py::test_it[2]"]
    assert "1 failed, 6 passed" in result["summary"]  # Its own body passed before the context was found broken.
    assert "test_it[2] broke the GPU's context: an illegal memory access was encountered" in log.read_text()


def test_a_machine_without_pytest_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: None)
    result = Result(tmp_path / FILE, {"stages": {}})
    stage = checks.tests_stage(sizes.dry_run(), result, export=False, say=print)
    assert stage.cases == {}
    assert "pytest" in stage.notes[0]


def test_what_failed_runs_again_under_the_sanitizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here a program that takes its place, and says what it was given."""
    sanitizer = tmp_path / checks.SANITIZER
    banner = "echo '=================================== FAILURES ==================================='"
    lines = ["#!/bin/sh", "echo '========= COMPUTE-SANITIZER'", 'echo "========= Invalid read by $*"', banner]
    sanitizer.write_text("\n".join([*lines, "case $* in *M=2*) sleep 600;; esac", "exit 7"]))
    sanitizer.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    names = [f"tests/test_x.py::test_{i}" for i in range(5)]
    failed = {"passed": False, "failed": names[:2], "unfinished": names[2:]}
    gates = {"M=1": {"passed": True}, "M=2": {"error": "illegal access"}}
    result = Result(
        tmp_path / FILE, {"stages": {checks.TESTS: {"cases": {"pytest": failed}}, "gates": {"cases": gates}}}
    )
    stage = checks.failed_stage(result)
    assert list(stage.cases) == [*names[: checks.RERUN], "M=2"]
    assert stage.notes == [f"of 5 that failed, {checks.RERUN} ran again"]
    for name, case in stage.cases.items():
        result.data["running"] = {"until": time.time() + MARGIN + 1}
        found = case()
        # One that hangs is ended, with what it had found.
        assert found["status"] == (None if name == "M=2" else 7)
        assert len(found["found"]) == 1
        assert name in found["summary"]
        assert f"{name}\n" in (tmp_path / checks.FAILED_LOG).read_text()


NCU = """
  quantize_rows (2048, 1, 1)x(128, 1, 1), Context 1, Stream 7, Device 0, CC 9.0
    Section: GPU Speed Of Light Throughput
    ----------------------- ----------- ------------
    Metric Name             Metric Unit Metric Value
    ----------------------- ----------- ------------
    Elapsed Cycles                cycle       40,110
    Duration                         us        26.85
    ----------------------- ----------- ------------
    Registers Per Thread             register/thread             168
    Waves Per SM                                                5.17
  gemv (512, 1, 1)x(128, 1, 1), Context 1, Stream 7, Device 0, CC 9.0
    Duration                         us        11.71
"""


def test_the_counters_are_read_from_the_profilers_pages() -> None:
    assert profile.parsed(NCU) == {
        "quantize_rows": {
            "Duration": "26.85 us",
            "Registers Per Thread": "168 register/thread",
            "Waves Per SM": "5.17",
        },
        "gemv": {"Duration": "11.71 us"},
    }


@pytest.mark.parametrize(
    ("m", "slow", "bar", "met"),
    [
        (1, 1.8, 1.75, True),
        (64, 1.7, 1.75, False),
        (65, 0.99, 1.0, False),
        (2047, 1.01, 1.0, True),
        (2048, 1.59, 1.6, False),
    ],
)
def test_a_linear_layer_is_judged_by_the_fastest_baseline(m: int, slow: float, bar: float, met: bool) -> None:
    times = Times({"bf16 eager": [2.0, 2.0], "bf16 Inductor": [slow, slow], "int8": [1.0, 1.0]}, None)
    measured = clock.Measured(times, {"bf16 max-autotune": "RuntimeError: no"})
    result = linear.result(measured, sizes.Shape("o", 64, 64), m, {})
    assert result["fastest_baseline"] == ("bf16 Inductor" if slow < 2 else "bf16 eager")
    assert result["bars"] == {"times faster": {"value": slow, "at_least": bar, "met": met}}
    assert result["errors"] == {"bf16 max-autotune": "RuntimeError: no"}
    assert result["roofline_share"] == {}


def test_a_linear_layer_without_our_time_is_an_error() -> None:
    measured = clock.Measured(Times({"bf16 eager": [1.0]}, None), {"int8": "RuntimeError: illegal access"})
    with pytest.raises(RuntimeError, match="int8: RuntimeError: illegal access"):
        linear.result(measured, sizes.Shape("o", 64, 64), 1, {})


def test_the_parts_of_a_product_are_judged() -> None:
    times = Times({parts.WITH: [1.04], parts.WITHOUT: [1.0], parts.QUANTIZE: [0.2]}, None)
    few, many = parts.outlier_bars(times, 16, 4096), parts.outlier_bars(times, 2048, 4096)
    assert list(few) == ["outlier part"]
    assert few["outlier part"] == {"value": 0.04, "at_most": 0.05, "met": True}
    # Half as long again as reading x takes at least, which is less of the time of a wider product.
    assert many["quantize to product"] == {"value": 0.2, "at_most": 1050 / 4096, "met": True}
    wide = parts.outlier_bars(times, 2048, 28672)["quantize to product"]
    assert wide == {"value": 0.2, "at_most": 1050 / 28672, "met": False}


def test_bars_of_other_packages() -> None:
    assert [bars.peer("bitsandbytes", m) for m in (1, 32, 33, 512, 2048, 4096)] == [4.0, 4.0, None, 2.0, 2.0, None]
    assert [bars.peer("torchao", m) for m in (1, 64, 65, 511, 512, 8192)] == [3.0, 3.0, None, None, 1.2, 1.2]
    with pytest.raises(ValueError, match="quanto"):
        bars.peer("quanto", 1)


@pytest.mark.parametrize("shape", sizes.gpu(32).shapes, ids=str)
def test_copies_of_a_weight_do_not_fit_into_the_l2_cache(shape: sizes.Shape) -> None:
    for itemsize in (1, 2):
        nbytes = itemsize * shape.k * shape.n
        count = inputs.copies_needed(nbytes, H100_L2)
        assert count >= 2
        assert count * nbytes > 3 * H100_L2
    weight = torch.zeros(10, 10)
    assert len({copy.data_ptr() for copy in inputs.copies(weight, 1000)}) == inputs.copies_needed(400, 1000) == 8


def test_rows_with_outliers_keep_them_when_they_are_rotated() -> None:
    from int8compile.ops import quantize_rows

    for k in (64, 4096, 14336):
        *_, d = inputs.quantized(inputs.weight(k, 16, torch.device("cpu")))
        has = [
            quantize_rows(make(50, k, torch.device("cpu")), d, linear.THRESHOLD)[1][1]
            for make in (inputs.with_outliers, inputs.activations)
        ]
        assert has[0].all() or k == 64
        assert not has[1].any()


def test_the_rows_of_a_gpu_reach_every_part_of_the_table() -> None:
    from int8compile.triton_kernels import tables

    real = sizes.gpu(32)
    assert {tables.bucket_of(m) for m in real.candidate_rows} == set(tables.BUCKETS)
    assert set(real.first_rows) < set(real.rows)
    assert {str(shape): shape.k * shape.n for shape in real.shapes}["gate_up 4096x28672"] == 4096 * 28672


def test_ulps() -> None:
    a = torch.tensor([1.0, -0.0, 1.0, torch.nan, torch.nan, torch.inf, -1.0], dtype=torch.bfloat16)
    b = torch.tensor([1.0078125, 0.0, -1.0, torch.nan, 1.0, torch.inf, -1.015625], dtype=torch.bfloat16)
    assert checks.ulps(a, b).tolist() == [1, 0, 2 * 0x3F80, 0, 65536, 0, 2]


def test_a_gate_sees_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = sizes.Gate(2, 64, 48)
    assert checks.check(gate, torch.device("cpu"))["passed"]
    right = torch.ops.int8compile.linear

    def wrong(*args: Any) -> torch.Tensor:
        y: torch.Tensor = right(*args)
        y[1, 7] = torch.nan
        return y

    monkeypatch.setattr(torch.ops.int8compile, "linear", wrong)
    result = checks.check(gate, torch.device("cpu"))
    assert (result["passed"], result["max_ulp"]) == (False, 65536)


def test_gates_poison_memory_that_nobody_wrote() -> None:
    with checks._poisoned():
        assert torch.empty(3).isnan().all()
        assert (torch.empty(3, dtype=torch.int8) == 127).all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_roofline_is_the_longer_of_bytes_and_operations() -> None:
    cases = {"copy": {"bytes_per_second": 10.0}, "bf16 matmul": {"operations_per_second": 100.0}}
    assert ceilings.floor(cases, 20, 100, "bf16") == 2.0
    assert ceilings.floor(cases, 20, 400, "bf16") == 4.0
    assert ceilings.floor(cases, 20, 400, "int8") is None


def test_texts_lose_folders_and_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    host = platform.node()
    # As `make test` has it.
    monkeypatch.setattr(sys, "prefix", str(facts.ROOT / ".venv"))
    text = f'File "/opt/venv/lib/python3.12/x.py", line 3: {Path.home()} -I{sys.prefix}/include 4096/6144, tests/a.py'
    found = facts.scrubbed(f"{text} {host}")
    assert found.startswith('File "x.py", line 3: ~ -Ipython/include 4096/6144, tests/a.py')
    assert not host or host not in found.split()
    long = facts.described(ValueError("begin " + "x" * 5000 + " end"))
    assert len(long) < 1600
    assert long.startswith("ValueError: begin")
    assert long.endswith(" end")


def test_short_calls_are_repeated() -> None:
    assert clock.passes_for(2.0) == 1
    assert clock.passes_for(1e-4) * 1e-4 >= clock.LEAST_SECONDS
    assert clock.passes_for(0.0) == clock.MOST_PASSES


def test_one_candidate_that_fails_does_not_stop_the_others() -> None:
    measured = clock.HostClock().times({"bad": [fail], "good": [time.perf_counter, time.perf_counter]}, 2)
    assert "out of memory" in measured.errors["bad"]
    assert len(measured.times.seconds["good"]) == 2
    with pytest.raises(RuntimeError, match="bad"):
        measured.needed("good", "bad")


class FakeCuda:
    """What the clock asks of torch.cuda: a replay takes 0.25 ms of a time that only replays move."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.capturing: list[Any] | None = None
        fake = self

        class Graph:
            def replay(self) -> None:
                fake.now += 0.25

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = fake.now

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, end: Event) -> float:
                return end.at - self.at

        class Stream:
            def wait_stream(self, other: Any) -> None:
                pass

        @contextlib.contextmanager
        def capture(graph: Graph, capture_error_mode: str) -> Iterator[None]:
            yield

        for name, value in {
            "CUDAGraph": Graph,
            "Event": Event,
            "Stream": Stream,
            "graph": capture,
            "stream": lambda stream: contextlib.nullcontext(),
            "current_stream": Stream,
            "synchronize": lambda: None,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)


def test_graphs_are_timed_by_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCuda(monkeypatch)
    calls: list[int] = []
    copies = [lambda i=i: calls.append(i) for i in range(3)]
    measured = clock.GraphClock().times({"graph": copies, "bad": [fail], "eager": [dict]}, 5, eager=["eager"])
    assert list(measured.errors) == ["bad"]
    # Warmed up, captured once, and captured again with as many passes as a millisecond takes.
    passes = clock.passes_for(0.25e-3)
    assert len(calls) == 3 * (clock.WARM_UPS + 1 + passes)
    assert calls[:6] == [0, 1, 2, 0, 1, 2]
    assert measured.times.seconds["graph"] == pytest.approx([0.25e-3 / (3 * passes)] * 5)
    assert len(measured.times.seconds["eager"]) == 5


def test_attention_is_what_repeated_heads_make() -> None:
    config = LlamaConfig(layers=1, hidden=32, heads=4, kv_heads=2, intermediate=48, vocabulary=16, length=8)
    attention = Attention(config, torch.device("cpu"), torch.float32).requires_grad_(False)
    x, positions = torch.randn(1, 3, 32), torch.tensor([2, 3, 4])
    cos, sin = torch.randn(3, 8), torch.randn(3, 8)
    mask = torch.arange(8) <= positions[:, None]
    found = attention(x, cos, sin, mask, positions)

    def heads(projection: torch.nn.Linear) -> torch.Tensor:
        return projection(x).view(1, 3, -1, 8).transpose(1, 2)

    q, k = rotated(heads(attention.q_proj), cos, sin), rotated(heads(attention.k_proj), cos, sin)
    assert torch.equal(attention.keys[:, :, positions], k)
    assert torch.equal(attention.values[:, :, positions], heads(attention.v_proj))
    expected = F.scaled_dot_product_attention(q, attention.keys, attention.values, attn_mask=mask, enable_gqa=True)
    expected = attention.o_proj(expected.transpose(1, 2).reshape(1, 3, 32))
    torch.testing.assert_close(found, expected)
