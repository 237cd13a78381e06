"""The fuzzers in C, and their builds: by clang with libFuzzer, or by gcc with drive.c.

Both report the errors of AddressSanitizer and UndefinedBehaviorSanitizer. gcc exists wherever fgpu is built. libFuzzer
measures which code an input reaches, and so finds more errors.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
_SANITIZED = ("-std=gnu11", "-O1", "-g", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all")
_CHECKS = "address,undefined"
_SERVER_MAIN = ROOT / "sim/server/main.c"  # fuzz_server.c includes it
_SERVER_SOURCES = sorted({*(ROOT / "sim/server").rglob("*.c"), ROOT / "sim/wire/link.c"} - {_SERVER_MAIN})
_SERVER = tuple(str(path.relative_to(ROOT)) for path in _SERVER_SOURCES)


@dataclass(frozen=True)
class Harness:
    """One fuzzer.

    Its own source is `fuzz_NAME.c`. `sources` are compiled with it, besides the sources that it includes.
    """

    name: str
    sources: tuple[str, ...]
    flags: tuple[str, ...]

    def build(self, out: Path, guided: bool = False) -> Path:
        """Build the program. `guided`: by clang, with libFuzzer."""
        files = [HERE / f"fuzz_{self.name}.c", *(ROOT / source for source in self.sources)]
        compiler = (
            ["clang", f"-fsanitize=fuzzer,{_CHECKS}", "-Wno-c2x-extensions"]
            if guided
            else ["gcc", f"-fsanitize={_CHECKS}"]
        )
        files += [] if guided else [HERE / "drive.c"]
        headers = ["-isystem", ROOT / "build/headers"]
        program = out / self.name
        subprocess.run([*compiler, *_SANITIZED, *self.flags, *headers, *files, "-o", program], check=True, timeout=300)
        return program


HARNESSES = {
    harness.name: harness
    for harness in (
        Harness(
            "answer",
            (
                "shim/account/admit.c",
                "shim/account/capture_mode.c",
                "shim/account/device.c",
                "shim/hooks/processes.c",
                "shim/hooks/view.c",
            ),
            (f"-I{ROOT}/shim", f"-I{ROOT}/bpf", "-fvisibility=hidden", "-fno-strict-aliasing"),
        ),
        Harness("server", _SERVER, (f"-I{ROOT}/sim", "-D_GNU_SOURCE", "-pthread")),
    )
}
