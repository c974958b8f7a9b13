"""What a run leaves on disk, and what it shows."""

from __future__ import annotations

import errno
import io
import json
import os
import resource
from pathlib import Path

import numpy as np
import pytest
import torch

from vespo_megatron.run.metrics_file import MetricsFile, read_metrics
from vespo_megatron.run.records import LoggedSample, RunLogger
from vespo_megatron.run.tensorboard_events import TensorBoardEvents


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def lines_of(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_every_step_is_one_json_object_with_its_step(tmp_path):
    with RunLogger(tmp_path, total_steps=2, tensorboard=False, stream=io.StringIO()) as logger:
        logger.log_step(1, {"reward/mean": torch.tensor(0.5), "time/generate": np.float32(0.25)})
        assert len(lines_of(tmp_path)) == 1, "a step is on disk as soon as it is logged"
        logger.log_step(2, {"reward/mean": 1, "loss/policy": -0.125})
    first, second = lines_of(tmp_path)
    assert (first["step"], first["reward/mean"], first["time/generate"]) == (1, 0.5, 0.25)
    assert (second["step"], second["reward/mean"], second["loss/policy"]) == (2, 1, -0.125)
    assert read_metrics(tmp_path) == [first, second]


def test_numbers_that_are_not_finite_are_null_and_the_file_stays_json(tmp_path):
    with RunLogger(tmp_path, total_steps=1, stream=io.StringIO()) as logger:
        logger.log_step(1, {"loss/policy": float("nan"), "vespo/w_max": torch.tensor(float("inf"))})
    (record,) = lines_of(tmp_path)
    assert record["loss/policy"] is None
    assert record["vespo/w_max"] is None


def test_a_resumed_run_drops_the_steps_it_will_take_again_and_a_torn_last_line(tmp_path):
    with RunLogger(tmp_path, total_steps=4, tensorboard=False, stream=io.StringIO()) as logger:
        for step in (1, 2, 3):
            logger.log_step(step, {"reward/mean": step / 10})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "reward/m')
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3]
    with RunLogger(tmp_path, total_steps=4, tensorboard=False, start_step=2, stream=io.StringIO()) as logger:
        assert [record["step"] for record in logger.history] == [1, 2]
        logger.log_step(3, {"reward/mean": 0.9})
    assert [(record["step"], record["reward/mean"]) for record in lines_of(tmp_path)] == [(1, 0.1), (2, 0.2), (3, 0.9)]


