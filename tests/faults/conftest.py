"""`rounds`, which `--soak` multiplies, and `observed`, which fills the table of faults."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.table import ROWS, Row, command


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
    """`rounds(quick, long)`: how often to try, in `make test` and in `make soak`."""
    return lambda quick, long: long if soak else quick


@pytest.fixture
def observed(request: pytest.FixtureRequest, soak: bool) -> Callable[[str, int, str, str], None]:
    """`observed(fault, rounds, expected, seen)`: add a row to the table, after the assertions."""

    def add(fault: str, rounds: int, expected: str, seen: str) -> None:
        row = Row(fault, rounds, expected, seen, command(request.node.nodeid, soak))
        request.config.stash[ROWS].append(row)

    return add
