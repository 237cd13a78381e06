"""Parsing of one policy file: from its bytes to its policies, or to the errors in it.

The module runs in the thread that reads the folder. It imports pydantic, so it is imported only when there is a file to
read. A file with an error gives no policy at all.
"""

from __future__ import annotations

from pydantic import ValidationError

from fgpu_ebpf.policy.rules import Policy
from fgpu_ebpf.policy.schema import GpuPolicy, compiled
from fgpu_ebpf.policy.validation import config_errors
from fgpu_ebpf.policy.yaml_document import MOST_ERRORS, ConfigError, Document, InvalidFileError, documents


def read(file: str, data: bytes) -> tuple[list[Policy], list[ConfigError]]:
    """Return the policies of a file in the order of its documents, and its errors. At least one list is empty."""
    policies: list[Policy] = []
    wrong: list[ConfigError] = []
    try:
        for document in documents(file, data):
            _read_document(file, document, policies, wrong)
            if len(wrong) >= MOST_ERRORS:
                break
    except InvalidFileError as invalid:
        wrong.append(invalid.error)
    return ([] if wrong else policies), wrong[:MOST_ERRORS]


def _read_document(file: str, document: Document, policies: list[Policy], wrong: list[ConfigError]) -> None:
    line = document.line(())
    if not isinstance(document.value, dict):
        wrong.append(ConfigError(file, line, "", "is not a policy: write apiVersion, kind, metadata and spec"))
        return
    try:
        policies.append(compiled(GpuPolicy.model_validate(document.value), f"{file}:{line}"))
    except ValidationError as error:
        wrong += config_errors(file, document, GpuPolicy, error)
