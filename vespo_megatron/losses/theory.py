"""Theory of a φ: surrogate f, implicit proposal Q ∝ μ·φ(W), its moments, and VESPO's bound.

Everything is float64 and pure. Q, Z, C and K are as in arXiv 2602.10693 v3. For c1 > 1 (so for both pairs of constants,
α = c1 > 1) Q is *not* an interpolation between μ and π.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vespo_megatron.losses.hyperparameters import check_hyperparameters
from vespo_megatron.losses.ratios import Ratios
from vespo_megatron.losses.registry import Phi, get_objective
from vespo_megatron.losses.sequence import PackedSequences

SURROGATE_POINTS = 20_001
"""Of a surrogate's integral."""


def vespo_phi(w: Tensor, c1: float, c2: float) -> Tensor:
    """φ(W) = W^c1·e^(c2(1−W)); shape of `w`."""
    return torch.exp(c2 + c1 * w.log() - c2 * w)


def vespo_surrogate(w: Tensor, c1: float, c2: float) -> Tensor:
    """f with f(0) = 0 and W·f′(W) = φ(W): e^c2·c2^(−c1)·γ(c1, c2·W), γ the lower incomplete gamma function."""
    regularized = torch.special.gammainc(torch.as_tensor(c1, dtype=w.dtype), c2 * w)
    return vespo_surrogate_limit(c1, c2) * regularized


def vespo_surrogate_limit(c1: float, c2: float) -> float:
    """f(∞) = e^c2·c2^(−c1)·Γ(c1): 2.2317 for A ≥ 0 and 1.8473 for A < 0."""
    return math.exp(c2) * c2**-c1 * math.gamma(c1)


def vespo_phi_max(c1: float, c2: float) -> float:
    """sup φ = (c1/c2)^c1·e^(c2−c1), at W = c1/c2: 1.208 and 1.242."""
    return (c1 / c2) ** c1 * math.exp(c2 - c1)


def vespo_k(c1: float, c2: float) -> float:
    """K = sup φ/W = ((c1−1)/c2)^(c1−1)·e^(c2−c1+1): 2.463 and 1.0; infinite for c1 < 1."""
    if c1 < 1:
        return math.inf
    if c1 == 1:
        return math.exp(c2)
    return ((c1 - 1) / c2) ** (c1 - 1) * math.exp(c2 - c1 + 1)


def objective_phi(name: str | Phi, w: Tensor, *, positive: bool, length: int = 1, **hyperparameters: object) -> Tensor:
    """φ(W) of any registered objective, on responses of `length` tokens that share log W evenly: shape of `w [n]`.

    For token objectives W is then the whole response's ratio and ρ_t = W^(1/length); with length 1, ρ = W. The
    behaviour probability of each token is taken as 1/2 where an objective looks at it.
    """
    log_w = w.to(torch.float64).log()
    tokens = (log_w / length)[:, None].expand(-1, length)
    phi = response_phi(name, log_w, tokens, positive=positive, length=length, **hyperparameters)
    return phi if phi.dim() == 1 else phi[:, 0]


def response_phi(
    name: str | Phi, log_w: Tensor, log_ratio: Tensor, *, positive: bool, length: int, **hyperparameters: object
) -> Tensor:
    """φ of any objective on responses given by their log-ratios: [n] of sequence objectives, else [n, tokens].

    Args:
        log_w: float64 [n], log W of each response.
        log_ratio: float64 [n, tokens], log ρ of tokens of theirs: all `length` of them; one is enough for objectives
            that look at W alone.
        length: T.
    """
    count, tokens = log_ratio.shape
    flat = log_ratio.reshape(-1)
    behavior = torch.full_like(flat, math.log(0.5))
    sign = torch.full((count,), 1.0 if positive else -1.0, dtype=torch.float64)
    sequences = PackedSequences(torch.arange(0, count * tokens + 1, tokens), count * tokens, log_w.device)
    objective = get_objective(name)
    check_hyperparameters(objective, hyperparameters, where="hyperparameters")
    phi = objective(
        Ratios(
            sequences=sequences,
            mask=None,
            corrected_log_ratio=flat,
            sequence_log_ratio=log_w,
            clamped_sequence_log_ratio=log_w,
            lengths=torch.full((count,), float(length), dtype=torch.float64),
            advantage=sign,
            sequence_advantage=sign,
            per_token_advantage=False,
            log_probs=behavior + flat,
            behavior_log_probs=behavior,
            old_log_probs=behavior if objective.anchor == "old" else None,
        ),
        **hyperparameters,
    )
    return phi if objective.level == "sequence" else phi.view(count, tokens)


