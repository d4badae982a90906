"""A tokenizer for tests."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

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
