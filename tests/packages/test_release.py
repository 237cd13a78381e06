"""Tests of the output of `./dev release`: the same bytes from two folders, checksums, a signature, and the contents."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.support import fresh_host
from tests.support import packages as kit

IS_FULL = os.environ.get("FGPU_TEST_SCALE") == "full"
IMAGES = ("agent-image", "device-plugin-image")  # these take minutes
CHEAP = ("wheel", "sdist", "deb", "rpm", "chart", "chart-layout", "bake", "dashboards")
LAST = ("sbom", "checksums")
OLD = 1_000_000_000  # seconds since 1970


def names() -> dict[str, str]:
    """Return the name of each artefact, in the order of CHEAP, IMAGES and LAST."""
    (version,) = re.findall('"(.*)"', (kit.ROOT / "fgpu_ebpf/__init__.py").read_text().splitlines()[-1])
    return {
        "wheel": f"fgpu_ebpf-{version}-py3-none-manylinux2014_x86_64.whl",
        "sdist": f"fgpu_ebpf-{version}.tar.gz",
        "deb": f"fgpu_{version}_amd64.deb",
        "rpm": f"fgpu-{version}-1.x86_64.rpm",
        "chart": f"fgpu-{version}.tgz",
        "chart-layout": f"fgpu-chart-{version}.oci.tar",
        "bake": f"fgpu-limit-images-{version}.tar.gz",
        "dashboards": f"fgpu-dashboards-{version}.tar.gz",
        "agent-image": f"fgpu-agent-image-{version}.oci.tar",
        "device-plugin-image": f"fgpu-device-plugin-image-{version}.oci.tar",
        "sbom": f"fgpu-{version}.cdx.json",
        "checksums": "SHA256SUMS",
    }


NAMES = names()


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the key of a release manager."""
    path = tmp_path_factory.mktemp("key") / "key"
    kit.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", path)
    return path


def copied(folder: Path, umask: int, seconds: int | None) -> None:
    """Copy the tree as a clone has it: with other modes, and at another time."""
    listed = kit.run("git", "ls-files", "-co", "--exclude-standard", "-z", cwd=kit.ROOT).stdout
    for name in filter(None, listed.split("\0")):
        if not (kit.ROOT / name).exists():
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(kit.ROOT / name, folder / name, follow_symlinks=False)
        if not (folder / name).is_symlink():
            (folder / name).chmod((folder / name).stat().st_mode & ~umask)
            if seconds is not None:
                os.utime(folder / name, (seconds, seconds))


def release(folder: Path, kinds: tuple[str, ...], key: Path) -> Path:
    """Build the C parts and the artefacts in a copy of the tree. Return the folder of the artefacts."""
    for part in ("shim", "oci"):
        headers = f"HEADERS={kit.BUILD}/headers"
        kit.run("make", "-s", "-j2", "-C", folder / part, f"OUT={folder}/build/{part}", headers)
    if (kit.BUILD / "engines").exists():
        (folder / "build/engines").symlink_to(kit.BUILD / "engines")
    into = folder / "made"
    committed = kit.run("git", "log", "-1", "--format=%ct", cwd=kit.ROOT).stdout.strip()
    environment = {**os.environ, "SOURCE_DATE_EPOCH": committed}
    more = ["--keep", kit.BUILD / "wheels", "--sign", key]
    command = [sys.executable, folder / "deploy/release/make.py", "--into", into, *more, *kinds]
    kit.run(*command, env=environment, timeout=1200)
    return into


@pytest.fixture(scope="module")
def made(key: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """Make the artefacts twice, in two folders with other modes and times; the images only in a full run."""
    kit.run(kit.ROOT / "dev", "package", "image" if IS_FULL else "rpm", timeout=900)  # installs what both need
    kinds = (*CHEAP, *IMAGES, *LAST) if IS_FULL else (*CHEAP, *LAST)
    folders = tmp_path_factory.mktemp("a"), tmp_path_factory.mktemp("other") / "folder"
    for folder, umask, seconds in zip(folders, (0, 0o077), (None, OLD), strict=True):
        copied(folder, umask, seconds)
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda folder: release(folder, kinds, key), folders))
    yield found[0], found[1]
    for folder in folders:
        shutil.rmtree(folder)


