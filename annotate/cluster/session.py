"""Start Ray on this machine, or attach to a cluster, and say what it has."""

import importlib
import logging
import os
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import ConfigError
from ..config import AnnotateConfig

_log = logging.getLogger(__name__)
_ROOT = Path(__file__).parents[2]  # the folder that is the package
_ROOMS = ("annotate", "dataset")


class Resources(NamedTuple):
    """What the teachers get.

    Attributes:
        teachers: how many actors.
        gpus, threads: GPUs and CPU threads of each.
        fixed: whether the user gave their number; else it follows the cluster's size.
    """

    teachers: int
    gpus: float
    threads: int
    fixed: bool = False


@contextmanager
def ray_session(address: str | None, num_cpus: int | None = None) -> Iterator[None]:
    """Ray for the `with` block; a session that the caller had started is used and left running.

    Without an address, Ray runs on this machine only, bound to the loopback interface, without
    dashboard or usage statistics.

    Args:
        address: host:port of a cluster's head node, "auto", or None.
        num_cpus: decode tasks at a time on this machine; None: its cores.

    Raises:
        ConfigError: no cluster answers at the address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray would otherwise hide the GPUs from actors that ask for none, and warn that it will not.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        yield
        return
    where = nullcontext() if address else _loopback_only()
    with where, tempfile.TemporaryDirectory(prefix="tokenlabel-") as folder:
        try:
            with _own_signals():
                _connect(address, Path(folder), num_cpus)
        except (OSError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"cannot reach a Ray cluster at {address or 'this machine'}: {error}. Remedy: "
                "`ray_address` is host:port of the head node, or auto on a node of the cluster; "
                "for a cluster with token authentication also set RAY_AUTH_MODE=token here and "
                "have the cluster's token in ~/.ray/auth_token"
            ) from error
        try:
            yield
        finally:
            ray.shutdown()


@contextmanager
def _loopback_only() -> Iterator[None]:
    """Bind all of Ray's servers to 127.0.0.1, as Ray itself does on macOS and Windows only.

    `_node_ip_address="127.0.0.1"` does not: Ray replaces it by the address of the network.
    """
    from ray._private import ray_constants

    name = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    before, enabled = os.environ.get(name), ray_constants.ENABLE_RAY_CLUSTER
    os.environ[name] = "0"  # for the processes that Ray starts
    ray_constants.ENABLE_RAY_CLUSTER = False  # read from the environment long ago
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = enabled
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


@contextmanager
def _no_dashboard() -> Iterator[None]:
    """Keep Ray from starting the dashboard's process, which `include_dashboard=False` does not.

    It would serve nothing then, but ask the clouds' metadata services, by DNS and HTTP, which of
    them this machine is in: for statistics, even where these are off.
    """
    services = importlib.import_module("ray._private.services")
    start = getattr(services, "start_api_server", None)
    if start is None:  # not in this release of Ray
        yield
        return
    vars(services)["start_api_server"] = lambda *_, **__: ("", None)  # no address, no process
    try:
        yield
    finally:
        vars(services)["start_api_server"] = start


def _connect(address: str | None, folder: Path, num_cpus: int | None) -> None:
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address:
        _check_answers(address)
        modules = [str(_copy_package(folder))]
        ray.init(address=address, runtime_env={"py_modules": modules}, **quiet)
    else:
        with _no_dashboard():
            ray.init(address="local", include_dashboard=False, num_cpus=num_cpus, **quiet)


def _check_answers(address: str) -> None:
    """Raise OSError unless something listens there; `ray.init` would try for many minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep the caller's SIGTERM handler, which `ray.init` replaces with one that exits."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


def _copy_package(folder: Path) -> Path:
    """The package's code in a folder `tokenlabel`, for nodes that have not installed it."""
    target = folder / "tokenlabel"
    target.mkdir()
    for path in (*_ROOT.glob("*.py"), _ROOT / "py.typed"):
        shutil.copy(path, target)
    for name in _ROOMS:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(_ROOT / name, target / name, ignore=ignored)
    return target


def plan_resources(config: AnnotateConfig) -> Resources:
    """How many teachers the cluster carries, and what each gets.

    Raises:
        ConfigError: `device: cuda` on a cluster without GPUs.
    """
    nodes = alive_nodes()
    gpus = config.gpus_per_teacher
    if config.device == "cpu" or not places(nodes, gpus):
        if config.device == "cuda":
            most = max((node["Resources"].get("GPU", 0.0) for node in nodes), default=0.0)
            raise ConfigError(
                f"device cuda needs {gpus:g} GPUs a teacher on one node, the cluster's nodes have "
                f"{most:g} at most. Remedy: device auto or cpu, or start Ray on nodes with GPUs"
            )
        gpus = 0.0
    hosts = [node for node in nodes if places([node], gpus)]
    teachers = config.teachers or places(nodes, gpus)
    cpus = max(int(node["Resources"].get("CPU", 1)) for node in hosts)
    shared = max(cpus // -(-teachers // len(hosts)), 1)
    return Resources(teachers, gpus, config.threads or shared, fixed=config.teachers > 0)


def alive_nodes() -> list[dict[str, Any]]:
    """The cluster's living nodes, as Ray describes them."""
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def places(nodes: Iterable[dict[str, Any]], gpus: float) -> int:
    """How many teachers of `gpus` GPUs the nodes carry: of teachers without any, one a node."""
    if gpus == 0:
        return sum(1 for _ in nodes)
    # 1 // 0.1 is 9: a float just below 10 is 10.
    return sum(int(node["Resources"].get("GPU", 0.0) / gpus + 1e-6) for node in nodes)
