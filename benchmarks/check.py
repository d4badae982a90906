"""The speed gate: is the working tree slower than its merge base? `make bench-check`, or `python -m benchmarks.check`.

Three processes run at a time: two of the base and one of the working tree. They take turns, case by case and in a
changing order, and what is compared are ratios within a round. The two processes of the base show how much the time of
the same code differs between processes (memory pages, addresses); that noise decides how wide an interval is. Several
such groups of processes are started. `benchmarks/cases.py` lists the cases and says how a call is timed.

A case fails if it has less than 0.95 (kernels) or 0.97 (models) of the base's speed, and is certainly slower: an
interval that holds with 95 % for all cases together is below 1. Groups are added until each case is decided, up to
`--groups`. Exit status:

    0  no case fails
    1  a case fails
    2  no case fails, but the noise is larger than what should be found: repeat it on a quieter machine
    3  it could not be measured, for example because the revision is unknown

    python -m benchmarks.check                    # against the merge base with origin/main, or main
    python -m benchmarks.check --base HEAD        # changes that are not committed
    python -m benchmarks.check --models --real    # SmolLM2 instead of two random layers of its size
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

from benchmarks import instructions, tables
from benchmarks.cases import KERNELS, MODELS
from int8compile.app.workers import Worker, WorkerError
from int8compile.errors import InputError, listed
from int8compile.progress import progress_bar
from int8compile.timing import Interval

ROOT = Path(__file__).parents[1]
# Least speed of the working tree, as a multiple of the base's.
BARS = {KERNELS: 0.95, MODELS: 0.97}
# Groups of processes before the first judgement, and at most; rounds of turns in each.
FEWEST, MOST, ROUNDS = 3, 8, 6
# Two-sided quantiles of Student's t for 1, 3, 5, ... degrees of freedom: of 95 %, and of 99.7 %, which is 95 % for 17
# cases together (Bonferroni). Above the last, it is used.
T95 = (12.71, 3.182, 2.571, 2.365, 2.262, 2.201, 2.160, 2.131)
T_ALL = (216.4, 8.952, 5.400, 4.459, 4.037, 3.800, 3.649, 3.545)

# Seconds of the processes of a round: base, base, head.
Round = tuple[float, float, float]
# The rounds of each group, by case.
Measured = dict[str, list[list[Round]]]
Verdict = Literal["pass", "SLOWER", "cannot tell"]


@dataclasses.dataclass(frozen=True)
class Case:
    """A judged case.

    Attributes:
        name: Its name.
        bar: Least speed.
        speed: Speed of the head as a multiple of the base's, with its 95 % interval.
        most: The upper end of an interval that is right for all cases together.
        null: Speed of one process of the base as a multiple of the other's: 1, but for noise.
        base: Median seconds of the base.
        head: Median seconds of the head.
    """

    name: str
    bar: float
    speed: Interval
    most: float
    null: float
    base: float
    head: float

    @property
    def verdict(self) -> Verdict:
        """Return the verdict, if nothing more is measured."""
        if self.speed.median < self.bar and self.most < 1:
            return "SLOWER"
        # With a wider interval, a speed at the bar cannot be told from no change.
        narrow = self.speed.median / self.speed.low <= 1 / self.bar
        return "pass" if self.speed.low > self.bar or (narrow and self.speed.median >= self.bar) else "cannot tell"

    @property
    def decided(self) -> bool:
        """Return whether the interval is on one side of the bar, so that more groups would change nothing."""
        return self.speed.low > self.bar or (self.speed.high < self.bar and self.most < 1)


def judge(name: str, bar: float, groups: Sequence[Sequence[Round]]) -> Case:
    """Judge a case.

    The value of a group is the median over its rounds of log(base / head). Its error is mostly that of its processes,
    which no number of rounds makes smaller. If s^2 is the variance of the logarithm of a process's time, the value has
    the variance 1.5 s^2, because the base is the mean of two processes, and the logarithm of the ratio of the base's
    processes has 2 s^2. s^2 is estimated from both; the second has a known mean, 0, so G groups give 2 G - 1 degrees of
    freedom for Student's t.
    """
    ratios = [[(math.log(a) + math.log(b)) / 2 - math.log(head) for a, b, head in rounds] for rounds in groups]
    values = [statistics.median(each) for each in ratios]
    nulls = [statistics.median(math.log(a) - math.log(b) for a, b, _ in rounds) for rounds in groups]
    mean, count = statistics.fmean(values), len(groups)
    freedom = 2 * count - 1
    variance = (sum((value - mean) ** 2 for value in values) / 1.5 + sum(null**2 for null in nulls) / 2) / freedom
    place, error = min(count, len(T95)) - 1, math.sqrt(1.5 * variance / count)
    half = T95[place] * error
    every = list(itertools.chain.from_iterable(groups))
    return Case(
        name,
        bar,
        Interval(math.exp(mean - half), math.exp(mean), math.exp(mean + half)),
        math.exp(mean + T_ALL[place] * error),
        math.exp(statistics.fmean(nulls)),
        statistics.median(math.sqrt(a * b) for a, b, _ in every),
        statistics.median(head for *_, head in every),
    )


def together(measured: Sequence[list[list[Round]]]) -> list[list[Round]]:
    """Return the rounds of several cases as those of one: the geometric means of their times."""

    def mean(rounds: Sequence[Round], process: int) -> float:
        return statistics.geometric_mean(each[process] for each in rounds)

    return [
        [(mean(rounds, 0), mean(rounds, 1), mean(rounds, 2)) for rounds in zip(*groups, strict=True)]
        for groups in zip(*measured, strict=True)
    ]


def judge_all(kinds: Mapping[str, Sequence[str]], measured: Measured) -> list[Case]:
    """Judge each case, and all cases of a kind together, whose noise is smaller."""
    return [
        case
        for kind, names in kinds.items()
        for case in (
            *(judge(name, BARS[kind], measured[name]) for name in names),
            judge(f"all {kind}", BARS[kind], together([measured[name] for name in names])),
        )
    ]


def measure(
    base: Path, head: Path, slower: Mapping[str, float], *, real: bool, groups: int, rounds: int
) -> tuple[list[Case], int]:
    """Measure groups of processes until each case is decided.

    Args:
        base: A checkout of the base.
        head: The tree to judge.
        slower: The kinds of cases to measure, each with the share by which the head's calls are prolonged.
        real: Whether the model is SmolLM2.
        groups: The most groups.
        rounds: Rounds of each group.

    Returns:
        The cases, and the number of groups.
    """
    kinds: dict[str, list[str]] = {}
    measured: Measured = {}
    cases: list[Case] = []

    def start(folder: Path, shares: Mapping[str, float]) -> Worker:
        command = [sys.executable, str(Path(__file__).with_name("cases.py")), str(folder), json.dumps(dict(shares))]
        return Worker([*command, *(["--real"] if real else [])], PYTHONPATH=str(folder))

    same = dict.fromkeys(slower, 0.0)
    with progress_bar(total=None, desc="Taking turns") as bar:
        for group in range(1, groups + 1):
            with ExitStack() as stack:
                trees = ((base, same), (base, same), (head, slower))
                workers = [stack.enter_context(start(folder, shares)) for folder, shares in trees]
                ready = [worker.answer() for worker in workers]
                check_same(ready)
                kinds = ready[0]["kinds"]
                names = [name for each in kinds.values() for name in each]
                found = list(turns(workers, names, rounds, bar.update))
            for name in names:
                measured.setdefault(name, []).append([each[name] for each in found])
            cases = judge_all(kinds, measured)
            if group >= min(FEWEST, groups) and (
                all(case.decided for case in cases) or any(case.decided and case.verdict == "SLOWER" for case in cases)
            ):
                break
    return cases, group


def check_same(ready: Sequence[Mapping[str, Any]]) -> None:
    """Raise `InputError` unless base and head have the same cases, with as many linears in int8."""
    *_, base, head = ready
    if base["kinds"] != head["kinds"]:
        raise InputError(f"the base has the cases {base['kinds']} and the working tree {head['kinds']}")
    if base["int8"] != head["int8"]:
        raise InputError(
            f"{base['int8']} weights are int8 in the base and {head['int8']} in the working tree, so their "
            "speeds do not compare: tests/gates says what runs in float"
        )


def turns(
    workers: Sequence[Worker], names: Sequence[str], rounds: int, advance: Callable[[], object]
) -> Iterator[dict[str, Round]]:
    """Yield the seconds of each case in each round."""
    orders = itertools.cycle(itertools.permutations(range(len(workers))))
    for _ in range(rounds):
        found: dict[str, Round] = {}
        for name in names:
            seconds = {i: workers[i].ask(name)["seconds"] for i in next(orders)}
            found[name] = (seconds[0], seconds[1], seconds[2])
        advance()
        yield found


def git(*arguments: str) -> str:
    """Return what git prints.

    Raises:
        InputError: git fails, or is missing.
    """
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, check=False, capture_output=True, text=True)
    except FileNotFoundError:
        raise InputError("the speed gate compares two revisions, and needs git, which is not installed") from None
    if done.returncode:
        raise InputError(f"git {' '.join(arguments)} failed: {done.stderr.strip().splitlines()[-1:] or ['no message']}")
    return done.stdout.strip()


def merge_base(base: str | None) -> str:
    """Return the commit to compare with: `base`, or the commit at which HEAD left origin/main or main.

    Raises:
        InputError: This is no git checkout, or there is no such commit.
    """
    try:
        git("rev-parse", "--git-dir")
    except InputError as error:
        raise InputError(f"{ROOT} is not a git checkout, so there is no base to compare with ({error})") from None
    if base is not None:
        try:
            return git("rev-parse", "--verify", "--quiet", f"{base}^{{commit}}")
        except InputError:
            raise InputError(f"--base {base}: this checkout has no such commit; fetch it, or name another") from None
    for branch in ("origin/main", "main"):
        try:
            return git("merge-base", branch, "HEAD")
        except InputError:
            continue
    raise InputError("there is neither origin/main nor main to find the merge base with; name the base by --base")


@contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """Extract a commit's files into a folder that is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="int8compile-") as folder:
        archive = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True).stdout
        subprocess.run(["tar", "-x"], cwd=folder, input=archive, check=True)
        yield Path(folder)


