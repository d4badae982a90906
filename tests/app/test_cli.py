"""The command line: its output; a mistake gives one clear line and exit code 2."""

import json
import runpy
import shutil
import subprocess
import sys

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
        runpy.run_module("int8compile", run_name="__main__")
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
