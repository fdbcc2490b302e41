"""An S3 server on loopback, and a proxy before it that cuts, throttles and holds requests."""

from __future__ import annotations

import contextlib
import http.client
import logging
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

BUCKET = "bucket"
# What S3 says of them.
ERRORS = {
    "500": ("InternalError", "We encountered an internal error. Please try again."),
    "501": (
        "NotImplemented",
        "A header you provided implies functionality that is not implemented.",
    ),
    "503": ("SlowDown", "Please reduce your request rate."),
}


def credentials(port: int, user: str = "user") -> dict[str, str]:
    """Return the environment variables with which S3 clients use a server here."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": user,
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


class Proxy:
    """Forwards requests to the server.

    Attributes:
        port: where it listens.
        requests: method and path of all requests.
        fault: called with method and path; returns for each request "" or the fault to answer with:
            one of ERRORS (refused), "cut" (half of the answer), "lose" (done, without an answer),
            "hold".
        released: held requests wait for it, and are cut then.
    """

    def __init__(self, server_port: int):
        self.requests: list[tuple[str, str]] = []
        self.fault: Callable[[str, str], str] = lambda method, path: ""
        self.released = threading.Event()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: Any) -> None:
                pass

            def forward(self) -> None:
                proxy.requests.append((self.command, self.path))
                fault = proxy.fault(self.command, self.path)
                if fault == "hold":
                    proxy.released.wait()
                    self.close_connection = True
                    return
                data = self.body()
                if fault in ERRORS:
                    code, words = ERRORS[fault]
                    text = f"<Error><Code>{code}</Code><Message>{words}</Message></Error>"
                    text = "" if self.command == "HEAD" else f'<?xml version="1.0"?>{text}'
                    headers = {"Content-Type": "application/xml"}
                    return self.answer(int(fault), headers, text.encode())
                upstream = http.client.HTTPConnection("127.0.0.1", server_port)
                headers = {k: v for k, v in self.headers.items() if k != "Expect"}
                upstream.request(self.command, self.path, data, headers)
                found = upstream.getresponse()
                body = found.read()
                upstream.close()
                if fault == "lose":
                    self.close_connection = True
                    return
                skip = ("connection", "transfer-encoding", "content-length", "date", "server")
                kept = {k: v for k, v in found.getheaders() if k.lower() not in skip}
                if self.command == "HEAD":
                    kept["Content-Length"] = found.getheader("Content-Length", "0")
                self.answer(found.status, kept, body, fault == "cut")

            def body(self) -> bytes:
                if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                    return self.rfile.read(int(self.headers.get("Content-Length", 0)))
                parts = []
                while (size := int(self.rfile.readline().split(b";")[0], 16)) > 0:
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                while self.rfile.readline().strip():
                    pass
                del self.headers["Transfer-Encoding"]
                self.headers["Content-Length"] = str(sum(map(len, parts)))
                return b"".join(parts)

            def answer(
                self, status: int, headers: dict[str, str], body: bytes, cut: bool = False
            ) -> None:
                self.send_response_only(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                if "Content-Length" not in headers:
                    self.send_header("Content-Length", str(len(body)))
                if cut:
                    self.close_connection = True
                with contextlib.suppress(OSError):  # the client was killed
                    self.end_headers()
                    self.wfile.write(body[: len(body) // 2] if cut else body)

        for method in ("GET", "PUT", "POST", "HEAD", "DELETE"):
            setattr(Handler, f"do_{method}", Handler.forward)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port: int = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()


class Faults:
    """Gives a fault to the first `count` requests whose method and path match."""

    def __init__(self, kind: str, count: int, pattern: str):
        self.kind, self.left, self._pattern = kind, count, re.compile(pattern)

    def __call__(self, method: str, path: str) -> str:
        if self.left and self._pattern.search(f"{method} {path}"):
            self.left -= 1
            return self.kind
        return ""


@contextlib.contextmanager
def s3_server() -> Iterator[int]:
    """Run moto's S3 server; yield its port."""
    pytest.importorskip("s3fs", reason="s3fs is not installed: pip install 'fastbert-pretrain[s3]'")
    server = pytest.importorskip("moto.server", reason="moto is not installed").ThreadedMotoServer
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    running = server(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    try:
        _, port = running.get_host_and_port()
        yield port
    finally:
        running.stop()


def make_bucket(port: int, name: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port)
    headers = {
        "Authorization": "AWS4-HMAC-SHA256 Credential=user/20260101/us-east-1/s3/aws4_request"
    }
    connection.request("PUT", f"/{name}", headers=headers)
    assert connection.getresponse().status == 200
    connection.close()
