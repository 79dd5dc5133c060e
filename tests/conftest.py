"""Fixtures shared by the tests: the embedded sample, and one Ray session for all of them."""

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

from tokenlabel.annotate.cluster import ray_session
from tokenlabel.annotate.sample import sample_folder

torch.set_num_threads(2)
# CI tries the same examples each time; elsewhere they differ from run to run.
hypothesis.settings.register_profile("default", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("default")


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded sample's folder, with train/ and val/."""
    return sample_folder(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def ray_here() -> Iterator[None]:
    """Ray on the loopback interface, started once; jobs of the tests use it as it is."""
    with ray_session(None, num_cpus=4):  # so that 2 teachers and their decoders run side by side
        yield
