"""The requests of a process that was forked from one that has made some.

obstore's threads are not in such a process: a request would wait for ever. `ask` has a process of
its own make it, which ends with the one that it serves.

    with RemotePath("s3://bucket/a").open() as file:  # a DataLoader's worker needs no other code
        file.read()
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import lru_cache
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

from ...errors import StoreError


def ask(path: Any, method: str, *args: Any, **options: Any) -> Any:
    """What a method of a path gives, or raises; a list where it gives an iterator."""
    return _server(os.getpid()).ask((path, method, args, options))


class _Server:
    def __init__(self) -> None:
        command = [sys.executable, "-P", "-c", f"import {__name__} as own; own.serve()"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        # It ends when its input does: with this process, however that ends.
        self._process = subprocess.Popen(command, env=environment, **pipes)
        assert self._process.stdout is not None
        address, key = json.loads(self._process.stdout.readline())
        self._address, self._key = address, bytes.fromhex(key)
        self._threads = threading.local()  # each thread has a connection

    def ask(self, request: tuple[Any, str, tuple[Any, ...], dict[str, Any]]) -> Any:
        try:
            if not hasattr(self._threads, "connection"):
                self._threads.connection = Client(self._address, authkey=self._key)
            self._threads.connection.send(request)
            done, found = self._threads.connection.recv()
        except BaseException as error:
            # Half of an exchange must not be taken for the start of the next one.
            self._threads.__dict__.pop("connection", None)
            if isinstance(error, EOFError | OSError):
                raise StoreError(
                    f"{request[0]}: the process that reads it for this one has ended. Remedy: run "
                    "the same command again"
                ) from error
            raise
        if done:
            return found
        raise found


@lru_cache(1)
def _server(_: int) -> _Server:
    return _Server()


def serve() -> None:
    """Answer requests until the standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that is served
    key = os.urandom(32)
    with Listener(authkey=key) as listener:
        print(json.dumps([listener.address, key.hex()]), flush=True)
        threading.Thread(target=_accept, args=(listener,), daemon=True).start()
        sys.stdin.buffer.read()


def _accept(listener: Listener) -> None:
    while True:
        threading.Thread(target=_answer, args=(listener.accept(),), daemon=True).start()


def _answer(connection: Connection) -> None:
    with connection:
        while True:
            try:
                path, method, args, options = connection.recv()
            except EOFError:
                return
            try:
                found = getattr(path, method)(*args, **options)
                answer = True, list(found) if isinstance(found, Iterator) else found
            except Exception as error:
                answer = False, error
            connection.send(answer)
