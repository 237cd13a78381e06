"""A guest that runs one suite and ends; what came of it."""

from __future__ import annotations

import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

from images import HERE, KERNELS, Image

CHECKOUT = HERE.parent.parent
PARTS = ("bench", "e2e", "examples", "headers", "oci", "shim", "sim")  # of build/
_COUNTED = {"failure": "failed", "error": "failed", "skipped": "skipped"}
VERIFIER = "tests/kernels/verify_programs.py"
MEMORY_MIB = 3072


@dataclass(frozen=True, slots=True)
class Outcome:
    """How many tests; `reasons` has a line for each that failed or was skipped. No number: the guest did not end."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    reasons: tuple[str, ...] = ()
    good: bool = False


def run(image: Image, suite: str, seconds: int) -> Outcome:
    """Boots, runs, and reads the report; build/kernels/out/RELEASE-SUITE keeps all that the guest said."""
    out = KERNELS / "out" / f"{image.release}-{suite.replace('/', '-')}"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    shutil.copy(HERE / "guest.sh", out)
    parts = " ".join(part for part in PARTS if (CHECKOUT / "build" / part).exists())
    if suite == VERIFIER:
        version = ".".join(image.release.split(".")[:2])
        subprocess.run(["/usr/bin/python3", HERE / "compile.py", version, out / "programs"], check=True, timeout=120)
    (out / "what").write_text(f"{CHECKOUT}\n{suite}\n{parts}\n")
    print(f"{image.release}: {suite}, the log is {out}/log", flush=True)
    with (out / "console").open("wb") as console:
        try:
            subprocess.run(_command(image, out), stdout=console, stderr=console, timeout=seconds, check=False)
        except subprocess.TimeoutExpired:
            return Outcome(reasons=(f"not done within {seconds // 60} minutes",))
    return _read(out)


def _command(image: Image, out: Path) -> list[str]:
    append = "console=ttyS0 loglevel=4 rdinit=/init panic=1 mitigations=off"
    return [
        *("qemu-system-x86_64", "-nodefaults", "-no-reboot", "-display", "none", "-serial", "stdio"),
        *("-machine", "q35", "-accel", "tcg,thread=single,tb-size=512", "-cpu", "max"),
        # Its clock counts instructions, so that no deadline there depends on how slow this is; of one processor alone.
        *("-icount", "shift=0", "-smp", "1", "-m", str(MEMORY_MIB)),
        *("-kernel", str(image.kernel), "-initrd", str(image.initramfs), "-append", append),
        *("-virtfs", "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap"),
        *("-virtfs", f"local,path={out},mount_tag=out,security_model=none"),
    ]


def _read(out: Path) -> Outcome:
    if not (out / "report.xml").exists():
        return Outcome(reasons=(f"no report: see {out}/console and {out}/log",))
    counts, reasons = {"passed": 0, "failed": 0, "skipped": 0}, []
    for case in ElementTree.parse(out / "report.xml").iter("testcase"):
        found = next((part for part in case if part.tag in _COUNTED), None)
        outcome = "passed" if found is None else _COUNTED[found.tag]
        counts[outcome] += 1
        if found is not None:
            reasons.append(f"    {outcome}: {case.get('name')}: {_first_line(found)}")
    return Outcome(**counts, reasons=tuple(reasons), good=not counts["failed"])


def _first_line(found: ElementTree.Element) -> str:
    return ((found.get("message") or "").splitlines() or [""])[0][:200]