def surrogate(phi: Callable[[Tensor], Tensor], w: Tensor, points: int = SURROGATE_POINTS) -> Tensor:
    """f(W) = ∫_1^W φ(u)/u du for any φ, so f(1) = 0 and W·f′(W) = φ(W): shape of `w`.

    Trapezoids in s = log u, where the integrand is φ(e^s) alone; `w` must be positive.
    """
    log_w = w.to(torch.float64).log()
    low, high = min(float(log_w.min()), 0.0), max(float(log_w.max()), 0.0)
    grid = torch.linspace(low, high, points, dtype=torch.float64)
    values = phi(grid.exp())
    step = (high - low) / (points - 1)
    area = torch.cat([torch.zeros(1, dtype=torch.float64), ((values[1:] + values[:-1]) / 2 * step).cumsum(0)])

    def at(s: Tensor) -> Tensor:
        index = ((s - low) / step).clamp(0, points - 1.000001) if step else torch.zeros_like(s)
        left = index.floor().long()
        share = index - left
        return area[left] * (1 - share) + area[(left + 1).clamp(max=points - 1)] * share

    return at(log_w) - at(torch.zeros(1, dtype=torch.float64))


@dataclass(frozen=True)
class Proposal:
    """Moments of Q ∝ μ·φ(W), from W of responses sampled by μ."""

    z: float
    """Z = E_μ[φ]."""
    mean_w: float
    """C = E_Q[W] = E_μ[φ·W]/E_μ[φ]: the constraint that φ implies."""
    ess: float
    """(E φ)²/E[φ²], in (0, 1]."""
    second_moment: float
    """E_μ[φ²]."""
    bound: float | None = None
    """Z·K·C ≥ E_μ[φ²]; VESPO alone."""


def proposal(w: Tensor, phi: Tensor, probabilities: Tensor | None = None, k: float | None = None) -> Proposal:
    """Moments of the implicit proposal.

    Args:
        w, phi: [n], W of each response and φ(W).
        probabilities: [n], μ of each outcome; None: a sample of μ, so 1/n each.
        k: sup φ/W, for the bound.
    """
    p = torch.full_like(w, 1 / len(w)) if probabilities is None else probabilities
    z, second = float((p * phi).sum()), float((p * phi**2).sum())
    mean_w = float((p * phi * w).sum()) / z if z > 0 else math.nan
    ess = z * z / second if second > 0 else math.nan
    return Proposal(z, mean_w, ess, second, None if k is None else z * k * mean_w)


def optimal_proposal(mu: Tensor, w: Tensor, alpha: float, lam: float) -> Tensor:
    """Q* ∝ μ·W^α·e^(−λW), the minimiser of KL(Q‖μ) − α·E_Q[log W] subject to E_Q[W] ≤ C: [n], sums to 1."""
    return torch.softmax(mu.log() + alpha * w.log() - lam * w, dim=0)


def lambda_of_c(mu: Tensor, w: Tensor, alpha: float, c: float, tolerance: float = 1e-12) -> float:
    """λ with E_{Q*}[W] = C, by bisection; 0 where the constraint does not bind.

    dE_Q[W]/dλ = −Var_Q(W) ≤ 0, so the root is unique.

    Raises:
        ValueError: C is not above the smallest W that μ can give; no λ reaches it.
    """

    def mean(lam: float) -> float:
        return float((optimal_proposal(mu, w, alpha, lam) * w).sum())

    if mean(0.0) <= c:
        return 0.0
    if c <= float(w[mu > 0].min()):
        raise ValueError(f"C = {c} is not above the smallest W ({float(w[mu > 0].min())}): no λ reaches it")
    low, high = 0.0, 1.0
    while mean(high) > c:
        low, high = high, 2 * high
    while high - low > tolerance * max(1.0, high):
        middle = (low + high) / 2
        low, high = (middle, high) if mean(middle) > c else (low, middle)
    return (low + high) / 2


def log_normal_w(sigma: float, count: int = 20_000) -> Tensor:
    """W of a log-normal with E_μ[W] = 1 (log W ~ N(−σ²/2, σ²)), at `count` equally likely quantiles: [count]."""
    quantiles = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return torch.exp(sigma * torch.special.ndtri(quantiles) - sigma**2 / 2)
