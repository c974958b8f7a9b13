"""A server that breaks SGLang's contract in one chosen way: standard library only, in a thread of the test."""

from __future__ import annotations

import base64
import json
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LAYERS, TOPK = 3, 2


class FaultServer:
    """Answers like SGLang 0.5.23 for the tests' tiny model; `fault` names what goes wrong in `/generate`.

    `calls` counts the requests to each path.
    """

    def __init__(self, fault: str = "", **settings):
        self.fault, self.settings, self.calls = fault, settings, {}
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

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self):
        self._http.shutdown()
        self._http.server_close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def answer(self, handler, body):
        path = handler.path.partition("?")[0]
        self.calls[path] = self.calls.get(path, 0) + 1
        if path == "/generate":
            self._generate(handler, body)
        elif path == "/server_info":
            info = {"version": "0.5.23", "device": "cpu", "context_length": 256, "enable_return_routed_experts": True}
            self._send(handler, 200, info | self.settings)
        elif path == "/model_info":
            self._send(handler, 200, {"weight_version": self.settings.get("weight_version", "0")})
        else:
            self._send(handler, 200, {"success": True})

    def _send(self, handler, status, value):
        raw = json.dumps(value).encode()
        if self.fault == "truncated" and handler.path == "/generate" and not self._probe:
            raw = raw[: len(raw) // 2]
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(raw)))
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
        if fault == "stalls":
            time.sleep(30)
        replies = [
            self._reply(ids, sampling["max_new_tokens"], fault)
            for ids, sampling in zip(body["input_ids"], body["sampling_params"], strict=True)
        ]
        return self._send(handler, 200, replies[1:] if fault == "one reply less" else replies)

    def _reply(self, ids, count, fault):
        rows = len(ids) + count - 1
        log_prob = float("nan") if fault == "NaN" else -1.0
        version = "3" if fault == "old weights" else "0"
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
