"""Patterns with `*`, `**` and `?` for paths and names.

Matching takes time linear in the lengths of pattern and text. The functions have no state and run in any thread.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

MOST_CHARACTERS = 512
SETS = "[]{}"  # characters that are special in shell patterns and are refused in these patterns
_WILD = re.compile(r"(\*+)")


class GlobError(ValueError):
    """The error of a text that is not a valid pattern. The message contains the correct form."""


@dataclass(frozen=True, slots=True)
class Globs:
    """A list of patterns. A text matches the list if at least one pattern matches the text."""

    texts: tuple[str, ...]
    _compiled: re.Pattern[str] = field(repr=False)

    def matches(self, text: str) -> bool:
        """Return whether at least one pattern matches the whole `text`."""
        return self._compiled.fullmatch(text) is not None

    def __str__(self) -> str:
        return ", ".join(self.texts)


def path_globs(texts: Sequence[str]) -> Globs:
    """Return patterns of paths without a leading slash. Raise GlobError if a pattern is invalid.

    `*` and `?` match characters of one name, and `**` matches any number of folders.
    """
    return Globs(tuple(texts), re.compile("|".join(_path(_checked(text, SETS)) for text in texts), re.S))


def name_globs(texts: Sequence[str], forbidden: str = SETS) -> Globs:
    """Return patterns of names: `*` matches any characters, `?` any single character. Raise GlobError on failure."""
    return Globs(tuple(texts), re.compile("|".join(_pieces(_checked(text, forbidden), ".") for text in texts), re.S))


def _checked(text: str, forbidden: str) -> str:
    if not text.strip("/"):
        raise GlobError("an empty pattern matches nothing: write ** for everything")
    if len(text) > MOST_CHARACTERS:
        raise GlobError(f"a pattern has at most {MOST_CHARACTERS} characters")
    found = next((c for c in forbidden if c in text), None)
    if found:
        raise GlobError(f"{found!r} is not supported in a pattern: use several patterns, with *, ** and ? only")
    return text


def _path(text: str) -> str:
    """Return the regular expression of a path pattern such as `a/**/b/*`.

    The part between two `**` is matched at its first occurrence, without backtracking, which keeps the time linear. No
    match is lost, because the second `**` matches any text that follows.
    """
    folders = text.strip("/").split("/")
    wrong = next((f for f in folders if not f or ("**" in f and f != "**")), None)
    if wrong is not None:
        example = wrong.replace("**", "*") + "/**"
        hint = f"** must be a whole component of the path: did you mean {example}?"
        raise GlobError(hint if wrong else "// is not supported: write /")
    runs: list[list[str]] = [[]]
    for folder in folders:
        if folder == "**":
            runs.append([])
        else:
            runs[-1].append("[^/]++" if folder == "*" else _pieces(folder, "[^/]"))  # no folder has an empty name
    if len(runs) == 1:
        return "/".join(runs[0])
    first, *middle, last = ("".join(f"{folder}/" for folder in run) for run in runs)
    skip = "(?:[^/]++/)*?"
    inner = "".join(f"(?>{skip}{run})" for run in middle if run)
    return first + inner + (skip + last.removesuffix("/") if last else _below(first + inner))


def _below(before: str) -> str:
    """Return the expression of a final `**`, for all paths below `before`, or for all paths if `before` is empty."""
    return "[^/].*+" if before else ".*+"


def _pieces(text: str, any_: str) -> str:
    """Return the expression of a pattern without folders. A piece between stars matches at its first occurrence."""
    parts = [part for part in _WILD.split(text) if part]
    regex, starred = [], False
    for at, part in enumerate(parts):
        if part.startswith("*"):
            starred = True
            continue
        piece = "".join(any_ if c == "?" else re.escape(c) for c in part)
        if starred and at < len(parts) - 1:
            piece = f"(?>{any_}*?{piece})"
        elif starred:
            piece = f"{any_}*{piece}"
        regex.append(piece)
    if parts and parts[-1].startswith("*"):
        regex.append(f"{any_}*+")
    return "".join(regex)
