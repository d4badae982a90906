"""Stages of cases, most important first, and the result file, which is complete whenever the day ends.

The file is written before and after every case. It lists all cases of all stages as left out from the beginning, and
removes a case from that list when it has run. So the file is also right if the process is killed.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import os
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.facts import described

FILE = "gpu-day.json"
# Exit status of a process that has to be restarted to continue.
BROKEN = 75
GATES = "gates"
# A case hangs if it takes this many times its expected time, and at least this many seconds.
HANGS, HANGS_SECONDS = 4.0, 20.0
# Seconds between the end of a case's own process and the end of the case.
MARGIN = 4.0

CaseResult = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Stage:
    """Cases of one kind.

    Attributes:
        name: Key of the stage in the result file.
        about: Description of the measurement.
        seconds: Time limit. Later stages get the time that a stage does not use.
        cases: Functions that return the result of a case, by name and in order.
        expected: Seconds that a case may need; no case begins with less time left. A case that takes several times as
            long hangs.
        always: Whether cases run even without time left, because later stages need them.
        measures: Whether results are only valid if the kernels are correct.
        notes: Notes for the reader, such as packages that are missing on this machine.
        close: Frees memory.
    """

    name: str
    about: str
    seconds: float
    cases: Mapping[str, Callable[[], CaseResult]]
    expected: float = 5.0
    always: bool = False
    measures: bool = True
    notes: Sequence[str] = ()
    close: Callable[[], None] = lambda: None


class ResultError(Exception):
    """A result file exists that must not be overwritten or cannot be continued."""


class Result:
    """The result file.

    Attributes:
        data: Its content.
        path: Its path.
    """

    def __init__(self, path: Path, data: dict[str, Any]) -> None:
        self.path = path
        self.data = data

    @staticmethod
    def begun(folder: Path, header: Mapping[str, Any], *, resume: bool) -> Result:
        """Return a new result file, or the existing one to continue.

        Args:
            folder: Folder of the file, made if it does not exist.
            header: Content above the stages.
            resume: Whether to continue the existing file.

        Raises:
            ResultError: A file exists that is not to be continued, or it is from another machine or commit.
        """
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / FILE
        if not path.exists():
            if resume:
                raise ResultError(
                    f"there is no {FILE} in --out to continue; measure first, without --resume or --second"
                )
            return Result(path, {**header, "stages": {}})
        if not resume:
            raise ResultError(f"there are results in --out already ({FILE}); give --resume or another folder")
        data = load_whole(folder)
        for key in ("dry_run", "commit", "machine"):
            before, now = data[key], header[key]
            if key == "machine":
                before, now = ([facts.get(name) for name in ("device", "torch", "triton")] for facts in (before, now))
            if before != now:
                raise ResultError(f"{FILE} in --out has {key} {before}, and now it is {now}; give another folder")
        # If the process ended in a case, that case is still listed as left out.
        data.pop("running", None)
        return Result(path, {**data, **header})

    def write(self) -> None:
        """Replace the file atomically."""
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.data, indent=1, allow_nan=False) + "\n")
        os.replace(part, self.path)

    def stage(self, name: str) -> dict[str, Any]:
        """Return a stage's results; empty results for a stage that is not in the file."""
        found: dict[str, Any] = self.data["stages"].get(name, {"cases": {}, "left_out": [], "notes": []})
        return found

    def plan(self, stages: Sequence[Stage]) -> None:
        """Enter all cases that have not run as left out."""
        for stage in stages:
            known = self.stage(stage.name)
            self.data["stages"][stage.name] = {
                "about": stage.about,
                "seconds": known.get("seconds", 0.0),
                "cases": known["cases"],
                "left_out": [name for name in stage.cases if name not in known["cases"]],
                "notes": list(dict.fromkeys([*known["notes"], *stage.notes])),
            }

    def begin(self, stage: Stage, case: str, until: float) -> None:
        """Enter the case that this process runs and its time limit, for the supervisor."""
        self.data["running"] = {"stage": stage.name, "case": case, "pid": os.getpid(), "until": until}
        self.write()

    @property
    def left(self) -> float:
        """Return the seconds that the running case has for its own process, including reading the output."""
        return float(self.data["running"]["until"]) - time.time() - MARGIN

    def record(self, stage: str, case: str, result: CaseResult) -> None:
        """Enter a case's result, and write the file."""
        found = self.data["stages"][stage]
        found["cases"][case] = _plain(result)
        if case in found["left_out"]:
            found["left_out"].remove(case)
        self.data.pop("running", None)
        self.write()

    @property
    def failed_gates(self) -> list[str]:
        """Return the names of the correctness gates that did not pass."""
        return [name for name, result in self.stage(GATES)["cases"].items() if not result.get("passed")]


