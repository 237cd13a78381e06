"""Tests of tools/language.py: the tree has no new banned words, and each kind of file is checked."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import language

ROOT = Path(__file__).parents[2]

BANNED = "some" + "body"  # in two parts: otherwise this file would have findings
PRONOUN = "w" + "ho"
FILES = {
    "fgpu_ebpf/docstring.py": f'def f():\n    """Wake {BANNED}."""\n',
    "fgpu_ebpf/comment.py": f"x = 1\ny = 2  # {BANNED} reads it\n",
    "fgpu_ebpf/message.py": f'print("{BANNED} asks")\n',
    "fgpu_ebpf/parts.py": f'print(f"{{1}} and {BANNED} asks")\n',
    "fgpu_ebpf/pronoun.py": f'"""Say {PRONOUN} asks."""\n',
    "fgpu_ebpf/opening.py": 'class C:\n    def f(self):\n        """What it does."""\n',
    "fgpu_ebpf/nested.py": 'if 1:\n    try:\n        def f():\n            """The same."""\n    finally:\n        1\n',
    "shim/block.c": f"int x; /* one\n * {BANNED} */\n",
    "bpf/line.h": f"int x; // {PRONOUN} asks\n",
    "docs/page.md": f"# Page\n\nAsk {BANNED}.\n",
    "docs/list.md": f"1. A list.\n\n    Its paragraph, {BANNED}.\n",
    "README.md": f"{BANNED}\n",
}  # fmt: skip
HARMLESS = {
    "fgpu_ebpf/names.py": f'def {BANNED}(nobody_asks):\n    """Return 1."""\n    return "{BANNED}"\n',
    "fgpu_ebpf/shown.py": f'print("{PRONOUN} asks")\n',
    "fgpu_ebpf/string.py": f'x = "# {PRONOUN} asks"\n',
    "fgpu_ebpf/plain.py": '"""Return what the page says."""\n',
    "tests/pronoun.py": f'"""Say {PRONOUN} asks."""\n',
    "sim/string.c": f'char *x = "/* {BANNED} */";\n',
    "docs/page.md": f"Ask {PRONOUN} reads.\n\n```\n{BANNED}\n```\n\n    {BANNED}\n\n`{BANNED}` [x](#{BANNED})\n",
    "docs/reference/page.md": f"{BANNED}\n",
    "bpf/include/bpf.h": f"/* {BANNED} */\n",
}


def write(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Return a tree without findings."""
    write(tmp_path, language.ALLOWED, "")
    for path, text in HARMLESS.items():
        write(tmp_path, path, text)
    return tmp_path


def test_the_tree_has_no_new_findings() -> None:
    assert language.check(ROOT) == []


def test_text_other_than_prose_is_ignored(tree: Path) -> None:
    assert language.check(tree) == []


@pytest.mark.parametrize("path", FILES)
def test_a_banned_word_or_opening_fails(tree: Path, path: str) -> None:
    write(tree, path, FILES[path])
    (finding, total) = language.check(tree)
    line = next(
        n for n, text in enumerate(FILES[path].splitlines(), 1) if any(w in text for w in (BANNED, PRONOUN, '"""'))
    )
    assert finding.startswith(f"{path}:{line}: ")
    assert total == f"{path}: 1 findings, 0 are allowed"


@pytest.mark.parametrize("path", ["fgpu_ebpf/__init__.py", "docs/how.md", "tests/bpf/test_ledger.py", "oci/json.c"])
def test_an_additional_banned_word_in_a_file_fails(tmp_path: Path, path: str) -> None:
    sources = (ROOT / path).read_text()
    write(tmp_path, path, sources)
    (tmp_path / "tools").mkdir()
    language.update(tmp_path)
    assert language.check(tmp_path) == []
    added = {".py": f"\n# {BANNED}\n", ".c": f"\n/* {BANNED} */\n", ".md": f"\n{BANNED}\n"}
    write(tmp_path, path, sources + added[Path(path).suffix])
    assert any(BANNED in line for line in language.check(tmp_path))


def test_the_allowed_numbers_can_only_fall(tree: Path) -> None:
    write(tree, "README.md", f"{BANNED}\n{BANNED}\n")
    language.update(tree)
    assert len(language.check(tree)) == 3, "a number has been raised"
    write(tree, language.ALLOWED, "2 README.md\n")
    assert language.check(tree) == []
    write(tree, "README.md", f"{BANNED}\n")
    assert language.check(tree) == ["README.md: 2 findings are allowed, it has 1: run tools/language.py --update"]
    language.update(tree)
    assert (tree / language.ALLOWED).read_text() == "1 README.md\n"
    assert language.check(tree) == []
    (tree / "README.md").unlink()
    assert len(language.check(tree)) == 1
    language.update(tree)
    assert (tree / language.ALLOWED).read_text() == ""
