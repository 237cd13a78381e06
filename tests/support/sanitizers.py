"""Sanitizers for the C parts: AddressSanitizer with UndefinedBehaviorSanitizer, and ThreadSanitizer.

Shim, simulated driver and helper are built again for each, into build/sanitized/NAME, by their own makefiles. A program
with sanitizers writes a report for each error into a folder, from any of its processes. No report is expected.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
HEADERS = ROOT / "build" / "headers"
CFLAGS = ("-O1", "-g", "-fno-omit-frame-pointer")
# Since Linux 6.6 addresses are more random than an older sanitizer library expects.
UNRANDOM = ("setarch", "-R")


@dataclass(frozen=True)
class Sanitizer:
    """A sanitizer.

    `checks` are the compiler's names of its checks. `library` must be the first library in the process.
    """

    name: str
    checks: str
    library: str

    @property
    def folder(self) -> Path:
        """Return the folder of its build."""
        return ROOT / "build" / "sanitized" / self.name

    @property
    def runtime(self) -> Path:
        """Return the path of the library; the linker's name for it may be a script."""
        said = subprocess.run(["gcc", f"-print-file-name={self.library}"], check=True, capture_output=True, text=True)
        return Path(said.stdout.strip()).resolve()

    def make(self, part: str, source: Path | None = None, out: Path | None = None) -> Path:
        """Build a part (shim, sim, oci) if it is outdated, and return its folder. `source`: another copy of it."""
        out = out or self.folder / part
        variables = [f"OUT={out}", f"HEADERS={HEADERS}", f"SANITIZE={self.checks}", "CFLAGS=-O1 -g"]
        command = ["make", "-s", "-j2", "-C", source or ROOT / part, *variables]
        subprocess.run(command, check=True, timeout=280, stdout=subprocess.DEVNULL)
        return out

    def compile(self, out: Path, *words: str | Path) -> Path:
        """Compile a program from sources and flags."""
        checks = (f"-fsanitize={self.checks}", "-fno-sanitize-recover=all")
        command = ["gcc", *CFLAGS, "-Wall", "-Wextra", "-Werror", *checks, "-isystem", HEADERS, "-o", out, *words]
        subprocess.run(command, check=True, timeout=120)
        return out

    def environment(self, reports: Path, leaks: bool = True) -> dict[str, str]:
        """Return variables that make a process write reports to that folder and end after an error."""
        where = f"log_path={reports}/report"
        return {
            "ASAN_OPTIONS": f"{where}:detect_leaks={int(leaks)}:abort_on_error=0",
            "UBSAN_OPTIONS": f"{where}:print_stacktrace=1",
            "TSAN_OPTIONS": f"{where}:halt_on_error=1:history_size=4:suppressions={ROOT}/tests/tsan.suppressions",
        }


ADDRESS = Sanitizer("address", "address,undefined", "libasan.so")
THREAD = Sanitizer("thread", "thread", "libtsan.so")
SANITIZERS = {by.name: by for by in (ADDRESS, THREAD)}


def reported(reports: Path) -> str:
    """Return all reports; nothing if there is no error."""
    return "\n".join(path.read_text(errors="replace")[:6000] for path in sorted(reports.glob("report*")))