def load(folder: Path) -> dict[str, Any]:
    """Read a folder's result file.

    Raises:
        ResultError: The file does not exist or is not JSON.
    """
    try:
        data: dict[str, Any] = json.loads((folder / FILE).read_text())
    except FileNotFoundError:
        raise ResultError(f"there is no {FILE} in --out; measure first, without --report") from None
    except ValueError as error:
        raise ResultError(f"{FILE} in --out is damaged ({error}); take another folder") from error
    return data


def load_whole(folder: Path) -> dict[str, Any]:
    """Read a folder's result file, and check that it is from a GPU day.

    Raises:
        ResultError: The file does not exist, or is not from a GPU day.
    """
    data = load(folder)
    if missing := [key for key in ("dry_run", "machine", "commit", "stages") if key not in data]:
        raise ResultError(f"{FILE} in --out has no {', '.join(missing)}; take another folder")
    return data


@dataclasses.dataclass(frozen=True)
class Day:
    """A day that runs stages.

    Attributes:
        result: Takes the results.
        until: End of the last stage, in seconds of `time.time`.
        healthy: Raises if the device can run nothing any more.
        say: Takes a line about each case.
        shown: Returns a result in a few words.
    """

    result: Result
    until: float
    healthy: Callable[[], object]
    say: Callable[[str], object]
    shown: Callable[[CaseResult], str]

    def run(self, stages: Sequence[Stage]) -> None:
        """Run all stages. A stage ends when the later stages need the time that is left."""
        self.result.plan(stages)
        self.result.write()
        for index, stage in enumerate(stages):
            self._run(stage, self.until - sum(later.seconds for later in stages[index + 1 :]))

    def _run(self, stage: Stage, until: float) -> None:
        found = self.result.data["stages"][stage.name]
        if stage.measures and self.result.failed_gates:
            found["marked"] = f"correctness gates failed: {'; '.join(self.result.failed_gates)}"
        before, began = found["seconds"], time.time()
        for name in list(found["left_out"]):
            case_began = time.time()
            hangs = case_began + max(HANGS * stage.expected, HANGS_SECONDS)
            if not stage.always and case_began + stage.expected > until:
                break
            self.result.begin(stage, name, hangs if stage.always else min(until, hangs))
            outcome = self._outcome(stage.cases[name])
            now = time.time()
            found["seconds"] = round(before + now - began, 1)
            self.result.record(stage.name, name, {**outcome, "took": round(now - case_began, 1)})
            self.say(f"{stage.name}: {name}: {self.shown(outcome)} [{now - case_began:.1f} s]")
        stage.close()
        self._free()
        self.result.write()
        if found["left_out"]:
            self.say(f"{stage.name}: no time for {len(found['left_out'])} cases: {', '.join(found['left_out'])}")

    def _outcome(self, case: Callable[[], CaseResult]) -> CaseResult:
        try:
            outcome = case()
        except Exception as error:
            traceback.print_exc()
            outcome = {"error": described(error)}
        # After the handler: while an error is handled, its frames keep their tensors.
        self._free()
        try:
            self.healthy()
        except Exception as error:
            # After an illegal access every call fails until the process ends. The supervisor enters this error as the
            # case's result.
            self.result.data["running"]["error"] = outcome.get("error") or described(error)
            self.result.write()
            os._exit(BROKEN)
        return outcome

    @staticmethod
    def _free() -> None:
        if torch.cuda.is_available():
            gc.collect()
            try:
                torch.cuda.empty_cache()
            except RuntimeError:
                traceback.print_exc()  # The caller checks next whether the device is lost.


def _plain(value: Any) -> Any:
    """Return a result as JSON allows it: NaN and infinity, which wrong kernels make, become text."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
