"""Integrations with other libraries. Each module imports its library, so import it only where that is installed."""

from __future__ import annotations

from typing import Any

from int8compile.stored.libraries import LIBRARIES, Library


def register() -> None:
    """Register the libraries whose models save themselves; a library is imported only when it is needed."""
    LIBRARIES["transformers"] = Library(("transformers.modeling_utils", "PreTrainedModel"), _transformers, _experts)
    LIBRARIES["diffusers"] = Library(("diffusers.models.modeling_utils", "ModelMixin"), _diffusers)


def _transformers() -> Any:
    from int8compile.integrations import transformers

    return transformers


def _experts() -> str:
    from int8compile.integrations import experts

    return experts.NAME


def _diffusers() -> Any:
    from int8compile.integrations import diffusers

    return diffusers
