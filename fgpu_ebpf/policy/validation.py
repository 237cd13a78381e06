"""Messages for users, made from pydantic's validation errors.

The functions run in the thread that reads an invalid configuration file. At most MOST_ERRORS errors of a document are
returned, and a message quotes at most one line of a file's text.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from fgpu_ebpf.policy.units import shown
from fgpu_ebpf.policy.yaml_document import MOST_ERRORS, ConfigError, Document, Place, field_text

_KINDS = {
    "string_type": "must be text",
    "int_type": "must be a whole number",
    "bool_type": "must be true or false",
    "list_type": "must be a list, as in [a, b]",
    "dict_type": "must be a mapping, as in {key: value}",
    "model_type": "must be a mapping, as in {key: value}",
}


def config_errors(file: str, document: Document, model: type[BaseModel], error: ValidationError) -> list[ConfigError]:
    """Return the first errors of a document, at most MOST_ERRORS, in the order of its lines."""
    details = error.errors(include_url=False)[: MOST_ERRORS * 4]
    found = [_config_error(file, document, model, detail) for detail in details]
    return sorted(dict.fromkeys(found), key=lambda config_error: config_error.line)[:MOST_ERRORS]


def _config_error(file: str, document: Document, model: type[BaseModel], detail: ErrorDetails) -> ConfigError:
    place: Place = tuple(part for part in detail["loc"] if part != "[key]")
    line = document.line(place)
    match detail["type"]:
        case "extra_forbidden":
            *around, key = place
            return ConfigError(file, line, field_text(tuple(around)), _unknown(str(key), _fields(model, tuple(around))))
        case "missing":
            return ConfigError(file, line, field_text(place), f"is missing: write {_example(model, place)}")
    while place and place not in document.lines:
        place = place[:-1]
    text = _text(detail) if detail["input"] is not None else _empty(model, place)
    return ConfigError(file, line, field_text(place), text)


def _text(detail: ErrorDetails) -> str:
    kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
    match kind:
        case "value_error":
            return str(context["error"])
        case "too_short":
            return "is empty: list at least one item, or leave the key out"
        case "too_long":
            return f"has more than {context['max_length']} items"
        case "less_than_equal" | "greater_than_equal":
            bound = "more" if kind.startswith("less") else "less"
            return f"{shown(str(value))} is {bound} than {next(iter(context.values()))}"
    if kind == "literal_error":
        known = context["expected"].replace(" or ", ", ").replace("'", "").split(", ")
        return _none_of(value if isinstance(value, str) else _plain(value), known)
    text = _KINDS.get(kind) or detail["msg"].replace("Input should", "should")
    if kind == "string_type" and isinstance(value, (bool, int, float)):
        return f"{text}: write it in quotes"
    if kind == "int_type" and isinstance(value, str) and value.isdigit():
        return f"{text}: write it without quotes"
    return text


def _plain(value: Any) -> str:
    """Return a value in its YAML form. For a list or mapping, return only the name of the type."""
    return str(value).lower() if isinstance(value, (bool, int, float)) else type(value).__name__


def _empty(model: type[BaseModel], place: Place) -> str:
    field = _fields(model, place[:-1]).get(str(place[-1])) if place else None
    return "is empty: write a value" + ("" if field and field.is_required() else ", or leave the key out")


def _none_of(value: str, known: list[str]) -> str:
    if len(known) == 1:
        return f"{shown(value)} must be {known[0]}"
    near = _near(value, known)
    hint = f"did you mean {near}?" if near else "write one of these values"
    return f"{shown(value)} is none of {', '.join(known)}: {hint}"


def _unknown(key: str, known: Iterable[str]) -> str:
    near = _near(key, known)
    hint = f"did you mean {near}?" if near else f"use one of {', '.join(known)}"
    return f"unknown key {shown(key)}: {hint}"


def _near(word: str, known: Iterable[str]) -> str:
    by_case = {name.lower(): name for name in known}
    found = difflib.get_close_matches(word[:64].lower().replace("_", ""), by_case, n=1)
    return by_case[found[0]] if found else ""


def _example(model: type[BaseModel], place: Place) -> str:
    """Return an example of a missing key with a value, such as `limit: 8GiB`, or the key alone without an example."""
    key = str(place[-1])
    field = _fields(model, place[:-1]).get(key)
    choices = getattr(field.annotation, "__args__", ()) if field else ()
    examples = [*(field.examples or () if field else ()), *(c for c in choices if isinstance(c, str))]
    if not examples:
        return key
    return f"{key}: {examples[0] if isinstance(examples[0], str) else json.dumps(examples[0])}"


def _fields(model: type[BaseModel], place: Place) -> dict[str, FieldInfo]:
    """Return the keys that a mapping of the document may have, and the fields. `place`: the path to the mapping."""
    for part in place:
        if isinstance(part, int):
            continue
        field = next((f for name, f in model.model_fields.items() if part in (f.alias, name)), None)
        inner = field and _model_in(field.annotation)
        if not inner:
            return {}
        model = inner
    return {field.alias or name: field for name, field in model.model_fields.items()}


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """Return the model of a field, which is the annotation or the model of a list's items, or None without a model."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((m for a in getattr(annotation, "__args__", ()) if (m := _model_in(a))), None)
