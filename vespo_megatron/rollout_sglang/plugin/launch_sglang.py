"""SGLang's server, its API key from the environment: `python -m vespo_megatron.rollout_sglang.plugin.launch_sglang`.

SGLang 0.5.23 takes a key as a flag or in a file. A flag would show in the process list, and both show in the server's
log, where it writes its arguments. Here the key joins the arguments inside the process, and the log gets stars.

It listens on a port that its launcher holds (`held_port`), where SGLang itself would find the port in use.

Its ranks meet in a file: the TCP store that they would open listens on every address of the machine.

Runs in the servers' Python environment: standard library, SGLang and what it needs alone.
"""

from __future__ import annotations

import os
import runpy
import socket
import sys
import tempfile
from typing import Any

from vespo_megatron.rollout_sglang.api_key import take_from_environment
from vespo_megatron.rollout_sglang.held_port import listen_at

_RENDEZVOUS = "SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE"
"""sglang/srt/distributed/bootstrap.py, `_resolve_dist_init_method`, of 0.5.23."""


def main() -> None:
    """Become SGLang's launcher."""
    key = take_from_environment()
    if key:
        sys.argv += ["--api-key", key]
        _mask_in_log()
    # In a folder that others cannot enter and that goes with the server (`server.supervisor`).
    os.environ.setdefault(_RENDEZVOUS, f"file://{os.path.join(tempfile.mkdtemp(), 'store')}")
    _listen_where_the_launcher_holds_the_port()
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)


def _listen_where_the_launcher_holds_the_port() -> None:
    """`sglang/srt/entrypoints/http_server.py` makes a `uvicorn.Server` and runs it without sockets."""
    import uvicorn

    class Server(uvicorn.Server):
        async def serve(self, sockets: list[socket.socket] | None = None) -> None:
            await super().serve(sockets or [listen_at(self.config.host, self.config.port)])

    uvicorn.Server = Server  # type: ignore[misc]


def _mask_in_log() -> None:
    from sglang.srt.entrypoints import engine

    original = engine._server_args_for_logging

    def masked(server_args: Any) -> Any:
        shown = original(server_args)
        return {name: "***" if name == "api_key" and value else value for name, value in shown.items()}

    engine._server_args_for_logging = masked


if __name__ == "__main__":
    main()
