"""Tests that run programs behind a wall, where this machine has one."""

from __future__ import annotations

import shutil

import pytest

needs_wall = pytest.mark.skipif(shutil.which("bwrap") is None, reason="make test-sandbox installs bubblewrap")
