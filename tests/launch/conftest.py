"""What the tests of the scripts share."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest


@pytest.fixture
def venv(tmp_path: Path) -> str:
    """A folder like a virtual environment's, with the Python that runs this test."""
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (tmp_path / "venv" / "bin" / "python").chmod(0o755)
    return str(tmp_path / "venv")
