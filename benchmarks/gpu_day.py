"""Everything that needs a GPU, in one command and as many minutes as there are: tests, gates, measurements.

python -m benchmarks.gpu_day --out DIR --minutes 10            # most important first; DIR/gpu-day.json and plots
python -m benchmarks.gpu_day --out DIR --minutes 10 --resume   # goes on where the time was over
python -m benchmarks.gpu_day --out DIR --report                # the table and the plots of what was measured
python -m benchmarks.gpu_day --out DIR --dry-run               # tiny sizes on the CPU; its times mean nothing

The exit status is 1 where a test or a correctness gate failed; a bar that is missed is a result, not a failure.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.gpu import candidates, ceilings, checks, decode, facts, linear, parts, peers, summary
from benchmarks.gpu.clock import Clock, GraphClock, HostClock
from benchmarks.gpu.day import GATES, Day, Result, ResultError, Stage, load
from benchmarks.gpu.sizes import Sizes, dry_run, gpu
from benchmarks.gpu.supervisor import Stopped, stop_on_signals, supervise
from int8compile import triton_kernels

STAGES = (
    *(checks.TESTS, GATES, ceilings.NAME, linear.FIRST, decode.NAME, parts.OUTLIERS, parts.LAUNCH),
    *(candidates.NAME, peers.NAME, linear.REST),
)
# Of the minutes, for tier 4 at most.
TESTS_SHARE = 0.3
# Of the cache in a dry run: a tiny weight has a few copies as well.
DRY_RUN_L2_BYTES = 4096


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    chosen = _parser().parse_args(arguments)
    until = time.time() + 60 * chosen.minutes if chosen.until is None else chosen.until
    try:
        if chosen.report:
            data = load(chosen.out)
            _say(summary.render(data))
            _say(summary.plot(data, chosen.out))
            return 0
        if chosen.dry_run:
            return measure(chosen, until, dry_run())
        if chosen.until is None:
            stop_on_signals()
            given = list(sys.argv[1:] if arguments is None else arguments)
            command = [sys.executable, "-m", "benchmarks.gpu_day", *given, "--until", str(until)]
            return supervise([*command, "--out", str(chosen.out.resolve())], chosen.out, until)
        stop_on_signals()
        return measure(chosen, until, gpu(chosen.layers))
    except ResultError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(f"stopped by {stopped}", file=sys.stderr)
        return 1


def measure(chosen: argparse.Namespace, until: float, sizes: Sizes) -> int:
    """Runs the stages in this process.

    Returns:
        The exit status.
    """
    device, clock, l2_bytes = _device(sizes)
    header = {
        "dry_run": sizes.dry_run,
        "machine": facts.machine(device),
        "commit": chosen.commit or facts.commit(),
        "minutes": chosen.minutes,
    }
    result = Result.begun(chosen.out, header, resume=chosen.resume)
    torch.manual_seed(0)

    def draw() -> None:
        result.data["notes"] = [note] if (note := summary.plot(result.data, chosen.out)) else []
        result.write()

    day = Day(result, until, healthy=clock.synchronize, say=_say, shown=summary.in_words, after_stage=draw)
    try:
        with torch.no_grad():
            stages = _stages(chosen, sizes, device, clock, l2_bytes, result)
            day.run([stage for stage in stages if stage.name in chosen.only])
    except Stopped as stopped:
        _say(f"stopped by {stopped}")
        result.data.pop("running", None)
        result.write()
        draw()
    _say(f"\n{summary.render(result.data)}")
    return 0 if summary.passed(result.data) else 1


def _stages(
    chosen: argparse.Namespace, sizes: Sizes, device: torch.device, clock: Clock, l2_bytes: int, result: Result
) -> list[Stage]:
    """All stages, most important first."""

    def measured() -> dict[str, object]:
        cases: dict[str, object] = result.stage(ceilings.NAME)["cases"]
        return cases

    first, rest = linear.stages(sizes, clock, device, l2_bytes, measured)
    return [
        checks.tests_stage(sizes, chosen.out, TESTS_SHARE * 60 * chosen.minutes),
        checks.gates_stage(sizes, device),
        ceilings.stage(sizes, clock, device),
        first,
        decode.stage(sizes, clock, device, measured),
        parts.outliers_stage(sizes, clock, device, l2_bytes),
        parts.launch_stage(sizes, clock, device),
        candidates.stage(sizes, clock, device, l2_bytes),
        peers.stage(sizes, clock, device, l2_bytes),
        rest,
    ]


def _device(sizes: Sizes) -> tuple[torch.device, Clock, int]:
    """The device, what times it, and the size of its cache."""
    if sizes.dry_run:
        return torch.device("cpu"), HostClock(), DRY_RUN_L2_BYTES
    if not torch.cuda.is_available():
        raise SystemExit("error: there is no CUDA GPU here; --dry-run goes through everything on the CPU")
    if not triton_kernels.load():
        raise SystemExit(f"error: there are no Triton kernels to measure: {triton_kernels.failure()}")
    # Its tables of what it tried would bury the results.
    torch._inductor.config.autotune_num_choices_displayed = 0
    return torch.device("cuda", 0), GraphClock(), int(torch.cuda.get_device_properties(0).L2_cache_size)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_day", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the results go")
    parser.add_argument("--minutes", type=float, default=10.0, metavar="N", help="no case begins later (default: 10)")
    parser.add_argument("--only", nargs="+", choices=STAGES, default=STAGES, metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--layers", type=int, default=32, metavar="N", help="of the decoder (default: 32)")
    parser.add_argument("--commit", metavar="ID", help="of the checkout, where it has no history to ask")
    parser.add_argument("--resume", action="store_true", help="go on with the results in --out")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)  # The process that measures is given it.
    return parser


def _say(text: str) -> None:
    if text:
        print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
