"""Fixtures shared by the tests: the embedded sample, and one Ray session for all of them."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tokenlabel.annotate.sample import sample_folder

torch.set_num_threads(2)


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded sample's folder, with train/ and val/."""
    return sample_folder(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def ray_here() -> Iterator[None]:
    """Ray on the loopback interface, started once; jobs of the tests use it as it is."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    import ray

    ray.init(
        address="local",
        num_cpus=4,  # more than the cores: tests run 2 teachers and decoders side by side
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        _node_ip_address="127.0.0.1",
    )
    yield
    ray.shutdown()
