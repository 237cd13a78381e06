#!/usr/bin/env python3
"""Make the artefacts of a release: `make.py --into FOLDER ARTEFACT...`, called by `./dev package` and `./dev release`.

Two runs on the same commit make the same bytes, in any folder. The program needs build/shim and build/oci of `./dev
build`, and SOURCE_DATE_EPOCH. Artefacts that are parts of the requested artefacts are made too.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import archives
import yaml

ROOT = Path(__file__).resolve().parents[2]
LOCK = ROOT / "deploy/packages.lock"
PYTHONS = ("3.11", "3.12", "3.13", "3.14")  # the .deb and the .rpm have compiled packages for these versions
PARTS = ("build/shim/libfgpu.so", "build/oci/fgpu-oci")  # made by ./dev build
SOURCES = ("fgpu_ebpf", "bpf", "shim", "oci", "sim/headers.sh", "pyproject.toml", "setup.py", "MANIFEST.in")
SOURCES += ("README.md", "LICENSE", "deploy/slurm", *PARTS)
CHART_CONFIG = "application/vnd.cncf.helm.config.v1+json"
CHART_CONTENT = "application/vnd.cncf.helm.chart.content.v1.tar+gzip"
NAMESPACE = "fgpu"  # of signatures, so that a signature of the same key for another purpose is not valid


def version() -> str:
    """Return the version of fgpu in this tree."""
    (found,) = re.findall('^__version__ = "(.*)"$', (ROOT / "fgpu_ebpf/__init__.py").read_text(), re.MULTILINE)
    return found


def run(*command: str | Path, where: Path = ROOT) -> None:
    """Run a command. Raises SystemExit with its output if it fails."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, cwd=where)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}: {done.returncode}\n{done.stdout}{done.stderr}")


def python(*words: str | Path) -> None:
    """Run pip with this Python, without output."""
    run(sys.executable, "-m", "pip", *words, "--quiet", "--disable-pip-version-check")


class Release:
    """The artefacts of one run.

    `into` is the folder for the artefacts, `work` a folder for intermediate files, and `keep` a folder for downloads
    that the next run may use.
    """

    def __init__(self, into: Path, work: Path, keep: Path) -> None:
        self.into, self._work, self._keep, self.version = into, work, keep, version()
        self.made: dict[str, Path] = {}
        self.packages: dict[Path, list[tuple[str, str]]] = {}  # Debian packages of each image

    def make(self, *kinds: str) -> None:
        """Make the artefacts of these kinds."""
        for kind in kinds:
            self.get(kind)

    def get(self, kind: str) -> Path:
        """Make an artefact, unless it was made in this run, and return its path."""
        if kind not in self.made:
            print(f"dev: making {kind}", file=sys.stderr)
            pattern, make = KINDS[kind]
            made = self._work / "made" / pattern.format(self.version)
            made.parent.mkdir(exist_ok=True)
            make(self, made)
            self._publish(kind, made)
        return self.made[kind]

    def _publish(self, kind: str, made: Path) -> None:
        """Move an artefact to `into`, and remove the same artefact of other versions.

        The last step is a rename(2), because other processes may read or make the same artefact at this time.
        """
        pattern, _ = KINDS[kind]
        if kind not in self.made:
            aside = Path(tempfile.mkdtemp(prefix=".new-", dir=self.into))
            self.made[kind] = self.into / made.name
            shutil.move(made, aside / made.name)
            (aside / made.name).rename(self.made[kind])
            aside.rmdir()
        for old in self.into.glob(pattern.format("*")):
            if old != self.made[kind]:
                old.unlink()

    # -- Python

    def source(self) -> Path:
        """Return a folder with a copy of the files of wheel and sdist, without files of earlier builds."""
        folder = self._work / "source"
        if not folder.exists():
            for name in SOURCES:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                if (ROOT / name).is_dir():
                    shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(ROOT / name, folder / name)
        return folder

    def wheel(self, out: Path) -> None:
        """Build the wheel."""
        folder = self._work / "wheel"
        python("wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", folder, self.source())
        (made,) = folder.glob("*.whl")
        assert made.name == out.name, made
        archives.normal_wheel(made, out)

    def sdist(self, out: Path) -> None:
        """Pack the sources of the wheel, from which pip builds the same wheel."""
        folder = self._work / "sdist"
        code = "import setuptools.build_meta as b, sys; b.build_sdist(sys.argv[1])"
        folder.mkdir()
        run(sys.executable, "-c", code, folder, where=self.source())
        (made,) = folder.glob("*.tar.gz")
        assert made.name == out.name, made
        shutil.unpack_archive(made, folder)
        top = out.name.removesuffix(".tar.gz")
        archives.tar_gz(out, archives.below(folder / top, top))

    def wheels(self) -> Path:
        """Return a folder with every wheel of the lock file, for each Python of PYTHONS. pip checks their digests."""
        folder = self._keep / archives.sha256(LOCK)[:16]
        if not folder.exists():
            self._keep.mkdir(parents=True, exist_ok=True)
            aside = Path(tempfile.mkdtemp(dir=self._keep))
            for number in PYTHONS:
                words = ["--python-version", number, "--platform", "manylinux2014_x86_64", "--only-binary=:all:"]
                python("download", "--no-deps", "--require-hashes", *words, "--dest", aside, "--requirement", LOCK)
            with contextlib.suppress(OSError):  # another process may have made the folder
                aside.rename(folder)
        return folder

    # -- packages of distributions

    def stage(self) -> Path:
        """Return the folder with the tree of files that both packages contain."""
        folder = self._work / "stage"
        if not folder.exists():
            run(ROOT / "deploy/stage", sys.executable, self.get("wheel"), self.wheels(), folder)
        return folder

    def deb(self, out: Path) -> None:
        """Build the Debian package."""
        run(ROOT / "deploy/debian/build", self.stage(), self.version, out.parent)

    def rpm(self, out: Path) -> None:
        """Build the RPM package."""
        run(ROOT / "deploy/rpm/build", self.stage(), self.version, out.parent)

    # -- images

    def images(self, _: Path) -> None:
        """Build both images with one engine."""
        import images  # here, because it needs Python packages that the other artefacts do not need

        kinds = {"agent-image": "agent", "device-plugin-image": "device-plugin"}
        deb = self.get("deb")
        with images.engine(ROOT / "build/engines", self._work) as docker:
            for artefact, kind in kinds.items():
                made = self._work / "made" / KINDS[artefact][0].format(self.version)
                packages = images.build(docker, kind, self.version, deb, self._work, made)
                self._publish(artefact, made)
                self.packages[self.made[artefact]] = packages

    # -- files

    def chart(self, out: Path) -> None:
        """Pack the Helm chart."""
        folder = ROOT / "deploy/helm/fgpu"
        assert yaml.safe_load((folder / "Chart.yaml").read_text())["version"] == self.version
        archives.tar_gz(out, archives.below(folder, "fgpu"))

    def chart_layout(self, out: Path) -> None:
        """Write the chart as an OCI layout, as `helm push` stores it in a registry."""
        facts = yaml.safe_load((ROOT / "deploy/helm/fgpu/Chart.yaml").read_text())
        config = archives.Blob(CHART_CONFIG, archives.as_json(facts))
        layer = archives.Blob(CHART_CONTENT, self.get("chart"))
        archives.oci_layout(out, config, [layer], f"fgpu:{self.version}")

    def bake(self, out: Path) -> None:
        """Pack all files that `docker buildx bake` needs for the images of docs/clearml.md."""
        top = out.name.removesuffix(".tar.gz")
        files = archives.below(ROOT / "deploy/images", f"{top}/deploy/images", ["agent", "device-plugin"])
        files |= {f"{top}/{name}": ROOT / name for name in ("LICENSE", "docs/clearml.md")}
        archives.tar_gz(out, files | {f"{top}/build/shim/libfgpu.so": ROOT / "build/shim/libfgpu.so"})

    def dashboards(self, out: Path) -> None:
        """Pack dashboards and alerts, with the files that install them."""
        archives.tar_gz(out, archives.below(ROOT / "dashboards", out.name.removesuffix(".tar.gz")))

    def sbom(self, out: Path) -> None:
        """Write the SBOM of all artefacts that were made."""
        import sbom

        bundles = {self.made.get(kind) for kind in ("deb", "rpm", "agent-image", "device-plugin-image")}
        artefacts = {path: path in bundles for path in self.made.values()}
        wheels = sorted(self.wheels().iterdir())
        sbom.write(out, self.version, artefacts, wheels, self.packages, "bookworm")

    def checksums(self, out: Path) -> None:
        """Write the digest of each artefact, in the format of `sha256sum --check`."""
        lines = [f"{archives.sha256(path)}  {path.name}\n" for path in sorted(self.made.values())]
        out.write_text("".join(lines))


