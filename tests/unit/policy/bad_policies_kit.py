"""Policy files that the parser must refuse."""

from __future__ import annotations

import random
from pathlib import Path

from tests.unit import policy_kit as kit

BAD = sorted((Path(__file__).parent / "bad").glob("*.yaml"))
MIB = 1 << 20
HEAD = f"{kit.HEAD}metadata: {{name: a}}\nspec:\n  selector: {{cgroup: a}}\n".encode()
BOMBS = {
    "aliases": b"a: &a [x]\nb: &b [*a,*a]\n" * 9_000,
    "anchors": b"&a " * (MIB // 3),
    "brackets": b"[" * MIB,
    "braces": b"{a: " * (MIB // 4),
    "pairs": b"[" + b"{a: 1}," * (MIB // 8),
    "dashes": b"- " * (MIB // 2),
    "questions": b"? " * (MIB // 2),
    "scalar": b"a: " + b"x" * (MIB - 10),
    "escapes": b'a: "' + b"\\x41" * (MIB // 5) + b'"',
    "open quote": b'a: "' + b"x" * (MIB - 10),
    "folded": b"a: >\n" + b"  x\n" * (MIB // 5),
    "plain lines": b"a:\n" + b"  x\n" * (MIB // 5),
    "documents": b"---\n" * (MIB // 4),
    "bad documents": b"--- a\n" * (MIB // 6),
    "digits": b"a: " + b"9" * (MIB - 10),
    "fraction": b"a: 1." + b"9" * (MIB - 10),
    "tags": b"!a " * (MIB // 3),
    "directives": b"%TAG ! x\n" * (MIB // 9),
    "keys": HEAD + b"".join(b"  k%d: 1\n" % n for n in range(60_000)),
    "long key": HEAD + b"  " + b"k" * 900 + b": 1\n",
    "list": HEAD + b"  devices: [" + b"-1," * 9_000 + b"]\n",
    "globs": HEAD + b"  metricLabels: [" + b"'a**'," * 9_000 + b"]\n",
    "policies": b"".join(
        kit.text(f"p{n}", "{selector: {cgroup: [a]}, memory: {limit: 8GB}}").encode() for n in range(700)
    ),
    "noise": random.Random(1).randbytes(MIB),
    "signs": bytes(random.Random(2).choices(b"[]{},:-?&*!|>'\"%@` \na", k=MIB)),
}
