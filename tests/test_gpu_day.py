"""The day on a GPU, as far as a machine without one can tell: a dry run, and every rule of the runner by itself."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import platform
import shutil
import signal
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
from benchmarks.gpu import bars, candidates, ceilings, checks, clock, facts, inputs, linear, parts, sizes, summary
from benchmarks.gpu.day import BROKEN, FILE, Day, Result, ResultError, Stage, load
from benchmarks.gpu.llama import Attention, LlamaConfig, rotated
from benchmarks.gpu.supervisor import supervise
from benchmarks.interleaved import Times

# Other packages warn of what is no concern of ours while they quantize and compile, and warnings are errors here.
pytestmark = pytest.mark.filterwarnings("ignore")

H100_L2 = 50 * 2**20


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a dry run of everything wrote."""
    folder = tmp_path_factory.mktemp("gpu") / "day"
    assert gpu_day.main(["--out", str(folder), "--dry-run", "--minutes", "20"]) == 0
    return folder


def make_day(folder: Path, until: float, **options: Callable[..., Any]) -> Day:
    result = Result.begun(folder, {"dry_run": True, "machine": {}, "commit": None}, resume=False)
    chosen: dict[str, Callable[..., Any]] = {
        "healthy": lambda: None,
        "say": lambda line: None,
        "shown": lambda result: "",
        "after_stage": lambda: None,
        **options,
    }
    return Day(result, until, **chosen)


def fail() -> dict[str, Any]:
    raise RuntimeError("out of memory in /home/somebody/project/kernel.py")


def test_every_stage_of_a_dry_run_has_its_cases(dry_run: Path) -> None:
    data = load(dry_run)
    assert data["dry_run"] is True
    assert data["minutes"] == 20
    assert bool(data["notes"]) == (importlib.util.find_spec("matplotlib") is None)
    assert tuple(data["stages"]) == gpu_day.STAGES
    for name, stage in data["stages"].items():
        assert stage["cases"] or stage["notes"], name
        assert stage["left_out"] == []
        for case, result in stage["cases"].items():
            assert "error" not in result, (name, case, result)
            assert not result.get("errors"), (name, case, result)
    small = sizes.dry_run()
    rows = {name: len(data["stages"][name]["cases"]) for name in (linear.FIRST, linear.REST)}
    assert sum(rows.values()) == len(small.rows) * len(small.shapes)
    assert rows[linear.FIRST] == len(small.first_rows) * len(small.shapes)


def test_a_case_of_a_linear_layer_holds_what_readme_needs(dry_run: Path) -> None:
    cases = load(dry_run)["stages"][linear.REST]["cases"]
    case = cases["M=80 o 64x64"]
    assert (case["m"], case["k"], case["n"], case["shape"]) == (80, 64, 64, "o")
    baselines = {"bf16 eager", "bf16 Inductor", "bf16 max-autotune"}
    assert case["fastest_baseline"] in baselines
    assert set(case["medians"]) == set(case["spreads"]) == baselines | {linear.OURS, linear.IN_COLUMNS}
    assert set(case["ratios"]) == {linear.OURS, linear.IN_COLUMNS}
    assert set(case["roofline_share"]) == {case["fastest_baseline"], linear.OURS, linear.IN_COLUMNS}
    assert case["copies"]["int8"] > case["copies"]["bf16"] >= 2
    judged = case["bars"]["times faster"]
    assert judged["at_least"] == bars.linear(80)
    assert judged["value"] == case["ratios"][linear.OURS]["ratio"]


def test_candidates_are_the_tables(dry_run: Path) -> None:
    from int8compile.triton_kernels import tables

    case = load(dry_run)["stages"][candidates.NAME]["cases"]["M=1 o 64x64"]
    arch = tables.ARCHITECTURES[candidates.DRY_RUN]
    assert list(case["medians"]) == [str(config) for config in tables.candidates(arch, 1, 64, lists=False)]
    assert {case["choice"], case["best"]} <= set(case["medians"])


@pytest.mark.parametrize("m", [1, 16, 64, 128, 512])
def test_candidates_are_launches_of_kernels(m: int) -> None:
    pytest.importorskip("triton")
    from int8compile.ops import quantize_rows
    from int8compile.ops.digits import Activations
    from int8compile.triton_kernels import tables
    from int8compile.triton_kernels.policy import Policy

    arch = tables.ARCHITECTURES["sm_90"]
    x = Activations(*quantize_rows(torch.randn(m, 256, dtype=torch.bfloat16), 6.0, False))
    policy = Policy.of(m, 256, x.digits.shape[0], 6.0, False, arch)
    qweights, scale = [torch.ones(128, 256, dtype=torch.int8) for _ in range(2)], torch.ones(128)
    for config in tables.candidates(arch, m, 256, lists=policy.lists):
        first, second = (call.__self__ for call in candidates._launches(x, qweights, scale, policy, config, 132))
        assert first.kernel.__name__ == config.kernel
        assert first.args["weight_ptr"] is qweights[0]
        assert second.args["weight_ptr"] is qweights[1]
        assert first.args["y_ptr"] is second.args["y_ptr"]
        assert list(first.args["y_ptr"].shape) == [m, 128]


def test_the_decoder_is_compared_with_the_fastest_baseline(dry_run: Path) -> None:
    first, both = load(dry_run)["stages"]["decode"]["cases"].values()
    assert set(first["medians"]) == {"bf16 reduce-overhead", "int8"}
    assert set(both["tokens_per_second"]) == {"bf16 reduce-overhead", "bf16 max-autotune", "int8"}
    assert both["bars"]["cosine to bfloat16"]["met"]
    assert both["sizes"]["layers"] == 1


