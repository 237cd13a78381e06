"""The workloads that a policy selects: by path, namespace, image, unit and labels.

The functions do no I/O, and run in the agent and in `fgpu policy`.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import NamedTuple

from fgpu_ebpf.policy.globs import Globs
from fgpu_ebpf.workloads.workload import Workload

CUT = "the workload has too many labels, and the policy selects by a label that was left out or does not exist"


class Operator(StrEnum):
    """The kind of a test of a label."""

    IN = "In"
    NOT_IN = "NotIn"
    EXISTS = "Exists"
    DOES_NOT_EXIST = "DoesNotExist"


class LabelTest(NamedTuple):
    """A test of one label. As in Kubernetes, a missing label passes every NotIn test."""

    key: str
    operator: Operator
    values: frozenset[str] = frozenset()

    def holds(self, labels: Mapping[str, str]) -> bool:
        """Return whether these labels pass the test."""
        match self.operator:
            case Operator.IN:
                return labels.get(self.key) in self.values
            case Operator.NOT_IN:
                return labels.get(self.key) not in self.values
            case Operator.EXISTS:
                return self.key in labels
            case Operator.DOES_NOT_EXIST:
                return self.key not in labels

    def __str__(self) -> str:
        values = f" ({', '.join(sorted(self.values))})" if self.values else ""
        return f"{self.key} {self.operator}{values}"


class Selector(NamedTuple):
    """The workloads that a policy selects. A workload must match all fields that are set."""

    cgroup: Globs | None = None
    namespace: Globs | None = None
    image: Globs | None = None
    unit: Globs | None = None
    labels: tuple[LabelTest, ...] = ()

    def miss(self, workload: Workload) -> str:
        """Return why a workload does not match, or an empty text if the workload matches.

        A workload can create cgroups below its own cgroup. Such a cgroup has the workload's namespace, image and unit,
        but only a selector with a path matches the cgroup.
        """
        if self.cgroup and not self.cgroup.matches(workload.path.lstrip("/")):
            return f"the workload's cgroup matches none of {self.cgroup}"
        if workload.inside and not self.cgroup:
            return "the cgroup is inside the workload's own cgroup, where only selector.cgroup matches"
        for word, globs, name in (
            ("namespace", self.namespace, workload.namespace),
            ("image", self.image, workload.image),
            ("unit", self.unit, workload.unit),
        ):
            if globs and name is None:
                return f"the workload has no {word}"
            if globs and not globs.matches(name or ""):
                return f"the workload's {word} matches none of {globs}"
        failed = next((test for test in self.labels if not test.holds(workload.labels)), None)
        return f"the workload's labels do not match {failed}" if failed else ""

    def depends_on_cut(self, workload: Workload) -> bool:
        """Return whether the match depends on labels that were left out, if labels were left out."""
        if not workload.is_cut:
            return False
        known = tuple(test for test in self.labels if test.key in workload.labels)
        return known != self.labels and not self._replace(labels=known).miss(workload)
