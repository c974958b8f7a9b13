"""Advantages of single turns, from rewards that an environment gives to each turn (MT-GRPO, arXiv 2505.11821).

MT-GRPO adds to a turn's outcome advantage, that of the response's score within its group, the advantage of the turn's
own reward within the group. It is written for two turns, of which the first alone has a reward of its own; here every
turn may have one, and the weight between the two is 1.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import torch

from vespo_megatron.errors import UserError
from vespo_megatron.losses.advantage_estimators import ESTIMATORS, RewardGroups


def compute_turn_advantages(
    rewards: Sequence[np.ndarray], group_ids: Sequence[Hashable], estimator: str = "group_mean_std"
) -> list[np.ndarray]:
    """The advantage of each turn's reward over those that the same turn has in its group.

    Turn k of a response is compared with turn k of the responses of its group that have so many. Alone it has 0, but
    for estimators without a baseline.

    Args:
        rewards: [responses] of float64 [turns of the response].
        group_ids: [responses]; responses with the same id form a group.
        estimator: a key of `ESTIMATORS` that needs rewards and groups alone.

    Returns:
        [responses] of float64 [turns of the response].

    Raises:
        UserError: lengths that differ, or a reward that is not finite.
    """
    if len(rewards) != len(group_ids):
        raise UserError(
            f"{len(group_ids)} group ids for the rewards of {len(rewards)} responses", where="turn advantages"
        )
    found = [np.zeros(len(each)) for each in rewards]
    for turn in range(max(map(len, rewards), default=0)):
        members = [index for index, each in enumerate(rewards) if len(each) > turn]
        numbers: dict[Hashable, int] = {}
        index = torch.tensor([numbers.setdefault(group_ids[member], len(numbers)) for member in members])
        values = torch.tensor([float(rewards[member][turn]) for member in members], dtype=torch.float64)
        if not values.isfinite().all():
            raise UserError(
                f"the reward of turn {turn} is {float(values[~values.isfinite()][0])}",
                where="turn advantages",
                expected="finite rewards",
            )
        groups = RewardGroups(values, index, torch.bincount(index).double(), torch.ones(len(members), dtype=torch.bool))
        for member, value in zip(members, ESTIMATORS[estimator](groups).tolist(), strict=True):
            found[member][turn] = value
    return found
