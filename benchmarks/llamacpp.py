"""llama.cpp with a model in 8 bits, through llama-cpp-python if it is installed.

`python -m benchmarks.llamacpp GGUF JOB` runs a job of `int8compile.app.speed`, as `int8compile.app.variants` does.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from int8compile.app import variants
from int8compile.app.variants import DECODE, PREFILL, ROOM, Job, Ready, case, random_tokens

NAME = "llama.cpp Q8_0"


def main() -> None:
    """Run the job in the last argument with the GGUF file in the first."""
    job = Job(**json.loads(sys.argv[2]))
    variants.serve(lambda: prepare(Path(sys.argv[1]), job), job.outputs)


def prepare(file: Path, job: Job) -> Ready:
    """Convert a model to Q8_0 (8 bits, and one scale for each 32 weights), and load it."""
    if not importlib.util.find_spec("llama_cpp"):
        raise RuntimeError("llama-cpp-python is not installed")
    with tempfile.TemporaryDirectory() as folder:
        converted = Path(folder) / "q8_0.gguf"
        convert(file, converted)
        size = converted.stat().st_size
        began = time.perf_counter()
        model = Model(converted, max(job.batches), job.prompt + ROOM)
        seconds = time.perf_counter() - began
    (prompt,), tokens = (each.tolist() for each in random_tokens(model.vocabulary, max(job.batches), job.prompt))

    def generate(batch: int) -> Callable[[], Tensor]:
        rows = [token for (token,) in tokens[:batch]]
        return lambda: model.generate(rows, job.prompt)

    calls = {PREFILL: lambda: model.read(prompt), **{case(batch): generate(batch) for batch in job.batches}}
    return Ready(calls, seconds, lambda: size, DECODE)


class Model:
    """A language model of llama.cpp with a cache for each text.

    Attributes:
        vocabulary: The number of tokens that it knows.
    """

    def __init__(self, file: Path, texts: int, length: int) -> None:
        self._library: Any = importlib.import_module("llama_cpp")
        library, threads = self._library, torch.get_num_threads()
        quiet = library.llama_log_callback(lambda *_: None)
        library.llama_log_set(quiet, ctypes.c_void_p(0))
        self._kept = quiet  # The library calls it later.
        parameters = library.llama_model_default_params()
        parameters.use_mmap = False
        # With AMX, version 0.3.36 of llama-cpp-python compiled by GCC 12 dies of an illegal instruction (tileloadd
        # without configured tiles), also without PyTorch in the process. AVX-512 VNNI is used instead.
        parameters.use_extra_bufts = False
        self._model = library.llama_model_load_from_file(str(file).encode(), parameters)
        options = library.llama_context_default_params()
        options.n_seq_max, options.n_ctx = texts, texts * length
        options.n_batch = options.n_ubatch = max(texts, length)
        options.n_threads = options.n_threads_batch = threads
        options.kv_unified = False
        self._context = library.llama_init_from_model(self._model, options)
        self._memory = library.llama_get_memory(self._context)
        self.vocabulary: int = library.llama_vocab_n_tokens(library.llama_model_get_vocab(self._model))
        self._texts = texts

    def read(self, tokens: Sequence[int]) -> Tensor:
        """Read a prompt as the first text, and return the logits after it. Shapes: result [1, vocabulary]."""
        self._library.llama_memory_seq_rm(self._memory, 0, 0, -1)
        return self._decode([(token, position, 0) for position, token in enumerate(tokens)], 1)

    def generate(self, tokens: Sequence[int], start: int) -> Tensor:
        """Return the logits after the prompt and a token for each text. Shapes: result [B, vocabulary]."""
        for text in range(len(tokens)):
            self._library.llama_memory_seq_rm(self._memory, text, start, -1)  # The last call's token.
            if text and self._library.llama_memory_seq_pos_max(self._memory, text) < 0:
                self._library.llama_memory_seq_cp(self._memory, 0, text, 0, -1)
        return self._decode([(token, start, text) for text, token in enumerate(tokens)], len(tokens))

    def _decode(self, entries: Sequence[tuple[int, int, int]], last: int) -> Tensor:
        """Process tokens with their positions and texts, and return the logits of the last ones."""
        batch = self._library.llama_batch_init(len(entries), 0, 1)
        try:
            batch.n_tokens = len(entries)
            for i, (token, position, text) in enumerate(entries):
                batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
                batch.seq_id[i][0] = text
                batch.logits[i] = i >= len(entries) - last
            if status := self._library.llama_decode(self._context, batch):
                raise RuntimeError(f"llama_decode returned {status}")
            rows = range(len(entries) - last, len(entries))
            logits = [self._library.llama_get_logits_ith(self._context, i)[: self.vocabulary] for i in rows]
        finally:
            self._library.llama_batch_free(batch)
        return torch.tensor(logits)


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


def write(model: Any, file: Path) -> None:
    """Write a Llama of transformers as a GGUF file, without a tokenizer."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for path, tensor in model.state_dict().items():
        name = names.get_name(path, (".weight",))
        assert name
        if path == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if count := heads.get(path.split(".")[-2]):
            # The rotary embedding of llama.cpp pairs neighbours; that of transformers, the halves of a head.
            tensor = tensor.unflatten(0, (count, 2, -1)).transpose(1, 2).flatten(0, 2)
        values = tensor.float().numpy()
        writer.add_tensor(name, values if values.ndim == 1 else values.astype("float16"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
