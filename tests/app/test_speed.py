"""`int8compile bench`: ratios of paired rounds, notes on what fails, and the ways to run a model."""

import contextlib
import importlib.util
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import torch

from int8compile import ConfigError, Int8Config, Int8Linear, ModelError, memory_footprint
from int8compile.app import cli, loading, speed, variants
from int8compile.app.variants import DECODE, FORWARD, PREFILL, VARIANTS, Job, Variant
from int8compile.tuning import candidates, peers
from tests.helpers.configs import SMALL

transformers = pytest.importorskip("transformers")

from int8compile.integrations.decoder import StaticCacheDecoder  # noqa: E402 - it imports transformers

WORKER = str(pathlib.Path(__file__).parents[1] / "helpers" / "speed_worker.py")
READY = {"cases": [PREFILL, "batch 1"], "kind": DECODE, "note": "", "load": 1.0, "compile": 8.0, "peak": 2**20}
READY |= {"weights": 2**19, "warnings": []}
CALLS = ["batch 1", "batch 2"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Save small random models, and return their folders."""
    torch.manual_seed(0)
    sizes = {**SMALL, "num_hidden_layers": 1, "vocab_size": 128}
    made = {
        "llama": transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_key_value_heads=2)),
        "mistral": transformers.MistralForCausalLM(
            transformers.MistralConfig(**sizes, num_key_value_heads=2, sliding_window=8)
        ),
        "bert": transformers.BertForSequenceClassification(transformers.BertConfig(**sizes)),
    }
    folder = tmp_path_factory.mktemp("models")
    for name, model in made.items():
        model.save_pretrained(folder / name)
    return folder


@pytest.fixture
def race(tmp_path, monkeypatch):
    """Return a function that measures variants whose processes only report what they are told to."""
    monkeypatch.setattr(speed, "PAUSE", 0)
    commands = {}

    def add(name, seconds=(), output=(1.0, 2.0, 4.0), **answer):
        file = tmp_path / f"{len(commands)}.pt"
        # The numbers of rows differ between cases.
        torch.save({PREFILL: torch.tensor([output]), "batch 1": torch.tensor([output, output])}, file)
        said = answer if "error" in answer else READY | answer
        commands[name] = [sys.executable, WORKER, json.dumps(said), str(file), json.dumps(list(seconds))]

    def run(rounds=2):
        return speed.measure("tiny", batches=[1], rounds=rounds, names=list(commands), commands=commands)

    return add, run


def test_ratios_are_those_of_the_paired_rounds(race):
    add, run = race
    # By round: prompt, step. The first round warms up. The machine is three times slower in the last one.
    add("float32", [9.0, 9.0, 1.0, 4.0, 1.0, 4.0, 3.0, 12.0])
    add("bfloat16", [9.0, 9.0, 1.5, 2.0, 1.5, 2.0, 4.5, 6.0])
    add("int8 bfloat16", [9.0, 9.0, 0.5, 1.0, 0.5, 0.5, 1.5, 3.0], compile=10.0, load=0.5)
    found = run(rounds=3)
    prompt, step = (found["cases"][case] for case in READY["cases"])
    assert (prompt["baseline"], step["baseline"]) == ("float32", "bfloat16")
    assert prompt["seconds"] == {"float32": 1.0, "bfloat16": 1.5, "int8 bfloat16": 0.5}
    assert prompt["ratios"]["int8 bfloat16"] == [2.0, 2.0, 2.0]
    assert step["ratios"]["int8 bfloat16"] == [2.0, 2.0, 4.0]
    assert (prompt["tokens"], step["tokens"]) == (128, 1)
    assert found["variants"]["int8 bfloat16"]["overhead"] == 1.25
    assert found["variants"]["int8 bfloat16"]["load"] == 0.5
    assert not [note for note in found["notes"] if "int8" in note]
    rows = {line.split("  ")[0]: line for line in speed.render(found).splitlines()[2:7]}
    # 1 s and 1.5 s for 128 tokens, 4 s and 2 s for one.
    assert "7.81 (baseline)" in rows["float32"]
    assert "4e+03 (0.50, 0.50 to 0.50)" in rows["float32"]
    assert "2e+03 (baseline)" in rows["bfloat16"]
    assert "1e+03 (2.00, 2.00 to 4.00)" in rows["int8 bfloat16"]
    text = speed.render(found)
    assert "1.25" in text
    assert "*" not in text


def test_a_result_is_plain_data(race, tmp_path):
    add, run = race
    add("float32", [1.0] * 6)
    found = run()
    keys = ["model", "kind", "batches", "prompt", "rounds", "others", "machine", "cases", "variants", "notes"]
    assert list(found) == keys
    assert json.loads(json.dumps(found)) == found
    costs = ["load", "compile", "overhead", "peak", "weights", "cosine", "kl"]
    assert list(found["variants"]["float32"]) == costs
    assert found["machine"]["threads"] == torch.get_num_threads()
    pytest.importorskip("matplotlib")
    speed.plot(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_a_variant_that_fails_or_dies_is_a_note(race):
    add, run = race
    add("float32", [1.0] * 6)
    add("int8 float32", error="RuntimeError: no compiler", model=False)
    add("int8 bfloat16", [1.0] * 3)
    add("torchao dynamic bfloat16", [1.0] * 6, warnings=["a warning"])
    found = run()
    torchao = peers.installed("torchao")
    assert list(found["variants"]) == ["float32", *(["torchao dynamic bfloat16"] if torchao else [])]
    notes = "\n".join(found["notes"])
    assert "int8 float32: RuntimeError: no compiler." in notes
    assert "int8 bfloat16: the process ended with status 0." in notes
    assert f"torchao dynamic bfloat16: {'a warning' if torchao else 'torchao is not installed.'}" in notes


@pytest.mark.parametrize(("dead", "left"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_ratios_to_the_only_float_variant_are_marked(race, dead, left):
    add, run = race
    add(left, [4.0] * 6)
    add(dead, [1.0] * 3)  # It ends in the middle of the rounds.
    add("int8 bfloat16", [2.0] * 6)
    found = run()
    assert dead not in found["variants"]
    assert [case["baseline"] for case in found["cases"].values()] == [left, left]
    text = speed.render(found)
    assert "2e+03 (2.00*, 2.00 to 2.00)" in text
    assert f"* {dead} was not measured, or is wrong, so the baseline is {left}; ratios" in text


@pytest.mark.parametrize(("turns", "others"), [(4, 6), (3, 3)])
def test_float_variants_that_end_in_the_middle_are_an_error(race, turns, others):
    add, run = race
    add("float32", [1.0] * 3)
    add("bfloat16", [1.0] * turns)
    add("int8 bfloat16", [1.0] * others)
    with pytest.raises(ModelError, match=r"no float variant of 'tiny' runs: float32: .* bfloat16: the process ended"):
        run()


def test_a_float_variant_with_wrong_output_is_no_baseline(race):
    add, run = race
    add("float32", [1.0] * 6, output=(math.nan, 2.0, 4.0))
    add("int8 float32", [1.0] * 6)
    with pytest.raises(ModelError, match="no float variant of 'tiny' has the right output: float32: its output is"):
        run()


def test_an_export_is_not_compared_with_the_compile_time_of_more_cases():
    facts = {"bfloat16": READY, "int8 bfloat16": READY, "int8 bfloat16, exported": READY}
    facts = {name: each | {"cosine": 1.0, "kl": None} for name, each in facts.items()}
    costs = {name: speed._costs(name, facts) for name in facts}
    assert {name: each["overhead"] for name, each in costs.items()} == {
        "bfloat16": 1.0,
        "int8 bfloat16": 1.0,
        "int8 bfloat16, exported": None,
    }
    assert costs["int8 bfloat16, exported"]["compile"] == READY["compile"]


STUBBORN = """
import os, pathlib, signal, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))
time.sleep(600)
"""
BENCH = """
import functools, signal, sys
from int8compile.app import cli, speed, workers
signal.signal(signal.SIGINT, signal.default_int_handler)  # Even if the tests run in the background.
workers.GRACE = 0.2
command = [sys.executable, "-c", {stubborn!r}, {file!r}]
speed.measure = functools.partial(speed.measure, commands={{"float32": command}})
sys.exit(cli.main(["bench", "tiny", "--variants", "float32"]))
"""


def test_an_interrupt_ends_the_processes(tmp_path):
    """Also one that does not listen, as a compiler in C++ does not."""
    file = tmp_path / "pid"
    code = BENCH.format(stubborn=STUBBORN, file=str(file))
    bench = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        while not file.exists() or not file.read_text():
            assert bench.poll() is None, bench.stderr.read()
            time.sleep(0.05)
        os.killpg(bench.pid, signal.SIGINT)
        printed = bench.communicate(timeout=60)[1]
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.read_text()), 0)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(bench.pid, signal.SIGKILL)
    assert bench.returncode == 130
    assert printed.splitlines()[-1] == "int8compile: interrupted"
    assert "Traceback" not in printed


def test_wrong_output_is_noticed_and_not_compared(race):
    add, run = race
    add("float32", [4.0] * 6)
    add("bfloat16", [2.0] * 6, output=(4.0, 2.0, -1.0))
    add("int8 float32", [1.0] * 6, output=(math.nan, 2.0, 4.0))
    add("int8 bfloat16", [1.0] * 6, output=(1.0, 2.0, 4.1))
    found = run()
    wrong = [note for note in found["notes"] if "wrong" in note]
    assert [note.partition(":")[0] for note in wrong] == ["bfloat16", "int8 float32"]
    step = found["cases"]["batch 1"]
    assert step["baseline"] == "float32"  # bfloat16 is faster, and wrong.
    assert step["ratios"] == {"float32": [1.0, 1.0, 1.0], "int8 bfloat16": [4.0, 4.0, 4.0]}
    assert "(wrong)" in speed.render(found)
    # Softmaxes of (1, 2, 4) and (1, 2, 4.1).
    one, other = (torch.tensor(row).double().log_softmax(0) for row in ([1.0, 2.0, 4.0], [1.0, 2.0, 4.1]))
    assert found["variants"]["int8 bfloat16"]["kl"] == pytest.approx(float((one.exp() * (one - other)).sum()), rel=0.01)


def test_without_a_float_variant_there_is_nothing_to_compare_with(race):
    add, run = race
    add("float32", error="no such file", model=True)
    with pytest.raises(ModelError, match="no such file"):
        run()
    add("float32", error="MemoryError: ", model=False)
    with pytest.raises(ModelError, match="no float variant of 'tiny' runs: float32: MemoryError"):
        run()


def test_a_variant_that_does_not_fit_into_the_memory_is_left_out(race, monkeypatch):
    add, run = race
    add("float32", [1.0] * 6, peak=8 * 2**30)
    add("bfloat16", [1.0] * 6)
    monkeypatch.setattr(speed.machine, "read_bytes", lambda file, key: 9 * 2**30)
    found = run()
    assert list(found["variants"]) == ["float32"]
    assert found["notes"][0].startswith("bfloat16: not measured, since 10.0 GiB may be needed")


def test_a_variant_may_need_as_much_memory_as_others_of_its_dtype(race, monkeypatch):
    add, run = race
    add("float32", [1.0] * 6, peak=8 * 2**30)
    free = iter([12, 12, 9, 4])
    monkeypatch.setattr(speed.machine, "read_bytes", lambda file, key: next(free) * 2**30)
    add("bfloat16", [1.0] * 6, peak=4 * 2**30)
    add("int8 bfloat16", [1.0] * 6, peak=4 * 2**30)
    add("llama.cpp Q8_0", [1.0] * 6)
    found = run()
    assert list(found["variants"]) == ["float32", "bfloat16", "int8 bfloat16"]
    assert found["notes"][0].startswith("llama.cpp Q8_0: not measured, since 5.0 GiB may be needed")


def test_load_by_other_processes_is_a_note():
    assert list(speed._busy(0.01)) == list(speed._busy(None)) == []
    assert "12%" in next(speed._busy(0.12))


def test_variants_are_selected_by_how_they_begin():
    assert speed.select() == list(VARIANTS)
    assert speed.select(["torchao w"]) == ["float32", "bfloat16", "torchao weight-only bfloat16"]
    assert speed.select(["int8"], "float32") == ["float32", "int8 float32"]
    with pytest.raises(ConfigError, match=r"'torchai'.*did you mean 'torchao"):
        speed.select(["torchai"])


def job(folder, tmp_path, variant, **fields):
    return Job(str(folder), variant, [1, 2], 8, "", str(tmp_path / "outputs.pt"))._replace(**fields)


@pytest.fixture
def eager(monkeypatch):
    """Have every variant run without a compiler."""
    monkeypatch.setattr(
        variants,
        "VARIANTS",
        {name: each._replace(compiler={"backend": "eager"}) for name, each in VARIANTS.items()}
        | {"int8": Variant("float32", {"backend": "eager"}, quantized="int8compile")},
    )


def test_a_language_model_generates_at_every_batch(saved, tmp_path, eager):
    ready = variants.prepare(job(saved / "llama", tmp_path, "float32"))
    assert (ready.kind, list(ready.calls)) == (DECODE, [PREFILL, *CALLS])
    with torch.no_grad():
        found = {name: call() for name, call in ready.calls.items()}
        again = {name: call() for name, call in ready.calls.items()}
    ids, tokens = variants.random_tokens(128, 2, 8)
    texts = torch.cat([ids.repeat(2, 1), tokens], 1)
    with torch.no_grad():
        expected = loading.load(str(saved / "llama"))(texts, use_cache=False).logits
    for outputs in (found, again):
        torch.testing.assert_close(outputs[PREFILL], expected[:1, -2])
        torch.testing.assert_close(outputs["batch 2"], expected[:, -1])
        torch.testing.assert_close(outputs["batch 1"], expected[:1, -1])
    assert ready.weights() == memory_footprint(loading.load(str(saved / "llama")))


# Other packages emit warnings.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("variant", ["int8", "bitsandbytes bfloat16"])
def test_quantized_models_take_less(saved, tmp_path, eager, variant):
    pytest.importorskip("bitsandbytes")
    ready = variants.prepare(job(saved / "llama", tmp_path, variant))
    plain = variants.prepare(job(saved / "llama", tmp_path, "bfloat16" if "bfloat16" in variant else "float32"))
    assert ready.weights() < plain.weights()
    with torch.no_grad():
        for name in ready.calls:
            assert speed.cosine(plain.calls[name](), ready.calls[name]()) > 0.99


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("variant", ["int8", "bitsandbytes bfloat16"])
def test_rows_of_other_libraries_may_depend_on_each_other(saved, tmp_path, eager, variant, monkeypatch):
    """bitsandbytes gives other results for two calls than for one; the cache is checked with the other models."""
    pytest.importorskip("bitsandbytes")

    def differs(self):
        raise ModelError("other results with a static cache")

    monkeypatch.setattr(StaticCacheDecoder, "_check", differs)
    ready = variants.prepare(job(saved / "llama", tmp_path, variant))
    assert ready.kind == (DECODE if "bitsandbytes" in variant else FORWARD)


def test_other_models_make_a_forward_pass(saved, tmp_path, eager):
    ready = variants.prepare(job(saved / "bert", tmp_path, "float32"))
    assert (ready.kind, list(ready.calls), ready.note) == (FORWARD, CALLS, "")
    with torch.no_grad():
        assert ready.calls["batch 2"]().shape == (2, 2)
    # A language model without a cache of fixed size, too, and it is said.
    ready = variants.prepare(job(saved / "mistral", tmp_path, "float32"))
    assert (ready.kind, list(ready.calls)) == (FORWARD, CALLS)
    assert "looks back 8 tokens" in ready.note


def test_a_model_that_is_int8_already_is_refused(saved, tmp_path, eager):
    loading.quantize(str(saved / "llama"), tmp_path / "int8", Int8Config())
    assert any(isinstance(each, Int8Linear) for each in loading.load(str(tmp_path / "int8")).modules())
    with pytest.raises(ModelError, match="quantized already"):
        variants.prepare(job(tmp_path / "int8", tmp_path, "float32"))


def test_an_error_is_an_answer(tmp_path, capsys):
    variants.serve(lambda: variants.prepare(job(tmp_path / "none", tmp_path, "float32")))
    said = json.loads(capsys.readouterr().out)
    assert said["model"]
    assert "does not exist" in said["error"]
    variants.serve(lambda: {}["key"])
    assert json.loads(capsys.readouterr().out) == {"error": "KeyError: 'key'", "model": False}


@pytest.mark.slow
def test_the_command_measures_a_model(saved, tmp_path, capsys):
    """In processes of their own, compiled by Inductor."""
    out = tmp_path / "speed.json"
    options = ["--batch", "1", "--prompt", "4", "--rounds", "2", "--variants", "int8 f", "--dtype", "float32"]
    assert cli.main(["bench", str(saved / "llama"), *options, "--out", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(out.read_text())
    assert list(found["variants"]) == ["float32", "int8 float32"]
    assert list(found["cases"]) == [PREFILL, "batch 1"]
    for costs in found["variants"].values():
        assert costs["cosine"] > 0.99
        assert costs["peak"] > costs["weights"] > 0
    assert found["variants"]["int8 float32"]["kl"] < 0.01


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "names"),
    [("llama", list(VARIANTS)), ("bert", ["float32", "int8 bfloat16", "int8 bfloat16, exported"])],
)
def test_every_variant_runs(saved, name, names):
    found = speed.measure(str(saved / name), batches=[1, 2], prompt=8, rounds=2, names=names)
    left_out = [each for each in names if each.startswith("torchao") and not peers.installed("torchao")]
    assert [each for each in names if each not in found["variants"]] == left_out, found["notes"]
    assert all(each["cosine"] > 0.98 for each in found["variants"].values())


def test_the_command_line_has_the_same_defaults():
    assert (cli.BATCHES, cli.PROMPT, cli.ROUNDS) == (speed.BATCHES, speed.PROMPT, speed.ROUNDS)
    assert cli.CANDIDATES == candidates.STANDARD


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch", "0"], "'0' is not a whole number of at least 1"),
        (["--variants", "int9"], "no variant begins with 'int9' (did you mean 'int8'?)"),
        (["--out", "nowhere/speed.json"], "'nowhere/speed.json' cannot be written: its folder does not exist"),
        (["--out", "."], "'.' cannot be written: it is a folder"),
        (["--plot", "."], "'.' cannot be written: it is a folder"),
        (["--rouns", "3"], "did you mean '--rounds'"),
    ],
)
def test_a_mistake_is_one_line(saved, capsys, options, message):
    assert cli.main(["bench", str(saved / "llama"), *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_a_model_that_does_not_exist_is_one_line(capsys, tmp_path):
    assert cli.main(["bench", str(tmp_path / "none")]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "does not exist" in captured.err


def test_files_are_checked_before_and_named_after_the_measurement(race, monkeypatch, capsys, tmp_path):
    add, run = race
    add("float32", [2.0] * 6)
    found = run()
    monkeypatch.setattr(speed, "measure", lambda *args, **options: found)
    monkeypatch.setattr(pathlib.Path, "write_text", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
    assert cli.main(["bench", "tiny", "--out", str(tmp_path / "out.json")]) == 2
    assert f"{str(tmp_path / 'out.json')!r} cannot be written: disk full" in capsys.readouterr().err
    monkeypatch.setattr(speed, "measure", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.main(["bench", "tiny", "--plot", str(tmp_path / "plot.png")]) == 2
    assert "matplotlib is not installed" in capsys.readouterr().err
