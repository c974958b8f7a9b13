"""Whether statements hold of a program: they run in a process of their own, the program in another, both fenced.

What is asserted is compared where the program cannot reach: of its values only plain ones arrive (`peer`), and that
the last statement was reached is said by a mark that it does not know.
"""

from __future__ import annotations

import secrets
import socket
from pathlib import Path

from vespo_megatron.rewards.sandbox import Limits, running
from vespo_megatron.rewards.wall import Wall

_PEER = Path(__file__).with_name("peer.py")
_PROGRAM_SIDE = """
import sys
_module = sys.modules["__main__"] = types.ModuleType("__main__")
exec(compile({source!r}, "program", "exec"), _module.__dict__)
Peer(int(sys.argv[1]), _module.__dict__).serve()
"""
_TESTS_SIDE = """
import importlib, sys
_code = compile({source!r}, "tests", "exec")
_peer = Peer(int(sys.argv[1]))
_tests = {{"__name__": "tests"}}
_wanted = sorted(set(names_used(_code)) - set(dir(builtins)))
for _name, _of_module in _peer.ask("names", 0, _wanted, {{}}).items():
    _known = _of_module is not None and _of_module.partition(".")[0] in sys.stdlib_module_names
    _tests[_name] = importlib.import_module(_of_module) if _known else _peer.ask("name", 0, [_name], {{}})
exec(_code, _tests)
sys.stdout.write({mark!r})
"""


def hold(statements: str, program: str, limits: Limits, wall: Wall) -> bool:
    """Whether all of `statements` run without an exception, with the names that the program defines."""
    mark = secrets.token_hex(16)
    peer = _PEER.read_text()
    ends = socket.socketpair()
    try:
        with (
            running(peer + _PROGRAM_SIDE.format(source=program), limits, wall, channel=ends[0].fileno()) as tested,
            running(
                peer + _TESTS_SIDE.format(source=statements, mark=mark), limits, wall, channel=ends[1].fileno()
            ) as tests,
        ):
            for end in ends:  # or neither side would see the other's end
                end.close()
            ended = tests.wait(tested)
    finally:
        for end in ends:
            end.close()
    return ended.status == 0 and ended.printed.endswith(mark)
