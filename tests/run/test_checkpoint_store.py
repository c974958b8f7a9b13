"""Checkpoints as folders: only whole ones count, what is damaged is named, the right ones stay."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from vespo_megatron import durable
from vespo_megatron.durable import publish_folder
from vespo_megatron.errors import UserError
from vespo_megatron.run.checkpoint_judgement import Record
from vespo_megatron.run.checkpoint_store import MANIFEST, CheckpointStore, FileEntry, Judgement, RetentionPolicy, damage
from vespo_megatron.run.metrics_file import MetricsFile


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "checkpoints")


def put(store, step):
    partial = store.begin(step)
    files = {}
    for name, content in (("policy/__0_0.distcp", b"weights of %d" % step), ("trainer.json", b"{}")):
        (partial / name).write_bytes(content)
        files[name] = FileEntry.on_disk(partial / name)
    return store.publish(partial, files)


def test_the_newest_is_that_of_the_latest_step_whatever_the_clock_said(store):
    for step in (9, 10, 1_000_000, 2):
        os.utime(put(store, step), (step % 7, step % 7))
    assert list(store.checkpoints()) == [1_000_000, 10, 9, 2]


def test_what_was_not_finished_is_none_and_goes_with_the_next(store):
    put(store, 1)
    left = store.begin(2)
    (left / "policy" / "__0_0.distcp").write_bytes(b"half")
    (store.root / "step_000007").mkdir()  # no manifest: half removed
    assert list(store.checkpoints()) == [1]
    put(store, 3)
    assert not left.exists() and list(store.checkpoints()) == [3, 1]


def test_the_same_step_again_replaces_the_first(store):
    (put(store, 4) / "of the first").touch()
    assert not (put(store, 4) / "of the first").exists()


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-3]), "has 9 bytes, written were 12"),
        (lambda path: path.write_bytes(b"W" + path.read_bytes()[1:]), "has other bytes than were written"),
        (lambda path: path.unlink(), "cannot be read"),
    ],
)
def test_damage_is_named(store, spoil, says):
    folder = put(store, 1)
    names = ["policy/__0_0.distcp", "trainer.json"]
    assert damage(folder, names) == []
    spoil(folder / names[0])
    (found,) = damage(folder, names)
    assert found.startswith(names[0]) and says in found


@pytest.mark.parametrize("content", ["", "{", "[]", '{"files": 3}', '{"files": {"a": {"bytes": 1}}}'])
def test_a_manifest_that_is_none_is_an_error_of_its_own(store, content):
    folder = put(store, 1)
    (folder / MANIFEST).write_text(content)
    with pytest.raises(UserError, match=re.escape(f"{folder / MANIFEST}: cannot be read")):
        damage(folder, ["trainer.json"])


SCORES = {1: 0.2, 2: 0.9, 4: 0.9, 5: 0.1, 6: 0.3}
"""Of six checkpoints; the third has none."""


@pytest.mark.parametrize(
    ("kept", "judged", "steps"),
    [
        (RetentionPolicy(), None, [6, 5, 4, 3, 2, 1]),
        (RetentionPolicy(top=2), None, [6, 5]),
        (RetentionPolicy(last=3, top=1), None, [6, 5, 4]),
        (RetentionPolicy(top=1), Judgement(SCORES), [6, 4]),  # the newer of two equals
        (RetentionPolicy(top=2), Judgement(SCORES), [6, 4, 2]),
        (RetentionPolicy(top=1, higher_is_better=False), Judgement(SCORES), [6, 5]),
        (RetentionPolicy(top=2), Judgement({}), [6]),
        (RetentionPolicy(top=1), Judgement(SCORES, undecided={3}), [6, 4, 3]),
    ],
)
def test_the_newest_and_the_best_stay_and_what_may_yet_be_the_best(store, kept, judged, steps):
    for step in range(1, 7):
        put(store, step)
    gone = store.prune(kept, judged)
    assert list(store.checkpoints()) == steps
    assert sorted(gone + steps) == list(range(1, 7))


def test_an_evaluation_that_has_not_ended_leaves_its_checkpoint_undecided(tmp_path):
    """Metric of an evaluation every second step: that of step 4 goes on, step 6 is not in the record at all."""
    lines = MetricsFile(tmp_path, 0)
    for row in ({"step": 2}, {"step": 3, "reward/mean": 0.1}, {"step": 4}, {"step": 2, "eval/a/avg@1": 0.5}):
        lines.append(row)
    record = Record(tmp_path, lambda step: step % 2 == 0)
    assert record.judge("eval/a/avg@1", [2, 3, 4, 6]) == Judgement({2: 0.5}, {4, 6})
    assert record.judge("eval/b/avg@1", [2]) == Judgement({}, set()), "another set's: it will not come"
    assert record.judge("reward/mean", [2, 3]) == Judgement({3: 0.1}, set())


def test_everything_is_on_the_disk_before_a_checkpoint_has_its_name(store, monkeypatch):
    """In the order of the calls: files, their names, the new name, the name in the folder above."""
    events = []
    fsync, rename = os.fsync, os.rename

    def synced(handle):
        events.append(os.readlink(f"/proc/self/fd/{handle}").removeprefix(f"{store.root}"))
        fsync(handle)

    def renamed(old, new):
        events.append("named")
        rename(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", lambda old, new: renamed(old, new))
    put(store, 1)
    partial = "/step_000001.partial"
    before, after = events[: events.index("named")], events[events.index("named") + 1 :]
    wanted = ["/policy/__0_0.distcp", "/trainer.json", "/manifest.json", "", "/policy"]
    assert sorted(before) == sorted(partial + name for name in wanted) and after == [""]


def test_a_folder_s_files_are_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    events = []
    monkeypatch.setattr(durable, "sync", lambda path: events.append(path.name if path != tmp_path else "above"))
    monkeypatch.setattr(Path, "replace", lambda old, new: events.append("named"))
    (tmp_path / "x.partial" / "deep").mkdir(parents=True)
    (tmp_path / "x.partial" / "deep" / "weights").write_text("w")
    publish_folder(tmp_path / "x.partial", tmp_path / "x")
    assert events == ["weights", "x.partial", "deep", "named", "above"]
