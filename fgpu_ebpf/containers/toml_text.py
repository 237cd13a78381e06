"""Conversion between TOML and Python values, for settings of engines.

This module runs in `fgpu setup` and `fgpu doctor`, and does no I/O.
"""

from __future__ import annotations

import json
from typing import Any


def loads(text: str) -> dict[str, Any]:
    """Return the contents of a TOML document. Raise ValueError on failure."""
    import tomllib  # imported when needed: most processes that import this module read no TOML

    return tomllib.loads(text)


def dumps(value: Any) -> str:
    """Return a value as TOML, in one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {dumps(of)}" for key, of in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(dumps, value)) + "]"
    return json.dumps(value, ensure_ascii=False)  # strings, numbers and booleans have the same form in JSON and TOML
