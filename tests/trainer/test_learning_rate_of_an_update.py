"""Learning rate of one update, by how stale its samples are."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vespo_megatron.recipe.schema import AsyncGRPOConfig
from vespo_megatron.trainer import learning_rate
from vespo_megatron.trainer.learning_rate import scale_by_staleness, staleness_scale


def test_lag_times_learning_rate_stays_below_its_bound():
    for lag in range(9):
        for free in (0.5, 1.0, 4.0):
            scale = staleness_scale(lag, free)
            assert 0 < scale <= 1 and lag * scale <= max(free, 1e-12) + 1e-12
    assert [staleness_scale(lag, 2.0) for lag in (0, 1, 2, 4)] == [1, 1, 1, 0.5]


@pytest.mark.parametrize(("free", "elsewhere", "expected"), [(None, 9, None), (2.0, 0, 0.5), (2.0, 8, 0.25)])
def test_the_largest_lag_on_any_rank_decides(free, elsewhere, expected, monkeypatch):
    """`elsewhere` is the largest lag that another rank has."""
    monkeypatch.setattr(learning_rate.dist, "all_reduce", lambda value, **_: value.clamp_(min=elsewhere))
    scaled = []
    policy = SimpleNamespace(rank_info=SimpleNamespace(device=torch.device("cpu")), scale_learning_rate=scaled.append)
    reports = [
        (None, SimpleNamespace(batch=SimpleNamespace(lags=np.array(lags) if lags else None)))
        for lags in ([0, 4], [1, 1], None)
    ]
    scale_by_staleness(AsyncGRPOConfig(learning_rate_lag=free), policy, reports)
    assert scaled == ([] if expected is None else [expected])
