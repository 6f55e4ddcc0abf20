"""Real servers on this machine: object stores in processes of their own, and an HTTP server whose faults are chosen."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import fsspec
import pytest


def free_port() -> int:
    """A TCP port of this machine that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class StoreServer:
    """A server of an object store that can be killed and started again at the same address; it forgets what it held.

    Attributes:
        scheme: of its URLs.
    """

    scheme: str

    def __init__(self) -> None:
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    def command(self) -> list[str]:
        """The command line that starts the server."""
        raise NotImplementedError

    def settings(self) -> dict[str, str]:
        """The environment that leads clients to it."""
        raise NotImplementedError

    def start(self) -> None:
        """Start, and return when it answers."""
        self._process = subprocess.Popen(self.command(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 600
        while socket.socket().connect_ex(("127.0.0.1", self.port)) != 0:
            assert time.monotonic() < deadline and self._process.poll() is None
            time.sleep(0.1)

    def kill(self) -> None:
        """Kill the server; what it held is lost."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def client(self) -> fsspec.AbstractFileSystem:
        """A client of its own."""
        return fsspec.filesystem(self.scheme, skip_instance_cache=True)

    def upload(self, folder: Path, bucket: str) -> None:
        """Put the files below a folder into a new bucket."""
        client = self.client()
        client.mkdir(bucket)
        for path in folder.rglob("*"):
            if path.is_file():
                client.put_file(str(path), f"{bucket}/{path.relative_to(folder)}")


_FILLED_S3 = """
import os
import sys
from pathlib import Path
os.environ.pop("AWS_ENDPOINT_URL")  # leads clients here, where nobody listens yet
import boto3
from moto import mock_aws
from moto.server import main
folder, bucket = Path(sys.argv[1]), sys.argv[2]
with mock_aws():
    client = boto3.client("s3", region_name="us-east-1")
    client.create_bucket(Bucket=bucket)
    for path in filter(Path.is_file, folder.rglob("*")):
        client.upload_file(str(path), bucket, str(path.relative_to(folder)))
    main(sys.argv[3:])
"""


class S3Server(StoreServer):
    """S3, as moto answers it.

    Attributes:
        content: a folder and the bucket that holds its files whenever the server starts: it never answers without them.
    """

    scheme = "s3"
    content: tuple[Path, str] | None = None

    def command(self) -> list[str]:
        """See `StoreServer`."""
        address = ["-H", "127.0.0.1", "-p", str(self.port)]
        if self.content:
            return [sys.executable, "-c", _FILLED_S3, *map(str, self.content), *address]
        return [sys.executable, "-m", "moto.server", *address]

    def settings(self) -> dict[str, str]:
        """See `StoreServer`."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }


class GcsServer(StoreServer):
    """Google's store, as gcp-storage-emulator answers it."""

    scheme = "gs"

    def command(self) -> list[str]:
        """See `StoreServer`."""
        return [
            sys.executable,
            "-m",
            "gcp_storage_emulator",
            "start",
            "--host=127.0.0.1",
            f"--port={self.port}",
            "--in-memory",
        ]

    def settings(self) -> dict[str, str]:
        """See `StoreServer`. Asking for the kind of a bucket needs another protocol, which the server has not."""
        return {
            "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{self.port}",
            "GOOGLE_CLOUD_PROJECT": "test",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }


@contextmanager
def running(server: StoreServer) -> Iterator[Any]:
    """A running server; the environment leads clients to it."""
    with pytest.MonkeyPatch.context() as patch:
        for key, value in server.settings().items():
            patch.setitem(os.environ, key, value)
        server.start()
        try:
            yield server
        finally:
            server.kill()


def s3_server() -> AbstractContextManager[S3Server]:
    """A running S3 server."""
    return running(S3Server())


def gcs_server() -> AbstractContextManager[GcsServer]:
    """A running server of Google's store."""
    return running(GcsServer())


class _QuietServer(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """Connections that break are what it is for."""


class WebServer:
    """Serves a folder over HTTP, with range requests and pages that list folders.

    Attributes:
        resets: one in this many answers is cut off by a reset of the connection; 0: none.
        cuts: one in this many answers ends half-way; 0: none.
        hangs: answers, of those to come, that are not given at all.
        sent: bytes of each file that were sent.
        url: where it is.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.resets, self.cuts, self.hangs, self.answers, self.closed = folder, 0, 0, 0, 0, False
        self.sent: Counter[str] = Counter()
        self.lock = threading.Lock()
        outer = self

        class Handler(SimpleHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self._server = _QuietServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def answer(self, request: SimpleHTTPRequestHandler) -> None:
        """Answer one request, or do not."""
        with self.lock:
            self.answers += 1
            hangs, resets = self.hangs > 0, self.resets > 0 and self.answers % self.resets == 0
            cuts = self.cuts > 0 and self.answers % self.cuts == 1
            self.hangs -= hangs
        if hangs:
            time.sleep(30)
        if self.closed:
            request.close_connection = True
            return
        path = self.folder / unquote(request.path).lstrip("/")
        if path.is_dir():
            SimpleHTTPRequestHandler.do_GET(request)
            return
        if not path.is_file():
            request.send_error(404)
            return
        content, status = path.read_bytes(), 200
        if wanted := request.headers.get("Range"):
            first, last = wanted.removeprefix("bytes=").split("-")
            content, status = content[int(first) : int(last) + 1], 206
        request.send_response(status)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        if resets:
            request.wfile.write(content[: len(content) // 2])
            request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            request.connection.close()
            request.close_connection = True
            return
        if cuts:
            request.wfile.write(content[: len(content) // 2])
            request.close_connection = True
            return
        request.wfile.write(content)
        with self.lock:
            self.sent[path.name] += len(content)

    def close(self) -> None:
        """Stop serving, on connections that are open too."""
        self.closed = True
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def web_server(folder: Path) -> Iterator[WebServer]:
    """A running HTTP server."""
    server = WebServer(folder)
    try:
        yield server
    finally:
        server.close()
