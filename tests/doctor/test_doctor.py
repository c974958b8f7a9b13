"""The doctor says what is so: on this machine, and where things are broken on purpose."""

from __future__ import annotations

import json
import sys
from functools import partial

import pytest

from vespo_megatron.cli import main
from vespo_megatron.doctor import communication, machine, software
from vespo_megatron.doctor.findings import FAIL, OK, WARN, Finding, run


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Make a package that can be imported: name → source of its __init__."""

    def make(name, source):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(source)
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{':'.join(sys.path)}")

    return make


def only(check):
    (finding,) = check()
    return finding


def test_the_report_of_this_machine_has_a_line_for_everything_and_says_with_its_status(capsys, tmp_path):
    assert main(["doctor", "--json", "--exp-dir", str(tmp_path)]) == 0
    report = json.loads(capsys.readouterr().out)
    names = {finding["name"] for finding in report["findings"]}
    assert {
        "Python",
        "torch",
        "megatron-core",
        "Transformer Engine",
        "Apex",
        "SGLang",
        "CUDA",
        "shared memory",
        "run directory",
        "loopback ports",
        "gloo sum over 2 ranks",
        "math reward",
        "code reward",
    } <= names
    assert report["failed"] == 0
    assert all(finding["fix"] for finding in report["findings"] if finding["level"] != OK)


def test_a_failure_is_a_status_of_one(monkeypatch, capsys):
    monkeypatch.setattr(software, "CHECKS", [lambda: iter([Finding("x", FAIL, "is broken", "mend it")])])
    monkeypatch.setattr(communication, "CHECKS", [])
    assert main(["doctor"]) == 1
    assert "fail  x: is broken\n      to do: mend it" in capsys.readouterr().out


def test_pypis_apex_is_not_nvidias(package):
    assert only(software.apex).level == OK
    package("apex", "")
    found = only(software.apex)
    assert found.level == FAIL and "impostor" in found.detail and found.fix == "pip uninstall apex"


def test_a_transformer_engine_without_its_pytorch_part_is_found_by_importing_it(package):
    package("transformer_engine", "raise RuntimeError('found empty `transformer-engine` meta package')")
    found = only(software.transformer_engine)
    assert found.level == FAIL and "empty `transformer-engine`" in found.detail


@pytest.mark.parametrize(("version", "level"), [(None, WARN), ("0.5.23", OK), ("0.5.23+cpu", OK), ("0.6.0", WARN)])
def test_sglang_is_held_to_the_contract_that_is_spoken(version, level, monkeypatch):
    monkeypatch.setattr(software, "version_of", lambda name: version)
    assert only(software.sglang).level == level


@pytest.mark.parametrize(("version", "level"), [(None, FAIL), ("2.13.0+cpu", OK), ("2.11.0", OK), ("2.99", WARN)])
def test_versions_that_were_not_tried_are_named(version, level, monkeypatch):
    monkeypatch.setattr(software, "version_of", lambda name: version)
    assert next(software.required_packages()).level == level


def test_a_sum_that_cannot_be_made_is_a_finding_with_the_reason(monkeypatch):
    monkeypatch.setattr(communication, "_SUM", "raise RuntimeError('no route to host')")
    found = only(communication.gloo)
    assert found.level == FAIL and "no route to host" in found.detail


def test_a_folder_that_cannot_be_made_is_a_finding(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for taken in (tmp_path / "file", tmp_path / "file" / "runs"):
        found = only(partial(machine.disk, str(taken)))
        assert found.level == FAIL and "file is no folder" in found.detail and found.fix
    monkeypatch.setattr(machine.os, "access", lambda path, mode: False)
    assert only(partial(machine.disk, "/nowhere/runs")).level == FAIL


def test_a_check_that_raises_is_a_finding_and_not_the_end():
    def broken():
        raise OSError("boom")

    found = list(run([broken, lambda: iter([Finding("next", OK, "")])]))
    assert [finding.level for finding in found] == [FAIL, OK]
