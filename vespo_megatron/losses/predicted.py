"""How wide W gets over a response, and what φ makes of it, predicted from moments of one token's log-ratio.

Let d be a token's log-ratio of two policies, k its KL (the k3 estimate) and log W the sum of T independent ones. Close
policies, with d small against 1, make log W ~ N(−kT, 2kT). Where a few tokens carry most of the KL that is too wide,
and mean(d²/2) > k says so. Then log W is taken as a drift and jumps: log W = c·T − b·G, G ~ Gamma(a·T), c = a·log(1+b).
That keeps what the Gaussian has (jumps add over tokens, E[W] = 1, E[log W] = −kT) and gives the variance its own value:

    k = a·(b − log(1+b)),    Var d = 2·mean(d²/2) − k² = a·b².

b > 0 are jumps down (tokens the trainer finds far less likely), −1 < b < 0 jumps up, b → 0 is the Gaussian. It holds as
far as tokens are independent and W is independent of the advantage; `tests/losses/test_predicted.py` and
`tests/trainer/test_predicted_phi.py` say how far. Everything is float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vespo_megatron.errors import UserError
from vespo_megatron.losses.registry import get_objective
from vespo_megatron.losses.theory import response_phi

_CELLS = 4096
_SIMULATED_TOKENS = 1 << 17
_GAUSSIAN_BELOW = 1e-3
"""Jumps smaller than this are a Gaussian's."""


@dataclass(frozen=True)
class Divergence:
    """How far two policies are apart on a token.

    Raises:
        UserError: a moment that no pair of policies has.
    """

    k3: float
    """KL per token, as k3 estimates it: mean(e^d − 1 − d), nats."""
    k2: float | None = None
    """mean(d²/2), nats; None: k3, the Gaussian."""

    def __post_init__(self) -> None:
        for name, value in (("k3", self.k3), ("k2", self.k2)):
            if value is not None and not 0 <= value < math.inf:
                raise UserError(f"is {value}", where=name, expected="a finite number of at least 0")
        if self.k2 is not None and self.variance <= 0 < self.k3:
            raise UserError(
                f"is {self.k2} beside k3 = {self.k3}",
                where="k2",
                expected="more than k3²/2: the mean of a square is no less than the square of the mean",
            )

    @property
    def variance(self) -> float:
        """Of d."""
        return 2 * self.k3 if self.k2 is None else 2 * self.k2 - self.k3**2

    def __add__(self, other: Divergence) -> Divergence:
        """Of two independent steps one after another: π/μ from π/π_old and π_old/μ."""
        if self.k2 is None and other.k2 is None:
            return Divergence(self.k3 + other.k3)
        variance, k3 = self.variance + other.variance, self.k3 + other.k3
        return Divergence(k3, (variance + k3**2) / 2)

    def jumps(self) -> tuple[float, float] | None:
        """(a, b): jumps per token and their size, negative upwards; None: a Gaussian."""
        if self.k2 is None or self.k3 == 0:
            return None
        ratio = self.variance / self.k3  # b²/(b − log(1+b)): 2 at b = 0, rising with b
        low, high = (_GAUSSIAN_BELOW, 1e9) if ratio > 2 else (_GAUSSIAN_BELOW - 1, -_GAUSSIAN_BELOW)
        if not _ratio(low) < ratio < _ratio(high):
            if abs(ratio - 2) < 0.1:
                return None
            b = low if ratio <= _ratio(low) else high
            return self.variance / b**2, b
        for _ in range(200):
            middle = math.sqrt(low * high) if low > 0 else (low + high) / 2
            low, high = (middle, high) if _ratio(middle) < ratio else (low, middle)
        return self.k3 / (low - math.log1p(low)), low


def _ratio(b: float) -> float:
    return b * b / (b - math.log1p(b))


@dataclass(frozen=True)
class Prediction:
    """What an objective makes of responses of one length; nan where there is nothing to say."""

    phi_positive: float
    """Mean φ of responses (of tokens for a token objective) with A ≥ 0."""
    phi_negative: float
    """The same where A < 0."""
    ess: float
    """Normalised effective sample size 1/E[W²], as (E W)²/E[W²] with E[W] = 1."""
    above_half_positive: float
    """Share of responses (or tokens) with φ > ½ where A ≥ 0."""
    above_half_negative: float
    """The same where A < 0."""


