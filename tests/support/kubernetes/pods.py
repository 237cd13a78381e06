"""Containers with kubelet's answer, as a container runtime that reads CDI starts them. Imports nothing of fgpu."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.support.containers import engines
from tests.support.tenant import Tenant


class Pods(engines.Bundles):
    """Containers that a container runtime creates from kubelet's answer."""

    def __init__(self, work: Path, runtime: str, folders: list[Path]) -> None:
        super().__init__(work, runtime)
        self._folders = folders
        self.names: list[str] = []
        self.answer: Any = None

    def pod(self, answer: Any = None, names: list[str] | None = None) -> Tenant:
        """Start one container with the plugin's `answer`, or with the CDI devices `names`."""
        self.answer, self.names = answer, names or [device.name for device in answer.cdi_devices]
        return self.tenant(None)

    def _bundle(self, bundle: Path, name: str, folder: Path) -> None:
        super()._bundle(bundle, name, folder)
        path = bundle / "config.json"
        config = json.loads(path.read_text())
        if self.answer is not None:
            config["process"]["env"] += [f"{key}={value}" for key, value in self.answer.envs.items()]
        whole: list[dict[str, Any]] = []
        for qualified in self.names:  # as in CDI's library: a specification's own edits are applied once
            kind, _, device = qualified.partition("=")
            (spec,) = [spec for spec in self.specs() if spec["kind"] == kind and device in named(spec)]
            common = {} if spec in whole else spec["containerEdits"]
            whole.append(spec)
            engines.inject(config, {**spec, "containerEdits": common}, device)
        path.write_text(json.dumps(config))

    def specs(self) -> list[dict[str, Any]]:
        """Return all specifications that engines find."""
        return [json.loads(path.read_text()) for folder in self._folders for path in folder.glob("*.json")]


def named(spec: dict[str, Any]) -> list[str]:
    """Return the devices of a specification."""
    return [device["name"] for device in spec["devices"]]
