"""Breaks the kernel's side one rule at a time and sees the tests fail: a check that cannot fail is a defect.

Each mutant is one replacement in bpf/fgpu.bpf.c; the tests run on a copy. usage: python tests/mutants.py [NAME…]
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
MUTANTS = {
    "limit-off-by-one": ("int over = now > limit;", "int over = now > limit + 1;"),
    "limit-not-looked-at": ("return used + bytes <= limit;", "return 1;"),
    "overflow": ("if (bytes > FGPU_MOST_BYTES) bytes = FGPU_MOST_BYTES;", ""),
    "ticket-charged-anew": ("if (a->ticket == ticket && a->verdict != FGPU_AGAIN) return a->verdict;", ""),
    "old-admission-kept": ("        release(p, a->device, a->bytes); /* an older one that nothing settled */\n", ""),
    "leaf-kept-when-the-group-refuses": (
        "if (refused_by_a_level(h, device, bytes, kind)) return FGPU_REFUSED;",
        "",
    ),
    "leader-is-the-process": ("if (ctx->args[1]) end_process", "if (id >> 32 == (u32)id) end_process"),
    "exec-forgotten": (
        "    end_process(id >> 32);\n    return 0;\n}\n\n/* -- admission",
        "    return 0;\n}\n\n/* -- admission",
    ),
    "thread-number-after-exec": ("(u32)ctx->args[1]); /* the thread", "(u32)id); /* the thread"),
    "free-looked-up-at-return": (
        "    allocations.delete(&key);\n}\n\n/* The witnessed size",
        "}\n\n/* The witnessed size",
    ),
    "failed-free-not-put-back": ("    if (!f->references) return;\n", "    return;\n"),
    "failed-call-kept": ("        release(p, f->device, f->bytes);\n        return;", "        return;"),
    "longjmp-ignored": ("&& a->arguments[0] == b->arguments[0] && a->arguments[1] == b->arguments[1];", ";"),
    "second-probe-counts": ("if (!settles && same_call(&t->call, &now)) return;", ""),
    "mapping-holds-nothing": (
        "    __sync_fetch_and_add(&a->references, 1);\n    struct fgpu_allocation value",
        "    struct fgpu_allocation value",
    ),
    "retained-handle-holds-nothing": ("        if (a) __sync_fetch_and_add(&a->references, 1);\n", ""),
    "context-never-ends": ("    if (--p->contexts[slot(device)]) {", "    if (1) {"),
    "second-reference-is-a-context": ("    if (p->primary[slot(device)]) return f->bytes;\n", ""),
    "reset-leaves-the-context": ("    p->primary[slot(device)] = 0;\n", ""),
    "vmm-dies-with-the-context": ("return bytes > vmm ? bytes - vmm : 0;", "return bytes;"),
    "era-forgotten": ("p->era[slot(device)]++;", ""),
    "bypass-not-charged": ("    charge(p, &h, f->device, bytes - f->bytes, 1);\n", ""),
    "pool-without-bottom": ("less = bytes < was ? bytes : was;", "less = bytes;"),
    "overhead-in-a-race": ("if (p->begun != changes || p->changes != changes) return -11;", ""),
    "move-leaves-the-charge": ("    move_charges(p, 1);\n", ""),
    "reap-anybody": (
        "if (!p || p->generation != generation) return -3;\n    end_process",
        "if (!p) return -3;\n    end_process",
    ),
    "device-unchecked": ("    if (device >= FGPU_DEVICES) {\n        anomaly", "    if (0) {\n        anomaly"),
    "hello-ends-the-admission": (
        "    if (kind == FGPU_HELLO)\n",
        "    if (kind == FGPU_HELLO) t->admission.bytes = 0;\n    if (kind == FGPU_HELLO)\n",
    ),
    "managed-forgotten-at-free": (
        "if (f->bytes && (f->function == FGPU_FUNCTION_RELEASE || f->arguments[2]))",
        "if (f->bytes && f->function == FGPU_FUNCTION_RELEASE)",
    ),
}


def survives(name: str, folder: Path) -> bool:
    """Applies one mutant; True where the tests did not notice."""
    old, new = MUTANTS[name]
    source = REPOSITORY / "bpf/fgpu.bpf.c"
    text = source.read_text(encoding="utf-8")
    if text.count(old) != 1:
        raise SystemExit(f"{name}: its text stands {text.count(old)} times in {source}")
    shutil.copytree(REPOSITORY / "bpf", folder / name)
    (folder / name / "fgpu.bpf.c").write_text(text.replace(old, new), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "--tb=no", "tests/bpf"]
    environment = {**os.environ, "FGPU_TEST_SOURCES": str(folder / name)}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    print(
        f"{name}: {'SURVIVED' if done.returncode == 0 else 'killed'}  {done.stdout.strip().splitlines()[-1]}",
        flush=True,
    )
    return done.returncode == 0


def main() -> int:
    """All mutants, or those named."""
    names = sys.argv[1:] or list(MUTANTS)
    with tempfile.TemporaryDirectory() as folder:
        alive = [name for name in names if survives(name, Path(folder))]
    print(f"{len(names) - len(alive)} killed, {len(alive)} survived: {' '.join(alive)}")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