def report(cases: Sequence[Case], groups: int, commit: str) -> str:
    """Return the cases as a table, and the result in a sentence."""
    rows = [
        (
            case.name,
            *(f"{1e6 * seconds:.0f} us" for seconds in (case.base, case.head)),
            f"{case.speed.median:.3f}",
            f"{case.speed.low:.3f} to {case.speed.high:.3f}",
            f"{case.null:.3f}",
            case.bar,
            case.verdict,
        )
        for case in cases
    ]
    headers = ("case", commit[:10], "here", "speed", "95 %", "base/base", "bar", "")
    slower, unclear = ([case.name for case in cases if case.verdict == each] for each in ("SLOWER", "cannot tell"))
    if slower:
        sentence = f"Slower than allowed: {listed(slower)}."
    elif unclear:
        sentence = (
            "No case is certainly slower than allowed, but the noise is larger than what should be found in "
            f"{listed(unclear)}. Repeat it on a quieter machine."
        )
    else:
        sentence = "No case is slower than allowed."
    return f"{tables.markdown(rows, headers)}\n\n{groups} groups of processes. {sentence}"


def status(cases: Sequence[Case]) -> int:
    """Return the exit status."""
    verdicts = {case.verdict for case in cases}
    return 1 if "SLOWER" in verdicts else 2 if "cannot tell" in verdicts else 0


