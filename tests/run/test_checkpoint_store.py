"""Checkpoints as folders: only whole ones count, what is damaged is named, the right ones stay."""

from __future__ import annotations

import os
import re

import pytest

from vespo_megatron.errors import UserError
from vespo_megatron.run.checkpoint_store import MANIFEST, CheckpointStore, FileEntry, RetentionPolicy, damage


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "checkpoints")


def put(store, step, **metrics):
    partial = store.begin(step)
    files = {}
    for name, content in (("policy/__0_0.distcp", b"weights of %d" % step), ("trainer.json", b"{}")):
        (partial / name).write_bytes(content)
        files[name] = FileEntry.of(partial / name)
    return store.publish(partial, files, metrics)


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
    put(store, 4, reward=1.0)
    folder = put(store, 4, reward=2.0)
    assert '"reward": 2.0' in (folder / MANIFEST).read_text()


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


SCORES = {1: 0.2, 2: 0.9, 3: None, 4: 0.9, 5: 0.1, 6: 0.3}


@pytest.mark.parametrize(
    ("kept", "steps"),
    [
        (RetentionPolicy(), [6, 5, 4, 3, 2, 1]),
        (RetentionPolicy(top=2), [6, 5]),
        (RetentionPolicy(last=3, top=1), [6, 5, 4]),
        (RetentionPolicy(top=1, metric="eval"), [6, 4]),  # the newer of two equals
        (RetentionPolicy(top=2, metric="eval"), [6, 4, 2]),
        (RetentionPolicy(top=1, metric="eval", higher_is_better=False), [6, 5]),
        (RetentionPolicy(top=2, metric="no such"), [6]),
    ],
)
def test_the_newest_and_the_best_stay(store, kept, steps):
    for step, score in SCORES.items():
        put(store, step, **({} if score is None else {"eval": score}))
    gone = store.prune(kept)
    assert list(store.checkpoints()) == steps
    assert sorted(gone + steps) == list(SCORES)
