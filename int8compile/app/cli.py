"""The command `int8compile`: one function adds the arguments of a subcommand, another runs it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_args

from int8compile.config import Int8Config, LmHead, OutlierPolicy, read_options
from int8compile.errors import Int8CompileError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from int8compile.tuning.calibration import Calibration
    from int8compile.tuning.candidates import Candidate

# The exit code of argparse.
USAGE_ERROR = 2
NO_KERNEL = 1
# The same as in int8compile.app.loading, which takes long to import.
SMOLLM2 = "smollm2"
DTYPES = ("float32", "bfloat16", "float16")
# The same as in int8compile.exporting.exporter.
ISAS = ("native", "avx512", "avx2")
FORMS = ("fast", "portable")
# The same as in int8compile.app.speed, and int8compile.tuning.candidates.
BATCHES, PROMPT, ROUNDS = (1, 8, 32), 128, 9
CANDIDATES = ("bfloat16", "default", "calibrated", "column", "no outliers", "bitsandbytes", "torchao")
# Stands for no file: random tokens.
RANDOM = Path()


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments, `sys.argv[1:]` if None.

    Returns:
        The exit code: 0; 2 after one line on stderr where an argument cannot be used; 1 where `doctor` finds that the
        CPU kernel does not work.
    """
    parser = _parser()
    try:
        args, unknown = parser.parse_known_args(argv)
        if unknown:
            args.parser.refuse(unknown[0])
        return int(args.run(args))
    except Int8CompileError as error:
        print(f"int8compile: error: {error}", file=sys.stderr)
        return USAGE_ERROR
    except SystemExit as end:  # argparse, after --help or an error.
        return int(end.code or 0)
    except KeyboardInterrupt:
        print("int8compile: interrupted", file=sys.stderr)
        return 130  # 128 + SIGINT, as shells do.