def sign(file: Path, key: Path) -> None:
    """Write FILE.sig with `ssh-keygen -Y sign`. The SSH key may be in an SSH agent or on a token."""
    file.with_suffix(".sig").unlink(missing_ok=True)
    subprocess.run(["ssh-keygen", "-q", "-Y", "sign", "-f", key, "-n", NAMESPACE, file], check=True)


# The kinds of artefacts: the name of the file, with {} for the version, and the function that makes it.
KINDS: dict[str, tuple[str, Callable[[Release, Path], None]]] = {
    "wheel": ("fgpu_ebpf-{}-py3-none-manylinux2014_x86_64.whl", Release.wheel),
    "sdist": ("fgpu_ebpf-{}.tar.gz", Release.sdist),
    "deb": ("fgpu_{}_amd64.deb", Release.deb),
    "rpm": ("fgpu-{}-1.x86_64.rpm", Release.rpm),
    "chart": ("fgpu-{}.tgz", Release.chart),
    "chart-layout": ("fgpu-chart-{}.oci.tar", Release.chart_layout),
    "bake": ("fgpu-limit-images-{}.tar.gz", Release.bake),
    "dashboards": ("fgpu-dashboards-{}.tar.gz", Release.dashboards),
    "agent-image": ("fgpu-agent-image-{}.oci.tar", Release.images),
    "device-plugin-image": ("fgpu-device-plugin-image-{}.oci.tar", Release.images),
    "sbom": ("fgpu-{}.cdx.json", Release.sbom),
    "checksums": ("SHA256SUMS", Release.checksums),
}


def main() -> None:
    """Make the artefacts that the command line names, or all artefacts if it names none."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--into", type=Path, required=True)
    parser.add_argument("--keep", type=Path, default=ROOT / "build/wheels", help="the folder of downloaded wheels")
    parser.add_argument("--sign", type=Path, metavar="KEY", help="sign the checksums with this SSH key")
    parser.add_argument("kinds", nargs="*", metavar="ARTEFACT", help=" ".join(KINDS))
    asked = parser.parse_args()
    if wrong := set(asked.kinds) - KINDS.keys():
        parser.error(f"no artefact {' '.join(sorted(wrong))}: choose from {' '.join(KINDS)}")
    os.umask(0o022)
    os.environ["PYTHONHASHSEED"] = "0"
    into = asked.into.absolute()
    into.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fgpu-") as work:
        release = Release(into, Path(work), asked.keep.absolute())
        release.make(*(asked.kinds or KINDS))
        if asked.sign:
            sign(release.get("checksums"), asked.sign)
    for path in sorted(release.made.values()):
        print(path)


if __name__ == "__main__":
    main()
