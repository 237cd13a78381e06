"""The reader of YAML files, which returns values with their lines and refuses error-prone features of YAML.

Aliases, tags and merges are refused, and `no` is a text instead of false. The module runs in the thread that reads the
file. Size, depth and number of values are bounded, so that no file takes long to read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import yaml

MOST_BYTES = 1 << 20
MOST_NODES = 10_000
MOST_DEPTH = 16
MOST_ERRORS = 20
MOST_INTEGER = 2**63 - 1

_INTEGER = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]{1,40}|[0-9]{1,40}(?:\.[0-9]{0,40})?)(?:[eE][-+]?[0-9]{1,9})?")
_NO_NUMBER = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
_WORDS: dict[str, bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}

Place = tuple[str | int, ...]  # the path to a value: keys and positions


class ConfigError(NamedTuple):
    """An error in a file. `text` contains the correction. `line` is 0 if the error concerns the file as a whole."""

    file: str
    line: int
    field: str
    text: str

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}" if self.line else self.file
        return f"{where}: {self.field}: {self.text}" if self.field else f"{where}: {self.text}"


class InvalidFileError(Exception):
    """The error of a file that is not a valid configuration. `error` has the file, the line and the field."""

    def __init__(self, error: ConfigError) -> None:
        super().__init__(str(error))
        self.error = error


class Document(NamedTuple):
    """One YAML document, and the line of each value. A value in a mapping has the line of its key."""

    value: Any
    lines: Mapping[Place, int]

    def line(self, place: Place) -> int:
        """Return the line of the value at `place`, or of the innermost value around a missing value."""
        while place and place not in self.lines:
            place = place[:-1]
        return self.lines[place]


def field_text(place: Place) -> str:
    """Return the human-readable path of a value, for example `spec.selector.cgroup[0]`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{_cut(part)}" for part in place)
    return text.removeprefix(".")


def _cut(text: str) -> str:
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= 64 else text[:64] + "…"


def documents(file: str, data: bytes) -> Iterator[Document]:
    """Yield the documents of a file, except empty documents. Raise InvalidFileError if the file is invalid."""
    if len(data) > MOST_BYTES:
        raise InvalidFileError(ConfigError(file, 0, "", "is larger than 1 MiB: split it"))
    try:
        data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InvalidFileError(ConfigError(file, line, "", "is not valid UTF-8: save it as UTF-8")) from error
    try:
        yield from _Reader(file, data).documents()
    except yaml.YAMLError as error:
        raise InvalidFileError(_syntax(file, data, error)) from error


def _syntax(file: str, data: bytes, error: yaml.YAMLError) -> ConfigError:
    """Return the parser's error, with the line of the unclosed construct if the parser failed at the file's end."""
    problem = str(getattr(error, "problem", None) or getattr(error, "reason", None) or "broken")
    last = len(data.splitlines()) or 1
    marks = [getattr(error, name, None) for name in ("problem_mark", "context_mark")]
    lines = [mark.line + 1 for mark in marks if mark] or [data.count(b"\n", 0, getattr(error, "position", 0)) + 1]
    line = next((line for line in lines if line <= last), last)
    if b"\t" in b"".join(data.splitlines()[line - 1 : line]):
        problem += "; indent with spaces, not with tabs"
    return ConfigError(file, line, "", f"is not YAML: {problem}")


class _Reader:
    """The conversion of YAML parser events to documents. A refused feature raises InvalidFileError."""

    def __init__(self, file: str, data: bytes) -> None:
        self._file = file
        self._events = yaml.parse(data, Loader=yaml.CBaseLoader)
        self._nodes = 0
        self._lines: dict[Place, int] = {}

    def documents(self) -> Iterator[Document]:
        """Yield the documents. Raise InvalidFileError at a refused feature."""
        for event in self._events:
            self._count(event)
            if isinstance(event, yaml.DocumentStartEvent):
                self._lines = {}
                value = self._value(next(self._events), ())
                if value is not None:
                    yield Document(value, self._lines)

    def _line(self, event: yaml.Event) -> int:
        return event.start_mark.line + 1 if event.start_mark else 0

    def _fail(self, event: yaml.Event, place: Place, text: str) -> InvalidFileError:
        return InvalidFileError(ConfigError(self._file, self._line(event), field_text(place), text))

    def _count(self, event: yaml.Event) -> None:
        self._nodes += 1
        if self._nodes > MOST_NODES:
            raise self._fail(event, (), f"more than {MOST_NODES:,} values in one file: split it")

    def _value(self, event: yaml.Event, place: Place) -> Any:
        self._count(event)
        self._lines[place] = self._line(event)
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise self._fail(event, place, "anchors and aliases (&, *) are refused: write the value out, or in quotes")
        if getattr(event, "tag", None) not in (None, "!"):
            raise self._fail(event, place, "tags (!) are refused: leave the tag out, or write the value in quotes")
        if isinstance(event, yaml.ScalarEvent):
            return self._scalar(event, place)
        if len(place) >= MOST_DEPTH:
            raise self._fail(event, place[:4], f"more than {MOST_DEPTH} levels: no valid value is nested so deep")
        if isinstance(event, yaml.MappingStartEvent):
            return self._mapping(place)
        return self._sequence(place)

    def _sequence(self, place: Place) -> list[Any]:
        found: list[Any] = []
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            found.append(self._value(event, (*place, len(found))))
        return found

    def _mapping(self, place: Place) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            key = self._key(event, place)
            if key in found:
                first = self._lines[(*place, key)]
                raise self._fail(event, (*place, key), f"is written twice, first in line {first}: keep one entry")
            line = self._line(event)
            found[key] = self._value(next(self._events), (*place, key))
            self._lines[(*place, key)] = line
        return found

    def _key(self, event: yaml.Event, place: Place) -> str:
        self._count(event)
        if not isinstance(event, yaml.ScalarEvent) or event.anchor or event.tag not in (None, "!"):
            raise self._fail(event, place, "a key must be text without an anchor, alias or tag")
        if event.value == "<<" and event.implicit[0]:
            raise self._fail(event, place, "merging (<<) is refused: write the values out")
        return str(event.value)

    def _scalar(self, event: yaml.ScalarEvent, place: Place) -> Any:
        text = event.value
        if not event.implicit[0]:  # the scalar is in quotes or is a block, so it is text
            return text
        if text in _WORDS:
            return _WORDS[text]
        if _INTEGER.fullmatch(text):
            if len(text) > 20 or abs(int(text)) > MOST_INTEGER:
                fix = "write a smaller number, or quote the value if the value is text"
                raise self._fail(event, place, f"the number is beyond 2^63: {fix}")
            return int(text)
        number = float(text) if _FLOAT.fullmatch(text) else None
        if number in (math.inf, -math.inf) or _NO_NUMBER.fullmatch(text):
            raise self._fail(event, place, f"{_cut(text)} is not a finite number")
        return text if number is None else number
