"""`rounds`, which `--soak` multiplies, and `observed`, which fills the table of faults."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.processes import IMAGES, OPTIONS
from tests.faults.table import ROWS, Row, command
from tests.jobs import arguments, digests, repeat_images, run


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Give the long form more time."""
    for item in items:
        if config.getoption("--soak") and item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.timeout(3600))


@pytest.fixture
def soak(request: pytest.FixtureRequest) -> bool:
    """Whether this is the long form."""
    return bool(request.config.getoption("--soak"))


@pytest.fixture
def rounds(soak: bool) -> Callable[[int, int], int]:
    """`rounds(quick, long)`: how often to try, in `make test-faults` and in `make soak`."""
    return lambda quick, long: long if soak else quick


@pytest.fixture
def observed(request: pytest.FixtureRequest, soak: bool) -> Callable[[str, int, str, str], None]:
    """`observed(fault, rounds, expected, seen)`: add a row to the table, after the assertions."""

    def add(fault: str, rounds: int, expected: str, seen: str) -> None:
        row = Row(fault, rounds, expected, seen, command(request.node.nodeid, soak))
        request.config.stash[ROWS].append(row)

    return add


@pytest.fixture(scope="session")
def many_images(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set that takes a job some seconds."""
    return repeat_images(sample, tmp_path_factory.mktemp("many"), IMAGES)


@pytest.fixture(scope="session")
def undisturbed(many_images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Digests of what a job on this machine alone makes of it when nothing comes between."""
    out = tmp_path_factory.mktemp("undisturbed")
    done = run(*arguments(many_images, out, **OPTIONS))
    assert done.returncode == 0, done.stderr
    return digests(out / "train")
