from __future__ import annotations

import subprocess
import sys

import pytest

import vitscale

NAMES = ["ViTConfig", "ViTModel", "ViTForImageClassification", "ViTForMaskedImageModeling", "ViTMAEForPreTraining"]


@pytest.mark.parametrize("name", NAMES)
def test_public_names(name: str) -> None:
    assert getattr(vitscale, name).__name__ == name
    assert name in dir(vitscale)


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(ImportError, match="ViTModell"):
        from vitscale import ViTModell  # noqa: F401


def test_import_is_light() -> None:
    code = "import sys, vitscale; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
