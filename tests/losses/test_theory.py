"""The mathematics the documentation claims, checked against quadrature, enumeration and a numeric optimiser."""

import math

import pytest
import torch
from scipy import integrate, optimize

from tests.losses.surrogates import GIVEN, SURROGATES
from vespo_megatron.losses import get_objective
from vespo_megatron.losses.theory import (
    lambda_of_c,
    log_normal_w,
    objective_phi,
    optimal_proposal,
    proposal,
    surrogate,
    vespo_k,
    vespo_phi,
    vespo_phi_max,
    vespo_surrogate,
    vespo_surrogate_limit,
)

VESPO_CONSTANTS = {"positive": (2.0, 3.0), "negative": (3.0, 2.0)}
"""(c1, c2) of the paper, by the sign of A."""
CONSTANTS = list(VESPO_CONSTANTS.values())
W = torch.logspace(-3, 2, 400, dtype=torch.float64)


def random_policies(seed, outcomes=6):
    generator = torch.Generator().manual_seed(seed)
    mu, pi = torch.softmax(1.5 * torch.randn(2, outcomes, generator=generator, dtype=torch.float64), dim=1)
    return mu, pi / mu


@pytest.mark.parametrize(("c1", "c2"), [*CONSTANTS, (1.0, 2.0), (1.7, 0.6), (0.5, 1.0)])
def test_surrogate_is_the_integral_of_phi_over_w(c1, c2):
    for w in (0.01, 0.3, 1.0, 2.5, 30.0):
        expected, _ = integrate.quad(lambda u: u ** (c1 - 1) * math.exp(c2 * (1 - u)), 0, w, epsabs=1e-13)
        assert float(vespo_surrogate(torch.tensor(w, dtype=torch.float64), c1, c2)) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("constants", "limit", "phi_max", "k"), [((2.0, 3.0), 2.2317, 1.208, 2.463), ((3.0, 2.0), 1.8473, 1.242, 1.0)]
)
def test_constants_are_those_of_the_paper_and_are_attained(constants, limit, phi_max, k):
    assert round(vespo_surrogate_limit(*constants), 4) == limit
    assert round(vespo_phi_max(*constants), 3) == phi_max
    assert round(vespo_k(*constants), 3) == k
    w = torch.linspace(1e-3, 20, 200_001, dtype=torch.float64)
    phi = vespo_phi(w, *constants)
    assert float(phi.max()) == pytest.approx(vespo_phi_max(*constants), rel=1e-7)
    assert float(w[phi.argmax()]) == pytest.approx(constants[0] / constants[1], abs=1e-3)
    assert float((phi / w).max()) == pytest.approx(vespo_k(*constants), rel=1e-7)


def test_k_is_finite_exactly_from_c1_of_one():
    assert vespo_k(0.99, 2.0) == math.inf
    assert vespo_k(1.0, 2.0) == pytest.approx(float((vespo_phi(W * 1e-6, 1.0, 2.0) / (W * 1e-6)).max()), rel=1e-3)


@pytest.mark.parametrize("name", sorted(name for name in SURROGATES if name not in GIVEN or name == "bapo"))
@pytest.mark.parametrize("positive", [True, False])
def test_numeric_surrogate_of_any_objective_has_slope_phi_over_w(name, positive):
    def phi(w):
        return objective_phi(name, w, positive=positive)

    for w in (0.05, 0.5, 0.9, 1.1, 2.0):
        found = float(surrogate(phi, torch.tensor([w], dtype=torch.float64))[0])
        points = [p for p in (0.6, 0.8, 0.9, 1 - 3e-4, 1 + 4e-4, 1.2, 1.27, 1.28) if min(w, 1) < p < max(w, 1)]
        expected, _ = integrate.quad(
            lambda u: float(phi(torch.tensor([u], dtype=torch.float64))[0]) / u, 1, w, points=points or None, limit=200
        )
        assert found == pytest.approx(expected, abs=2e-4)


