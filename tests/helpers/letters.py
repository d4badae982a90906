"""Tokenizers for tests."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor


class Letters:
    """A tokenizer with one token per ASCII letter."""

    eos_token_id = None

    def __call__(self, text: str, return_tensors: str) -> types.SimpleNamespace:
        return types.SimpleNamespace(input_ids=torch.tensor([[ord(letter) % 128 for letter in text]]))

    def apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> Tensor:
        return self(messages[0]["content"], "pt").input_ids

    def decode(self, tokens: list[int]) -> str:
        return "".join(chr(token) if chr(token).isalnum() else "-" for token in tokens)

    def save_pretrained(self, folder: Path) -> None:
        pass


def byte_tokenizer() -> Any:
    """Return a tokenizer of transformers with one token per byte."""
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = tokenizers.models.BPE({letter: number for number, letter in enumerate(alphabet)}, merges=[])
    backend = tokenizers.Tokenizer(words)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
