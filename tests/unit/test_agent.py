"""What the agent makes of processes that it can or cannot look at."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from fgpu_ebpf import procfs
from fgpu_ebpf.agent import Agent, Settings
from fgpu_ebpf.procfs import Mapping

MAPPED = {7: [Mapping("/libcuda.so.1", 1, 23)], 8: [], 9: None}


@pytest.mark.parametrize(
    ("with_memory", "dropped"),
    [({7, 8}, [{(1, 11), (1, 23)}]), ({7, 8, 9}, [])],
    ids=["what has no memory maps nothing", "what cannot be read may map anything"],
)
def test_probes_are_dropped_only_if_all_is_known(
    monkeypatch: pytest.MonkeyPatch, with_memory: set[int], dropped: list[set[tuple[int, int]]]
) -> None:
    said: list[set[tuple[int, int]]] = []
    monkeypatch.setattr(procfs, "fgpu_mappings", MAPPED.get)
    monkeypatch.setattr(procfs, "has_memory", with_memory.__contains__)
    agent = Agent(Settings())
    agent.probes = SimpleNamespace(drop_unused=said.append)  # type: ignore[assignment]
    agent._drop_unused([7, 8, 9], {(1, 11)})
    assert said == dropped
