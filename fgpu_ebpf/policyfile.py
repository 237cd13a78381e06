"""One policy file: its text -> policies, or everything that is wrong with it.

Owns: nothing but the way from bytes to policies. Never: opens a file (`policyfolder` does). On failure: faults, each
with its line; a file with one fault gives no policy at all.
"""

from __future__ import annotations

from pydantic import ValidationError

from fgpu_ebpf.faults import faults
from fgpu_ebpf.policy import Policy
from fgpu_ebpf.policymodel import GpuPolicy, compiled
from fgpu_ebpf.yamlfile import MOST_FAULTS, Document, Fault, FaultError, documents


def read(file: str, data: bytes) -> tuple[list[Policy], list[Fault]]:
    """The policies of a file's documents, in their order. With faults, none."""
    policies: list[Policy] = []
    wrong: list[Fault] = []
    try:
        for document in documents(file, data):
            _read_document(file, document, policies, wrong)
            if len(wrong) >= MOST_FAULTS:
                break
    except FaultError as error:
        wrong.append(error.fault)
    return ([] if wrong else policies), wrong[:MOST_FAULTS]


def _read_document(file: str, document: Document, policies: list[Policy], wrong: list[Fault]) -> None:
    line = document.line(())
    if not isinstance(document.value, dict):
        wrong.append(Fault(file, line, "", "is no policy: write apiVersion, kind, metadata and spec"))
        return
    try:
        policies.append(compiled(GpuPolicy.model_validate(document.value), f"{file}:{line}"))
    except ValidationError as error:
        wrong += faults(file, document, GpuPolicy, error)
