"""Run every check, print as they answer, and say with the exit status whether a run could work."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from functools import partial

from vespo_megatron.doctor import communication, machine, rewards, software
from vespo_megatron.doctor.findings import FAIL, WARN, Check, Finding, run


def examine(exp_dir: str = "runs") -> Iterator[Finding]:
    """Every finding on this machine."""
    disk: Check = partial(machine.disk, exp_dir)
    disk.__name__ = "run directory"
    checks = [*software.CHECKS, machine.gpus, machine.memory, disk, *communication.CHECKS, *rewards.CHECKS]
    yield from run(checks)


def doctor(exp_dir: str = "runs", *, as_json: bool = False) -> int:
    """Print what is found on this machine; 1 where a run cannot work, else 0."""
    return show(examine(exp_dir), as_json=as_json)


def show(found: Iterable[Finding], *, as_json: bool = False) -> int:
    """Print findings as they come; 1 where one is a failure, else 0."""
    findings = []
    for finding in found:
        findings.append(finding)
        if not as_json:
            print(finding, flush=True)
    failed, warned = (sum(finding.level == level for finding in findings) for level in (FAIL, WARN))
    if as_json:
        print(json.dumps({"failed": failed, "warned": warned, "findings": [f.as_dict() for f in findings]}, indent=2))
    else:
        print(f"\n{len(findings)} checks, {failed} failed, {warned} to look at")
    return int(failed > 0)
