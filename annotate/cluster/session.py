"""Start Ray on this machine, or attach to a cluster, and say what it has."""

import logging
import os
import re
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, MutableMapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray._private import ray_constants, services

from ...errors import ConfigError, JobError
from ..config import AnnotateConfig

#: A line of Ray's servers that is an error or worse, up to what it says.
_ERROR_LINE = re.compile(r"\[\S+ \S+ [CEF] [^]]*\] (?:\(\w+\) )?\S+:\s+(.*)")
_MOST_CHARS = 300

_log = logging.getLogger(__name__)
_ROOT = Path(__file__).parents[2]  # the folder that is the package
#: What a teacher actor imports, and what a teacher's file may: a student can be a teacher.
_ROOMS = ("annotate", "configs", "dataset", "supervise")
_QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}


class Resources(NamedTuple):
    """How many teachers there are, and the GPUs and CPU threads of each.

    `fixed` says whether the user gave their number; else it follows the cluster's size.
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
        JobError: Ray does not start on this machine.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray would otherwise hide the GPUs from actors that ask for none, and warn that it will not.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if ray.is_initialized():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    with tempfile.TemporaryDirectory(prefix="tokenlabel-") as folder:
        try:
            if address:
                _attach(address, Path(folder))
            else:
                _start(num_cpus)
        finally:
            # `ray.init` sets a handler that exits, where the caller may have one that tidies up.
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, handler)
        try:
            yield
        finally:
            ray.shutdown()


def _attach(address: str, folder: Path) -> None:
    try:
        host, _, port = address.rpartition(":")
        if host and port.isdigit():  # `ray.init` would try for many minutes
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        # The package's code travels along, for nodes that have not installed it.
        package = folder / "tokenlabel"
        package.mkdir()
        for path in (*_ROOT.glob("*.py"), _ROOT / "py.typed"):
            shutil.copy(path, package)
        for name in _ROOMS:
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(_ROOT / name, package / name, ignore=ignored)
        ray.init(address=address, runtime_env={"py_modules": [str(package)]}, **_QUIET)
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"cannot reach a Ray cluster at {address}: {error}. Remedy: `ray_address` is host:port "
            "of the head node, or auto on a node of the cluster; for a cluster with token "
            "authentication also set RAY_AUTH_MODE=token here and have the cluster's token in "
            "~/.ray/auth_token"
        ) from error


def _start(num_cpus: int | None) -> None:
    for last in (False, True):
        begin = time.time()
        try:
            with (
                # Bind all of Ray's servers to 127.0.0.1, as Ray itself does on macOS and Windows
                # only: in the processes that it starts, and in this one. `_node_ip_address` does
                # not, for Ray replaces it by the address of the network.
                _replaced(os.environ, ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, "0"),
                _replaced(vars(ray_constants), "ENABLE_RAY_CLUSTER", False),
                # Ray starts the dashboard's process even with `include_dashboard=False`. It would
                # serve nothing then, but ask the clouds' metadata services, by DNS and HTTP, which
                # of them this machine is in: for statistics, even where these are off.
                _replaced(vars(services), "start_api_server", lambda *_, **__: ("", None)),
            ):
                ray.init(address="local", include_dashboard=False, num_cpus=num_cpus, **_QUIET)
            return
        except Exception as error:  # Ray raises a bare Exception when its start times out
            ray.shutdown()
            temporary = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
            if "AF_UNIX path length" in str(error):
                raise JobError(
                    "Ray's sockets need a short path for temporary files (107 bytes with Ray's own "
                    f"70); got {temporary}. Remedy: RAY_TMPDIR=/tmp, or another short folder of "
                    "this machine that you can write to"
                ) from error
            cause = "; ".join([str(error).strip(" ."), *_logged(Path(temporary) / "ray", begin)])
            if last:
                raise JobError(
                    f"Ray does not start on this machine: {cause}. Finished shards are kept. "
                    "Remedy: stop other work, free memory, processes and space for temporary "
                    f"files (in {temporary}; RAY_TMPDIR names another folder), and run the same "
                    "command again"
                ) from error
            # On a busy machine Ray's own limit of 30 seconds may pass; its files are cached now.
            _log.warning("Ray did not start (%s); trying once more", cause)


def _logged(folder: Path, begin: float) -> list[str]:
    """What Ray's servers, started since then, wrote of their failure: a line each, at most two."""
    found = []
    for log in sorted(folder.glob("session_[0-9]*/logs/*.err")):
        with suppress(OSError):
            if log.stat().st_mtime < begin:
                continue
            lines = log.read_text(errors="replace").splitlines()
            # Errors and failed checks, not the stack below them.
            said = [match[1] for line in lines if (match := _ERROR_LINE.match(line))]
            said = said or [line for line in lines if line[:1].isalpha()]
            if said:
                text = said[-1].partition("Check failed: ")[2] or said[-1]
                found.append(f"{log.name} says: {text.strip()[:_MOST_CHARS]}")
    return found[-2:]


@contextmanager
def _replaced(names: MutableMapping[str, Any], name: str, value: Any) -> Iterator[None]:
    before = names.get(name)
    names[name] = value
    try:
        yield
    finally:
        del names[name]
        if before is not None:
            names[name] = before


def plan_resources(config: AnnotateConfig) -> Resources:
    """How many teachers the cluster carries, and what each gets.

    Raises:
        ConfigError: `device: cuda` on a cluster without GPUs.
    """
    nodes = alive_nodes()
    gpus = config.gpus_per_teacher
    if config.device == "cpu" or not teacher_slots(nodes, gpus):
        if config.device == "cuda":
            most = max((node["Resources"].get("GPU", 0.0) for node in nodes), default=0.0)
            raise ConfigError(
                f"device cuda needs {gpus:g} GPUs per teacher on one node, the cluster's nodes "
                f"have {most:g} at most. Remedy: device auto or cpu, or start Ray on nodes with "
                "GPUs"
            )
        gpus = 0.0
    slots = teacher_slots(nodes, gpus)
    hosts = [node for node in nodes if teacher_slots([node], gpus)]
    teachers = config.teachers or slots
    cpus = max(int(node["Resources"].get("CPU", 1)) for node in hosts)
    per_host = -(-teachers // len(hosts))
    threads = config.threads or max(cpus // per_host, 1)
    return Resources(teachers, gpus, threads, fixed=config.teachers > 0)


def alive_nodes() -> list[dict[str, Any]]:
    """The cluster's living nodes, as Ray describes them."""
    return [node for node in ray.nodes() if node["Alive"]]


def teacher_slots(nodes: Iterable[dict[str, Any]], gpus: float) -> int:
    """How many teachers of `gpus` GPUs the nodes carry; of teachers without GPUs, one per node."""
    if gpus == 0:
        return sum(1 for _ in nodes)
    # 1 // 0.1 is 9: a float just below 10 is 10.
    return sum(int(node["Resources"].get("GPU", 0.0) / gpus + 1e-6) for node in nodes)
