"""The port of an own server is nobody else's, from before its start until after its end."""

from __future__ import annotations

import os
import signal
import time

import pytest
from fake_node import NODE, write_interpreter
from port_thief import PortThief
from rollout_helpers import generate, make_requests

from vespo_megatron.rollout_sglang import api_key, connect, launch_servers

KEY = "a-key-nobody-may-see"
SERVERS = "policy.generation.sglang_cfg"
SEED = 731_000_000
"""On the servers' command lines, and on no other."""


def fake(folder):
    """Recipe keys of a server that speaks as SGLang and starts in a second or two."""
    return {
        "cluster.device": "cuda",
        f"{SERVERS}.python": write_interpreter(folder, gpus=1),
        f"{SERVERS}.weight_transport": "disk",
        f"{SERVERS}.weight_folder": str(folder / "weights"),
        f"{SERVERS}.mem_fraction_static": 0.5,
    }


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("server", "named"),
    [
        pytest.param(fake, False, id="fake"),
        pytest.param(fake, True, id="fake, port named"),
        pytest.param(lambda folder: {}, False, id="real", marks=[pytest.mark.sglang, pytest.mark.slow]),
    ],
)
def test_another_user_who_waits_for_a_servers_port_gets_neither_it_nor_what_is_sent_there(
    tiny_recipe, tmp_path, monkeypatch, server, named
):
    """It tries without end, in every way: while the server starts, serves, is dead, and starts again."""
    if os.getuid() != 0:
        pytest.skip("only root can be another user")
    monkeypatch.setenv(NODE, str(tmp_path))
    monkeypatch.setenv(api_key.VARIABLE, KEY)
    seed = SEED + 10 * (os.getpid() % 10_000)
    port = 24_000 + os.getpid() % 4_000 if named else 0
    recipe = tiny_recipe.with_values(server(tmp_path) | {"grpo.seed": seed, f"{SERVERS}.port": port})
    with PortThief(str(seed), tmp_path / "thief") as thief, launch_servers(recipe, tmp_path) as servers:
        (server,) = servers.servers
        assert thief.tried and not thief.took
        engine = connect(recipe, servers.urls)
        assert len(generate(engine, make_requests(2, max_new_tokens=2))) == 2
        os.kill(server.process_group, signal.SIGKILL)
        until(lambda: not server.alive)
        before = thief.tried
        until(lambda: thief.tried > before + 3)
        assert not server.answers()
        servers.restart_dead()
        until(server.answers)
        assert server.restarts == 1 and not thief.took
        engine.close()


def until(condition, seconds=200):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