@pytest.mark.timeout(4800 if IS_FULL else 240, func_only=True)
def test_two_builds_in_two_folders_have_the_same_bytes(made: tuple[Path, Path]) -> None:
    found = [{path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()} for folder in made]
    kinds = (*CHEAP, *IMAGES, *LAST) if IS_FULL else (*CHEAP, *LAST)
    assert set(found[0]) == {NAMES[kind] for kind in kinds} | {"SHA256SUMS.sig"}
    assert found[0] == found[1]


# -- the commands of docs/install.md


def block(words: str) -> list[str]:
    """Return the commands of the block of docs/install.md that has these words."""
    text = (kit.ROOT / "docs/install.md").read_text()
    (found,) = [part for part in re.findall(r"(?:^ {4}\S.*\n)+", text, re.MULTILINE) if words in part]
    return [line.strip() for line in found.splitlines()]


def checked(folder: Path, key: Path) -> list[int]:
    """Run the page's commands that check a download. Return their exit statuses."""
    public = Path(f"{key}.pub").read_text().split()
    (folder / "fgpu.signers").write_text(f"fgpu {public[0]} {public[1]}\n")
    commands = block("ssh-keygen -Y verify")
    assert len(commands) == 2
    return [subprocess.run(command, shell=True, cwd=folder, capture_output=True).returncode for command in commands]


def test_checksums_and_signature_are_verified_by_the_page_s_commands(
    made: tuple[Path, Path], key: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "download"
    folder.mkdir()
    for kind in ("deb", "sbom", "checksums"):  # a user downloads a part of the artefacts
        shutil.copy(made[0] / NAMES[kind], folder)
    shutil.copy(made[0] / "SHA256SUMS.sig", folder)
    assert checked(folder, key) == [0, 0]
    with open(folder / NAMES["deb"], "ab") as file:
        file.write(b"x")
    assert checked(folder, key)[1] != 0, "another package"
    shutil.copy(made[0] / NAMES["deb"], folder)
    with open(folder / "SHA256SUMS", "a") as lines:
        lines.write(f"{'0' * 64}  other\n")
    assert checked(folder, key)[0] != 0, "other checksums"


def test_a_signature_by_another_key_is_refused(made: tuple[Path, Path], tmp_path: Path) -> None:
    kit.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "other")
    folder = tmp_path / "download"
    shutil.copytree(made[0], folder)
    assert checked(folder, tmp_path / "other")[0] != 0


# -- contents


def test_the_sbom_names_every_artefact_and_every_bundled_package(made: tuple[Path, Path]) -> None:
    sbom = json.loads((made[0] / NAMES["sbom"]).read_text())
    parts = {part["name"]: part for part in sbom["components"]}
    for path in made[0].iterdir():
        if path.name.startswith(("SHA256SUMS", NAMES["sbom"])):
            continue
        (digest,) = parts[path.name]["hashes"]
        assert digest["content"] == hashlib.sha256(path.read_bytes()).hexdigest(), path.name
    lock = (kit.ROOT / "deploy/packages.lock").read_text()
    locked = dict(re.findall(r"^([\w.-]+)==(\S+)", lock, re.MULTILINE))
    found = {
        re.sub(r"[-_.]+", "-", part["name"]).lower(): part["version"]
        for part in sbom["components"]
        if part.get("purl", "").startswith("pkg:pypi/")
    }
    assert found == locked
    (inside,) = [one["dependsOn"] for one in sbom["dependencies"] if one["ref"] == NAMES["deb"]]
    assert len(inside) >= len(locked)


