"""Where ranks meet, and who may listen."""

from __future__ import annotations

import socket

import psutil
import pytest

from vespo_megatron.errors import UserError
from vespo_megatron.run import rendezvous


def listening():
    return {each.laddr for each in psutil.Process().net_connections("inet") if each.status == psutil.CONN_LISTEN}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in (rendezvous.FILE_VARIABLE, "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)


def test_one_process_and_those_of_one_machine_listen_nowhere(tmp_path, monkeypatch):
    before = listening()
    rendezvous.open_store(0, 1, 5.0).set("key", "value")
    monkeypatch.setenv(rendezvous.FILE_VARIABLE, str(tmp_path / "store"))
    first, second = (rendezvous.open_store(rank, 2, 5.0) for rank in range(2))
    first.set("key", "value")
    assert second.get("key") == b"value"
    assert listening() == before


def test_over_several_machines_rank_0_listens_on_the_named_address_alone(monkeypatch):
    before = listening()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    first, second = (rendezvous.open_store(rank, 2, 5.0) for rank in range(2))
    first.set("key", "value")
    assert second.get("key") == b"value"
    assert listening() - before == {("127.0.0.1", port)}
    with pytest.raises(UserError, match=f"127.0.0.1:{port}, where the ranks meet: cannot be listened on"):
        rendezvous.open_store(0, 2, 5.0)


def test_a_rank_that_is_not_told_where_says_so(monkeypatch):
    with pytest.raises(UserError, match="do not say where the ranks meet"):
        rendezvous.open_store(0, 2, 5.0)
    monkeypatch.setenv("MASTER_ADDR", "192.0.2.1")  # of no machine
    monkeypatch.setenv("MASTER_PORT", "1234")
    with pytest.raises(UserError, match="an address of the machine that rank 0 runs on"):
        rendezvous.open_store(0, 2, 5.0)
