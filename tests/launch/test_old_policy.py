"""Which behaviour modes an asynchronous run may have, with which objective and correction."""

import pytest

from vespo_megatron.errors import UserError
from vespo_megatron.launch.preflight import check_tables
from vespo_megatron.recipe.schema import Recipe

TIS = {"weight": "tis", "high": 2.0}
REJECTION = {"reject": [{"statistic": "k3", "level": "mean", "high": 0.01}]}


def recipe(**values):
    keys = {"behavior": "loss_fn.behavior", "name": "loss_fn.name", "correction": "loss_fn.correction"}
    told = {keys.get(key, f"grpo.async_grpo.{key}"): value for key, value in values.items()}
    return Recipe().with_values({"env.reward": "exact_match", **told})


@pytest.mark.parametrize(
    ("enabled", "behavior"), [(False, "recompute"), (True, "rollout")], ids=["synchronous", "asynchronous"]
)
def test_auto_is_what_the_reference_does(enabled, behavior):
    assert recipe(enabled=enabled).behavior == behavior
    for given in ("rollout", "recompute", "version"):
        assert recipe(enabled=enabled, behavior=given).behavior == given


@pytest.mark.parametrize(
    "values",
    [
        {"behavior": "version"},
        {"behavior": "version", "correction": TIS},
        {"behavior": "version", "name": "decoupled_ppo"},
        {"behavior": "recompute", "correction": TIS},
        {"behavior": "recompute", "name": "decoupled_ppo"},
        {"behavior": "recompute", "max_staleness": 0},
        {"behavior": "auto", "correction": REJECTION},
        {"behavior": "auto"},
    ],
)
def test_what_an_asynchronous_run_may_ask_for(values):
    check_tables(recipe(enabled=True, **values))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"behavior": "recompute"}, "nothing corrects that"),
        ({"behavior": "recompute", "correction": REJECTION}, "nothing corrects that"),
        ({"behavior": "auto", "name": "minirl"}, "version in an asynchronous run"),
        ({"behavior": "auto", "correction": TIS}, "count it twice"),
        ({"behavior": "rollout", "correction": TIS}, "recompute or version"),
    ],
)
def test_what_leaves_staleness_to_nobody_or_counts_it_twice_is_refused(values, says):
    with pytest.raises(UserError, match=says):
        check_tables(recipe(enabled=True, **values))
