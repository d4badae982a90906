"""The speed gate: its judgement of made-up times, its command line, and the process that measures."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import cases, check, instructions, trial
from benchmarks.instructions import Product
from int8compile.app.workers import Worker, WorkerError
from int8compile.errors import InputError

ROOT = Path(__file__).parents[2]


def rounds_of(
    draw: random.Random, speed: float = 1.0, *, groups: int = 8, process: float = 0.01, drift: float = 0.0
) -> list[list[check.Round]]:
    """Return times of a head with a given speed.

    Args:
        draw: The source of noise. Each time has 2 % of its own.
        speed: Speed of the head as a multiple of the base's.
        groups: Groups of processes.
        process: Standard deviation of the logarithm of what a process adds to all of its times.
        drift: The factor by which all times grow from the first round of a group to the last.
    """
    made = []
    for _ in range(groups):
        effects = [draw.gauss(math.log(factor), process) for factor in (1, 1, 1 / speed)]
        rounds = []
        for i in range(check.ROUNDS):
            shared = drift * i / check.ROUNDS + draw.gauss(0, 0.1)
            a, b, head = (math.exp(shared + effect + draw.gauss(0, 0.02)) for effect in effects)
            rounds.append((a, b, head))
        made.append(rounds)
    return made


def verdicts(speed: float, bar: float, **noise: Any) -> set[str]:
    draw = random.Random(0)
    return {check.judge("case", bar, rounds_of(draw, speed, **noise)).verdict for _ in range(100)}


@pytest.mark.parametrize("drift", [0.0, 0.5])
@pytest.mark.parametrize(("kind", "slower"), [(check.KERNELS, 0.10), (check.MODELS, 0.05)])
def test_what_is_slower_is_found_and_what_is_equal_passes(kind: str, slower: float, drift: float) -> None:
    bar = check.BARS[kind]
    assert verdicts(1 / (1 + slower), bar, drift=drift) == {"SLOWER"}
    assert verdicts(1.0, bar, drift=drift) == {"pass"}
    assert verdicts(1.2, bar, drift=drift) == {"pass"}


def test_processes_that_differ_by_a_tenth_hide_no_slow_kernel() -> None:
    """Of processes with a standard deviation of 2.5 %, the slowest takes a tenth longer than the fastest."""
    assert verdicts(1 / 1.10, check.BARS[check.KERNELS], process=0.025) == {"SLOWER"}
    assert verdicts(1.0, check.BARS[check.KERNELS], process=0.025) == {"pass"}


def test_too_much_noise_is_said() -> None:
    found = [check.judge("case", 0.97, rounds_of(random.Random(i), process=0.12)).verdict for i in range(100)]
    assert found.count("cannot tell") >= 90


@pytest.mark.parametrize("process", [0.02, 0.04, 0.08])
def test_noise_alone_raises_no_alarm(process: float) -> None:
    """A run judges some seventeen cases up to six times, so a false alarm of 5 % in each would be one in most runs."""
    draw, bar = random.Random(0), check.BARS[check.KERNELS]
    found = [check.judge("case", bar, rounds_of(draw, process=process, groups=3)) for _ in range(1000)]
    assert sum(each.verdict == "SLOWER" for each in found) <= 5


def test_trees_with_other_cases_or_other_linears_are_not_compared() -> None:
    base = {"kinds": {"kernels": ["a"]}, "int8": 4}
    check.check_same([base, base, base])
    for head, message in (
        ({**base, "int8": 3}, "4 weights .* 3 in the working tree"),
        ({**base, "kinds": {}}, "cases"),
    ):
        with pytest.raises(InputError, match=message):
            check.check_same([base, base, head])


def test_the_interval_holds_the_speed_as_often_as_it_says() -> None:
    draw, wrong = random.Random(0), 0
    for _ in range(1000):
        found = check.judge("case", 0.95, rounds_of(draw, groups=3)).speed
        wrong += not found.low <= 1 <= found.high
    assert wrong / 1000 < 0.05 + 4 * (0.05 * 0.95 / 1000) ** 0.5  # Four standard deviations.


def test_the_processes_of_the_base_widen_the_interval() -> None:
    """The head's groups may agree by chance; the base's processes show the noise."""
    calm: list[list[check.Round]] = [[(1.0, 1.0, 1.0)] * 3] * 3
    one: list[check.Round] = [(1.05, 1 / 1.05, 1.0)] * 3
    other: list[check.Round] = [(1 / 1.05, 1.05, 1.0)] * 3
    assert check.judge("case", 0.95, calm).speed == (1, 1, 1)
    found = check.judge("case", 0.95, [one, other, one])
    assert found.speed.low < 0.95 < 1.05 < found.speed.high
    assert found.verdict == "cannot tell"


def test_all_cases_together_are_a_case_of_less_noise() -> None:
    draw = random.Random(0)
    kinds = {check.KERNELS: [str(i) for i in range(16)]}
    measured = {name: rounds_of(draw, groups=3) for name in kinds[check.KERNELS]}
    *single, together = check.judge_all(kinds, measured)
    assert together.name == "all kernels"

    def width(case: check.Case) -> float:
        return case.speed.high - case.speed.low

    assert width(together) < min(map(width, single))


def case(speed: float, low: float, high: float, bar: float = 0.95) -> check.Case:
    # With four groups, the wider interval has 1.9 times the width.
    return check.Case(
        "case", bar, check.Interval(low, speed, high), speed * (high / speed) ** 1.9, 1.0, 1e-3, 1e-3 / speed
    )


@pytest.mark.parametrize(
    ("found", "decided", "status"),
    [
        (case(1.0, 0.99, 1.01), True, 0),
        (case(0.9, 0.89, 0.91), True, 1),
        (case(0.94, 0.92, 0.96), False, 1),
        (case(0.96, 0.945, 0.975), False, 0),  # slower, but not by more than allowed
        (case(0.96, 0.91, 1.01), False, 2),
        (case(0.93, 0.82, 1.05), False, 2),
        (case(1.2, 1.0, 1.4), True, 0),
    ],
)
def test_the_exit_status(found: check.Case, decided: bool, status: int) -> None:
    assert found.decided == decided
    assert check.status([found]) == status
    assert found.verdict in check.report([found], 3, "abcdef")
    assert check.status([found, case(0.9, 0.89, 0.91)]) == 1


class Fake:
    """A worker that answers with the numbers of its calls."""

    def __init__(self, log: list[tuple[int, str]], number: int) -> None:
        self.log, self.number = log, number

    def ask(self, line: str) -> dict[str, float]:
        self.log.append((self.number, line))
        return {"seconds": float(self.number)}


def test_processes_take_turns_in_every_order() -> None:
    log: list[tuple[int, str]] = []
    workers: Any = [Fake(log, i) for i in range(3)]
    found = list(check.turns(workers, ["a", "b"], 3, lambda: None))
    assert found == [{"a": (0.0, 1.0, 2.0), "b": (0.0, 1.0, 2.0)}] * 3
    turns = [number for number, _ in log]
    assert len({tuple(turns[i : i + 3]) for i in range(0, len(turns), 3)}) == 6


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a git checkout with a commit on main, a commit on a branch, and a change that is not committed."""
    monkeypatch.setattr(check, "ROOT", tmp_path)
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "somebody")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "somebody@example.org")
    check.git("init", "--quiet", "--initial-branch=main")
    file = tmp_path / "file"
    for text, before in (("on main", ()), ("on a branch", ("checkout", "--quiet", "-b", "branch"))):
        if before:
            check.git(*before)
        file.write_text(text)
        check.git("add", "file")
        check.git("commit", "--quiet", "-m", text)
    file.write_text("not committed")
    return tmp_path


