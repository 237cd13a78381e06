"""The SBOM of a release, in the format CycloneDX: every artefact with its digest, and the packages in it.

The Python packages are those of deploy/packages.lock, and the Debian packages are those of the images. The CycloneDX
library validates the document against its schema.
"""

from __future__ import annotations

import datetime
import email.parser
import uuid
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import archives
from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import HashAlgorithm, HashType
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packageurl import PackageURL

SPACE = uuid.UUID("5c1f8f0e-6b0c-5d0a-9c0e-2f6f6d6a7c11")  # for serial numbers that depend on the contents only


def _hashes(path: Path) -> list[HashType]:
    return [HashType(alg=HashAlgorithm.SHA_256, content=archives.sha256(path))]


def _python(wheel: Path) -> Component:
    """Return the component for a wheel, by the wheel's own metadata."""
    with zipfile.ZipFile(wheel) as file:
        (name,) = [name for name in file.namelist() if name.endswith(".dist-info/METADATA") and name.count("/") == 1]
        facts = email.parser.Parser().parsestr(file.read(name).decode())
    url = PackageURL("pypi", name=facts["Name"].lower().replace("_", "-"), version=facts["Version"])
    licence = facts["License-Expression"] or facts["License"] or ""
    known = [LicenseFactory().make_from_string(licence)] if licence and "\n" not in licence else []
    return Component(
        name=facts["Name"],
        version=facts["Version"],
        type=ComponentType.LIBRARY,
        bom_ref=f"{url}#{wheel.name}",
        purl=url,
        hashes=_hashes(wheel),
        licenses=known,
    )


def _debian(name: str, version: str, suite: str) -> Component:
    url = PackageURL("deb", "debian", name, version, {"arch": "amd64", "distro": suite})
    return Component(name=name, version=version, type=ComponentType.LIBRARY, bom_ref=str(url), purl=url)


def _artefact(path: Path, version: str) -> Component:
    return Component(name=path.name, version=version, type=ComponentType.FILE, bom_ref=path.name, hashes=_hashes(path))


def write(
    out: Path,
    version: str,
    artefacts: Mapping[Path, bool],
    wheels: Sequence[Path],
    images: Mapping[Path, Sequence[tuple[str, str]]],
    suite: str,
) -> None:
    """Write the document.

    Args:
        out: the file.
        version: the version of fgpu.
        artefacts: the artefacts, each with whether it contains the wheels.
        wheels: the wheels of the lock file.
        images: name and version of each Debian package in each image.
        suite: the Debian release of the images.

    Raises:
        SystemExit: the document does not match the schema.
    """
    bom = Bom()
    root = Component(name="fgpu", version=version, type=ComponentType.APPLICATION, bom_ref="fgpu")
    root.licenses.add(LicenseFactory().make_from_string("Apache-2.0"))
    bom.metadata.component = root
    bom.metadata.timestamp = datetime.datetime.fromtimestamp(archives.epoch(), datetime.UTC)
    python = [_python(wheel) for wheel in wheels]
    bom.components.update(python)
    made = []
    for path, bundles in artefacts.items():
        artefact = _artefact(path, version)
        inside = list(python) if bundles else []
        inside += [_debian(name, known, suite) for name, known in images.get(path, ())]
        bom.components.update([artefact, *inside])
        bom.register_dependency(artefact, inside)
        made.append(artefact)
    bom.register_dependency(root, made)
    digests = "".join(sorted(archives.sha256(path) for path in artefacts))
    bom.serial_number = uuid.uuid5(SPACE, digests)
    text = JsonV1Dot6(bom).output_as_string(indent=1)
    if error := JsonStrictValidator(SchemaVersion.V1_6).validate_str(text):
        raise SystemExit(f"the SBOM does not fit CycloneDX's schema: {error}")
    out.write_text(text + "\n")