def test_a_dry_run_names_nothing_private(dry_run: Path) -> None:
    for path in (dry_run / FILE, dry_run / checks.LOG):
        text = path.read_text()
        for private in (str(Path.home()), str(facts.ROOT), sys.prefix, str(dry_run)):
            assert private not in text
    machine = load(dry_run)["machine"]
    assert machine["torch"] == torch.__version__
    assert machine["python"] == platform.python_version()


def test_plots_and_a_report_are_drawn(dry_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    shutil.copy(dry_run / FILE, tmp_path)
    assert gpu_day.main(["--out", str(tmp_path), "--report"]) == 0
    for name in (summary.SPEED_UPS, summary.DECODING):
        assert (dry_run / name).stat().st_size > 1000
        assert (tmp_path / name).exists()
    printed = capsys.readouterr().out
    assert "DRY RUN" in printed
    assert "bars are met" in printed


def test_without_matplotlib_there_is_a_note(dry_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(summary.importlib.util, "find_spec", lambda name: None)
    assert "matplotlib" in summary.plot(load(dry_run), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_results_are_not_overwritten(dry_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_day.main(["--out", str(dry_run), "--dry-run"]) == 2
    assert "--resume" in capsys.readouterr().err


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
    assert gpu_day.main(["--out", str(tmp_path), "--dry-run", "--minutes", "0"]) == 0
    stages = load(tmp_path)["stages"]
    assert tuple(stages) == gpu_day.STAGES
    assert all(stage["cases"] == {} for stage in stages.values())
    assert stages[linear.FIRST]["left_out"][:2] == ["M=1 o 64x64", "M=1 down 192x64"]
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


def test_a_stage_ends_when_its_share_is_over_and_leaves_the_rest_to_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("benchmarks.gpu.day.time", types.SimpleNamespace(time=lambda: now))

    def slow() -> dict[str, Any]:
        nonlocal now
        now += 3
        return {}

    make_day(tmp_path, 108.0).run(
        [Stage("a", "", 1, {str(i): slow for i in range(9)}), Stage("b", "", 1, {"one": dict})]
    )
    stages = load(tmp_path)["stages"]
    assert list(stages["a"]["cases"]) == ["0", "1"]
    assert stages["a"]["left_out"] == [str(i) for i in range(2, 9)]
    assert list(stages["b"]["cases"]) == ["one"]


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


def test_failed_tests_fail_the_day() -> None:
    data = {"stages": {checks.TESTS: {"cases": {"pytest -m gpu": {"passed": True}}}}}
    assert summary.passed(data)
    data["stages"][checks.TESTS]["cases"]["pytest -m gpu"] = {"error": "it ran past its time limit"}
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
    assert supervise(command, tmp_path, time.time() + 60) == 0
    stage = load(tmp_path)["stages"]["s"]
    assert stage["left_out"] == []
    assert stage["cases"]["a"]["error"] == f"the process ended with status {-signal.SIGKILL}"
    assert "time limit" in stage["cases"]["b"]["error"]
    assert stage["cases"]["d"] == {"resumed": True}


def test_the_supervisor_ends_the_day_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.gpu.supervisor.GRACE", 0.3)
    data = {"stages": {"s": {"cases": {}, "left_out": ["c", "d"]}}}
    (tmp_path / FILE).write_text(json.dumps(data))
    command = [sys.executable, "-c", MEASURING, str(tmp_path / FILE), "c"]
    assert supervise(command, tmp_path, time.time() + 0.7) == 1
    assert load(tmp_path) == data


def test_without_a_gpu_the_day_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="--dry-run"):
        gpu_day.measure(gpu_day._parser().parse_args(["--out", str(tmp_path)]), time.time(), sizes.gpu(1))


def test_tests_that_take_too_long_are_stopped(tmp_path: Path) -> None:
    small = dataclasses.replace(sizes.dry_run(), tests=("tests",))
    result = checks.run_tests(small, tmp_path, 0.2)
    assert (result["passed"], result["status"]) == (False, None)


def test_a_machine_without_pytest_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: None)
    stage = checks.tests_stage(sizes.dry_run(), tmp_path, 1)
    assert stage.cases == {}
    assert "pytest" in stage.notes[0]


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
    times = Times({parts.WITH: [1.04], parts.WITHOUT: [1.0], parts.QUANTIZE: [0.12], parts.WHOLE: [1.2]}, None)
    few, many = parts.outlier_bars(times, 16), parts.outlier_bars(times, 2048)
    assert list(few) == ["outlier part"]
    assert few["outlier part"] == {"value": 0.04, "at_most": 0.05, "met": True}
    assert many["quantize share"] == {"value": 0.1, "at_most": 0.05, "met": False}


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


def test_outlier_columns_are_exactly_as_many() -> None:
    from int8compile.ops import reference

    for k, count in ((64, 1), (4096, 32), (14336, 43)):
        x = inputs.with_outlier_columns(50, k, count, torch.device("cpu"))
        outlier = reference.outlier_mask(x.float(), linear.THRESHOLD, "row")
        assert outlier.sum(dim=1).tolist() == [count] * 50
        assert int(outlier.any(dim=0).sum()) == count
    with pytest.raises(ValueError, match="at most 1"):
        inputs.with_outlier_columns(2, 64, 2, torch.device("cpu"))


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