@pytest.mark.parametrize(("arguments", "base"), [([], "on main"), (["--base", "branch"], "on a branch")])
def test_the_working_tree_is_compared_with_its_merge_base(
    arguments: list[str], base: str, repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    seen: list[tuple[str, str]] = []

    def measure(base: Path, head: Path, slower: object, **_: object) -> tuple[list[check.Case], int]:
        seen.append(((base / "file").read_text(), (head / "file").read_text()))
        return [case(1.0, 0.99, 1.01)], 3

    monkeypatch.setattr(check, "measure", measure)
    monkeypatch.setattr(instructions, "compare", lambda base, head: instructions.Comparison("instructions: equal"))
    assert check.main([*arguments, "--json", str(repository / "result.json")]) == 0
    assert seen == [(base, "not committed")]
    assert "No case is slower than allowed" in (out := capsys.readouterr().out)
    assert "instructions: equal" in out
    assert json.loads((repository / "result.json").read_text())["cases"][0]["verdict"] == "pass"


def test_an_unknown_base_is_an_error(repository: Path, capsys: pytest.CaptureFixture) -> None:
    assert check.main(["--base", "nonsense"]) == 3
    assert "--base nonsense: this checkout has no such commit" in capsys.readouterr().err


def test_no_main_is_an_error(repository: Path) -> None:
    check.git("branch", "--quiet", "-D", "main")
    with pytest.raises(InputError, match="name the base by --base"):
        check.merge_base(None)


def test_a_folder_without_git_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr(check, "ROOT", tmp_path)
    assert check.main([]) == 3
    assert "is not a git checkout" in capsys.readouterr().err
    monkeypatch.setenv("PATH", "")
    assert check.main([]) == 3
    assert "git, which is not installed" in capsys.readouterr().err


def test_a_worker_that_fails_is_an_error(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def measure(*_: object, **__: object) -> None:
        raise WorkerError("a worker ended with status 1")

    monkeypatch.setattr(check, "measure", measure)
    assert check.main([]) == 3
    assert capsys.readouterr().err == "error: a worker ended with status 1\n"


def test_planting_takes_a_kind_and_a_share(capsys: pytest.CaptureFixture) -> None:
    assert check.parser().parse_args(["--plant", "kernels=0.1", "--plant", "models=0.05"]).plant == [
        ("kernels", 0.1),
        ("models", 0.05),
    ]
    with pytest.raises(SystemExit):
        check.parser().parse_args(["--plant", "everything=0.1"])
    assert "kernels=SHARE or models=SHARE" in capsys.readouterr().err


def test_a_planted_call_takes_its_share_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the thread's CPU clock, which here advances by 1 whenever it is read, and by 100 in the call."""
    now = 0

    def clock() -> int:
        nonlocal now
        now += 1
        return now

    def call() -> None:
        nonlocal now
        now += 100

    monkeypatch.setattr(time, "thread_time_ns", clock)
    cases.slowed(call, 0.5)()
    # The call took 101 by the clock, which was read once before it, and waiting ends at 1.5 times as much.
    assert now == 1 + 101 + 50
    assert cases.slowed(call, 0) is call


def test_a_worker_times_the_named_kernels() -> None:
    every = list(cases.kernels())  # Not compiled yet.
    assert len(every) == len(cases.SIZES) * len(cases.ROWS) * len(cases.DTYPES) + 1
    command = [sys.executable, str(ROOT / "benchmarks" / "cases.py"), str(ROOT), json.dumps({cases.KERNELS: 0.0})]
    with Worker([*command, "--only", every[0]], PYTHONPATH=str(ROOT)) as made:
        assert made.answer() == {"kinds": {cases.KERNELS: every[:1]}, "int8": 1}
        assert made.ask(every[0])["seconds"] > 0


def test_a_worker_measures_no_other_tree(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "cases.py"), str(tmp_path), "{}"]
    with Worker(command, PYTHONPATH=str(ROOT)) as made, pytest.raises(WorkerError, match="status 1"):
        made.answer()
    assert f"not from {tmp_path}" in capfd.readouterr().err


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a git checkout")
@pytest.mark.slow  # Two groups of three processes, each with a model to compile.
def test_the_whole_gate_finds_a_model_that_takes_twice_the_time(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    command = [sys.executable, "-m", "benchmarks.check", "--base", "HEAD", "--models", "--groups", "2", "--rounds", "3"]
    done = subprocess.run(
        [*command, "--plant", "models=1.0", "--json", str(out)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stdout + done.stderr
    speeds = {each["name"]: each["speed"][1] for each in json.loads(out.read_text())["cases"]}
    assert all(speed < 0.75 for speed in speeds.values()), speeds


def test_more_instructions_are_found() -> None:
    product, other = Product("avx2", 1, 64, 16), Product("portable", 1, 64, 16)
    found = instructions.compared({product: 100, other: 100}, {product: 110, other: 101})
    assert found.slower == (product,)
    assert "1.100 ✗" in found.text
    assert "1.010 |" in found.text


def test_the_gate_fails_for_instructions_alone(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(check, "measure", lambda *_, **__: ([case(1.0, 0.99, 1.01)], 3))
    found = instructions.compared({Product("avx2", 1, 64, 16): 100}, {Product("avx2", 1, 64, 16): 110})
    monkeypatch.setattr(instructions, "compare", lambda base, head: found)
    assert check.main([]) == 1
    assert "110" in capsys.readouterr().out


def test_without_valgrind_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    found = instructions.compare(ROOT, ROOT)
    assert found.slower == ()
    assert "valgrind is not installed" in found.text


def test_a_trial_counts_what_the_gate_found() -> None:
    runs = [{"status": 0, "seconds": 100}, {"status": 2, "seconds": 130}]
    text = trial.report({"base against base": runs, "models 5 % slower": [{"status": 1, "seconds": 90}]})
    assert "1 of 2 ✗" in text
    assert "1 of 1 |" in text
    assert "100 to 130 s" in text
