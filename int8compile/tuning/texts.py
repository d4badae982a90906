"""Text that every machine has: the language reference that comes with Python."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

TOPICS = ("objects", "execmodel", "import")


def text_chunks(tokenizer: Any, count: int = 2, length: int = 1024) -> list[Tensor]:
    """Return English text that comes with Python, as tokens: `prose` of the language reference.

    Args:
        tokenizer: A transformers tokenizer.
        count: The number of chunks.
        length: Tokens in each.

    Returns:
        Tokens, [1, length] each.
    """
    ids = tokens(tokenizer, prose(TOPICS), count * length)
    return [ids[:, begin : begin + length] for begin in range(0, count * length, length)]


def tokens(tokenizer: Any, text: str, count: int) -> Tensor:
    """Return the first tokens of a text, [1, count], or fewer where it is shorter."""
    # No tokenizer needs more than 16 characters for a token on average; the rest of a long text would take time.
    ids: Tensor = tokenizer(text[: 16 * count], return_tensors="pt").input_ids
    return ids[:, :count]


def prose(chapters: Sequence[str]) -> str:
    """Return the running text of chapters of the language reference, as `help("objects")` shows them."""
    from pydoc_data.topics import topics

    paragraphs = [part for name in chapters for part in topics[name].split("\n\n")]
    # Indented paragraphs are code and lists; short ones are headings.
    return "\n\n".join(" ".join(part.split()) for part in paragraphs if len(part) >= 200 and not part[0].isspace())