def test_tensorboard_has_the_scalars_and_the_histograms(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    binned = ((-1.0, 0.0, 1.0, 2.0), torch.tensor([1.0, 0.0, 3.0], dtype=torch.float64))
    with RunLogger(tmp_path, total_steps=1, stream=io.StringIO()) as logger:
        logger.log_step(1, {"reward/mean": 0.5}, histograms={"vespo/phi": binned})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward/mean")] == [(1, 0.5)]
    assert events.Histograms("vespo/phi")[0].histogram_value.num == 4


def test_without_a_terminal_each_step_is_one_plain_line(tmp_path):
    stream = io.StringIO()
    with RunLogger(tmp_path, total_steps=9, tensorboard=False, stream=stream) as logger:
        metrics = {"reward/mean": 0.5, "vespo/w_mean": 1.01, "vespo/phi_mean": 0.98, "vespo/ess": 0.75}
        logger.log_step(3, {**metrics, "throughput/tokens_per_second": 12345.6, "eval/val/avg@1": 0.25})
    expected = "step 3/9 · reward 0.500 · W 1.010 · φ 0.980 · ESS 0.75 · tok/s 12,346 · val/avg@1 0.250\n"
    assert stream.getvalue() == expected


def test_on_a_terminal_a_bar_shows_the_same_and_messages_stay_readable(tmp_path):
    stream = Terminal()
    with RunLogger(tmp_path, total_steps=2, tensorboard=False, stream=stream) as logger:
        logger.log_step(1, {"reward/mean": 0.5})
        logger.print("a message")
        logger.log_step(2, {"reward/mean": 0.75})
    assert "reward 0.500" in stream.getvalue()
    assert "2/2" in stream.getvalue()
    assert "a message\n" in stream.getvalue()


def test_samples_can_be_read_by_people_and_programs_whatever_they_contain(tmp_path):
    nasty = LoggedSample("why ```` so", "because\n```\n", reward=float("nan"), ground_truth="7", finish_reason="length")
    with RunLogger(tmp_path, total_steps=1, tensorboard=False, stream=io.StringIO()) as logger:
        markdown = logger.log_samples(10, [nasty, LoggedSample("p", "r", 1.0)], name="val").read_text()
    rows = [json.loads(line) for line in (tmp_path / "samples" / "step_000010_val.jsonl").read_text().splitlines()]
    assert [row["response"] for row in rows] == ["because\n```\n", "r"]
    assert rows[0]["reward"] is None
    assert markdown.count("\n`````\n") == 4, "the fence is longer than the backticks inside"
    assert "ended by length" in markdown


def test_the_summary_tells_first_and_last_and_is_kept(tmp_path):
    with RunLogger(tmp_path, total_steps=2, tensorboard=False, stream=io.StringIO()) as logger:
        logger.log_step(0, {"eval/val/avg@1": 0.3})
        logger.log_step(1, {"reward/mean": 0.4})
        logger.log_step(2, {"reward/mean": 0.8, "eval/val/avg@1": 0.9})
        text = logger.summary({"rollout": "SGLang 0.5.23"})
    assert text.splitlines()[:3] == ["rollout: SGLang 0.5.23", "eval/val/avg@1: 0.3 → 0.9", "reward/mean: 0.4 → 0.8"]
    kept = json.loads((tmp_path / "summary.json").read_text())
    assert kept["first_last"]["eval/val/avg@1"] == [0.3, 0.9]
    assert kept["facts"] == {"rollout": "SGLang 0.5.23"}


def test_an_interrupted_run_closes_once_and_keeps_its_steps(tmp_path):
    logger = RunLogger(tmp_path, total_steps=5, stream=io.StringIO())
    with pytest.raises(KeyboardInterrupt), logger:
        logger.log_step(1, {"reward/mean": 0.5})
        raise KeyboardInterrupt
    logger.close()
    assert len(lines_of(tmp_path)) == 1


FULL = OSError(errno.ENOSPC, "No space left on device")


def test_where_the_disk_is_full_records_wait_or_are_lost_loudly_and_the_rest_is_written(tmp_path, monkeypatch):
    stream, full = io.StringIO(), [False]

    def unless_full(function):
        def call(*arguments, **named):
            if full[0]:
                raise FULL
            return function(*arguments, **named)

        return call

    monkeypatch.setattr(os, "fstat", unless_full(os.fstat))  # the first call of `MetricsFile` on its file
    monkeypatch.setattr(Path, "write_text", unless_full(Path.write_text))
    monkeypatch.setattr(TensorBoardEvents, "_write_event", unless_full(TensorBoardEvents._write_event))
    with RunLogger(tmp_path, total_steps=4, stream=stream) as logger:
        for step in (1, 2, 3, 4):
            full[0] = step in (2, 3)
            logger.log_step(step, {"reward/mean": step / 10})
            logger.log_samples(step, [LoggedSample("p", "r", 1.0)])
            logger.log_problems(step, [])
            if step == 3:
                logger.log_late(2, {"eval/val/avg@1": 0.5})
    assert [row["reward/mean"] for row in read_metrics(tmp_path)] == [0.1, 0.2, 0.3, 0.4]
    assert read_metrics(tmp_path)[1]["eval/val/avg@1"] == 0.5
    assert sorted(path.stem for path in (tmp_path / "evaluations").iterdir()) == ["step_000001", "step_000004"]
    told = [line for line in stream.getvalue().splitlines() if line.startswith("vespo-megatron: ")]
    assert "vespo-megatron: cannot write metrics.jsonl (No space left on device); its lines wait in memory" in told[0]
    for what in ("TensorBoard's events", "samples/", "evaluations/"):
        assert sum(f"cannot write {what} (No space" in line for line in told) == 1, "each is told once"
        assert sum(line.startswith(f"vespo-megatron: {what}: written again, after ") for line in told) == 1
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("reward/mean")] == [1, 4]


def test_a_line_is_in_the_file_whole_or_not_at_all(tmp_path, monkeypatch):
    """The disk takes half of a line, then nothing."""
    lines = MetricsFile(tmp_path, 0)
    lines.append({"step": 1})
    before, limits = (tmp_path / "metrics.jsonl").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 5, limits[1]))
    try:
        with pytest.raises(OSError):
            lines.append({"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before and lines.waiting == 1
    lines.append({"step": 3})
    lines.close()
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]


def test_what_is_known_later_is_of_its_step(tmp_path):
    stream = io.StringIO()
    with RunLogger(tmp_path, total_steps=3, tensorboard=False, stream=stream) as logger:
        logger.log_step(1, {"reward/mean": 0.5})
        logger.log_step(2, {"reward/mean": 0.6})
        logger.log_late(1, {"eval/val/avg@1": 0.25})
    first, second = read_metrics(tmp_path)
    assert (first["reward/mean"], first["eval/val/avg@1"]) == (0.5, 0.25) and "eval/val/avg@1" not in second
    assert stream.getvalue().endswith("of step 1: val/avg@1 0.250\n")
    with RunLogger(tmp_path, total_steps=3, tensorboard=False, start_step=1, stream=stream) as logger:
        assert logger.history == [first], "a resume keeps what is known of the steps it keeps"
