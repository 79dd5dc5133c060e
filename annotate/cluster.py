"""Start Ray on this machine, or attach to a cluster, and say what it has."""

import importlib
import logging
import os
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from tokenlabel.annotate.config import AnnotateConfig
from tokenlabel.annotate.errors import ConfigError

_log = logging.getLogger(__name__)
_PACKAGES = ("annotate", "dataset")


class Resources(NamedTuple):
    """What the teachers get: how many actors, and for each its GPUs and CPU threads (0: ask)."""

    teachers: int
    gpus: float
    threads: int


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


def _connect(address: str | None, folder: Path, num_cpus: int | None) -> None:
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address:
        _check_answers(address)
        modules = [str(_copy_package(folder))]
        ray.init(address=address, runtime_env={"py_modules": modules}, **quiet)
    else:
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
    for name in _PACKAGES:
        source = importlib.import_module(f"tokenlabel.{name}").__path__[0]
        shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    return target


def plan_resources(config: AnnotateConfig) -> Resources:
    """How many teachers the cluster carries, and what each gets.

    Raises:
        ConfigError: `device: cuda` on a cluster without GPUs.
    """
    import ray

    gpus = ray.cluster_resources().get("GPU", 0.0)
    if config.device == "cuda" and gpus < config.gpus_per_teacher:
        raise ConfigError(
            f"device cuda needs {config.gpus_per_teacher} GPUs a teacher, the cluster has {gpus}. "
            "Remedy: device auto or cpu, or start Ray on nodes with GPUs"
        )
    if config.device != "cpu" and gpus >= config.gpus_per_teacher:
        teachers = config.teachers or int(gpus // config.gpus_per_teacher)
        return Resources(teachers, config.gpus_per_teacher, config.threads)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    teachers = config.teachers or len(nodes)
    cpus = max(int(node["Resources"].get("CPU", 1)) for node in nodes)
    shared = max(cpus // -(-teachers // len(nodes)), 1)
    return Resources(teachers, 0.0, config.threads or shared)
