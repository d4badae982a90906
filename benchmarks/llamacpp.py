"""llama.cpp with the same model in 8 bits, through llama-cpp-python if it is installed."""

from __future__ import annotations

import importlib
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

NAME = "llama.cpp Q8_0"


def missing() -> str:
    """Return why llama.cpp cannot run; "" if it can."""
    return "" if importlib.util.find_spec("llama_cpp") else "llama-cpp-python is not installed"


class Step:
    """A model from a GGUF file, with weights converted to Q8_0: 8 bits, and one scale for each 32 weights."""

    def __init__(self, file: Path, length: int) -> None:
        threads = torch.get_num_threads()
        with tempfile.TemporaryDirectory() as folder:
            converted = Path(folder) / "q8_0.gguf"
            convert(file, converted)
            llama_cpp, bindings = (importlib.import_module(name) for name in ("llama_cpp", "llama_cpp.llama_cpp"))
            with mock.patch.object(bindings, "llama_model_default_params", _without_amx(bindings)):
                self._model: Any = llama_cpp.Llama(
                    str(converted),
                    n_ctx=length,
                    n_batch=length,
                    n_ubatch=length,
                    n_threads=threads,
                    n_threads_batch=threads,
                    use_mmap=False,
                    verbose=False,
                )

    def __call__(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Return the logits of the last token. Shapes: ids [1, T], positions [T]; result [vocabulary]."""
        self._model.n_tokens = int(positions[0])  # Forgets the tokens after this position.
        self._model.eval(ids[0].tolist())
        logits = self._model._ctx.get_logits_ith(-1)
        return torch.tensor(logits[: self._model.n_vocab()])


def _without_amx(bindings: Any) -> Callable[[], Any]:
    """Return a function with default parameters that switch llama.cpp's AMX code off, in favour of AVX-512 VNNI.

    With AMX, version 0.3.36 of llama-cpp-python compiled by GCC 12 dies of an illegal instruction (tileloadd without
    configured tiles), also without PyTorch in the process.
    """
    defaults = bindings.llama_model_default_params()
    defaults.use_extra_bufts = False
    return lambda: defaults


def convert(source: Path, target: Path) -> None:
    """Copy a GGUF file with every matrix in Q8_0."""
    import gguf

    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, architecture)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=inner)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if len(tensor.shape) == 1:
            writer.add_tensor(tensor.name, values)
            continue
        q8_0 = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(tensor.name, gguf.quants.quantize(values, q8_0), raw_dtype=q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
