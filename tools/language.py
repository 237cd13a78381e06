#!/usr/bin/env python3
"""Find words and docstrings that the language rule of CONTRIBUTING.md bans.

It checks docstrings, comments and strings with a space in Python, comments in C, and Markdown outside of code. The file
tools/language_allowed.txt has the number of findings that each file may still have. A number can only fall: the check
fails if a file has more findings than its number, and also if it has fewer.

    tools/language.py             check all files and print the failures; exit with 1 if there are any
    tools/language.py FILE...     print every finding in these files; exit with 1 if there are any
    tools/language.py --update    lower each number to the number of findings; create the file if it does not exist
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = "tools/language_allowed.txt"
FOLDERS = ("fgpu_ebpf", "shim", "bpf", "oci", "sim", "tools", "bench", "tests", "examples", "dashboards", "docs")
LEFT_OUT = ("bpf/include/", "docs/reference/")  # other projects' headers, generated pages
WITHOUT_WHO = ("fgpu_ebpf/", "shim/", "bpf/", "sim/", "tools/")  # the pronoun would refer to a process or a thread here
WORDS = re.compile(r"\b(?:whoever|whomever|somebody|nobody|anybody|mend(?:s|ed|ing)?)\b", re.IGNORECASE)
WORDS_AND_WHO = re.compile(rf"{WORDS.pattern}|\bwhom?\b", re.IGNORECASE)
OPENING = re.compile(
    r"\s*((?:What|How|As|Of|Where|Those|For|Who|Whom|Whose|Whoever|Until|When|Which|That|By|With|Without|From|In|On|At|"
    r"To|Into|After|Before|Between|Beside|And|But|Or|If|Than|Since|Because|While|Whether|The\s+same)\b)"
)
C_TOKEN = re.compile(r'"(?:\\.|[^"\\\n])*"|' r"'(?:\\.|[^'\\\n])+'|" r"(/\*.*?\*/|//[^\n]*)", re.DOTALL)
INLINE_CODE = re.compile(r"`[^`\n]*`|\]\([^)\n]*\)")
DEFINITIONS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
Finding = tuple[int, str]  # line, text


def in_text(text: str, line: int, banned: re.Pattern[str]) -> Iterator[Finding]:
    """Yield the banned words of `text`, which begins at `line`."""
    for match in banned.finditer(text):
        yield line + text.count("\n", 0, match.start()), f"banned word {match[0]!r}"


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield line and text of each docstring. Visits only statements, which is several times as fast as ast.walk()."""
    nodes: list[ast.AST] = [tree]
    for node in nodes:  # the loop appends to the list
        if isinstance(node, DEFINITIONS) and (text := ast.get_docstring(node, clean=False)) is not None:
            yield node.body[0].lineno, text
        for field in ("body", "orelse", "finalbody", "handlers", "cases"):
            nodes.extend(getattr(node, field, ()))


def in_python(source: str, banned: re.Pattern[str]) -> Iterator[Finding]:
    """Yield the findings in strings, comments and docstrings of a Python file."""
    tree = ast.parse(source)
    known = list(docstrings(tree))
    for line, text in known:
        yield from in_text(text, line, banned)
        if opening := OPENING.match(text):
            yield line, f"docstring begins with {opening[1]!r}"
    for node in ast.walk(tree) if WORDS.search(source) else ():
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield from () if (node.lineno, node.value) in known else in_text(node.value, node.lineno, WORDS)
    if any("#" in line and banned.search(line) for line in source.splitlines()):  # because tokenize is slow
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT:
                yield from in_text(token.string, token.start[0], banned)


def in_c(source: str, banned: re.Pattern[str]) -> Iterator[Finding]:
    """Yield the findings in comments of a C or assembler file."""
    for match in C_TOKEN.finditer(source) if banned.search(source) else ():
        yield from in_text(match[1] or "", 1 + source.count("\n", 0, match.start()), banned)


def in_markdown(source: str) -> Iterator[Finding]:
    """Yield the findings in a page, except in code blocks, inline code and addresses of links."""
    is_fenced, in_list, before = False, False, ""
    for number, line in enumerate(source.splitlines(), 1):
        if line.lstrip().startswith(("```", "~~~")):
            is_fenced = not is_fenced
        in_list = bool(re.match(r" *(?:[-*]|\d+\.) ", line)) or (in_list and line[:1] in ("", " "))
        is_code = is_fenced or (line.startswith("    ") and before in ("", "code") and not in_list)
        yield from () if is_code else in_text(INLINE_CODE.sub(" ", line), number, WORDS)
        before = "code" if is_code else line.strip()


def findings(root: Path, path: str) -> list[Finding]:
    """Return the findings in one file, in the order of its lines."""
    source = (root / path).read_text(encoding="utf-8")
    banned = WORDS_AND_WHO if path.startswith(WITHOUT_WHO) else WORDS
    if path.endswith(".md"):
        return sorted(in_markdown(source))
    return sorted(in_python(source, banned) if path.endswith(".py") else in_c(source, banned))


def files(root: Path) -> Iterator[str]:
    """Yield the paths of all files to check, relative to `root`."""
    for place in [*root.glob("*.md"), *(path for folder in FOLDERS for path in (root / folder).rglob("*"))]:
        path = place.relative_to(root).as_posix()
        if place.suffix in (".py", ".c", ".h", ".S", ".md") and not path.startswith(LEFT_OUT) and place.is_file():
            yield path


def allowed(root: Path) -> dict[str, int]:
    """Return the number of allowed findings of each file that has one. Raises FileNotFoundError."""
    lines = (root / ALLOWED).read_text(encoding="utf-8").splitlines()
    return {path: int(count) for count, path in map(str.split, lines)}


def check(root: Path) -> list[str]:
    """Return the failures: the findings of files that have too many, and the files whose number is too high."""
    limits, wrong = allowed(root), []
    found = {path: findings(root, path) for path in files(root)}
    for path in sorted(found.keys() | limits.keys()):
        here, limit = found.get(path, []), limits.get(path, 0)
        if len(here) > limit:
            wrong += [f"{path}:{line}: {text}" for line, text in here]
            wrong.append(f"{path}: {len(here)} findings, {limit} are allowed")
        elif len(here) < limit:
            wrong.append(f"{path}: {limit} findings are allowed, it has {len(here)}: run tools/language.py --update")
    return wrong


def update(root: Path) -> None:
    """Lower every number to the number of findings. If the file of numbers does not exist, write all numbers."""
    found = {path: len(findings(root, path)) for path in files(root)}
    limits = allowed(root) if (root / ALLOWED).exists() else found
    counts = sorted((path, min(limit, found.get(path, 0))) for path, limit in limits.items())
    text = "".join(f"{count} {path}\n" for path, count in counts if count)
    (root / ALLOWED).write_text(text, encoding="utf-8")


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    if arguments == ["--update"]:
        update(ROOT)
        return 0
    named = [f"{path}:{line}: {text}" for path in arguments for line, text in findings(ROOT, path)]
    for text in (wrong := named if arguments else check(ROOT)):
        print(text)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
