"""What all tests share: which ones run, and one thread a process."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from tests.integration.worlds import Launcher
from tests.torchvision_ops import DeclareOperators
from vitscale.world import enter, local_device

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: tests run several processes on few cores
sys.meta_path.insert(0, DeclareOperators())
# No test fails for the time that it took.
settings.register_profile("vitscale", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("vitscale")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run the long tests too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if local_device() == "cpu":
        for item in items:
            if item.get_closest_marker("gpu"):  # `keywords` has the folders' names too
                item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU here"))
    if not config.getoption("--full"):
        long = [item for item in items if item.get_closest_marker("full")]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if not item.get_closest_marker("full")]


@pytest.fixture(scope="session")
def slurm_required() -> bool:
    """Whether a missing Slurm is a failure (in CI) or a reason to skip."""
    return os.environ.get("VITSCALE_REQUIRE_SLURM") == "1"


@pytest.fixture(scope="session")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    """Starts worlds of forked ranks."""
    started = Launcher(tmp_path_factory.mktemp("logs"))
    yield started
    started.close()


@pytest.fixture
def environment() -> Iterator[None]:
    """os.environ is restored: processes of later tests must not inherit what `world.enter` sets."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def single_rank(environment: None) -> None:
    """The environment of a run of one rank."""
    enter()
