"""Everything that needs a GPU, in two commands and fifteen minutes: tests, gates, measurements.

python -m benchmarks.gpu_day --out DIR --copy "$OUT"            # the first call: 530 seconds, most important first
python -m benchmarks.gpu_day --out DIR --copy "$OUT" --second   # goes on, for 170 seconds: what failed, and the rest
python -m benchmarks.gpu_day --out DIR --report                 # the table and the plots of what was measured
python -m benchmarks.gpu_day --out DIR --dry-run                # tiny sizes on the CPU; its times mean nothing

DIR must survive the first call; its files (gpu-day.json and what the tools printed) are copied to --copy every few
seconds. `make gpu-bundle` compiles the kernels beforehand. The exit status is 1 where tests or correctness gates failed
or were left out, where a decoded or exported model gave other outputs, and where CUDA graphs were skipped; a speed that
misses its bar is a result, not a failure.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from benchmarks.gpu import (
    bundle,
    candidates,
    ceilings,
    checks,
    decode,
    exported,
    facts,
    kernels,
    linear,
    parts,
    peers,
    predictions,
    summary,
)
from benchmarks.gpu import profile as profiles
from benchmarks.gpu.clock import Clock, GraphClock, HostClock
from benchmarks.gpu.day import GATES, Day, Result, ResultError, Stage, load_whole
from benchmarks.gpu.sizes import Sizes, dry_run, gpu, with_rows
from benchmarks.gpu.supervisor import Stopped, stop_on_signals, supervise
from int8compile import triton_kernels

# The stages of a call, most important first.
FIRST = (
    *(kernels.NAME, ceilings.NAME, GATES, checks.TESTS, linear.FIRST, parts.OUTLIERS, parts.LAUNCH, decode.NAME),
    *(candidates.NAME, profiles.NAME, linear.AUTOTUNED),
)
SECOND = (checks.FAILED, exported.NAME, checks.EXPORT_TESTS, *FIRST, linear.REST, peers.NAME)
STAGES = tuple(dict.fromkeys([*FIRST, *SECOND]))
# Length of a call, and the part of it that is reserved for starting and ending.
SECONDS, SECOND_SECONDS, ENDS = 530.0, 170.0, 5.0
# Seconds of the second call for cases that the first one left out, all stages together.
LEFT_OVER = 15.0
# L2 size assumed in a dry run: a tiny weight has a few copies as well.
DRY_RUN_L2_BYTES = 4096


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    chosen = _parser().parse_args(arguments)
    until = time.time() + _seconds(chosen) if chosen.until is None else chosen.until
    try:
        if chosen.report:
            data = load_whole(chosen.out)
            _say(summary.render(data))
            _say(summary.plot(data, chosen.out))
            return 0
        stop_on_signals()
        if chosen.until is not None:
            return measure(chosen, until)
        given = list(sys.argv[1:] if arguments is None else arguments)
        command = [sys.executable, "-u", "-m", "benchmarks.gpu_day", *given, "--until", str(until)]
        folder = chosen.out.resolve()
        environment = {} if chosen.dry_run else kernels.environment(folder)
        return supervise([*command, "--out", str(folder)], folder, until, environment=environment, copy=chosen.copy)
    except ResultError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(f"stopped by {stopped}", file=sys.stderr)
        return 1


def measure(chosen: argparse.Namespace, until: float) -> int:
    """Runs the stages in this process.

    Returns:
        The exit status.
    """
    sizes = dry_run() if chosen.dry_run else gpu(chosen.layers)
    if chosen.rows:
        sizes = with_rows(sizes, tuple(chosen.rows))
    device, clock, l2_bytes = _device(sizes)
    machine = facts.machine(device)
    header = {"dry_run": sizes.dry_run, "machine": machine, "commit": chosen.commit or facts.commit()}
    if (predicted := predictions.of(machine["device"])) is not None:
        header["predicted"] = predicted
    result = Result.begun(chosen.out, header, resume=chosen.resume or chosen.second)
    torch.manual_seed(0)
    stages = schedule(_stages(chosen, sizes, device, clock, l2_bytes, result), chosen)
    limits = [f"{stage.name} {stage.seconds:.3g} s" for stage in stages]
    _say(f"{', '.join(limits)}; {sum(stage.seconds for stage in stages):.4g} s of {_seconds(chosen):g} s")
    day = Day(result, until - ENDS, healthy=clock.synchronize, say=_say, shown=summary.in_words)
    try:
        with torch.no_grad():
            day.run(stages)
    except Stopped as stopped:
        _say(f"stopped by {stopped}")
        result.data.pop("running", None)
    kernels.count(result)
    _say(f"\n{summary.render(result.data)}")
    return 0 if summary.passed(result.data) else 1


def schedule(stages: Mapping[str, Stage], chosen: argparse.Namespace) -> list[Stage]:
    """The stages of a call in order, with their limits.

    Args:
        stages: By name.
        chosen: With `second`, `only` and `seconds`.
    """
    if chosen.only:
        # All stages use the kernels.
        names = [name for name in STAGES if name in chosen.only or name == kernels.NAME]
        limits = {name: stages[name].seconds for name in names}
    elif chosen.second:
        limits = {name: LEFT_OVER / len(FIRST) if name in FIRST else stages[name].seconds for name in SECOND}
    else:
        limits = {name: stages[name].seconds for name in FIRST}
    # A shorter call has shorter stages.
    scale = min(1.0, (_seconds(chosen) - ENDS) / sum(limits.values()))
    return [dataclasses.replace(stages[name], seconds=scale * limit) for name, limit in limits.items()]


def _seconds(chosen: argparse.Namespace) -> float:
    """How long a call takes at most."""
    if chosen.seconds is not None:
        return float(chosen.seconds)
    return SECOND_SECONDS if chosen.second else SECONDS


def _stages(
    chosen: argparse.Namespace, sizes: Sizes, device: torch.device, clock: Clock, l2_bytes: int, result: Result
) -> dict[str, Stage]:
    """All stages by name."""

    def measured() -> dict[str, object]:
        cases: dict[str, object] = result.stage(ceilings.NAME)["cases"]
        return cases

    stages = (
        kernels.stage(_bundle(chosen, sizes)),
        ceilings.stage(sizes, clock, device),
        checks.gates_stage(sizes, device),
        checks.tests_stage(sizes, result, export=False, say=_say),
        *linear.stages(sizes, clock, device, l2_bytes, measured),
        parts.outliers_stage(sizes, clock, device, l2_bytes),
        parts.launch_stage(sizes, clock, device),
        decode.stage(sizes, clock, device, measured),
        candidates.stage(sizes, clock, device, l2_bytes),
        profiles.stage(result, sizes.dry_run),
        checks.failed_stage(result),
        exported.stage(sizes, clock, device),
        checks.tests_stage(sizes, result, export=True, say=_say),
        peers.stage(sizes, clock, device, l2_bytes),
    )
    return {stage.name: stage for stage in stages}


def _bundle(chosen: argparse.Namespace, sizes: Sizes) -> Path | None:
    """The file with compiled kernels; None where there is none.

    Raises:
        ResultError: The one that was asked for is missing.
    """
    if chosen.bundle is not None and not chosen.bundle.exists():
        raise ResultError(f"--bundle {chosen.bundle} does not exist; `make gpu-bundle` makes {kernels.BUNDLE}")
    file: Path = chosen.bundle or facts.ROOT / kernels.BUNDLE
    return file if file.exists() and not sizes.dry_run else None


def _device(sizes: Sizes) -> tuple[torch.device, Clock, int]:
    """The device, what times it, and the size of its cache."""
    if sizes.dry_run:
        return torch.device("cpu"), HostClock(), DRY_RUN_L2_BYTES
    if not torch.cuda.is_available():
        raise SystemExit("error: there is no CUDA GPU here; --dry-run goes through everything on the CPU")
    if not triton_kernels.load():
        raise SystemExit(f"error: there are no Triton kernels to measure: {triton_kernels.failure()}")
    if bundle.WATCH in os.environ:
        bundle.watch(Path(os.environ[bundle.WATCH]))
    # Its tables of what it tried would bury the results.
    torch._inductor.config.autotune_num_choices_displayed = 0
    return torch.device("cuda", 0), GraphClock(), int(torch.cuda.get_device_properties(0).L2_cache_size)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_day", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the results go")
    parser.add_argument("--copy", type=Path, metavar="DIR", help="where they are copied to, every few seconds")
    parser.add_argument("--second", action="store_true", help="go on with the results in --out: the second call")
    parser.add_argument(
        "--seconds",
        type=_seconds_of,
        metavar="N",
        help=f"length of the call (default: {SECONDS:g}, {SECOND_SECONDS:g} with --second)",
    )
    parser.add_argument("--only", nargs="+", choices=STAGES, metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--rows", nargs="+", type=_positive, metavar="M", help="measure these numbers of rows")
    parser.add_argument(
        "--layers", type=_positive, default=decode.LAYERS, metavar="N", help="of the decoder (default: 8)"
    )
    parser.add_argument(
        "--bundle",
        type=Path,
        metavar="FILE",
        help=f"of kernels (default: {kernels.BUNDLE}, where it is there)",
    )
    parser.add_argument("--commit", metavar="ID", help="of the checkout, where it has no history to ask")
    parser.add_argument("--resume", action="store_true", help="go on with the results in --out")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)  # The process that measures is given it.
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not allowed; give a number of at least 1")
    return number


def _seconds_of(text: str) -> float:
    number = float(text)
    if not number > ENDS:
        raise argparse.ArgumentTypeError(f"{text} is not allowed; give more than {ENDS:g}, which a call takes to start")
    return number


def _say(text: str) -> None:
    if text:
        print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
