"""Everything that needs a GPU, in two commands and fifteen minutes: tests, correctness gates, measurements.

python -m benchmarks.gpu_day --out DIR --copy "$OUT"            # first call: 530 seconds, most important first
python -m benchmarks.gpu_day --out DIR --copy "$OUT" --second   # second call: 170 seconds for failed cases and the rest
python -m benchmarks.gpu_day --out DIR --report                 # summary and plots of the measurements
python -m benchmarks.gpu_day --out DIR --dry-run                # tiny sizes on the CPU; times mean nothing

The second call needs DIR of the first. Its files (gpu-day.json and the output of tools) are copied to --copy every few
seconds. `make gpu-bundle` compiles the kernels beforehand. The exit status is 1 if tests or correctness gates failed or
were left out, if a decoded or exported model gave wrong outputs, or if CUDA graphs were skipped. A speed that misses
its bar is a result, not a failure.
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
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.clock import GraphClock, HostClock
from benchmarks.gpu.day import GATES, Day, Result, ResultError, Stage, load_whole
from benchmarks.gpu.sizes import Sizes, dry_run, for_gpu, with_rows
from benchmarks.gpu.supervisor import Stopped, stop_on_signals, supervise
from int8compile import triton_kernels

# The stages of a call, most important first.
FIRST = (
    *(kernels.NAME, ceilings.NAME, GATES, checks.TESTS, linear.FIRST, parts.OUTLIERS, parts.LAUNCH, decode.NAME),
    *(candidates.NAME, profiles.NAME, linear.AUTOTUNED),
)
SECOND = (checks.FAILED, exported.NAME, checks.EXPORT_TESTS, *FIRST, linear.REST, peers.NAME)
STAGES = tuple(dict.fromkeys([*FIRST, *SECOND]))
# Seconds of each call, and the part reserved for starting and ending.
SECONDS, SECOND_SECONDS, ENDS = 530.0, 170.0, 5.0
# Seconds of the second call for all cases that the first call left out.
LEFT_OVER = 15.0
# L2 size in a dry run, so that tiny weights have a few copies, too.
DRY_RUN_L2_BYTES = 4096


def main(arguments: Sequence[str] | None = None) -> int:

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
    """Run the stages in this process, and return the exit status."""
    sizes = dry_run() if chosen.dry_run else for_gpu(chosen.layers)
    if chosen.rows:
        sizes = with_rows(sizes, tuple(chosen.rows))
    bench = _bench(sizes)
    machine = facts.machine(bench.device)
    header = {"dry_run": sizes.dry_run, "machine": machine, "commit": chosen.commit or facts.commit()}
    if (predicted := predictions.of(machine["device"])) is not None:
        header["predicted"] = predicted
    result = Result.begun(chosen.out, header, resume=chosen.resume or chosen.second)
    torch.manual_seed(0)
    stages = schedule(_stages(chosen, bench, result), chosen)
    limits = [f"{stage.name} {stage.seconds:.3g} s" for stage in stages]
    _say(f"{', '.join(limits)}; {sum(stage.seconds for stage in stages):.4g} s of {_seconds(chosen):g} s")
    day = Day(result, until - ENDS, healthy=bench.clock.synchronize, say=_say, shown=summary.in_words)
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
    """Return the stages of a call in order, with their time limits, from all stages by name."""
    if chosen.only:
        # All stages need the stage `kernels`.
        names = [name for name in STAGES if name in chosen.only or name == kernels.NAME]
        limits = {name: stages[name].seconds for name in names}
    elif chosen.second:
        limits = {name: LEFT_OVER / len(FIRST) if name in FIRST else stages[name].seconds for name in SECOND}
    else:
        limits = {name: stages[name].seconds for name in FIRST}
    # In a shorter call, all stages are shorter.
    scale = min(1.0, (_seconds(chosen) - ENDS) / sum(limits.values()))
    return [dataclasses.replace(stages[name], seconds=scale * limit) for name, limit in limits.items()]


def _seconds(chosen: argparse.Namespace) -> float:
    """Return the time limit of a call."""
    if chosen.seconds is not None:
        return float(chosen.seconds)
    return SECOND_SECONDS if chosen.second else SECONDS


def _stages(chosen: argparse.Namespace, bench: Bench, result: Result) -> dict[str, Stage]:
    """Return all stages by name."""
    sizes = bench.sizes

    def measured() -> dict[str, object]:
        cases: dict[str, object] = result.stage(ceilings.NAME)["cases"]
        return cases

    stages = (
        kernels.stage(_bundle(chosen, sizes)),
        ceilings.stage(bench),
        checks.gates_stage(sizes, bench.device),
        checks.tests_stage(sizes, result, export=False, say=_say),
        *linear.stages(bench, measured),
        parts.outliers_stage(bench),
        parts.launch_stage(bench),
        decode.stage(bench, measured),
        candidates.stage(bench),
        profiles.stage(result, sizes.dry_run),
        checks.failed_stage(result),
        exported.stage(bench),
        checks.tests_stage(sizes, result, export=True, say=_say),
        peers.stage(bench),
    )
    return {stage.name: stage for stage in stages}


def _bundle(chosen: argparse.Namespace, sizes: Sizes) -> Path | None:
    """Return the file with compiled kernels; None if there is none.

    Raises:
        ResultError: The file named by --bundle is missing.
    """
    if chosen.bundle is not None and not chosen.bundle.exists():
        raise ResultError(f"--bundle {chosen.bundle} does not exist; `make gpu-bundle` makes {kernels.BUNDLE}")
    file: Path = chosen.bundle or facts.ROOT / kernels.BUNDLE
    return file if file.exists() and not sizes.dry_run else None


def _bench(sizes: Sizes) -> Bench:
    """Return the device of this machine with its clock; the CPU in a dry run."""
    if sizes.dry_run:
        return Bench(sizes, HostClock(), torch.device("cpu"), DRY_RUN_L2_BYTES)
    if not torch.cuda.is_available():
        raise SystemExit("error: there is no CUDA GPU here; --dry-run runs all stages on the CPU")
    if not triton_kernels.load():
        raise SystemExit(f"error: there are no Triton kernels to measure: {triton_kernels.failure()}")
    if bundle.WATCH in os.environ:
        bundle.watch(Path(os.environ[bundle.WATCH]))
    # Inductor's tables of autotuning choices would hide the results.
    torch._inductor.config.autotune_num_choices_displayed = 0
    l2_bytes = int(torch.cuda.get_device_properties(0).L2_cache_size)
    return Bench(sizes, GraphClock(), torch.device("cuda", 0), l2_bytes)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_day", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the results")
    parser.add_argument("--copy", type=Path, metavar="DIR", help="copy the results there every few seconds")
    parser.add_argument("--second", action="store_true", help="make the second call, which continues --out")
    length = f"time limit of the call (default: {SECONDS:g}, {SECOND_SECONDS:g} with --second)"
    parser.add_argument("--seconds", type=_seconds_of, metavar="N", help=length)
    parser.add_argument("--only", nargs="+", choices=STAGES, metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--rows", nargs="+", type=_positive, metavar="M", help="measure these numbers of rows")
    layers = "layers of the decoder (default: %(default)s)"
    parser.add_argument("--layers", type=_positive, default=decode.LAYERS, metavar="N", help=layers)
    bundled = f"compiled kernels (default: {kernels.BUNDLE}, if it exists)"
    parser.add_argument("--bundle", type=Path, metavar="FILE", help=bundled)
    parser.add_argument("--commit", metavar="ID", help="commit of a checkout without a git history")
    parser.add_argument("--resume", action="store_true", help="continue the results in --out")
    parser.add_argument("--report", action="store_true", help="summarize and plot the results in --out, only")
    parser.add_argument("--dry-run", action="store_true", help="run with tiny sizes on the CPU")
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)  # Only for the measuring process.
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not allowed; give a number of at least 1")
    return number


def _seconds_of(text: str) -> float:
    number = float(text)
    if not number > ENDS:
        raise argparse.ArgumentTypeError(f"{text} is not allowed; give more than {ENDS:g}, which starting takes")
    return number


def _say(text: str) -> None:
    if text:
        print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
