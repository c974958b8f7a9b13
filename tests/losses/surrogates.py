"""The published surrogates, written apart from the kernels: one response at a time, differentiated by autograd.

Each takes the unmasked tokens of one response and returns J, to be maximised, summed over its tokens.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from tests.losses.batches import Batch


def ppo(ratio: Tensor, a: Tensor, low: float, high: float, dual: float | None = None) -> Tensor:
    """min(ρA, clip(ρ)A); with a dual clip, max(that, cA) where A < 0."""
    value = torch.minimum(ratio * a, ratio.clamp(low, high) * a)
    if dual is None:
        return value
    # clamp, not maximum: exactly on c both sides are equal and maximum would halve the gradient
    return torch.where(a < 0, a * ratio.clamp(low, dual), value)


def vespo_surrogate(w: Tensor, c1: float, c2: float) -> Tensor:
    """f with W·f′(W) = φ(W): e^c2·c2^(−c1)·γ(c1, c2·W)."""
    a = torch.tensor(c1, dtype=w.dtype)
    return math.exp(c2) * c2**-c1 * math.gamma(c1) * torch.special.gammainc(a, c2 * w)


def vespo(lp: Tensor, mu: Tensor, old: Tensor, a: Tensor, power: float = 0.0, **_: object) -> Tensor:
    length = len(lp) ** power
    c1, c2 = (2.0, 3.0) if a.mean() >= 0 else (3.0, 2.0)
    # The sum over tokens of A_t·∇log π_t with one φ; for one A per response this is A·f(W).
    if (a == a[0]).all():
        return a[0] * length * vespo_surrogate(((lp - mu).sum() / length).exp(), c1, c2)
    w = ((lp - mu).sum() / length).exp().detach().requires_grad_()
    (slope,) = torch.autograd.grad(vespo_surrogate(w, c1, c2), w)
    return (slope * w.detach() * a * lp).sum()


def reinforce(lp: Tensor, mu: Tensor, old: Tensor, a: Tensor) -> Tensor:
    return (a * lp).sum()


def grpo(lp: Tensor, mu: Tensor, old: Tensor, a: Tensor, dual: float | None = 3.0) -> Tensor:
    return ppo((lp - mu).exp(), a, 0.8, 1.28, dual).sum()


def gspo(lp: Tensor, mu: Tensor, old: Tensor, a: Tensor, low: float = 3e-4, high: float = 4e-4) -> Tensor:
    ratio = (lp - mu).mean().exp()
    return len(lp) * ppo(ratio, a[0], 1 - low, 1 + high, math.exp(10))


def gspo_token(lp: Tensor, mu: Tensor, old: Tensor, a: Tensor, low: float = 3e-4, high: float = 4e-4) -> Tensor:
    ratio = (lp - mu).mean().exp().detach() * (lp - lp.detach()).exp()
    return ppo(ratio, a, 1 - low, 1 + high, math.exp(10)).sum()


def sapo(lp: Tensor, mu: Tensor, old: Tensor, a: Tensor) -> Tensor:
    tau = torch.where(a >= 0, torch.tensor(1.0).double(), torch.tensor(1.05, dtype=torch.float64))
    return (4 / tau * torch.sigmoid(tau * ((lp - mu).exp() - 1)) * a).sum()


def cispo(lp: Tensor, mu: Tensor, old: Tensor, a: Tensor) -> Tensor:
    return ((lp - mu).exp().clamp(max=5.0).detach() * a * lp).sum()


def topr(lp: Tensor, mu: Tensor, old: Tensor, a: Tensor, power: float = 0.0) -> Tensor:
    length = len(lp) ** power
    s = (lp - mu).sum() / length
    f = torch.where(s <= 0, s.exp(), 1 + s)
    return a[0] * (length * f if a[0] < 0 else lp.sum())


def minpro(lp: Tensor, mu: Tensor, old: Tensor, a: Tensor) -> Tensor:
    ratios = (lp - mu).exp().tolist()
    total = lp.new_zeros(())
    for t, ratio in enumerate(ratios):
        weight = min(max(min(ratios[:t], default=1.0) * ratio, 0.8), 1.28)
        total = total + weight * a[t] * lp[t]
    return total


def dppo(lp: Tensor, mu: Tensor, old: Tensor, a: Tensor, kind: str = "tv") -> Tensor:
    total = lp.new_zeros(())
    for t in range(len(lp)):
        p, q = math.exp(lp[t].item()), math.exp(mu[t].item())
        away = (p > q) if a[t] > 0 else (p < q)
        if kind == "tv":
            distance, most = abs(p - q), 0.15
        else:
            distance, most = q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p)), 0.05
        if not (away and distance > most):
            total = total + torch.clamp((lp[t] - mu[t]).exp(), max=20.0) * a[t]
    return total


def minirl(lp: Tensor, mu: Tensor, old: Tensor, a: Tensor) -> Tensor:
    r = (lp - old).exp()
    keep = torch.where(a >= 0, r <= 1.27, (r >= 0.8) & (r <= 3))
    weight = (r * (old - mu).exp().clamp(max=5.0)).detach()
    return (keep * weight * a * lp).sum()


def decoupled_ppo(lp: Tensor, mu: Tensor, old: Tensor, a: Tensor) -> Tensor:
    weight = (old - mu).exp().detach()
    return (torch.where(weight <= 5, weight, 0.0) * ppo((lp - old).exp(), a, 0.8, 1.28, 3.0)).sum()


def maspo(lp: Tensor, mu: Tensor, old: Tensor, a: Tensor) -> Tensor:
    """FlyTune/MASPO-RL: the detached Gaussian gate times the ratio, where A pushes away from 1."""
    ratio = (lp - mu).exp()
    room = (mu.exp() ** -0.3).clamp(1.0, 10.0)
    positive, negative = room * (1 + 0.03 * a).clamp(0.1, 10.0), room * (1 / (1 - 0.03 * a)).clamp(0.1, 10.0)
    away_up, away_down = (a > 0) & (ratio > 1), (a < 0) & (ratio < 1)
    gates = [torch.exp(-((ratio.detach() - 1) ** 2) / 2 / sigma**2) for sigma in (positive, negative)]
    gated = torch.where(away_up, gates[0] * ratio, torch.where(away_down, gates[1] * ratio, ratio))
    return (torch.where((a < 0) & (ratio > 20), ratio.detach(), gated) * a).sum()


def bapo(lp: Tensor, mu: Tensor, old: Tensor, a: Tensor, low: float = 0.6, high: float = 1.2) -> Tensor:
    return ppo((lp - mu).exp(), a, low, high, 3.0).sum()


def gppo(lp: Tensor, mu: Tensor, old: Tensor, a: Tensor, beta: float = 1.0) -> Tensor:
    """compute_gppo_loss_general_beta of Kwai-Klear/CE-GPPO, to be maximised: three cases, then a dual clip of 3."""
    ratio = (lp - mu).exp()
    low, high = (ratio < 0.8) & (a < 0), (ratio > 1.28) & (a > 0)
    value = torch.where(low, beta * 0.8 / ratio.detach() * ratio * a, ratio * a)
    value = torch.where(high, 1.28 / ratio.detach() * ratio * a, value)
    return torch.where((a < 0) & (ratio > 3), 3 * a, value).sum()


def luspo(lp: Tensor, mu: Tensor, old: Tensor, a: Tensor) -> Tensor:
    """TRL's luspo: the length times GSPO's clipped sequence ratio."""
    return gspo(lp, mu, old, a, 2e-3, 2.5e-3)


def gmpo(lp: Tensor, mu: Tensor, old: Tensor, a: Tensor) -> Tensor:
    """compute_policy_loss_geo_mean of verl: T·A·exp of the mean of log-ratios clipped on one side."""
    d = lp - mu
    sign = torch.where(a >= 0, 1.0, -1.0).double()
    d = sign * torch.minimum(sign * d, sign * d.clamp(-0.4, 0.4))
    geometric = d.mean().exp()
    if not (a == a[0]).all():
        return (a * geometric.detach() * d).sum()  # one A per token: each with the mean of all
    return len(lp) * a[0] * geometric


def opmd(lp: Tensor, mu: Tensor, old: Tensor, a: Tensor, tau: float = 0.01) -> Tensor:
    """openkimi's: −τ/2·(A/τ − S)²; of its gradient A·∇S − τ·S·∇S."""
    return -tau / 2 * (a[0] / tau - (lp - mu).sum()) ** 2


