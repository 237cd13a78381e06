"""A guest that runs one suite after another and exits, and the results."""

from __future__ import annotations

import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.kernels.images import HERE, KERNELS, Image

CHECKOUT = HERE.parent.parent
PARTS = ("bench", "e2e", "examples", "headers", "oci", "shim", "sim")  # of build/
VERIFIER = "verifier"  # the suite that loads the programs that the agent would load there, compiled on this machine
MEMORY_MIB = 3072
_COUNTED = {"failure": "failed", "error": "failed", "skipped": "skipped"}
# Options that make an emulated processor fast: no wide registers, for which TCG has helpers, and no guard against
# speculation. The clock is the processor's own, because reading it leaves the emulation least often.
_PROCESSOR = "Nehalem,+rdtscp"
_APPEND = "console=ttyS0 loglevel=4 rdinit=/init panic=1 mitigations=off tsc=reliable clocksource=tsc nokaslr audit=0"


@dataclass(frozen=True, slots=True)
class Outcome:
    """The numbers of tests.

    `reasons` has a line for each test that failed or was skipped, and for an incomplete suite.
    """

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    reasons: tuple[str, ...] = ()
    good: bool = False


def run(image: Image, suites: Mapping[str, Sequence[str]], seconds: int) -> dict[str, Outcome]:
    """Boot a guest, run the suites, and read the reports. build/kernels/out/RELEASE-SUITES keeps all of its output."""
    out = KERNELS / "out" / "-".join([image.release, *suites])
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    shutil.copy(HERE / "guest.sh", out)
    parts = " ".join(part for part in PARTS if (CHECKOUT / "build" / part).exists())
    if VERIFIER in suites:
        version = ".".join(image.release.split(".")[:2])
        subprocess.run(["/usr/bin/python3", HERE / "compile.py", version, out / "programs"], check=True, timeout=300)
    (out / "what").write_text(f"{CHECKOUT}\n{parts}\n")
    (out / "suites").write_text("".join("\t".join([name, *words]) + "\n" for name, words in suites.items()))
    print(f"{image.release}: {', '.join(suites)}; its output is in {out}", flush=True)
    late = ""
    with (out / "console").open("wb") as console:
        try:
            subprocess.run(_command(image, out), stdout=console, stderr=console, timeout=seconds, check=False)
        except subprocess.TimeoutExpired:
            late = f", within {seconds // 60} minutes"
    return {name: _read(out, name, late) for name in suites}


def _command(image: Image, out: Path) -> list[str]:
    return [
        *("qemu-system-x86_64", "-nodefaults", "-no-reboot", "-display", "none", "-serial", "stdio"),
        *("-machine", "q35", "-accel", "tcg,thread=single,tb-size=512", "-cpu", _PROCESSOR),
        # Its clock counts instructions, so that no deadline there depends on the speed of this machine. It has one
        # processor.
        *("-icount", "shift=0", "-smp", "1", "-m", str(MEMORY_MIB)),
        *("-kernel", str(image.kernel), "-initrd", str(image.initramfs), "-append", _APPEND),
        *("-virtfs", "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap"),
        *("-virtfs", f"local,path={out},mount_tag=out,security_model=none"),
    ]


def _read(out: Path, name: str, late: str) -> Outcome:
    report = out / f"{name}.xml"
    if not report.exists():
        log = out / f"{name}.log"
        said = log.read_text(errors="replace") if log.exists() else ""
        passed, failed = (len(re.findall(rf"^\S.* {word} +\[", said, re.MULTILINE)) for word in ("PASSED", "FAILED"))
        return Outcome(passed, failed, reasons=(f"    it did not end{late}: see {log} and {out}/console",))
    last = {(case.get("classname"), case.get("name")): case for case in ElementTree.parse(report).iter("testcase")}
    counts, reasons = {"passed": 0, "failed": 0, "skipped": 0}, []
    for case in last.values():  # the last trial of a repeated test
        found = next((part for part in case if part.tag in _COUNTED), None)
        outcome = "passed" if found is None else _COUNTED[found.tag]
        counts[outcome] += 1
        if found is not None:
            reasons.append(f"    {outcome}: {case.get('name')}: {_first_line(found)}")
    return Outcome(**counts, reasons=tuple(reasons), good=not counts["failed"])


def _first_line(found: ElementTree.Element) -> str:
    return ((found.get("message") or "").splitlines() or [""])[0][:200]
