"""Two small studies, every night: facts of staleness and of mismatch that have held so far (docs/studies/README.md)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vespo_megatron.study.comparison import compare_rows
from vespo_megatron.study.outcomes import read_outcomes
from vespo_megatron.study.spec import load_study

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.smoke, pytest.mark.timeout(1200)]


EQUAL = 1e-10
"""k3 per token of two programs that compute the same in float32, at most, in any rollout batch."""


def finished(name, *options):
    """The study of that file and its outcomes, run here or finished before."""
    prepare = ["examples/tiny_moe/prepare.py", "--task", "long", "--output", "examples/tiny_moe/build_long"]
    subprocess.run([sys.executable, *prepare], cwd=ROOT, check=True, timeout=600)
    command = [sys.executable, "-m", "vespo_megatron.cli", "compare", f"examples/studies/{name}.yaml", *options]
    subprocess.run(command, cwd=ROOT, check=True, timeout=1100)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        loaded = load_study(f"examples/studies/{name}.yaml")
        return loaded, read_outcomes(loaded)


def engines_k3(outcome):
    """Of every rollout batch, before its first update."""
    return [row["mismatch/k3_first_update"] for row in outcome.history[1:]]


@pytest.fixture(scope="module")
def study():
    return finished("smoke")


@pytest.fixture(scope="module")
def replay():
    """Variant → its runs, of three seeds of examples/studies/r2_on_off.yaml."""
    _, outcomes = finished("r2_on_off", "--seeds", "21,22,23")
    done = [outcome for outcome in outcomes if outcome.state == "finished"]
    return {name: [o for o in done if o.cell.levels == (name,)] for name in ("none", "R2", "R3")}


def test_every_run_finished(study):
    _, outcomes = study
    assert len(outcomes) == 20 and {outcome.state for outcome in outcomes} == {"finished"}


def test_both_learn_at_sixteenfold_staleness_with_every_seed(study):
    """From 0.2; the one pair that has been run on the task as it is came to 0.66 (GRPO) and 0.73."""
    _, outcomes = study
    assert [(o.cell.name, o.accuracy) for o in outcomes if o.accuracy < 0.5 or o.collapsed] == []


def test_vespo_s_training_reward_is_ahead_of_grpo_s_and_it_is_not_noise(study):
    """With each of the ten seeds, on the task before this one; so it was in the one pair that has been run on this."""
    loaded, outcomes = study
    (row,) = [row for row in compare_rows(loaded, outcomes) if row.variant == "vespo"]
    assert row.differences["reward"].verdict == "higher", row.differences


def test_data_grows_stale_within_a_rollout(study):
    _, outcomes = study
    for outcome in outcomes:
        for row in outcome.history[1:]:
            assert row["vespo/ess_last_update"] < row["vespo/ess_first_update"]


def test_without_a_dial_engine_and_trainer_are_one_in_every_batch(study):
    """The control arm: float32 on both sides, as the weights change in twenty runs."""
    _, outcomes = study
    assert max(k3 for outcome in outcomes for k3 in engines_k3(outcome)) < EQUAL


def test_replaying_the_engine_s_routes_takes_away_what_flips_have_made(replay):
    assert max(k3 for run in replay["R3"] for k3 in engines_k3(run)) < EQUAL
    for name in ("none", "R2"):
        assert min(sum(engines_k3(run)) / len(engines_k3(run)) for run in replay[name]) > 0.03


def test_replaying_the_engine_s_routes_ends_ahead(replay):
    """With each of the seventeen seeds of two studies so far, by .06 in the mean."""
    ends = {name: [run.accuracy for run in runs] for name, runs in replay.items()}
    assert {len(values) for values in ends.values()} == {3}
    assert sum(ends["R3"]) > sum(ends["none"])
