"""What a run leaves on disk, and what it shows."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch

from vespo_megatron.run.metrics_file import read_metrics
from vespo_megatron.run.records import LoggedSample, RunLogger


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
