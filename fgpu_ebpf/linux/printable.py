"""Texts for a terminal or a log. A tenant chooses the names of its cgroups and processes.

A name may contain control characters, which a terminal would execute. This module runs in all processes of fgpu.
"""

from __future__ import annotations


def line(text: str) -> str:
    """Return a text in which `?` replaces each control character or line break. Invalid UTF-8 is escaped."""
    known = text.encode(errors="backslashreplace").decode()
    return "".join(c if c.isprintable() else "?" for c in known)


def lines(text: str) -> str:
    """Return a text of several lines in which `?` replaces each control character except the line breaks."""
    return "\n".join(map(line, text.split("\n")))
