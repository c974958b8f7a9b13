"""The sample buffer: nothing is trained on beyond the bound, nothing is lost, whatever arrives in whatever order."""

from __future__ import annotations

import io
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from made_up_sample import sample

from vespo_megatron.controller.staleness import StalenessBuffer
from vespo_megatron.data.sampling_mask import SamplingMask
from vespo_megatron.losses import MetricSums
from vespo_megatron.trainer.objective import add_by_lag


def closes(buffer: StalenessBuffer) -> bool:
    counts = buffer.counts
    return counts.sent == counts.trained + counts.aborted + counts.expired + len(buffer.groups)


def saved(buffer: StalenessBuffer) -> dict:
    file = io.BytesIO()
    torch.save(buffer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def run(
    buffer: StalenessBuffer, steps: int, chance: random.Random, abort: float, resume: float, between: float = 0.0
) -> list[int]:
    """Train so many steps; arrivals in random order, some aborts, some resumes from a checkpoint. Every group's lag.

    `between` is how often servers that come back are given weights between two versions of the schedule.
    """
    found = []
    for step in range(1, steps + 1):
        while not buffer.ready():
            for _ in range(min(buffer.room(), chance.randint(0, 4) + (buffer.under_way == 0))):
                buffer.admit(f"p{buffer.counts.sent}")
            under_way = [group for group in buffer.groups.values() if group.samples is None]
            assert under_way, "nothing is ready, nothing is under way and nothing may be sent: it would wait for ever"
            group = chance.choice(under_way)
            if chance.random() < abort:
                buffer.abort(group)
            else:
                buffer.arrive(group, [sample(buffer.version)])
            assert closes(buffer)
            if chance.random() < between:
                assert buffer.new_version(buffer.version + 1, between=True) == []
        found += [buffer.lag(group.version) for group in buffer.take()]
        if step % buffer.sync_every == 0:
            assert buffer.new_version(buffer.version + 1) == [], "admitted, and yet too late"
        if chance.random() < resume:
            again = StalenessBuffer(buffer.max_staleness, buffer.batch_groups, buffer.sync_every)
            resent = again.load_state_dict(saved(buffer))
            assert len(resent) == buffer.under_way and again.waiting == buffer.waiting
            buffer.__dict__.update(again.__dict__)
        assert closes(buffer)
    return found


@given(
    st.sampled_from([0, 0.25, 0.5, 1, 1.5, 2, 4, 8]),
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(0, 10**6),
    st.sampled_from([0.0, 0.1, 0.5]),
    st.sampled_from([0.0, 0.3]),
)
def test_no_lag_beyond_the_bound_and_every_group_accounted_for(max_staleness, batch, sync_every, seed, abort, between):
    buffer = StalenessBuffer(max_staleness, batch, sync_every)
    found = run(buffer, 30, random.Random(seed), abort, resume=0.1, between=between)
    assert max(found) <= buffer.bound and len(found) == 30 * batch
    assert buffer.lag(0) == 30 // sync_every, "a version of the schedule is counted, and no other"


def test_the_counts_close_over_a_thousand_steps_and_the_bound_is_reached():
    buffer = StalenessBuffer(2, 4, 2)
    found = run(buffer, 1000, random.Random(0), abort=0.2, resume=0.01)
    assert buffer.counts.trained == 4000 and buffer.counts.aborted > 500 and buffer.counts.expired == 0
    assert set(found) == {0, 1, 2}, "a bound that is never reached would be another, smaller one"


def test_a_slow_group_is_waited_for_when_its_turn_would_pass():
    buffer = StalenessBuffer(max_staleness=1, batch_groups=2, sync_every=1)
    slow, *others = [buffer.admit(str(number)) for number in range(4)]
    assert buffer.room() == 0
    for group in others:
        buffer.arrive(group, [sample(0)])
    assert [group.number for group in buffer.take()] == [1, 2]  # overtakes
    buffer.new_version(1)
    assert buffer.room() == 2
    for group in (buffer.admit("a"), buffer.admit("b")):
        buffer.arrive(group, [sample(1)])
    assert not buffer.ready(), "three have arrived, but the slow one is due now"
    buffer.arrive(slow, [sample(0)])
    assert [group.number for group in buffer.take()] == [0, 3]


def test_staleness_0_is_on_policy():
    buffer = StalenessBuffer(max_staleness=0, batch_groups=3, sync_every=1)
    for group in [buffer.admit(str(number)) for number in range(3)]:
        buffer.arrive(group, [sample(0)])
    assert buffer.room() == 0
    buffer.take()
    assert buffer.room() == 0, "the weights are still the old ones"
    buffer.new_version(1)
    assert buffer.room() == 3


def test_a_checkpoint_of_before_rows_had_versions_says_one_of_all():
    buffer = StalenessBuffer(max_staleness=1, batch_groups=1, sync_every=1)
    buffer.arrive(buffer.admit("p"), [sample(3)])
    state = buffer.state_dict()
    state["groups"][0]["samples"][0]["routes_version"] = 3
    again = StalenessBuffer(max_staleness=1, batch_groups=1, sync_every=1)
    again.load_state_dict(state)
    assert again.take()[0].samples[0].route_versions.tolist() == [3] * 4


def test_samples_survive_a_checkpoint_with_their_routes():
    buffer = StalenessBuffer(1, 1, 1)
    buffer.arrive(buffer.admit("a"), [sample(3, "kept")])
    again = StalenessBuffer(1, 1, 1)
    again.load_state_dict(saved(buffer))
    (group,) = again.take()
    for name, value in vars(sample(3, "kept")).items():
        found = getattr(group.samples[0], name)
        if isinstance(value, np.ndarray):
            assert found.dtype == value.dtype
            np.testing.assert_array_equal(found, value)
        elif isinstance(value, SamplingMask):
            assert [array.tolist() for array in vars(found).values()] == [a.tolist() for a in vars(value).values()]
        else:
            assert found == value or value != value  # the reward is NaN


def test_a_smaller_bound_after_a_resume_lets_groups_expire():
    buffer = StalenessBuffer(4, 1, 1)
    buffer.arrive(buffer.admit("old"), [sample(0)])
    again = StalenessBuffer(0, 1, 1)
    again.load_state_dict(saved(buffer))
    assert [group.prompt_id for group in again.new_version(1)] == ["old"]
    assert again.counts.expired == 1 and closes(again)


def test_lags_are_per_token():
    assert StalenessBuffer(4, 1, 1, version=6).lags([sample(3), sample(5)]).tolist() == [3, 3, 2, 1, 1, 0]


def test_a_version_between_two_of_the_schedule_counts_as_the_one_before():
    """Servers that came back got weights that had been updated since the last version: another number, no more lag."""
    buffer = StalenessBuffer(1, 2, 4)
    buffer.admit("a")
    for version, between in ((1, False), (2, True), (3, False), (4, True), (5, True)):
        taken = buffer.taken = 3
        buffer.new_version(version, between=between)
        assert (buffer.version, buffer.taken) == (version, taken if between else 0)
    again = StalenessBuffer(1, 2, 4)
    again.load_state_dict(saved(buffer))
    for each in (buffer, again):
        assert [each.lag(version) for version in range(6)] == [2, 1, 1, 0, 0, 0]
        assert each.lags([sample(0), sample(1), sample(4)]).tolist() == [2, 2, 1, 1, 1, 1, 0, 0, 0]
    del (state := saved(buffer))["between"]
    again.load_state_dict(state)
    assert again.lag(4) == 1, "a checkpoint of before has none"


def test_without_room_nothing_is_sent():
    buffer = StalenessBuffer(0, 1, 1)
    buffer.admit("a")
    with pytest.raises(ValueError, match="no group may be sent"):
        buffer.admit("b")


def test_w_and_ess_are_told_by_lag():
    """A response without a finite W counts nowhere."""
    w = torch.tensor([1.0, 2.0, 0.5, 3.0, torch.inf], dtype=torch.float64)
    output = SimpleNamespace(sequence_log_ratio=w.log(), metrics=MetricSums())
    add_by_lag(output, np.array([0, 0, 2, 2, 2]), 3, first=True)
    found = output.metrics.finalize()
    assert found["staleness/w_mean_lag_0"] == pytest.approx(1.5)
    assert found["staleness/w_mean_lag_2"] == pytest.approx(1.75)
    assert found["staleness/ess_lag_0"] == pytest.approx(1.5**2 / 2.5)
    assert found["staleness/ess_lag_2"] == pytest.approx(1.75**2 / 4.625)
    elsewhere = SimpleNamespace(sequence_log_ratio=w.log(), metrics=MetricSums())
    add_by_lag(elsewhere, np.array([0, 0, 2, 2, 2]), 3, first=False)
    assert (output.metrics + elsewhere.metrics).finalize() == pytest.approx(found, nan_ok=True)


def test_what_nobody_can_score_any_more_is_given_up_and_counted():
    """After a resume under `behavior: version` of a run that kept no weights of earlier versions."""
    buffer = StalenessBuffer(2, 4, 1)
    for versions in ([0, 0], [0, 1], [1, 1], [1, 2]):
        drawn = sample(0)
        drawn.weight_versions = np.array(versions)
        buffer.arrive(buffer.admit("p"), [sample(1), drawn])
    under_way = buffer.admit("p")
    buffer.expire_other_versions({1, 2})
    left = [[one.weight_versions.tolist() for one in group.samples or ()] for group in buffer.groups.values()]
    assert [each[-1:] for each in left] == [[[1, 1]], [[1, 2]], []]
    assert buffer.groups[under_way.number] is under_way and buffer.counts.expired == 2 and closes(buffer)
    buffer.expire_other_versions(set())
    assert buffer.waiting == 0 and buffer.counts.expired == 4 and closes(buffer)
