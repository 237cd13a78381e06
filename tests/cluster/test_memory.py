"""The memory that all tests before this one have taken together. The name of this file is the last one."""

from __future__ import annotations

from tests.cluster.cluster_kit import Cluster
from tests.support.host import GIB


def test_the_cluster_fits_in_eight_gib(cluster: Cluster) -> None:
    print(f"peak memory {cluster.memory.peak_bytes / GIB:.1f} GiB")
    assert 0 < cluster.memory.peak_bytes < 8 * GIB
