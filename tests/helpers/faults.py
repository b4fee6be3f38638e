"""A proxy between a client and a real S3 server that breaks the answers it is told to break."""

from __future__ import annotations

import socket
import struct
import sys
import threading
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import urlsplit

Fault = Literal[
    "500",  # InternalError
    "503",  # what a load balancer says, no XML
    "slow-down",  # S3's own 503
    "403",  # AccessDenied, which no patience cures
    "reset",  # before the first byte of the answer
    "reset-in-body",
    "truncate",  # the connection ends in mid-body, Content-Length being right
    "flip",  # one bit of the body
    "slow-first-byte",  # which comes, but late
    "stall",  # the connection stays open in mid-body, and nothing more comes
    "lose-answer",  # the server does what is asked, the client never hears of it
]
_XML = '<?xml version="1.0"?><Error><Code>{}</Code><Message>scripted</Message></Error>'
_REFUSALS: dict[str, tuple[int, str]] = {
    "500": (500, _XML.format("InternalError")),
    "503": (503, "<html>Service Unavailable</html>"),
    "slow-down": (503, _XML.format("SlowDown")),
    "403": (403, _XML.format("AccessDenied")),
}
_OF_THE_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "expect"}


@dataclass(frozen=True)
class Seen:
    """A request to an object: its path, its Range, the fault it got, and the client's port, which tells
    one connection from another."""

    method: str
    path: str
    range: str
    fault: Fault | None
    connection: int


class FaultProxy(ThreadingHTTPServer):
    """Forwards everything unchanged, the Host header too, since the client's signature covers it.

    The requests to objects (not lists) of a method get the faults of `script[method]` in the order in
    which they arrive, and those of `always` once the script is over.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, upstream: str, late_seconds: float) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = urlsplit(upstream).netloc
        self.late_seconds = late_seconds
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        self.script: dict[str, deque[Fault | None]] = defaultdict(deque)
        self.always: dict[str, Fault] = {}
        self.seen: list[Seen] = []
        self.ended = threading.Event()
        self._lock = threading.Lock()

    def next_fault(self, handler: BaseHTTPRequestHandler) -> Fault | None:
        method, address = handler.command, urlsplit(handler.path)
        if "/" not in address.path.strip("/"):
            return None  # the bucket itself
        with self._lock:
            script = self.script[method]
            fault = script.popleft() if script else self.always.get(method)
            ranged = handler.headers.get("Range", "")
            self.seen.append(Seen(method, address.path, ranged, fault, handler.client_address[1]))
        return fault

    def shutdown_request(self, request: Any) -> None:
        self.close_request(request)  # no orderly end first, which would turn a reset into an end of file

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # a client that went away is what the tests are about
            super().handle_error(request, client_address)


@contextmanager
def fault_proxy(upstream: str, late_seconds: float = 30.0) -> Iterator[FaultProxy]:
    """A running proxy before the server at `upstream`; a slow first byte comes after `late_seconds`."""
    proxy = FaultProxy(upstream, late_seconds)
    thread = threading.Thread(target=proxy.serve_forever, args=(0.05,), name="fault-proxy")
    thread.start()
    try:
        yield proxy
    finally:
        proxy.ended.set()
        proxy.shutdown()
        thread.join()
        proxy.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: FaultProxy

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.server.next_fault(self)
        if fault in _REFUSALS:
            status, text = _REFUSALS[fault]
            return self._send(status, {"Content-Type": "application/xml"}, text.encode())
        if fault == "reset":
            return self._reset()
        if fault == "slow-first-byte":
            self.server.ended.wait(self.server.late_seconds)
        try:
            status, headers, data = self._forward(body)
        except (HTTPException, OSError):  # the server is gone, and so are we
            return self._reset()
        if fault == "lose-answer":
            return self._reset()
        if fault == "flip":
            data = data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 4]) + data[len(data) // 2 + 1 :]
        if fault in ("reset-in-body", "truncate", "stall"):
            return self._break_off(fault, status, headers, data)
        self._send(status, headers, data)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _answer  # noqa: N815 - names of http.server

    def _forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        upstream = HTTPConnection(self.server.upstream, timeout=60)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in _OF_THE_HOP:
                    upstream.putheader(name, value)
            if "Content-Length" in self.headers:
                upstream.putheader("Content-Length", str(len(body)))
            upstream.endheaders(body)
            answer = upstream.getresponse()
            headers = {n: v for n, v in answer.getheaders() if n.lower() not in _OF_THE_HOP}
            if self.command == "HEAD":
                headers["Content-Length"] = answer.headers.get("Content-Length", "0")
            return answer.status, headers, answer.read()
        finally:
            upstream.close()

    def _send(self, status: int, headers: dict[str, str], data: bytes, length: int | None = None) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers and status != 204:
            self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        self.wfile.write(data)

    def _break_off(self, fault: Fault, status: int, headers: dict[str, str], data: bytes) -> None:
        self._send(status, headers, data[: len(data) // 2], len(data))
        if fault == "stall":
            self.server.ended.wait()
        if fault == "reset-in-body":
            self._reset()
        self.close_connection = True

    def _reset(self) -> None:
        """Closing a socket that lingers for no time sends RST."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        """Silence: `seen` is the log."""