def to_dict(case: Case) -> dict[str, Any]:
    """Return a case as data."""
    return {**dataclasses.asdict(case), "speed": list(case.speed), "verdict": case.verdict}


def planted(text: str) -> tuple[str, float]:
    """Read an argument like `kernels=0.10`."""
    kind, _, share = text.partition("=")
    if kind not in BARS or not share:
        raise argparse.ArgumentTypeError(f"{text!r} is not {' or '.join(f'{name}=SHARE' for name in BARS)}")
    return kind, float(share)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--base", metavar="REV", help="the base (default: the merge base with origin/main, or main)")
    made.add_argument("--kernels", action="append_const", dest="kinds", const=KERNELS, help="only kernels")
    made.add_argument("--models", action="append_const", dest="kinds", const=MODELS, help="only models")
    made.add_argument("--real", action="store_true", help="take SmolLM2 as the model")
    made.add_argument("--groups", type=int, default=MOST, help="most groups of processes (default %(default)s)")
    made.add_argument("--rounds", type=int, default=ROUNDS, help="rounds of each group (default %(default)s)")
    made.add_argument("--json", type=Path, metavar="FILE", help="also write the result to FILE")
    made.add_argument(
        "--plant",
        type=planted,
        action="append",
        default=[],
        metavar="KIND=SHARE",
        help="prolong the head's calls by busy waiting, to try the gate: kernels=0.10, models=0.05",
    )
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit status."""
    options = parser().parse_args(arguments)
    slower = dict.fromkeys(options.kinds or BARS, 0.0) | dict(options.plant)
    try:
        commit = merge_base(options.base)
        with checkout(commit) as base:
            cases, groups = measure(base, ROOT, slower, real=options.real, groups=options.groups, rounds=options.rounds)
            counted = instructions.compare(base, ROOT) if KERNELS in slower else None
    except (InputError, WorkerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    found = status(cases)
    print(report(cases, groups, commit))
    if counted is not None:
        print(f"\n{counted.text}")
        found = 1 if counted.slower else found
    if options.json:
        data = {"status": found, "groups": groups, "base": commit, "cases": [to_dict(case) for case in cases]}
        options.json.write_text(json.dumps(data, indent=2) + "\n")
    return found


if __name__ == "__main__":
    sys.exit(main())