class _Parser(argparse.ArgumentParser):
    """Reports an error in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE_ERROR, f"{self.prog}: error: {message}; see {self.prog} --help\n")

    def refuse(self, argument: str) -> NoReturn:
        """Report an unknown argument, with the nearest option."""
        options = [option for action in self._actions for option in action.option_strings]
        self.error(f"unknown argument {argument!r}{did_you_mean(argument.split('=')[0], options, ', {}')}")


def _parser() -> _Parser:
    parser = _Parser(prog="int8compile", description='torch.compile(model, backend="int8") from the command line.')
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (about, add, run) in {
        "demo": ("compile a small language model to int8: what was rewritten, how fast, how exact", _add_demo, _demo),
        "explain": ("list every linear of a model: int8 or float, and why", _add_explain, _explain),
        "eval": ("compare a model in int8 and other formats with float32: KL, perplexity, layers", _add_eval, _eval),
        "bench": ("measure a model in float and in int8: time, compile time, memory", _add_bench, _bench),
        "advise": ("find the cheapest config that keeps a stated divergence from float", _add_advise, _advise),
        "quantize": ("write a model in int8 to a folder that transformers can load", _add_quantize, _quantize),
        "export": ("compile a model to a file that runs without int8compile, from Python or C++", _add_export, _export),
        "inspect": ("show what is in an exported file and where it runs, and check it", _add_inspect, _inspect),
        "doctor": ("show this machine, and whether the CPU kernel works (compiles it if need be)", _add_json, _doctor),
    }.items():
        command = commands.add_parser(name, help=about, description=about, allow_abbrev=False)
        add(command)
        command.set_defaults(parser=command, run=run)
    return parser


def _add_demo(demo: _Parser) -> None:
    demo.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        default=SMOLLM2,
        help="a folder or hub name of a Llama-like language model, in float or in int8 (default %(default)s)",
    )
    _add_count(demo, "tokens", 32, "tokens to generate")
    demo.add_argument("--prompt", metavar="TEXT", help="what to ask the model instead of the built-in question")
    demo.add_argument("--no-eval", action="store_true", help="skip the accuracy part")


def _add_explain(explain: _Parser) -> None:
    _add_model(explain)
    _add_options(explain)
    inputs = explain.add_argument_group("the model and the inputs it is run on")
    _add_count(inputs, "batch", 1, "rows")
    _add_count(inputs, "sequence", 8, "tokens")
    _add_dtype(inputs, "dtype of the weights")
    _add_json(explain)


def _add_eval(evaluate: _Parser) -> None:
    _add_model(evaluate)
    evaluate.add_argument("--text", metavar="FILE", type=Path, help="a text to compare on (default: Python's manual)")
    _add_count(evaluate, "tokens", 2048, "the most tokens of the text")
    evaluate.add_argument(
        "--config",
        dest="configs",
        action="append",
        metavar="NAME",
        help=f"what to compare with float32: {', '.join(CANDIDATES)}, or a FILE.json as `int8compile advise --out` "
        "writes it; may be given several times (default: all names)",
    )
    evaluate.add_argument("--out", metavar="FILE", type=_file, help="write all figures to a JSON file")
    evaluate.add_argument("--plot", metavar="FILE", type=_file, help="draw errors and outliers by layer, as a PNG")
    _add_json(evaluate)


def _add_bench(bench: _Parser) -> None:
    _add_model(bench)
    bench.add_argument(
        "--batch",
        type=_count,
        nargs="+",
        default=BATCHES,
        metavar="N",
        help=f"texts, or other inputs, at a time (default {' '.join(map(str, BATCHES))})",
    )
    _add_count(bench, "prompt", PROMPT, "tokens of a text")
    _add_count(bench, "rounds", ROUNDS, "turns of each variant; fewer than six give no interval of 95 %%")
    bench.add_argument(
        "--variants",
        nargs="+",
        default=[],
        metavar="NAME",
        help="variants that begin so, e.g. 'int8 bfloat16' torchao, beside float32 and bfloat16 (default: all)",
    )
    bench.add_argument("--dtype", choices=DTYPES[:2], help="only variants whose float parts have this dtype")
    bench.add_argument("--out", metavar="FILE", type=_file, help="also write the result to FILE as JSON")
    bench.add_argument("--plot", metavar="FILE", type=_file, help="also draw the result to FILE, e.g. speed.png")
    _add_json(bench)


def _add_advise(advise: _Parser) -> None:
    _add_model(advise)
    goal = advise.add_argument_group("the goal and how it is measured")
    bounds = goal.add_mutually_exclusive_group(required=True)
    bounds.add_argument("--kl", type=float, metavar="NATS", help="the largest mean KL divergence from float, in nats")
    bounds.add_argument(
        "--error", type=float, metavar="E", help="the largest relative error, for models without logits"
    )
    goal.add_argument(
        "--text", metavar="FILE", type=Path, help="a text for the model to read (default: text that comes with Python)"
    )
    _add_count(goal, "tokens", 2048, "the most tokens of the text")
    _add_count(goal, "rows", 1, "rows at a time, such as texts generated at once, for which times are estimated")
    advise.add_argument(
        "--out", metavar="FILE", type=_file, help="a JSON file for the config, which --config of other commands takes"
    )
    _add_options(advise)
    _add_dtype(advise, "dtype of the float model")
    _add_json(advise)


def _add_quantize(quantize: _Parser) -> None:
    _add_model(quantize)
    quantize.add_argument("out", metavar="OUT", type=Path, help="the folder; it must not exist, or be empty")
    _add_options(quantize)
    _add_dtype(quantize, "dtype of the weights that stay in float")
    quantize.add_argument(
        "--calibrate",
        metavar="FILE",
        nargs="?",
        type=Path,
        const=RANDOM,
        help="run the float model first, on random tokens or on a text FILE, to calibrate the int8 model: about half "
        "the divergence from float",
    )


def _add_export(export: _Parser) -> None:
    _add_model(export)
    export.add_argument("out", metavar="OUT", type=Path, help="the file, which must end in .pt2")
    _add_options(export)
    target = export.add_argument_group("the target")
    _add_count(
        target, "context", 1024, "for a language model, the tokens that its cache holds; each step reads all of it"
    )
    _add_count(target, "batch", 1, "for a language model, texts at a time")
    _add_dtype(target, "dtype of the weights that stay in float")
    target.add_argument(
        "--isa",
        choices=ISAS,
        default=ISAS[0],
        help="the CPUs it runs on: those with all features of this one, or with the named one",
    )
    target.add_argument("--device", default="cpu", help="where it runs, e.g. cuda (default %(default)s)")
    target.add_argument(
        "--form",
        choices=FORMS,
        help="with the kernels of int8compile (default where a file can hold them) or with operators of PyTorch",
    )
    export.add_argument(
        "--allow-partial", action="store_true", help="export even if linears stay in float that no option excludes"
    )


def _add_inspect(inspect: _Parser) -> None:
    inspect.add_argument("file", metavar="FILE", type=Path, help="a .pt2 file made by `int8compile export`")
    _add_json(inspect)


def _add_model(command: _Parser) -> None:
    command.add_argument(
        "model",
        metavar="MODEL",
        help=f"a folder or hub name that transformers can load, a .gguf file, or {SMOLLM2!r}, the model of the demo",
    )


def _add_json(command: _Parser) -> None:
    command.add_argument("--json", action="store_true", help="print the same as JSON, and nothing else, on stdout")


def _add_count(group: argparse._ActionsContainer, name: str, default: int, about: str) -> None:
    group.add_argument(f"--{name}", type=_count, default=default, metavar="N", help=f"{about} (default %(default)s)")


def _add_dtype(group: argparse._ActionsContainer, about: str) -> None:
    group.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help=f"{about} (default %(default)s)")


def _add_options(command: _Parser) -> None:
    """Add the options of `Int8Config`, under the names of its fields; those that are not given are not set."""
    default = Int8Config()
    options = command.add_argument_group("what becomes int8, and how", argument_default=argparse.SUPPRESS)
    options.add_argument(
        "--config",
        metavar="FILE",
        type=Path,
        default=None,
        help="a JSON file with fields of Int8Config, as `int8compile advise --out` writes it; other options given here "
        "replace its fields",
    )
    options.add_argument(
        "--threshold",
        type=float,
        metavar="T",
        help="what counts as an outlier: about T times the mean magnitude of its row (default 12, or 6 where it is not "
        "rotated), or T itself for --outliers column (default 6); 0 turns outliers off",
    )
    options.add_argument(
        "--outliers",
        choices=get_args(OutlierPolicy),
        help="elements that take a second digit, or whole columns in float as LLM.int8() does "
        f"(default {default.outliers})",
    )
    options.add_argument(
        "--no-rotate",
        dest="rotate",
        action="store_false",
        help="do not rotate activations: nearer to float where most elements of a row are 0, or equal",
    )
    options.add_argument(
        "--skip",
        dest="skip_modules",
        action="append",
        metavar="PATTERN",
        help="leave modules with this path in float, e.g. 'mlp' or 'layers.0'; may be given several times",
    )
    options.add_argument(
        "--lm-head",
        choices=get_args(LmHead),
        help=f"what to do with the output projection (default {default.lm_head}: float)",
    )
    options.add_argument(
        "--min-features",
        type=_count,
        metavar="N",
        help=f"leave weights with fewer inputs or outputs in float (default {default.min_features})",
    )


def _config(args: argparse.Namespace) -> tuple[Int8Config, Calibration | None]:
    """Return the config that a command was given, and the calibration that its file names."""
    names = [field.name for field in dataclasses.fields(Int8Config)]
    return _read_config(args.config, **{name: getattr(args, name) for name in names if hasattr(args, name)})


def _read_config(file: Path | None, **options: Any) -> tuple[Int8Config, Calibration | None]:
    """Return the config of a JSON file, with some options replaced, and the calibration that the file names."""
    read = {} if file is None else read_options(file)
    beside = read.pop("calibration", None)
    config = Int8Config.from_options(read | options)
    if file is None or beside is None:
        return config, None
    from int8compile.tuning.calibration import Calibration, check_rotates

    check_rotates(config)
    return config, Calibration.load(file.expanduser().parent / str(beside))


def _candidate(name: str) -> str | Candidate:
    """Return the candidate that `eval --config` names; a name is left as it is."""
    if not name.endswith(".json"):
        return name
    from int8compile.tuning.candidates import Candidate, quantized

    config, calibration = _read_config(Path(name))

    def make(model: nn.Module, batches: Sequence[Any]) -> Any:
        if calibration is not None:
            calibration.apply(model)
        return quantized(config).make(model, batches)

    return Candidate(make, config=config)


def _file(text: str) -> Path:
    """Return the path of a file to write, whose folder must exist: this is checked before what takes long."""
    path = Path(text).expanduser()
    if not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written: its folder does not exist")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written: it is a folder")
    return path


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _demo(args: argparse.Namespace) -> int:
    from int8compile.app import demo

    demo.run(print, args.model, tokens=args.tokens, prompt=args.prompt, accuracy=not args.no_eval)
    return 0


def _explain(args: argparse.Namespace) -> int:
    # Before the model is loaded, which takes long: a wrong option is reported at once.
    config, calibration = _config(args)
    import torch

    from int8compile import explain
    from int8compile.app import loading

    model = loading.load(args.model, getattr(torch, args.dtype))
    inputs = loading.example_inputs(model, args.batch, args.sequence)
    loading.check_runs(model, inputs)
    if calibration is not None:
        calibration.apply(model)
    report = explain(model, config=config, **inputs)
    print(json.dumps(report.to_dict(), indent=2) if args.json else report)
    return 0


def _eval(args: argparse.Namespace) -> int:
    from int8compile import evaluate
    from int8compile.app import loading
    from int8compile.tuning import candidates, pictures

    configs = args.configs and {name: _candidate(name) for name in args.configs}
    candidates.chosen(configs)
    if args.plot:
        pictures.check_installed()
    text = None if args.text is None else loading.read_text(args.text)
    model = loading.load(args.model)
    batches, what = loading.evaluation_batches(args.model, model, text, args.tokens)
    found = evaluate(model, batches, configs)
    # The files first: the output may be closed early.
    if args.out:
        found.save(args.out)
    if args.plot:
        found.plot(args.plot)
    print(json.dumps({"inputs": what, **found.to_dict()}, indent=2) if args.json else f"On {what}:\n\n{found}")
    return 0


def _bench(args: argparse.Namespace) -> int:
    from int8compile.app import speed
    from int8compile.tuning import pictures
    from int8compile.tuning.evaluation import writing

    if args.plot:
        pictures.check_installed()
    names = speed.select(args.variants, args.dtype)
    found = speed.measure(args.model, batches=args.batch, prompt=args.prompt, rounds=args.rounds, names=names)
    text = json.dumps(found, indent=2)
    if args.out:
        with writing(args.out):
            args.out.write_text(f"{text}\n")
    if args.plot:
        with writing(args.plot):
            speed.plot(found, args.plot)
    print(text if args.json else speed.render(found))
    return 0


def _advise(args: argparse.Namespace) -> int:
    config, calibration = _config(args)
    import torch

    from int8compile import advise
    from int8compile.app import loading
    from int8compile.tuning.advice import CALIBRATED_BEFORE, checked_goal

    # What can be refused before the model is loaded, which takes long.
    checked_goal(args.kl, args.error)
    text = None if args.text is None else loading.read_text(args.text)
    model = loading.load(args.model, getattr(torch, args.dtype))
    batches, what = loading.evaluation_batches(args.model, model, text, args.tokens)
    if calibration is not None:
        calibration.apply(model)
    found = advise(model, batches, kl=args.kl, error=args.error, config=config, rows=args.rows)
    if found.calibration is None and calibration is not None:  # It belongs to the config as given.
        notes = tuple(note for note in found.notes if note != CALIBRATED_BEFORE)
        found = dataclasses.replace(found, calibration=calibration, notes=notes)
    if args.out is not None:
        found.save(args.out)
    print(json.dumps({"inputs": what, **found.to_dict()}, indent=2) if args.json else f"On {what}:\n\n{found}")
    if args.out is not None and not args.json and found.chosen.skipped < found.in_float.skipped:
        print(f"\nWritten to {args.out}: int8compile quantize {args.model} FOLDER --config {args.out}")
    return 0


def _quantize(args: argparse.Namespace) -> int:
    config, calibration = _config(args)
    import torch

    from int8compile.app import loading
    from int8compile.app.demo import describe
    from int8compile.tuning.calibration import check_rotates

    loading.new_folder(args.out)
    if args.calibrate is not None:
        check_rotates(config)
        text = None if args.calibrate is RANDOM else args.calibrate
        calibration = loading.calibrated(args.model, text, getattr(torch, args.dtype))
        print(f"{calibration.summary()}\n")
    report = loading.quantize(args.model, args.out, config, getattr(torch, args.dtype), calibration)
    print(describe(report))
    # Others are those of the model's authors.
    for pattern in (each for each in report.unused_patterns if each in config.patterns):
        print(f"\nThe pattern {pattern!r} matched nothing.")
    for note in report.notes:
        print(f"\n{note}")
    print(f"\nWritten to {args.out}. from_pretrained of transformers loads it wherever int8compile is installed.")
    return 0


def _export(args: argparse.Namespace) -> int:
    config, calibration = _config(args)
    import torch

    from int8compile import export
    from int8compile.app import loading
    from int8compile.app.demo import describe
    from int8compile.exporting import package

    package.check_name(args.out)
    model = loading.load(args.model, getattr(torch, args.dtype)).to(args.device)
    if calibration is not None:
        calibration.apply(model)
    made = loading.exportable(model, args.context, args.batch)
    report = export(
        made.model,
        made.args,
        args.out,
        dynamic_shapes=made.dynamic_shapes,
        config=config,
        allow_partial=args.allow_partial,
        isa=args.isa,
        form=args.form,
    )
    print(describe(report))
    for note in report.notes:
        print(f"\n{note}")
    size = args.out.stat().st_size / 2**20
    print(f"\nWritten to {args.out}, {size:.1f} MiB. int8compile.load_exported() checks and loads it.")
    print("torch._inductor.aoti_load_package() loads it where int8compile is not installed.")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from int8compile import inspect

    found = inspect(args.file)
    print(json.dumps(found.to_dict(), indent=2) if args.json else found)
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from int8compile.app import doctor

    found = doctor.examine()
    print(json.dumps(found, indent=2) if args.json else doctor.render(found))
    return NO_KERNEL if found["kernel"]["problem"] else 0