def predict(
    name: str,
    divergence: Divergence,
    length: int,
    *,
    hyperparameters: Mapping[str, Any] | None = None,
    mean_w: tuple[float, float] = (1.0, 1.0),
) -> Prediction:
    """φ of an objective on responses of `length` tokens.

    Args:
        name: a registered objective or package.module:function.
        divergence: of the two policies that W is the ratio of.
        length: T, at least 1.
        mean_w: E[W] where A ≥ 0 and where A < 0, as far as a run has measured it: responses that fail often have
            more of the jumps.

    Raises:
        UserError: an unknown objective or hyperparameter, a length below 1.
    """
    if length < 1:
        raise UserError(f"is {length}", where="tokens", expected="at least 1 token in a response")
    phi, share = [], []
    for positive, mean in ((True, mean_w[0]), (False, mean_w[1])):
        values, weights = _phi(name, divergence, length, mean, positive, dict(hyperparameters or {}))
        phi.append(float((weights * values).sum()))
        share.append(float((weights * (values > 0.5)).sum()))
    return Prediction(phi[0], phi[1], effective_sample_size(divergence, length), share[0], share[1])


def _phi(
    name: str, divergence: Divergence, length: int, mean_w: float, positive: bool, hyperparameters: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Values of φ and their probabilities, [n] each."""
    log_w, weights = log_w_distribution(divergence, length, mean_w)
    if get_objective(name).level == "sequence":
        each = (log_w / length)[:, None]
        return response_phi(name, log_w, each, positive=positive, length=length, **hyperparameters), weights
    # What looks at tokens gets responses with all of theirs, whose sums lie at equally likely quantiles.
    number = max(32, min(2048, _SIMULATED_TOKENS // length))
    levels = (torch.arange(number, dtype=torch.float64) + 0.5) / number
    log_w = log_w[torch.searchsorted(weights.cumsum(0), levels).clamp(max=len(log_w) - 1)]
    tokens = _tokens(divergence, number, length)
    tokens += ((log_w - tokens.sum(1)) / length)[:, None]
    phi = response_phi(name, log_w, tokens, positive=positive, length=length, **hyperparameters).reshape(-1)
    return phi, torch.full_like(phi, 1 / len(phi))


def log_w_distribution(divergence: Divergence, length: int, mean_w: float = 1.0) -> tuple[Tensor, Tensor]:
    """log W of responses of `length` tokens as values and their probabilities: float64 [n], [n], values ascending.

    `mean_w` other than 1 is E[W] of a part of the responses: as many jumps more or fewer as that takes (of a
    Gaussian: its mean moved).
    """
    shift = math.log(mean_w)
    if divergence.k3 == 0:
        return torch.full((1,), shift, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    found = divergence.jumps()
    if found is None:
        edges = torch.linspace(-9, 9, _CELLS + 1, dtype=torch.float64)
        mean, deviation = shift - divergence.variance * length / 2, math.sqrt(divergence.variance * length)
        return mean + deviation * (edges[1:] + edges[:-1]) / 2, torch.special.ndtr(edges).diff()
    a, b = found
    drift = a * math.log1p(b) * length
    shape = max((drift - shift) / math.log1p(b), 1e-9)
    deviation = math.sqrt(shape)
    low, high = max(shape - 10 * deviation, 1e-12), shape + 10 * deviation + 60
    # What is near 0 needs cells of equal ratio, as there may be hardly any jumps; the rest cells of equal width.
    start = max(low, 0.5)
    even = torch.linspace(start, high, _CELLS, dtype=torch.float64)
    fine = torch.logspace(math.log10(low), math.log10(start), _CELLS // 2, dtype=torch.float64)[:-1]
    inner = torch.cat([fine, even]) if start > low else even
    edges = torch.cat([torch.zeros(1, dtype=torch.float64), inner])
    weights = torch.special.gammainc(torch.tensor(shape, dtype=torch.float64), edges).diff()
    values = drift - b * torch.cat([inner[:1], (inner[1:] + inner[:-1]) / 2])
    return (values.flip(0), weights.flip(0)) if b > 0 else (values, weights)


def _tokens(divergence: Divergence, number: int, length: int) -> Tensor:
    """Log-ratios of the tokens of `number` responses, the same each time: float64 [number, length]."""
    generator = np.random.default_rng(0)
    found = divergence.jumps()
    if found is None:
        deviation = math.sqrt(divergence.variance)
        return torch.from_numpy(generator.normal(-divergence.variance / 2, deviation, (number, length)))
    a, b = found
    return torch.from_numpy(a * math.log1p(b) - b * generator.gamma(a, size=(number, length)))


def effective_sample_size(divergence: Divergence, length: int) -> float:
    """1/E[W²] of responses of `length` tokens, in [0, 1]: e^(−2kT) of the Gaussian, 0 where E[W²] is infinite."""
    found = divergence.jumps()
    if found is None:
        return math.exp(-divergence.variance * length)
    a, b = found
    if 1 + 2 * b <= 0:
        return 0.0
    return math.exp(a * length * (math.log1p(2 * b) - 2 * math.log1p(b)))
