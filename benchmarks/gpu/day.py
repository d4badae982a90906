"""Stages of cases, most important first, and the file that holds what was measured whenever the day ends.

The file is written before and after every case. All cases of all stages stand in it as left out from the beginning and
leave that list when they have run, so it is right also if the process is killed.
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
# The exit status of a process that has to be started again to go on.
BROKEN = 75
GATES = "gates"
# A case that takes so many times what was expected of it hangs, and so many seconds at least.
HANGS, HANGS_SECONDS = 4.0, 20.0
# Seconds between the end of a process that a case runs and that of the case.
MARGIN = 4.0

CaseResult = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Stage:
    """Cases of one kind.

    Attributes:
        name: Its key in the result file.
        about: What is measured.
        seconds: Its limit. What a stage does not use goes to those behind it.
        cases: By name, in order. Each returns its result.
        expected: Seconds that a case may need: with fewer left none begins. One that takes several times as long hangs.
        always: Whether its cases run even without time left: later stages need them.
        measures: Whether its results are only worth something if the kernels are right.
        notes: What a reader has to know, such as what is missing on this machine.
        close: Gives memory back.
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
    """A result file is there that must not be overwritten, or cannot be gone on with."""


class Result:
    """The result file.

    Attributes:
        data: What it holds.
        path: Where it is.
    """

    def __init__(self, path: Path, data: dict[str, Any]) -> None:
        self.path = path
        self.data = data

    @staticmethod
    def begun(folder: Path, header: Mapping[str, Any], *, resume: bool) -> Result:
        """A new file, or the one that is there.

        Args:
            folder: Made if it is not there.
            header: What stands above the stages.
            resume: Whether to go on with the file.

        Raises:
            ResultError: There is one already and it is not to be resumed, or it comes from something else.
        """
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / FILE
        if not path.exists():
            if resume:
                raise ResultError(
                    f"there is no {FILE} in --out to go on with; measure first, without --resume or --second"
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
        # If the process ended at a case, that one is still left out.
        data.pop("running", None)
        return Result(path, {**data, **header})

    def write(self) -> None:
        """Replaces the file in one step."""
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.data, indent=1, allow_nan=False) + "\n")
        os.replace(part, self.path)

    def stage(self, name: str) -> dict[str, Any]:
        """A stage's part of it; of one that is not there, an empty one."""
        found: dict[str, Any] = self.data["stages"].get(name, {"cases": {}, "left_out": [], "notes": []})
        return found

    def plan(self, stages: Sequence[Stage]) -> None:
        """Enters all cases that it does not have yet as left out."""
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
        """Enters what this process is at, and until when, for the one that watches it."""
        self.data["running"] = {"stage": stage.name, "case": case, "pid": os.getpid(), "until": until}
        self.write()

    @property
    def left(self) -> float:
        """Seconds that the case which runs has for a process of its own, and to read what that printed."""
        return float(self.data["running"]["until"]) - time.time() - MARGIN

    def record(self, stage: str, case: str, result: CaseResult) -> None:
        """Enters a case's result, and writes the file."""
        found = self.data["stages"][stage]
        found["cases"][case] = _plain(result)
        if case in found["left_out"]:
            found["left_out"].remove(case)
        self.data.pop("running", None)
        self.write()

    @property
    def failed_gates(self) -> list[str]:
        """The correctness gates that did not pass."""
        return [name for name, result in self.stage(GATES)["cases"].items() if not result.get("passed")]


def load(folder: Path) -> dict[str, Any]:
    """Reads a folder's result file.

    Raises:
        ResultError: There is none, or it is no JSON.
    """
    try:
        data: dict[str, Any] = json.loads((folder / FILE).read_text())
    except FileNotFoundError:
        raise ResultError(f"there is no {FILE} in --out; measure first, without --report") from None
    except ValueError as error:
        raise ResultError(f"{FILE} in --out is damaged ({error}); take another folder") from error
    return data


def load_whole(folder: Path) -> dict[str, Any]:
    """Reads a folder's result file, which another process may have left.

    Raises:
        ResultError: There is none, or it is not one of a GPU day.
    """
    data = load(folder)
    if missing := [key for key in ("dry_run", "machine", "commit", "stages") if key not in data]:
        raise ResultError(f"{FILE} in --out has no {', '.join(missing)}; take another folder")
    return data


class Day:
    """Runs stages.

    Args:
        result: Where results go.
        until: When the last stage ends, as `time.time` tells it.
        healthy: Raises if nothing can be run on the device any more.
        say: Takes a line about what was done.
        shown: A result in a few words.
    """

    def __init__(
        self,
        result: Result,
        until: float,
        *,
        healthy: Callable[[], object],
        say: Callable[[str], object],
        shown: Callable[[CaseResult], str],
    ) -> None:
        self._result = result
        self._until = until
        self._healthy = healthy
        self._say = say
        self._shown = shown

    def run(self, stages: Sequence[Stage]) -> None:
        """Runs all of them; each ends when those behind it need the time that is left."""
        self._result.plan(stages)
        self._result.write()
        for index, stage in enumerate(stages):
            self._run(stage, self._until - sum(behind.seconds for behind in stages[index + 1 :]))

    def _run(self, stage: Stage, until: float) -> None:
        found = self._result.data["stages"][stage.name]
        if stage.measures and self._result.failed_gates:
            found["marked"] = f"correctness gates failed: {'; '.join(self._result.failed_gates)}"
        before, began = found["seconds"], time.time()
        for name in list(found["left_out"]):
            case_began = time.time()
            hangs = case_began + max(HANGS * stage.expected, HANGS_SECONDS)
            if not stage.always and case_began + stage.expected > until:
                break
            self._result.begin(stage, name, hangs if stage.always else min(until, hangs))
            outcome = self._outcome(stage.cases[name])
            now = time.time()
            found["seconds"] = round(before + now - began, 1)
            self._result.record(stage.name, name, {**outcome, "took": round(now - case_began, 1)})
            self._say(f"{stage.name}: {name}: {self._shown(outcome)} [{now - case_began:.1f} s]")
        stage.close()
        self._free()
        self._result.write()
        if found["left_out"]:
            self._say(f"{stage.name}: no time for {len(found['left_out'])} cases: {', '.join(found['left_out'])}")

    def _outcome(self, case: Callable[[], CaseResult]) -> CaseResult:
        try:
            outcome = case()
        except Exception as error:
            traceback.print_exc()
            outcome = {"error": described(error)}
        # Behind the handler: while an error is handled, its frames keep their tensors.
        self._free()
        try:
            self._healthy()
        except Exception as error:
            # After an illegal access every call fails until the process ends; the supervisor enters this as the case's.
            self._result.data["running"]["error"] = outcome.get("error") or described(error)
            self._result.write()
            os._exit(BROKEN)
        return outcome

    @staticmethod
    def _free() -> None:
        if torch.cuda.is_available():
            gc.collect()
            try:
                torch.cuda.empty_cache()
            except RuntimeError:
                traceback.print_exc()  # Whether the device is lost is asked next.


def _plain(value: Any) -> Any:
    """A result as JSON has it: it knows no NaN and no infinity, which a wrong kernel makes."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
