"""The mark of unit tests that need root."""

from __future__ import annotations

import os

import pytest


def needs_root(why: str) -> pytest.MarkDecorator:
    """Return a mark: without root the test is skipped, and the report shows this reason."""
    return pytest.mark.skipif(os.geteuid() != 0, reason=f"needs root: {why}")
