"""Tests of the chart in a cluster of Kubernetes' own programs, with the simulated driver: `./dev cluster`."""