def test_phi_of_the_kernel_is_phi_of_the_theory():
    for sign, constants in VESPO_CONSTANTS.items():
        found = objective_phi("vespo", W[:350], positive=sign == "positive", length=3)
        torch.testing.assert_close(found, vespo_phi(W[:350], *constants), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("constants", [*CONSTANTS, (1.0, 1.0), (1.2, 5.0)])
def test_second_moment_is_bounded_by_z_k_c_on_random_policies(constants):
    for seed in range(300):
        mu, w = random_policies(seed)
        moments = proposal(w, vespo_phi(w, *constants), mu, vespo_k(*constants))
        assert moments.second_moment <= moments.bound * (1 + 1e-12)
        q = mu * vespo_phi(w, *constants)
        assert moments.mean_w == pytest.approx(float((q / q.sum() * w).sum()))
        assert 0 < moments.ess <= 1 + 1e-12


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_optimal_proposal_is_the_numeric_constrained_optimum(alpha):
    for seed in range(4):
        mu, w = random_policies(seed, 5)
        free = float((optimal_proposal(mu, w, alpha, 0.0) * w).sum())
        c = (float(w.min()) + free) / 2
        found = optimal_proposal(mu, w, alpha, lambda_of_c(mu, w, alpha, c)).numpy()
        m, v = mu.numpy(), w.numpy()

        def cost(q, m=m, v=v):
            import numpy as np

            q = np.maximum(q, 1e-15)
            return float((q * np.log(q / m)).sum() - alpha * (q * np.log(v)).sum())

        best = optimize.minimize(
            cost,
            m,
            method="SLSQP",
            bounds=[(1e-12, 1)] * 5,
            constraints=[
                {"type": "eq", "fun": lambda q: q.sum() - 1},
                {"type": "ineq", "fun": lambda q, v=v, c=c: c - (q * v).sum()},
            ],
            options={"ftol": 1e-14, "maxiter": 1000},
        )
        assert found == pytest.approx(best.x, abs=2e-4)
        assert cost(found) <= best.fun + 1e-8
        assert float((found * v).sum()) == pytest.approx(c, rel=1e-9)


def test_mean_w_falls_with_lambda_as_its_variance_says():
    mu, w = random_policies(1)
    step = 1e-5
    for lam in (0.0, 0.3, 1.0, 4.0, 20.0):
        means = [float((optimal_proposal(mu, w, 2.0, x) * w).sum()) for x in (lam, lam + step)]
        q = optimal_proposal(mu, w, 2.0, lam)
        variance = float((q * w**2).sum() - (q * w).sum() ** 2)
        assert (means[1] - means[0]) / step == pytest.approx(-variance, rel=1e-3)
        assert means[1] < means[0]


def test_a_constraint_that_does_not_bind_has_lambda_zero_and_an_impossible_one_is_an_error():
    mu, w = random_policies(2)
    assert lambda_of_c(mu, w, 1.0, 1e6) == 0.0
    with pytest.raises(ValueError, match="not above the smallest W"):
        lambda_of_c(mu, w, 1.0, float(w.min()) * 0.9)


def test_implied_c_of_the_deployed_kernel_is_the_optimum_of_its_own_constraint():
    """Q ∝ μ·φ(W) with φ = W^c1·e^(−c2·W) is Q* at λ = c2, whose C is E[φW]/E[φ]."""
    for c1, c2 in CONSTANTS:
        mu, w = random_policies(3)
        c = proposal(w, vespo_phi(w, c1, c2), mu).mean_w
        assert lambda_of_c(mu, w, c1, c) == pytest.approx(c2, abs=1e-8)


def test_log_normal_weights_are_a_change_of_measure():
    w = log_normal_w(0.7)
    assert float(w.mean()) == pytest.approx(1.0, abs=1e-4)
    assert float(w.log().std()) == pytest.approx(0.7, abs=1e-3)


def test_a_long_response_moves_token_clipping_away():
    w = torch.tensor([2.0], dtype=torch.float64)
    assert float(objective_phi("grpo", w, positive=True)) == 0.0
    assert float(objective_phi("grpo", w, positive=True, length=100)) == pytest.approx(2 ** (1 / 100))
    assert get_objective("grpo").level == "token"
