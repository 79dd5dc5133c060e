"""Fixtures shared by the tests: the embedded sample, and one Ray session for all of them."""

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

from tests.faults.table import ROWS, write_table
from tokenlabel.annotate.cluster.session import ray_session
from tokenlabel.annotate.sample import sample_folder

torch.set_num_threads(1)
# Seconds that Ray waits for its server, which starts late on a busy machine.
os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "300")
# CI tries the same examples each time; elsewhere they differ from run to run.
hypothesis.settings.register_profile("default", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("default")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of `make soak`."""
    parser.addoption("--soak", action="store_true", help="try faults for an hour, not a minute")
    parser.addoption("--table", type=Path, help="write what the tests of faults saw to this file")


def pytest_configure(config: pytest.Config) -> None:
    """Make room for what the tests of faults see."""
    config.stash[ROWS] = []


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the table, if asked for."""
    if path := session.config.getoption("--table"):
        write_table(session.config.stash[ROWS], path)


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded sample's folder, with train/ and val/."""
    return sample_folder(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def ray_here() -> Iterator[None]:
    """Ray on the loopback interface, started once; jobs of the tests use it as it is."""
    with ray_session(None, num_cpus=4):  # so that 2 teachers and their decoders run side by side
        yield
