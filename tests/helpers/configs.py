"""Configs of small models, and the config of a saved one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}


def saved_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())
