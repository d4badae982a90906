"""The command line: its output; a mistake gives one clear line and exit code 2."""

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import int8compile
from int8compile import Int8Config, ModelError
from int8compile.app import cli, demo, loading
from tests.helpers.configs import SMALL
from tests.helpers.letters import Letters

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Save small random models, and return their folders."""
    made = {
        "llama": transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**SMALL, num_key_value_heads=2, vocab_size=128)
        ),
        "bert": transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL, vocab_size=128)),
        "vit": transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL, image_size=32, patch_size=8)),
        "t5": transformers.T5ForConditionalGeneration(
            transformers.T5Config(d_model=64, d_kv=16, d_ff=96, num_layers=1, num_heads=4, vocab_size=128)
        ),
        "whisper": transformers.WhisperForConditionalGeneration(
            transformers.WhisperConfig(
                d_model=64,
                encoder_layers=1,
                decoder_layers=1,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=96,
                decoder_ffn_dim=96,
                max_source_positions=20,
                num_mel_bins=16,
                vocab_size=128,
                pad_token_id=0,
            )
        ),
        "clip": transformers.CLIPModel(
            transformers.CLIPConfig(
                text_config={**SMALL, "vocab_size": 128, "eos_token_id": 2},
                vision_config={**SMALL, "image_size": 32, "patch_size": 8},
            )
        ),
    }
    folder = tmp_path_factory.mktemp("models")
    for name, model in made.items():
        model.save_pretrained(folder / name)
    return folder


def run(capsys, *argv):
    """Return the exit code, stdout and stderr of a command."""
    capsys.readouterr()
    code = cli.main([str(arg) for arg in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def explained(capsys, *argv):
    code, out, _ = run(capsys, "explain", *argv, "--json")
    assert code == 0
    return json.loads(out)


def refused(capsys, *argv):
    """Return the line on stderr of a command that is refused."""
    code, out, err = run(capsys, *argv)
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1
    return err


def test_explain_prints_the_report(capsys, saved):
    code, out, _ = run(capsys, "explain", saved / "llama")
    assert code == 0
    assert "model.layers.1.mlp.down_proj" in out
    assert "14 of 15 linears in int8" in out


@pytest.mark.parametrize(
    ("name", "rewritten", "skipped"),
    [
        ("llama", 14, {"lm_head": 1}),
        ("bert", 13, {"small": 1}),
        ("vit", 12, {"small": 1}),
        # Encoder 4 + 2, decoder 8 + 2.
        ("t5", 16, {"tied": 1}),
        ("whisper", 16, {"tied": 1}),
        ("clip", 26, {}),
    ],
)
def test_explain_reaches_every_linear(capsys, saved, name, rewritten, skipped):
    report = explained(capsys, saved / name)
    totals = report["totals"]
    assert len(report["sites"]) == totals["sites"]
    assert (totals["rewritten"], totals["reasons"], totals["graphs"]) == (rewritten, skipped, 1)


def test_options_reach_the_config(capsys, saved):
    report = explained(capsys, saved / "llama", "--skip", "mlp", "--skip", "nothing", "--lm-head", "int8")
    assert report["totals"]["reasons"] == {"name": 6}
    assert report["unused_patterns"] == ["nothing"]
    report = explained(capsys, saved / "llama", "--min-features", 65)
    assert report["totals"]["rewritten"] == 0


@pytest.mark.parametrize(
    ("argv", "field", "value"),
    [
        ([], "threshold", Int8Config().threshold),
        (["--threshold", "4.5"], "threshold", 4.5),
        (["--outliers", "column"], "outliers", "column"),
        ([], "rotate", True),
        (["--no-rotate"], "rotate", False),
        (["--lm-head", "int8"], "lm_head", "int8"),
        (["--min-features", "32"], "min_features", 32),
        (["--skip", "a", "--skip=b"], "skip_modules", ("a", "b")),
    ],
)
def test_every_option_of_the_backend(monkeypatch, capsys, saved, argv, field, value):
    configs = []
    monkeypatch.setattr("int8compile.explain", lambda model, config, **inputs: configs.append(config))
    run(capsys, "explain", saved / "llama", *argv)
    assert getattr(configs[0], field) == value


def test_a_file_of_options(monkeypatch, capsys, saved, tmp_path):
    file, configs = tmp_path / "config.json", []
    file.write_text(json.dumps({"threshold": 5, "skip_modules": ["a"], "modules": {"mlp": {"rotate": False}}}))
    monkeypatch.setattr("int8compile.explain", lambda model, config, **inputs: configs.append(config))
    run(capsys, "explain", saved / "llama", "--config", file)
    run(capsys, "explain", saved / "llama", "--config", file, "--skip", "b", "--threshold", 7)
    modules = {"mlp": {"rotate": False}}
    assert configs[0] == Int8Config(threshold=5, skip_modules=("a",), modules=modules)
    assert configs[1] == Int8Config(threshold=7, skip_modules=("b",), modules=modules), "single options win"
    for text, message in (
        ('{"treshold": 3}', "did you mean 'threshold'"),
        ("[]", "holds []; give options"),
        ('{"calibration": "none"}', "cannot be read as a calibration"),
        ('{"calibration": "none", "rotate": false}', "no effect with rotate=False"),
    ):
        file.write_text(text)
        assert message in refused(capsys, "explain", "smollm2", "--config", file)
    assert "cannot be read as JSON" in refused(capsys, "explain", "smollm2", "--config", tmp_path / "none.json")


def test_advise_writes_what_config_takes(monkeypatch, capsys, saved, tmp_path):
    monkeypatch.setattr(loading, "load_processor", lambda name: Letters())
    out, name = tmp_path / "config.json", str(saved / "llama")
    argv = ("advise", name, "--tokens", 512, "--skip", "o_proj", "--out", out)
    code, text, _ = run(capsys, *argv, "--kl", 1)
    assert code == 0
    assert text.startswith("On 512 tokens of the chapters objects, execmodel, import of the language reference")
    assert "as given: KL" in text
    assert f"int8compile quantize {name} FOLDER --config {out}" in text
    assert json.loads(out.read_text()) == {"skip_modules": ["o_proj"]}
    # Nothing to quantize where only float is near enough.
    code, text, _ = run(capsys, "advise", name, "--tokens", 64, "--min-features", 1000, "--kl", 1, "--out", out)
    assert code == 0
    assert "The model has no linear that quantize_ converts under this config." in text
    assert "int8compile quantize" not in text
    # The calibration beside the file is used.
    calibration = int8compile.calibrate(loading.load(name))
    calibration.save(tmp_path / "config.calibration.safetensors")
    out.write_text(json.dumps({"calibration": "config.calibration.safetensors"}))
    assert run(capsys, "quantize", name, tmp_path / "int8", "--config", out)[0] == 0
    d = {weight.name: group.d for group in calibration.groups for weight in group.weights}
    up = loading.load(str(tmp_path / "int8")).model.layers[0].mlp.up_proj
    assert torch.equal(up.d, d["model.layers.0.mlp.up_proj.weight"])
    sites = explained(capsys, name, "--config", out)["sites"]
    assert {site["calibrated"] for site in sites if site["rewritten"]} == {True}
    # `eval` measures the calibrated model, under the name of the file.
    argv = ("--tokens", 64, "--config", out, "--config", "default", "--json")
    _, found, _ = run(capsys, "eval", name, *argv)
    results = json.loads(found)["results"]
    assert list(results) == ["float32", str(out), "default"]
    model = loading.load(name)
    calibration.apply(model)
    int8compile.quantize_(model, progress=False)
    batches, _ = loading.evaluation_batches(name, model, None, 64)
    expected = int8compile.evaluate(loading.load(name), batches, {"int8": model}, progress=False).results["int8"]
    assert results[str(out)]["kl"] == expected.kl != results["default"]["kl"]
    argv = ("advise", name, "--out")
    assert "kl=0.0: give a finite number > 0" in refused(capsys, *argv, out, "--kl", 0)
    assert "cannot be written: it is a folder" in refused(capsys, *argv, tmp_path, "--kl", 1)
    # As a shell does not expand it in `--out=~/config.json`.
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run(capsys, *argv, "~/home.json", "--kl", 1, "--tokens", 64)[0] == 0
    assert (tmp_path / "home.json").is_file()


def test_sizes_of_the_inputs_and_dtype(capsys, saved):
    report = explained(capsys, saved / "llama", "--batch", 2, "--sequence", 5, "--dtype", "bfloat16")
    assert {site["shape"][0] for site in report["sites"]} == {"10"}
    wide = explained(capsys, saved / "llama")["totals"]["bytes_before"]
    assert report["totals"]["bytes_before"] * 2 == wide


def test_missing_models_are_named(capsys, saved, tmp_path):
    for name in (tmp_path / "nowhere", "./nowhere", tmp_path / "nowhere.gguf"):
        line = refused(capsys, "explain", name)
        assert f"{str(name)!r} does not exist; give a folder with a config.json" in line
    line = refused(capsys, "explain", tmp_path)
    assert "is a folder without a config.json" in line


def test_what_transformers_cannot_load_is_named(capsys, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert "could not be loaded" in refused(capsys, "explain", tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    assert "no_such_model" in refused(capsys, "explain", tmp_path)
    (tmp_path / "broken.gguf").write_bytes(b"not a model")
    assert "could not be loaded" in refused(capsys, "explain", tmp_path / "broken.gguf")


def test_a_name_that_the_hub_does_not_give_is_named(monkeypatch, capsys):
    def offline(name):
        raise OSError(f"{name} is not a local folder and is not a valid model identifier.\nMore lines.")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", offline)
    line = refused(capsys, "explain", "nobody/nothing")
    assert "'nobody/nothing' could not be loaded" in line
    assert "More lines" not in line


def test_missing_packages_are_named(monkeypatch, capsys, saved):
    find_spec = loading.importlib.util.find_spec
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: find_spec(name) if name == "torch" else None)
    line = refused(capsys, "explain", saved / "llama")
    assert 'transformers is not installed; run `pip install "int8compile[transformers]"`' in line
    assert "`make demo`" in refused(capsys, "demo")
    assert "`make demo`" in refused(capsys, "explain", "smollm2")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--threshold", "-1"], "threshold=-1.0: give a finite number >= 0"),
        (["--threshold", "0.5"], "threshold=0.5: it counts in mean magnitudes of a row"),
        (["--threshold", "six"], "argument --threshold: invalid float value: 'six'"),
        (["--outliers", "rows"], "argument --outliers: invalid choice: 'rows'"),
        (["--batch", "0"], "argument --batch: '0' is not a whole number of at least 1"),
        (["--treshold", "3"], "unknown argument '--treshold', did you mean '--threshold'?"),
        (["--skip", ""], "skip_modules holds ''"),
        (["second"], "unknown argument 'second'"),
    ],
)
def test_wrong_options_are_refused_before_the_model_is_loaded(monkeypatch, capsys, argv, message):
    monkeypatch.setattr(loading, "load", None)
    assert message in refused(capsys, "explain", "smollm2", *argv)


@pytest.mark.parametrize("argv", [[], ["compress"], ["demo", "--tokens", "none"]])
def test_wrong_commands_are_refused(capsys, argv):
    assert "--help" in refused(capsys, *argv)


def test_inputs_that_cannot_be_made_up(saved):
    model = transformers.LlamaForCausalLM.from_pretrained(saved / "llama")
    model.main_input_name = "smells"
    with pytest.raises(ModelError, match="takes 'smells'"):
        loading.example_inputs(model)


def test_a_model_that_does_not_run_on_its_inputs(saved):
    model = transformers.LlamaForCausalLM.from_pretrained(saved / "llama")
    with pytest.raises(ModelError, match=r"does not run on made-up inputs \{'input_ids': \[1, 3\]\}: IndexError"):
        loading.check_runs(model, {"input_ids": torch.full((1, 3), 1000)})


def test_demo_passes_its_options(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(demo, "run", lambda write, name, **options: calls.append({"name": name, **options}))
    assert run(capsys, "demo", "folder", "--tokens", 5, "--prompt", "Why?", "--no-eval")[0] == 0
    assert run(capsys, "demo")[0] == 0
    assert calls == [
        {"name": "folder", "tokens": 5, "prompt": "Why?", "accuracy": False},
        {"name": "smollm2", "tokens": 32, "prompt": None, "accuracy": True},
    ]


def test_help_of_every_command(capsys):
    for argv in (["--help"], ["demo", "--help"], ["explain", "--help"], ["quantize", "--help"]):
        code, out, _ = run(capsys, *argv)
        assert code == 0
        assert out.startswith("usage: int8compile")


def test_python_dash_m():
    done = subprocess.run([sys.executable, "-m", "int8compile", "--help"], capture_output=True, text=True, check=True)
    assert "explain" in done.stdout


def test_the_exit_code_reaches_the_shell(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["int8compile", "explain"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(Path(int8compile.__file__).with_name("__main__.py")), run_name="__main__")
    assert end.value.code == 2


def test_quantize_writes_a_folder_that_loads(capsys, saved, tmp_path):
    out = tmp_path / "new" / "int8"
    code, text, _ = run(capsys, "quantize", saved / "llama", out, "--skip", "o_proj", "--threshold", 5)
    assert code == 0
    assert "12 of 15 linears in int8" in text
    assert "o_proj stays in float: its module path matches skip_modules (pattern 'o_proj')" in text
    assert f"Written to {out}" in text
    assert sorted(file.name for file in out.iterdir()) == ["config.json", "generation_config.json", "model.safetensors"]
    assert [file.name for file in out.parent.iterdir()] == ["int8"]
    model = loading.load(str(out))
    assert model.model.layers[0].mlp.up_proj.threshold == 5.0
    expected = loading.load(str(saved / "llama"), config=Int8Config(threshold=5.0, skip_modules=("o_proj",)))
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected(ids).logits)
    # `explain` works on the result.
    sites = explained(capsys, out, "--skip", "o_proj")["sites"]
    kept = [site["path"].rpartition(".")[2] for site in sites if not site["rewritten"]]
    assert kept == ["o_proj", "o_proj", "lm_head"]


@pytest.mark.parametrize("text", [False, True])
def test_quantize_calibrates(monkeypatch, capsys, saved, tmp_path, text):
    file = tmp_path / "text.txt"
    file.write_text("Any text. " * 100)
    if text:
        monkeypatch.setattr(loading, "load_processor", lambda name: Letters())
    argv = ["--calibrate", file] if text else ["--calibrate"]
    code, out, _ = run(capsys, "quantize", saved / "llama", tmp_path / "int8", *argv)
    assert code == 0
    # The head is calibrated too, but stays in float.
    assert "15 linears calibrated, in 9 groups" in out
    assert "14 of 15 linears in int8" in out
    model = loading.load(str(saved / "llama"))
    ids = Letters()(file.read_text()[:512], "pt").input_ids
    calibration = int8compile.calibrate(model, [ids] if text else None)
    found = loading.load(str(tmp_path / "int8"))
    for group in calibration.groups[:-1]:
        for weight in group.weights:
            module = found.get_submodule(weight.name.removesuffix(".weight"))
            assert torch.equal(module.d, group.d)
            assert module.d is found.get_submodule(group.weights[0].name.removesuffix(".weight")).d
    int8compile.quantize_(model, progress=False)
    with torch.no_grad():
        assert torch.equal(found(ids).logits, model(ids).logits)


def test_quantize_of_what_cannot_be_calibrated(monkeypatch, capsys, saved, tmp_path):
    out = tmp_path / "int8"
    (tmp_path / "some.txt").write_text("Some text.")
    (tmp_path / "empty.txt").write_text("\n")
    for name, argv, message in (
        ("vit", [], "ViTForImageClassification is not a language model for which tokens can be made up"),
        ("llama", [tmp_path / "none.txt"], f"{str(tmp_path / 'none.txt')!r} cannot be read: [Errno 2] No such file"),
        ("llama", [tmp_path / "empty.txt"], f"{str(tmp_path / 'empty.txt')!r} is empty; give a text"),
        ("llama", [tmp_path / "some.txt"], "has no tokenizer; calibrate it on random tokens, without a file"),
    ):
        code, _, said = run(capsys, "quantize", saved / name, out, "--calibrate", *argv)
        assert code == 2
        assert message in said.splitlines()[-1]
        assert not out.exists()
    # These are refused before anything is loaded.
    assert "exists and is not an empty folder" in refused(capsys, "quantize", "x", tmp_path, "--calibrate")
    assert "no effect with rotate=False" in refused(capsys, "quantize", "x", out, "--calibrate", "--no-rotate")


def test_quantize_stores_what_stays_in_float_as_asked(capsys, saved, tmp_path):
    assert run(capsys, "quantize", saved / "llama", tmp_path / "int8", "--dtype", "bfloat16")[0] == 0
    model = loading.load(str(tmp_path / "int8"), torch.bfloat16)
    assert model.model.norm.weight.dtype == model.model.layers[0].mlp.up_proj.dtype == torch.bfloat16
    assert model.model.layers[0].mlp.up_proj.scale.dtype == torch.float32


def test_quantize_refuses(capsys, saved, tmp_path):
    full, file, int8 = tmp_path / "full", tmp_path / "file", tmp_path / "int8"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    file.write_text("mine")
    for out in (full, file):
        assert "exists and is not an empty folder; name another" in refused(capsys, "quantize", saved / "llama", out)
    assert (full / "mine.txt").read_text() == file.read_text() == "mine"
    assert run(capsys, "quantize", saved / "llama", int8)[0] == 0
    assert "is quantized already" in refused(capsys, "quantize", int8, tmp_path / "again")
    assert "does not exist" in refused(capsys, "quantize", tmp_path / "none", tmp_path / "again")
    assert "threshold=-1.0" in refused(capsys, "quantize", saved / "llama", tmp_path / "again", "--threshold", "-1")
    assert not (tmp_path / "again").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full", "int8"]


@pytest.mark.filterwarnings("ignore::int8compile.Int8Warning")
def test_quantize_writes_nothing_without_int8(capsys, saved, tmp_path):
    code, out, err = run(capsys, "quantize", saved / "llama", tmp_path / "int8", "--min-features", 1000)
    assert (code, out) == (2, "")
    said = err.splitlines()[-1]
    assert "is int8 under these options, so nothing is written. model.layers.0.self_attn.q_proj: " in said
    assert "min_features" in said
    assert not list(tmp_path.iterdir())


def test_quantize_names_patterns_that_match_nothing(capsys, saved, tmp_path):
    code, out, _ = run(
        capsys, "quantize", saved / "t5", tmp_path / "int8", "--skip", "layer.7", "--skip", "DenseReluDense"
    )
    assert code == 0
    assert out.count("matched nothing") == 1
    assert "The pattern 'layer.7' matched nothing." in out


def test_quantize_to_a_full_disk(monkeypatch, capsys, saved, tmp_path):
    from safetensors import SafetensorError
    from transformers import modeling_utils

    def full(tensors: object, file: str, **options: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(modeling_utils, "safe_save_file", full)
    code, _, said = run(capsys, "quantize", saved / "llama", tmp_path / "int8")
    assert code == 2
    assert f"{str(tmp_path / 'int8')!r} cannot be written: I/O error: No space left on device (os error 28)" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("int8", [False, True])
def test_files_that_are_damaged(int8, capsys, saved, tmp_path):
    folder = tmp_path / "model"
    if int8:
        assert run(capsys, "quantize", saved / "llama", folder)[0] == 0
    else:
        shutil.copytree(saved / "llama", folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    said = refused(capsys, "explain", folder)
    assert ("model.safetensors cannot be read" if int8 else "could not be loaded: Error while deserializing") in said
    config = folder / "config.json"
    for content in (b"{", b"\xff", b'{"quantization_config": [1], "model_type": "llama"}'):
        config.write_bytes(content)
        assert "could not be loaded" in refused(capsys, "explain", folder)


def test_a_checkpoint_of_save_is_named(capsys, tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(32, 32))
    int8compile.quantize_(model, progress=False)
    int8compile.save(model, tmp_path / "own", progress=False)
    assert "is a checkpoint of int8compile.save()" in refused(capsys, "explain", tmp_path / "own")


def test_quantize_keeps_what_the_models_authors_keep(capsys, saved, tmp_path):
    """In float16, T5 overflows in one of its linears."""
    code, text, _ = run(capsys, "quantize", saved / "t5", tmp_path / "int8", "--dtype", "float16")
    assert code == 0
    assert "wo stays in float: its module path matches skip_modules (pattern 'wo')" in text
    model = loading.load(str(tmp_path / "int8"), torch.float16)
    kept = {type(module) for path, module in model.named_modules() if path.endswith(".wo")}
    assert kept == {torch.nn.Linear}


@pytest.mark.parametrize("calibrate", [False, True])
def test_quantize_of_a_model_that_transformers_does_not_stream(monkeypatch, capsys, saved, tmp_path, calibrate):
    """A GGUF file is loaded in float first; the report is the same."""
    file = tmp_path / "model.gguf"
    monkeypatch.setattr(loading, "load_gguf", lambda path, dtype: loading.load(str(saved / "llama"), dtype))
    monkeypatch.setattr(loading, "load_tokenizer", lambda path: None)
    argv = ["--calibrate"] if calibrate else []
    code, text, _ = run(capsys, "quantize", file, tmp_path / "int8", "--skip", "o_proj", *argv)
    assert code == 0
    assert "12 of 15 linears in int8" in text
    assert "o_proj stays in float: its module path matches skip_modules (pattern 'o_proj')" in text
    model = loading.load(str(saved / "llama"))
    calibrated = int8compile.calibrate(model, progress=False).groups[0].d
    d = loading.load(str(tmp_path / "int8")).model.layers[0].self_attn.q_proj.d
    assert torch.equal(d, calibrated) is calibrate
    assert "has no tokenizer or processor" in text


@pytest.fixture
def letters(monkeypatch):
    """Give all models a tokenizer of letters."""
    monkeypatch.setattr(loading, "load_processor", lambda name: Letters())


def test_eval_compares_on_the_text_that_comes_with_python(capsys, saved, letters, tmp_path):
    out, plot = tmp_path / "found.json", tmp_path / "found.png"
    argv = ["--config", "default", "--config", "bfloat16", "--tokens", 600, "--out", out, "--plot", plot]
    code, text, _ = run(capsys, "eval", saved / "llama", *argv)
    assert code == 0
    assert text.startswith("On 600 tokens of the chapters objects, execmodel, import of the language reference that")
    assert "KL divergence [nats]" in text
    found = json.loads(out.read_text())["results"]
    assert list(found) == ["float32", "default", "bfloat16"]
    assert found["default"]["positions"] == 600
    assert found["default"]["kl"] > found["float32"]["kl"] == 0
    assert len(found["default"]["kl_by_batch"]) == 2, "batches of at most 512 tokens"
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_eval_prints_json_on_a_given_text(capsys, saved, letters, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Some text. " * 9)
    code, out, _ = run(capsys, "eval", saved / "bert", "--text", text, "--config", "no outliers", "--json")
    assert code == 0
    said = json.loads(out)
    assert said["inputs"].endswith(" tokens of the text")
    found = said["results"]["no outliers"]
    # A classifier of sequences has one distribution for each.
    assert (found["positions"], found["perplexity"]) == (1, None)


def test_eval_of_an_image_model_says_what_it_was_given(capsys, saved):
    code, text, _ = run(capsys, "eval", saved / "vit", "--config", "default")
    assert code == 0
    assert text.startswith("On random numbers (give your own inputs from Python):")
    assert "error of outputs" in text


def test_eval_of_a_folder_in_int8(capsys, saved, letters, tmp_path):
    run(capsys, "quantize", saved / "llama", tmp_path / "int8")
    code, out, _ = run(capsys, "eval", tmp_path / "int8", "--tokens", 40, "--json")
    assert code == 0
    assert list(json.loads(out)["results"]) == ["float32", "as stored", "bfloat16"]


def test_eval_refuses_what_it_cannot_use(capsys, saved, letters, monkeypatch, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("x")
    empty = tmp_path / "empty.txt"
    empty.write_text(" ")
    llama = saved / "llama"
    for argv, message in {
        (llama, "--config", "defalt"): "unknown candidate 'defalt' (did you mean 'default'?)",
        (llama, "--text", tmp_path / "none.txt"): "cannot be read: ",
        (llama, "--text", empty): "is empty; give a text of some hundred words, or no file",
        (llama, "--out", tmp_path / "none" / "out.json"): "cannot be written: its folder does not exist",
        (llama, "--tokens", "0"): "'0' is not a whole number of at least 1",
    }.items():
        assert message in refused(capsys, "eval", *argv), argv
    # After the model was loaded, with a progress bar.
    for argv, message in {
        (llama, "--text", short): "the text has 1 tokens; give some hundred words",
        (llama, "--tokens", "1"): "--tokens 1: give at least 2, because each token is predicted",
        (saved / "vit", "--text", short): "does not read text; leave the text out",
    }.items():
        code, out, err = run(capsys, "eval", *argv)
        assert (code, out) == (2, "")
        assert message in err.splitlines()[-1]
    monkeypatch.setattr(loading, "load_processor", lambda name: None)
    assert "has no tokenizer; give tokens from Python" in run(capsys, "eval", llama)[2].splitlines()[-1]