GIVEN: dict[str, dict[str, float]] = {
    "bapo": {"ratio_low": 0.6, "ratio_high": 1.2},
    "m2po": {"m2_max": 0.05},
    "clip_cov": {"mean_advantage": 0.1, "mean_log_prob": -1.0, "lot_max": 0.5, "cov_low": 0.2, "cov_high": 5.0},
    "kl_cov": {"mean_advantage": 0.1, "mean_log_prob": -1.0, "cov_min": 0.3},
}
"""What objectives search for in a mini-batch, as if it had been found."""


def m2po(lp: Tensor, mu: Tensor, old: Tensor, a: Tensor) -> Tensor:
    kept = (lp - mu).detach() ** 2 <= GIVEN["m2po"]["m2_max"]
    return torch.where(kept, ppo((lp - mu).exp(), a, 0.8, 1.28, 3.0), 0.0).sum()


def covariances(lp: Tensor, a: Tensor, given: dict[str, float]) -> Tensor:
    return (a - given["mean_advantage"]) * (lp.detach() - given["mean_log_prob"])


def clip_cov(lp: Tensor, mu: Tensor, old: Tensor, a: Tensor, shift: Tensor | float = 0.0) -> Tensor:
    """verl's: correction 0 on drawn tokens among those of high covariance that the clip leaves."""
    given = GIVEN["clip_cov"]
    ratio, covariance = (lp - mu + shift).exp(), covariances(lp, a, given)
    left = torch.where(a >= 0, ratio <= 1.28, ratio >= 0.8)
    mixed = torch.sin(lp.detach() * 12.9898 + mu * 78.233) * 43758.5453
    drawn = (mixed - mixed.floor() <= 0.5) & (covariance > 0.2) & (covariance < 5.0) & left
    return torch.where(drawn, 0.0, ppo(ratio, a, 0.8, 1.28, 3.0)).sum()