def test_the_sdist_builds_the_same_wheel(made: tuple[Path, Path], tmp_path: Path) -> None:
    words = ["--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", tmp_path, made[0] / NAMES["sdist"]]
    kit.run(sys.executable, "-m", "pip", "wheel", *words, timeout=200)
    (rebuilt,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(rebuilt) as one, zipfile.ZipFile(made[0] / NAMES["wheel"]) as other:
        contents = [{name: file.read(name) for name in file.namelist()} for file in (one, other)]
    assert contents[0] == contents[1]


def blobs(layout: Path) -> dict[str, Any]:
    """Return the parts of an OCI layout by digest, after a check of each digest.

    `index` is the contents of index.json.
    """
    found: dict[str, Any] = {}
    with tarfile.open(layout) as tar:
        for info in tar:
            data = tar.extractfile(info)
            assert data
            text = data.read()
            if info.name.startswith("blobs/"):
                digest = f"sha256:{hashlib.sha256(text).hexdigest()}"
                assert info.name == f"blobs/{digest.replace(':', '/')}"
                found[digest] = text
            elif info.name == "index.json":
                found["index"] = json.loads(text)
            elif info.name == "oci-layout":
                assert json.loads(text) == {"imageLayoutVersion": "1.0.0"}
    return found


def test_the_layout_of_the_chart_has_the_chart(made: tuple[Path, Path]) -> None:
    parts = blobs(made[0] / NAMES["chart-layout"])
    (manifest,) = parts["index"]["manifests"]
    shown = json.loads(parts[manifest["digest"]])
    assert json.loads(parts[shown["config"]["digest"]])["name"] == "fgpu"
    (layer,) = shown["layers"]
    assert parts[layer["digest"]] == (made[0] / NAMES["chart"]).read_bytes()
    with tarfile.open(fileobj=io.BytesIO(parts[layer["digest"]])) as tar:
        chart = kit.ROOT / "deploy/helm/fgpu"
        expected = {f"fgpu/{path.relative_to(chart)}" for path in chart.rglob("*") if path.is_file()}
        assert set(tar.getnames()) == expected
        assert all(info.isfile() for info in tar), "helm follows no link"


def test_the_archive_of_the_images_has_the_files_of_its_bake_file(made: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.unpack_archive(made[0] / NAMES["bake"], tmp_path)
    (top,) = tmp_path.iterdir()
    text = (top / "deploy/images/docker-bake.hcl").read_text()
    (context,) = re.findall(r'^ *context *= "(.*)"$', text, re.MULTILINE)
    (file,) = re.findall(r'^ *dockerfile *= "(.*)"$', text, re.MULTILINE)
    for name in re.findall(r"^COPY (\S+) ", (top / context / file).read_text(), re.MULTILINE):
        assert (top / context / name).stat().st_size > 10_000


# -- the .rpm


def test_the_rpm_has_the_files_of_the_deb(made: tuple[Path, Path]) -> None:
    listed = kit.run("rpm", "-qpl", "--nosignature", made[0] / NAMES["rpm"]).stdout.splitlines()
    with_folders = kit.run("dpkg-deb", "--contents", made[0] / NAMES["deb"]).stdout.splitlines()
    deb = {line.split(maxsplit=5)[5].removeprefix(".") for line in with_folders if not line.startswith("d")}
    deb = {name.replace("/zsh/vendor-completions/", "/zsh/site-functions/") for name in deb}
    assert deb - set(listed) == {"/usr/share/doc/fgpu/copyright"}
    asked = kit.run("rpm", "-qp", "--nosignature", "--requires", made[0] / NAMES["rpm"]).stdout
    assert {"python3-bcc", "python3 >= 3.11"} <= set(asked.splitlines())


def test_the_rpm_enforces_and_keeps_measurements_after_its_removal(
    host: fresh_host.Host, made: tuple[Path, Path], tmp_path: Path
) -> None:
    """rpm itself runs in a root of this distribution, where its dependencies have other names."""
    host.apt("install", "rpm", "python3-bpfcc")
    before = fresh_host.listing(host.root)
    shutil.copy(made[0] / NAMES["rpm"], host.root / "tmp/fgpu.rpm")
    try:
        host.run("rpm", "--install", "--nodeps", "/tmp/fgpu.rpm")
        host.start_agent(tmp_path / "log")
        kit.assert_enforced(host, "rpm")
    finally:
        host.run("rpm", "--erase", "--nodeps", "fgpu")
        host.stop()
    left = [name for name in host.left(before) if "rpm" not in name and not name.startswith("etc/g")]
    # The folders belong to other packages on distributions of rpm. Their parent may exist already.
    others = {"usr/share/fish", "usr/share/fish/vendor_completions.d", "usr/share/zsh", "usr/share/zsh/site-functions"}
    # usage.db is written every half minute.
    measured = {"var/lib/fgpu", "var/lib/fgpu/contexts.json", "var/lib/fgpu/usage.db"}
    assert set(left) - others <= measured, left
    assert host.pins() == []
