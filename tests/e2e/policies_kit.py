"""Policy files of a running agent."""

from __future__ import annotations

from collections.abc import Callable

from tests.support.commands import metrics

GROUP = "fgpu-e2e"
POLICY = """
apiVersion: fgpu.dev/v1alpha1
kind: GpuPolicy
metadata: {{name: {name}}}
spec:
  selector: {selector}
  {rest}
"""
Write = Callable[..., None]


def reloads() -> float:
    return metrics()["fgpu_config_last_reload_success_timestamp_seconds", frozenset()]


def is_good() -> bool:
    return metrics()["fgpu_config_last_reload_successful", frozenset()] == 1