def kl_cov(lp: Tensor, mu: Tensor, old: Tensor, a: Tensor) -> Tensor:
    """verl's: the ratio, and −|log ratio| on tokens of high covariance; none of the ratio beyond 20 for negatives."""
    high = covariances(lp, a, GIVEN["kl_cov"]) >= GIVEN["kl_cov"]["cov_min"]
    ratio = (lp - mu).exp()
    ratio = torch.where((a < 0) & (ratio > 20), ratio.detach(), ratio)
    return (a * ratio - torch.where(high, (lp - mu).abs(), 0.0)).sum()


SURROGATES = {
    "vespo": vespo,
    "reinforce": reinforce,
    "grpo": grpo,
    "dr_grpo": grpo,
    "gspo": gspo,
    "gspo_token": gspo_token,
    "sapo": sapo,
    "cispo": cispo,
    "topr": topr,
    "minpro": minpro,
    "gppo": gppo,
    "ce_gppo": lambda *x: gppo(*x, beta=0.25),
    "luspo": luspo,
    "gmpo": gmpo,
    "opmd": opmd,
    "m2po": m2po,
    "clip_cov": clip_cov,
    "kl_cov": kl_cov,
    "dppo_tv": lambda *x: dppo(*x, kind="tv"),
    "dppo_kl": lambda *x: dppo(*x, kind="kl"),
    "minirl": minirl,
    "decoupled_ppo": decoupled_ppo,
    "maspo": maspo,
    "bapo": bapo,
}
VARIANTS = [
    ("vespo", {"normalization": "sqrt"}, lambda *x: vespo(*x, power=0.5)),
    ("vespo", {"normalization": "linear"}, lambda *x: vespo(*x, power=1.0)),
    ("gspo", {"clip_low": 0.2, "clip_high": 0.25}, lambda *x: gspo(*x, low=0.2, high=0.25)),
    ("gspo_token", {"clip_low": 0.2, "clip_high": 0.25}, lambda *x: gspo_token(*x, low=0.2, high=0.25)),
    ("topr", {"length_normalized": True}, lambda *x: topr(*x, power=1.0)),
    ("grpo", {"dual_clip": None}, lambda *x: grpo(*x, dual=None)),
    ("bapo", {"ratio_low": 0.8, "ratio_high": 1.2}, lambda *x: bapo(*x, low=0.8, high=1.2)),
]


def token_scale(batch: Batch, aggregation: str, length: float) -> Tensor:
    """[num_sequences], by the definitions of the four aggregations."""
    lengths = batch.unmasked_lengths
    filled = sum(n > 0 for n in lengths)
    return torch.tensor(
        [
            {
                "token-mean": 1 / sum(lengths),
                "seq-mean-token-sum": 1 / filled,
                "seq-mean-token-mean": 1 / (filled * max(n, 1)),
                "token-sum-norm": 1 / (filled * length),
            }[aggregation]
            for n in lengths
        ],
        dtype=torch.float64,
    )


def surrogate_gradient(
    batch: Batch, surrogate, aggregation: str = "token-mean", per_token: bool = False, length: float = 16.0
) -> Tensor:
    """∇ of −Σ_i scale_i·J_i with respect to every log-prob: [tokens]."""
    log_probs = batch.leaf()
    scale = token_scale(batch, aggregation, length)
    loss = log_probs.new_zeros(())
    for i, (start, stop) in enumerate(pairwise(batch.cu_seqlens.tolist())):
        index = torch.arange(start, stop)[batch.mask[start:stop]]
        if len(index) == 0:
            continue
        a = batch.token_advantages[index] if per_token else batch.advantages[i].expand(len(index))
        loss = loss - scale[i] * surrogate(
            log_probs[index], batch.behavior_log_probs[index], batch.old_log_probs[index], a
        )
    (gradient,) = torch.autograd.grad(loss, log_probs)
    return gradient
