"""A server that breaks SGLang's contract in one chosen way: standard library only, in a thread of the test."""

from __future__ import annotations

import base64
import itertools
import json
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

LAYERS, TOPK = 3, 2


_starts = itertools.count(1)


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address, handler, listener=None):
        self.connections = set()
        super().__init__(address, handler, bind_and_activate=listener is None)
        if listener is not None:
            self.socket.close()
            self.socket, self.server_address = listener, listener.getsockname()
            self.server_port = self.server_address[1]

    def process_request(self, request, client_address):
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request):
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request, client_address):
        """A caller that gave up is no news."""


class FaultServer:
    """Answers like SGLang 0.5.23 for the tests' tiny model; `fault` names what goes wrong in `/generate`.

    As there, nothing is generated while it is paused, and a weight update is open or not. `fault_proxy` has what goes
    wrong on the way.

    It listens on a `port` of its own (0: a free one), or is given what it listens with.

    `calls` counts the requests to each path, `answered` the request ids whose answer was sent whole, and `posts` holds
    the last body of each path. `settings` join the answer of `/server_info`; `delay_s` is how long a response takes,
    `api_key` what a caller must bring.
    """

    servers: ClassVar[dict[int, FaultServer]] = {}
    """The last one on each port."""

    def __init__(
        self, fault: str = "", *, port: int = 0, listener=None, delay_s: float = 0.0, api_key: str = "", **settings
    ):
        self.fault, self.settings, self.calls = fault, settings, {}
        self.delay_s, self.api_key = delay_s, api_key
        self.answered, self.posts, self.startup_time = [], {}, next(_starts)
        self.serves, self.update_is_open = threading.Event(), False
        self.serves.set()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_GET(self):
                server.answer(self, {})

            def do_POST(self):
                length = int(self.headers.get("Content-Length", 0))
                server.answer(self, json.loads(self.rfile.read(length) or b"{}"))

        self._http = _Http(("127.0.0.1", port), Handler, listener)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        FaultServer.servers[self.port] = self
        threading.Thread(target=lambda: self._http.serve_forever(0.02), daemon=True).start()

    @property
    def port(self):
        return self._http.server_port

    def close(self):
        """As kill -9 does: nothing more is accepted, and what is under way is cut off."""
        self._http.shutdown()
        self._http.server_close()
        for connection in list(self._http.connections):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def answer(self, handler, body):
        path = handler.path.partition("?")[0]
        self.calls[path] = self.calls.get(path, 0) + 1
        self.posts[path] = body
        if self.api_key and handler.headers.get("Authorization") != f"Bearer {self.api_key}":
            self._send(handler, 401, {"error": "Unauthorized"})
        elif path == "/health" and self.fault == "hangs":
            time.sleep(30)
        elif path == "/begin_weight_update" and self.fault == "refuses begin":
            self._send(handler, 400, {"success": False, "message": "a session is open"})
        elif path in ("/begin_weight_update", "/end_weight_update"):
            begins = path == "/begin_weight_update"
            fits, self.update_is_open = self.update_is_open != begins, begins
            message = "" if fits else "a session is open" if begins else "no session is open"
            self._send(handler, 200 if fits else 400, {"success": fits, "message": message})
        elif path == "/pause_generation":
            self.serves.clear()
            self._send(handler, 200, {"status": "ok"})
        elif path == "/continue_generation":
            self.serves.set()
            self._send(handler, 200, {"status": "ok"})
        elif path == "/ready":
            self._send(handler, 200 if self.serves.is_set() else 503, {})
        elif path == "/generate":
            self._generate(handler, body)
        elif path == "/server_info":
            info = {"version": "0.5.23", "device": "cpu", "context_length": 256, "enable_return_routed_experts": True}
            self._send(handler, 200, info | {"startup_time": self.startup_time} | self.settings)
        elif path == "/update_weight_version":
            self.settings["weight_version"] = body["new_version"]
            self._send(handler, 200, {"success": True})
        elif path == "/model_info":
            self._send(handler, 200, {"weight_version": self.settings.get("weight_version", "default")})
        else:
            self._send(handler, 200, {"success": True})

    def _send(self, handler, status, value):
        raw = json.dumps(value).encode()
        if self.fault == "truncated" and handler.path == "/generate" and not self._probe:
            raw = raw[: len(raw) // 2]
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(raw)))
        handler.send_header("Content-Type", "application/json")
        handler.end_headers()
        try:
            handler.wfile.write(raw)
        except OSError:  # the client gave up
            handler.close_connection = True

    _probe = False

    def _generate(self, handler, body):
        self._probe = body["rid"][0].startswith("probe")
        fault = "" if self._probe else self.fault
        first = self.calls["/generate"] <= 2  # the probe, then the first real call
        if fault == "500":
            return self._send(handler, 500, {"error": {"message": "it broke"}})
        if fault == "busy once" and first:
            return self._send(handler, 503, {"error": {"message": "busy"}})
        if fault == "drops" or (fault == "drops once" and first):
            handler.close_connection = True
            return handler.connection.shutdown(socket.SHUT_RDWR)
        if fault in ("stalls", "hangs"):
            time.sleep(30)
        if not self.serves.wait(30):
            return self._send(handler, 500, {"error": {"message": "was paused for 30 s"}})
        if not self._probe:
            time.sleep(self.delay_s)
        replies = [
            self._reply(ids, sampling["max_new_tokens"], fault)
            for ids, sampling in zip(body["input_ids"], body["sampling_params"], strict=True)
        ]
        for reply, rid in zip(replies, body["rid"], strict=True):
            reply["meta_info"]["id"] = rid
            if (known := body["routed_experts_start_len"]) and "routed_experts" in reply["meta_info"]:
                routes = base64.b64decode(reply["meta_info"]["routed_experts"])[known * LAYERS * TOPK * 4 :]
                reply["meta_info"]["routed_experts"] = base64.b64encode(routes).decode()
        self._send(handler, 200, replies[1:] if fault == "one reply less" else replies)
        if not self._probe and not handler.close_connection:
            self.answered += [rid.partition("#")[0] for rid in body["rid"]]
        return None

    def _reply(self, ids, count, fault):
        rows = len(ids) + count - 1
        log_prob = float("nan") if fault == "NaN" else -1.0
        version = "3" if fault == "old weights" else str(self.settings.get("weight_version", "default"))
        meta = {
            "finish_reason": {"type": "length", "length": count},
            "prompt_tokens": len(ids),
            "completion_tokens": count,
            "weight_versions": [{"version": version, "start": 0, "end": count}],
            "output_token_logprobs": [[log_prob, 7, None]] * (count - (fault == "a token less")),
        }
        if fault != "no routes":
            routes = [0, 1] * (rows * LAYERS * TOPK // 2)
            meta["routed_experts"] = base64.b64encode(struct.pack(f"<{len(routes)}i", *routes)).decode()
        return {"output_ids": [7] * count, "meta_info": meta}
