"""Run directories: never shared, continued only when asked."""

from __future__ import annotations

import errno
from concurrent.futures import ThreadPoolExecutor

import pytest

from vespo_megatron.errors import UserError
from vespo_megatron.recipe.schema import ExpManagerConfig
from vespo_megatron.run.run_directory import claimed, make_run_directory


@pytest.fixture
def make(tmp_path):
    return lambda **settings: make_run_directory(ExpManagerConfig(exp_dir=str(tmp_path), name="run", **settings))


def test_each_run_gets_the_next_free_version(make, tmp_path):
    assert [make().name for _ in range(3)] == ["version_0", "version_1", "version_2"]
    (tmp_path / "run" / "version_12").mkdir()
    (tmp_path / "run" / "version_final").mkdir()
    assert make().name == "version_13"


def test_runs_that_start_at_the_same_moment_get_different_directories(make):
    with ThreadPoolExecutor(16) as threads:
        made = list(threads.map(lambda _: make(), range(64)))
    assert len(set(made)) == 64


def test_a_version_that_exists_is_refused_unless_it_is_to_be_resumed(make):
    assert make(version="mine").name == "mine"
    with pytest.raises(UserError, match="resume_if_exists=true"):
        make(version="mine")
    assert make(version="mine", resume_if_exists=True).name == "mine"


def test_resuming_without_a_version_continues_the_latest(make):
    assert make(resume_if_exists=True).name == "version_0"
    assert make().name == "version_1"
    assert make(resume_if_exists=True).name == "version_1"


def test_a_folder_that_cannot_be_made_names_the_key(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"exp_manager\.exp_dir"):
        make_run_directory(ExpManagerConfig(exp_dir=str(tmp_path / "file"), name="run"))


def test_a_run_that_may_not_be_written_any_more_is_named(make, monkeypatch):
    run_dir = make()

    def refuse(path, *_):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(type(run_dir), "open", refuse)
    with pytest.raises(UserError, match=rf"{run_dir}: cannot be written \(Permission denied\)"), claimed(run_dir):
        pass
