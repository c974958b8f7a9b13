"""Random packed batches of extremes, each with an objective and a correction: what nothing may hide in."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vespo_megatron.errors import UserError
from vespo_megatron.losses import (
    CorrectionConfig,
    LossInputs,
    LossOutput,
    Normalizer,
    PolicyLossConfig,
    Rejection,
    compute_policy_loss,
    objective_names,
)
from vespo_megatron.losses.aggregation import AGGREGATIONS
from vespo_megatron.losses.config import BEHAVIORS, KL_WEIGHTS
from vespo_megatron.losses.correction.config import LEVELS as WEIGHT_LEVELS
from vespo_megatron.losses.correction.rejection import LEVELS, STATISTICS

LOG_PROBS = (0.0, -1e-8, -0.5, -3.0, -50.0, -88.8, -200.0, -745.0)
NOT_FINITE = (float("nan"), float("inf"), float("-inf"))
ADVANTAGES = (0.0, 1.0, -1.0, 1e-30, -37.0, 1e4)


@dataclass
class Draw:
    """One call of the loss, and which of its sequences hold a number that is not finite."""

    inputs: LossInputs
    config: PolicyLossConfig
    bad: Tensor
    """bool [num_sequences]"""

    def output(self) -> tuple[LossOutput, Tensor]:
        """The loss, and its gradient [tokens]."""
        leaf = self.inputs.log_probs.detach().clone().requires_grad_()
        output = compute_policy_loss(replace(self.inputs, log_probs=leaf), self.config, Normalizer(64, 8))
        output.loss.backward()
        return output, leaf.grad


def draws(seed: int, sequences: int = 8, dtype: torch.dtype = torch.float32) -> Iterator[Draw]:
    """Without end: configurations that are taken, on batches with empty and single-token responses among them."""
    rng = random.Random(seed)
    while True:
        config = _config(rng)
        if config is not None:
            yield _draw(rng, config, sequences, dtype)


def _config(rng: random.Random) -> PolicyLossConfig | None:
    """A configuration, or None where this combination is refused."""
    try:
        return PolicyLossConfig(
            rng.choice(objective_names()),
            {"opsm_delta": rng.choice((0.0, 0.1, 1e3))} if rng.random() < 0.2 else {},
            aggregation=rng.choice(AGGREGATIONS),
            aggregation_length=16.0,
            behavior=rng.choice(list(BEHAVIORS)),
            correction=_correction(rng) if rng.random() < 0.7 else None,
            on_bad_sample="drop",
            kl_coefficient=rng.choice((0.0, 0.0, 0.1)),
            kl_type=rng.choice(("k1", "k2", "k3")),
            kl_weight=rng.choice(KL_WEIGHTS),
            metrics=rng.choice(("none", "full")),
        )
    except UserError:
        return None


def _correction(rng: random.Random) -> CorrectionConfig:
    rules = tuple(
        Rejection(
            rng.choice(list(STATISTICS)), rng.choice(LEVELS), rng.choice((None, 0.0, 0.5)), rng.choice((1.5, 1e9))
        )
        for _ in range(rng.randrange(3))
    )
    return CorrectionConfig(
        weight=rng.choice(("none", "tis", "mis", "icepop")),
        level=rng.choice(WEIGHT_LEVELS),
        high=rng.choice((None, 1.2, float("inf"))),
        normalize=rng.random() < 0.3,
        reject=rules,
        veto=rng.choice((None, 1e-4)),
        denominator=rng.choice(("fixed", "kept")),
        apply=rng.choice((None, "before_clip", "after_clip")),
    )


def _draw(rng: random.Random, config: PolicyLossConfig, sequences: int, dtype: torch.dtype) -> Draw:
    lengths = [rng.choice((0, 1, 1, 2, 5, 17)) for _ in range(sequences)]
    count = sum(lengths)
    segment = torch.repeat_interleave(torch.arange(sequences), torch.tensor(lengths))
    mask = torch.tensor([rng.random() < 0.85 for _ in range(count)], dtype=torch.bool)
    bad = torch.zeros(sequences, dtype=torch.bool)

    def log_probs() -> Tensor:
        extreme = rng.random() < 0.5
        values = torch.tensor(
            [rng.choice(LOG_PROBS) if extreme else -rng.expovariate(1) for _ in range(count)], dtype=dtype
        )
        for _ in range(rng.choice((0, 0, 0, 1, 2)) if count else 0):
            token = rng.randrange(count)
            values[token] = rng.choice(NOT_FINITE)
            if mask[token]:
                bad[segment[token]] = True
        return values

    advantages = torch.tensor([rng.choice(ADVANTAGES) for _ in range(sequences)], dtype=dtype)
    if rng.random() < 0.1:
        row = rng.randrange(sequences)
        advantages[row] = rng.choice(NOT_FINITE)
        bad[row] = True
    needs_old = config.behavior != "rollout"
    inputs = LossInputs(
        log_probs(),
        log_probs(),
        advantages,
        torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()]),
        mask=mask,
        old_log_probs=log_probs() if needs_old else None,
        ref_log_probs=log_probs() if config.kl_coefficient else None,
        advantage_level="sequence",
    )
    return Draw(inputs, config, bad)
