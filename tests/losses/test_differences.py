"""What the table "Differences that stay" of docs/losses.md says of this library, computed apart from it."""

import math
import re

import pytest
import torch

from tests.losses.test_docs import TEXT
from vespo_megatron.losses import get_objective, policy_loss

SECTION = re.search(r"## Differences that stay\n(.*?)\n## ", TEXT, re.DOTALL).group(1)
MU = torch.tensor([-1.0, -2.0, -3.5, -1.5, -1.0], dtype=torch.float64)
LOG_RATIO = torch.tensor([0.1, -0.3, 0.2, 0.05, -0.1], dtype=torch.float64)


def here(what):
    """The middle cell of a row."""
    return next(line.split("|")[2] for line in SECTION.splitlines() if line.startswith(f"| {what} |"))


def gradient(name, log_ratio, mu, advantages, **given):
    leaf = (mu + log_ratio).requires_grad_()
    cu_seqlens = torch.tensor([0, len(mu)])
    policy_loss(leaf, mu, advantages, cu_seqlens, name=name, advantage_level="auto", **given).loss.backward()
    return leaf.grad


@pytest.mark.parametrize(
    ("what", "name", "keys"),
    [
        ("clip of ρ", "grpo", ("clip_low", "clip_high")),
        ("bound of ρ for A < 0", "grpo", ("dual_clip",)),
        ("bound of ρ for A < 0", "gspo", ("log_ratio_max",)),
        ("CISPO's bounds", "cispo", ("ratio_min", "ratio_max")),
        ("DPPO's δ", "dppo_tv", ("delta_low", "delta_high")),
        ("DPPO's δ", "dppo_kl", ("delta_low", "delta_high")),
        ("DPPO's truncation", "dppo_tv", ("ratio_max",)),
    ],
)
def test_the_table_has_the_defaults_of_the_code(what, name, keys):
    numbers = [float(number) for number in re.findall(r"\d*\.?\d+", here(what))]
    for key in keys:
        assert get_objective(name).hyperparameters[key] in numbers


def test_dropped_tokens_leave_the_ratio_of_gspo_and_its_length():
    mismatch = torch.tensor([0.0, 0.0, 2.0, 0.0, -2.0], dtype=torch.float64)  # tokens 2 and 4 are dropped
    kept = mismatch == 0
    leaf = (MU + mismatch + LOG_RATIO).requires_grad_()
    policy_loss(
        leaf,
        MU,
        torch.ones(1, dtype=torch.float64),
        torch.tensor([0, 5]),
        name="gspo",
        old_log_probs=MU + mismatch,
        correction={"reject": [{"statistic": "k1", "level": "token", "low": 0.5, "high": 2.0}]},
        clip_low=1.0,
        clip_high=math.inf,
    ).loss.backward()
    s = LOG_RATIO[kept].mean().exp()
    theirs = LOG_RATIO.mean().exp()  # slime, TRL
    torch.testing.assert_close(leaf.grad, torch.where(kept, -s / 5, 0.0), rtol=1e-12, atol=0)
    assert abs(s - theirs) > 0.01


def test_a_sum_of_log_ratios_is_what_it_is_but_in_vespo():
    far = torch.tensor([-50.0, 25.0, 25.0], dtype=torch.float64)  # W = 1; with each token at most 20 in size, e^20
    mu = torch.tensor([-1.0, -30.0, -30.0], dtype=torch.float64)
    advantage = torch.tensor([-1.0], dtype=torch.float64)
    raw = gradient("topr", far, mu, advantage)
    torch.testing.assert_close(raw, torch.full_like(raw, 1 / 3), rtol=1e-12, atol=0)
    assert gradient("gspo", far, mu, advantage).tolist() == pytest.approx([1 / 3] * 3)
    assert gradient("vespo", far, mu, advantage).abs().max() < 1e-300  # W = e^20


def test_an_advantage_per_token_multiplies_its_own_token_in_gspo():
    advantages = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0], dtype=torch.float64)
    found = gradient("gspo", LOG_RATIO, MU, advantages, clip_low=1.0, clip_high=math.inf)
    torch.testing.assert_close(found, -LOG_RATIO.mean().exp() * advantages / 5, rtol=1e-12, atol=0)
