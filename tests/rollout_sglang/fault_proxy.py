"""A proxy before a server, real or fake, that spoils the replies of one endpoint in one chosen way."""

from __future__ import annotations

import gzip
import http.client
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

AT = ("status", "length", "middle", "last")
"""Classes of bytes: of the status line, of the header that says how long the body is, of the body, its last one."""
FAULTS = (
    *(f"cut {at}" for at in AT),
    *(f"garbled {at}" for at in AT),
    *("nothing", "late", "drip", "doubled", "another protocol"),
    *("endless headers", "endless body", "claims a tebibyte", "packed"),
    *("nested", "a list", "text", "null", "digits", "another's answer", "permuted"),
)
GIVES_UP_S = 60.0
"""After so long the proxy has had enough of whoever waits for it."""


class FaultProxy:
    """Replies to `path` are as `fault` says, the next `times` of them; all others are the server's own.

    `spoiled` counts what was. Keeps connections open, as servers do, but for those of a spoiled reply.
    """

    def __init__(self, upstream: str) -> None:
        self.path, self.fault, self.times, self.spoiled = "", "", 0, 0
        self._lock, self._over = threading.Lock(), threading.Event()
        host = urlsplit(upstream).netloc
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_GET(self):
                self.forward("GET")

            def do_POST(self):
                self.forward("POST")

            def forward(self, method):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                server = http.client.HTTPConnection(host, timeout=120)
                try:
                    server.request(method, self.path, body, dict(self.headers))
                    reply = server.getresponse()
                    data = reply.read()
                finally:
                    server.close()
                kind = reply.getheader("Content-Type")
                head = [f"HTTP/1.1 {reply.status} {reply.reason}", f"Content-Length: {len(data)}"]
                head += [f"Content-Type: {kind}"] if kind else []
                fault = proxy.due(self.path.partition("?")[0])
                try:
                    if fault:
                        self.close_connection = True
                        proxy.send_spoiled(self.wfile, fault, head, data)
                    else:
                        self.wfile.write(whole(head, data))
                except OSError:  # whoever asked gave up
                    self.close_connection = True

        self._http = _Http(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=lambda: self._http.serve_forever(0.02), daemon=True).start()

    def spoil(self, path: str, fault: str, times: int = 1) -> None:
        """From now on."""
        with self._lock:
            self.path, self.fault, self.times, self.spoiled = path, fault, times, 0

    def due(self, path: str) -> str:
        """The fault of the reply that is about to be sent; empty for none."""
        with self._lock:
            if path != self.path or self.times < 1:
                return ""
            self.times -= 1
            self.spoiled += 1
            return self.fault

    def send_spoiled(self, file, fault: str, head: list[str], data: bytes) -> None:
        raw = whole(head, data)
        what, _, at = fault.partition(" ")
        if what in ("cut", "garbled") and at in AT:
            start = len(raw) - len(data)
            length = raw.index(b"Content-Length: ") + len("Content-Length: ")
            place = {"status": 9, "length": length, "middle": start + len(data) // 2, "last": len(raw) - 1}[at]
            file.write(raw[:place] if what == "cut" else raw[:place] + bytes([raw[place] ^ 0x55]) + raw[place + 1 :])
        elif fault == "late":
            self._over.wait(GIVES_UP_S)
        elif fault == "drip":
            until = time.monotonic() + GIVES_UP_S
            for byte in raw:
                file.write(bytes([byte]))
                if self._over.wait(0.1) or time.monotonic() > until:
                    return
        elif fault == "doubled":
            file.write(raw + raw)
        elif fault == "another protocol":
            file.write(b"SSH-2.0-OpenSSH_9.2\r\n" + bytes(range(256)))
        elif fault.startswith("endless"):
            line, count = (f"X: {'x' * 1000}\r\n".encode(), 300) if fault.endswith("headers") else (data, 1 << 12)
            file.write(b"HTTP/1.1 200 OK\r\n" + (b"" if fault.endswith("headers") else b"\r\n"))
            for _ in range(count):
                file.write(line or b" " * 1000)
        elif fault == "claims a tebibyte":
            file.write(whole([head[0], f"Content-Length: {1 << 40}", *head[2:]], data))
        elif fault == "packed":
            packed = gzip.compress(data)
            file.write(whole([head[0], f"Content-Length: {len(packed)}", "Content-Encoding: gzip", *head[2:]], packed))
        elif fault != "nothing":
            other = _other_body(fault, data)
            file.write(whole([head[0], f"Content-Length: {len(other)}", "Content-Type: application/json"], other))

    def close(self) -> None:
        """Accept no more, and let go of whoever waits."""
        self._over.set()
        self._http.shutdown()
        self._http.server_close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request, client_address):
        """A caller that gave up is no news."""


def whole(head: list[str], data: bytes) -> bytes:
    """The bytes of a reply."""
    return "\r\n".join([*head, "", ""]).encode() + data


def _other_body(fault: str, data: bytes) -> bytes:
    """A whole reply with another body than the server's."""
    if fault == "nested":
        return b"[" * 200_000
    if fault == "digits":
        digits = "7" * 5000
        return f'{{"weight_version": "{digits}", "startup_time": {digits}, "version": {digits}}}'.encode()
    if fault in ("another's answer", "permuted"):
        reply = json.loads(data) if data[:1] in (b"[", b"{") else None
        answers = reply if isinstance(reply, list) else []
        for one in answers if fault == "another's answer" else ():
            one["meta_info"]["id"] = "another#0"
        answers.reverse()
        return json.dumps(reply).encode()
    return {"a list": b"[]", "text": b'"text"', "null": b"null"}[fault]
