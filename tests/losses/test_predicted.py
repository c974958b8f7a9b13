"""φ and ESS predicted from moments of a token, against the known table, quadrature, and responses that were drawn."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from tests.losses.surrogates import SURROGATES
from vespo_megatron.errors import UserError
from vespo_megatron.losses import objective_names
from vespo_megatron.losses.predicted import Divergence, effective_sample_size, log_w_distribution, predict

PUBLISHED = {
    5e-4: {500: (0.83, 0.61), 1000: (0.70, 0.37), 2000: (0.54, 0.15), 6000: (0.23, 0.003)},
    1.5e-3: {500: (0.61, 0.23), 1000: (0.42, 0.06), 2000: (0.23, 0.006), 6000: (0.03, 0.000)},
}
"""k3 → tokens → mean φ where A ≥ 0 and ESS, of N(−k3·T, 2·k3·T): its ESS are those of a sample."""
JUMPS = [(0.047, 0.112), (0.0035, 0.0107), (0.01, 0.0099), (0.02, 0.012), (0.0015, 0.0016), (1e-5, 3e-3)]
"""(k3, k2): few tokens far less likely to the trainer, the same fewer, nearly Gaussian, far more likely, …"""


def vespo(w, c1, c2):
    return w**c1 * np.exp(c2 * (1 - w))


@pytest.mark.parametrize("k3", PUBLISHED)
def test_the_table_of_vespo_comes_out(k3):
    for length, (phi, ess) in PUBLISHED[k3].items():
        made = predict("vespo", Divergence(k3), length)
        assert round(made.phi_positive, 2) == pytest.approx(phi, abs=0.0051)
        assert made.ess == pytest.approx(math.exp(-2 * k3 * length), rel=1e-12)
        assert made.ess == pytest.approx(ess, abs=0.016)


@pytest.mark.parametrize(("k3", "length"), [(5e-4, 500), (1.5e-3, 1000), (0.05, 40), (1e-6, 10), (1e-3, 1)])
def test_a_gaussian_is_integrated_as_scipy_does(k3, length):
    variance = 2 * k3 * length
    for positive, constants in ((True, (2, 3)), (False, (3, 2))):

        def density(s, variance=variance, constants=constants):
            return vespo(math.exp(s), *constants) * stats.norm.pdf(s, -variance / 2, math.sqrt(variance))

        middle, width = -variance / 2, 12 * math.sqrt(variance)
        expected, _ = integrate.quad(density, middle - width, middle + width, epsabs=1e-12, limit=500, points=[middle])
        made = predict("vespo", Divergence(k3), length)
        assert (made.phi_positive if positive else made.phi_negative) == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize(("k3", "k2"), JUMPS)
@pytest.mark.parametrize("length", [1, 40, 5000])
def test_jumps_keep_what_a_ratio_of_policies_must_have(k3, k2, length):
    divergence = Divergence(k3, k2)
    log_w, weights = log_w_distribution(divergence, length)
    assert (log_w.diff() >= 0).all() and float(weights.sum()) == pytest.approx(1, abs=1e-9)
    mean = float((weights * log_w).sum())
    assert mean == pytest.approx(-k3 * length, rel=2e-3)
    assert float((weights * (log_w - mean) ** 2).sum()) == pytest.approx((2 * k2 - k3**2) * length, rel=5e-3)
    if 2 * k3 * length < 20:
        assert float((weights * log_w.exp()).sum()) == pytest.approx(1, abs=5e-3)
    if 0 < effective_sample_size(divergence, length) and 2 * k3 * length < 10:
        second = float((weights * (2 * log_w).exp()).sum())
        assert 1 / second == pytest.approx(effective_sample_size(divergence, length), rel=0.02)


@pytest.mark.parametrize(("k3", "k2"), JUMPS)
def test_phi_of_jumps_is_that_of_a_gamma_distribution(k3, k2):
    """The same integral over scipy's quantiles, its b found by scipy's root finder."""
    from scipy.optimize import brentq

    ratio = (2 * k2 - k3**2) / k3
    bounds = (1e-6, 1e7) if ratio > 2 else (-1 + 1e-12, -1e-6)
    b = brentq(lambda b: b * b / (b - math.log1p(b)) - ratio, *bounds, xtol=1e-14)
    a, length = k3 / (b - math.log1p(b)), 60
    levels = (np.arange(200_000) + 0.5) / 200_000
    log_w = a * length * math.log1p(b) - b * stats.gamma.ppf(levels, a * length)
    made = predict("vespo", Divergence(k3, k2), length)
    assert made.phi_positive == pytest.approx(vespo(np.exp(log_w), 2, 3).mean(), abs=1e-3)
    assert made.phi_negative == pytest.approx(vespo(np.exp(log_w), 3, 2).mean(), abs=1e-3)
    share = float((vespo(np.exp(log_w), 2, 3) > 0.5).mean())
    assert made.above_half_positive == pytest.approx(share, abs=2e-3)


def test_vanishing_jumps_are_a_gaussian():
    exact = predict("vespo", Divergence(1.5e-3), 1000)
    for excess in (1e-12, 1e-6, 1e-5, -1e-6):
        near = predict("vespo", Divergence(1.5e-3, 1.5e-3 + 1.5e-3**2 / 2 + excess), 1000)
        assert near.phi_positive == pytest.approx(exact.phi_positive, abs=0.01)
        assert near.ess == pytest.approx(exact.ess, abs=0.01)


def draw_responses(policies, number, length):
    """d of tokens drawn by μ: float64 [number, length]; policies [contexts, vocabulary], a context per token."""
    mu, pi = policies
    generator = torch.Generator().manual_seed(1)
    contexts = torch.randint(len(mu), (number, length), generator=generator)
    tokens = torch.multinomial(mu[contexts.flatten()], 1, generator=generator)[:, 0]
    rows = contexts.flatten()
    return (pi[rows, tokens] / mu[rows, tokens]).log().view(number, length)


def near_policies(noise):
    """Softmax policies whose logits differ by that noise."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(200, 40, generator=generator, dtype=torch.float64)
    moved = logits + noise * torch.randn(200, 40, generator=generator, dtype=torch.float64)
    return torch.softmax(logits, 1), torch.softmax(moved, 1)


def policies_with_rare_disagreement(share, strength):
    """Nearly equal policies, but in some contexts μ likes a token that π finds e^−strength as likely."""
    mu, pi = near_policies(0.02)
    contexts = torch.arange(int(share * len(mu)))
    pi = pi.clone()
    pi[contexts, mu[contexts].argmax(1)] *= math.exp(-strength)
    return mu, pi / pi.sum(1, keepdim=True)


@pytest.mark.parametrize("noise", [0.05, 0.12, 0.3])
def test_the_gaussian_predicts_phi_of_policies_that_are_close(noise):
    d = draw_responses(near_policies(noise), 2000, 300)
    k3 = float((d.expm1() - d).mean())
    made, w = predict("vespo", Divergence(k3), 300), d.sum(1).exp().numpy()
    assert made.phi_positive == pytest.approx(vespo(w, 2, 3).mean(), abs=0.03)
    assert made.phi_negative == pytest.approx(vespo(w, 3, 2).mean(), abs=0.03)
    assert made.above_half_positive == pytest.approx((vespo(w, 2, 3) > 0.5).mean(), abs=0.03)


@pytest.mark.parametrize(
    ("share", "strength", "bound"), [(0.1, 1.5, 0.02), (0.2, 2.0, 0.02), (0.3, 3.0, 0.02), (0.02, 5.0, 0.25)]
)
def test_k2_tells_rare_large_disagreements_from_many_small_ones(share, strength, bound):
    """The last has less than one of them in a response: there two moments say too little, though more than one."""
    d = draw_responses(policies_with_rare_disagreement(share, strength), 4000, 40)
    k3, k2 = float((d.expm1() - d).mean()), float((d**2).mean() / 2)
    w = d.sum(1).exp().numpy()
    true = np.array([vespo(w, 2, 3).mean(), vespo(w, 3, 2).mean()])
    errors = []
    for divergence in (Divergence(k3), Divergence(k3, k2)):
        made = predict("vespo", divergence, 40)
        errors.append(np.abs(np.array([made.phi_positive, made.phi_negative]) - true).max())
    assert errors[1] < bound and errors[1] < errors[0]


def test_mean_w_of_a_sign_is_what_it_was_measured_as():
    for divergence in (Divergence(0.01), Divergence(0.047, 0.112), Divergence(0.02, 0.012)):
        for mean_w in (0.7, 1.0, 1.2):
            log_w, weights = log_w_distribution(divergence, 40, mean_w)
            assert float((weights * log_w.exp()).sum()) == pytest.approx(mean_w, rel=5e-3)
    fewer = predict("vespo", Divergence(0.0035, 0.0107), 40, mean_w=(1.1, 0.9))
    assert fewer.phi_negative < predict("vespo", Divergence(0.0035, 0.0107), 40).phi_negative


def test_staleness_adds_to_the_engines_difference():
    assert Divergence(1e-3) + Divergence(5e-4) == Divergence(1.5e-3)
    both = Divergence(0.047, 0.112) + Divergence(0.01)
    assert both.k3 == pytest.approx(0.057) and both.variance == pytest.approx(2 * 0.112 - 0.047**2 + 0.02)
    none = predict("vespo", Divergence(0.0), 6000)
    assert (none.phi_positive, none.phi_negative, none.ess, none.above_half_negative) == (1, 1, 1, 1)


@pytest.mark.parametrize("name", ["grpo", "sapo", "cispo", "gspo_token", "minpro"])
def test_token_objectives_see_tokens_and_whole_responses(name):
    """Beside responses drawn apart, one at a time through the independently written surrogates' own formulas."""
    length, k3 = 30, 0.02
    d = torch.from_numpy(np.random.default_rng(5).normal(-k3, math.sqrt(2 * k3), (3000, length)))
    ratio = d.exp()
    expected = {
        "grpo": lambda: (ratio * (ratio <= 1.28), ratio * ((ratio >= 0.8) & (ratio <= 3))),
        "sapo": lambda: tuple(
            4 * torch.sigmoid(t * (ratio - 1)) * torch.sigmoid(t * (1 - ratio)) * ratio for t in (1, 1.05)
        ),
        "cispo": lambda: (ratio.clamp(0, 5),) * 2,
        "gspo_token": lambda: _gspo(d.mean(1).exp()),
        "minpro": lambda: (_minpro(d),) * 2,
    }[name]()
    made = predict(name, Divergence(k3), length)
    assert name in SURROGATES
    assert made.phi_positive == pytest.approx(float(expected[0].mean()), abs=0.02)
    assert made.phi_negative == pytest.approx(float(expected[1].mean()), abs=0.02)


def _gspo(s):
    return s * (s <= 1 + 4e-4), s * (s >= 1 - 3e-4)


def _minpro(d):
    before = torch.cat([torch.zeros(len(d), 1, dtype=d.dtype), d.cummin(1).values[:, :-1]], 1)
    return (before + d).exp().clamp(0.8, 1.28)


@pytest.mark.parametrize("name", objective_names())
def test_every_objective_can_be_predicted(name):
    for divergence in (Divergence(1.5e-3), Divergence(0.01, 0.03)):
        for length in (1, 700):
            made = predict(name, divergence, length)
            assert all(math.isfinite(value) for value in vars(made).values())
            assert 0 <= made.above_half_positive <= 1 + 1e-9 and 0 <= made.above_half_negative <= 1 + 1e-9


def test_hyperparameters_are_the_recipe_s():
    wide = predict("vespo", Divergence(1.5e-3), 1000, hyperparameters={"normalization": "linear"})
    assert wide.phi_positive == pytest.approx(1, abs=0.01)
    with pytest.raises(UserError, match="c9"):
        predict("vespo", Divergence(1.5e-3), 1000, hyperparameters={"c9": 1})


@pytest.mark.parametrize(
    ("k3", "k2", "message"),
    [(-1e-3, None, "k3: is -0.001"), (math.nan, None, "k3: is nan"), (math.inf, None, "k3"), (1.0, 0.4, "k2: is 0.4")],
)
def test_moments_that_no_policies_have_are_refused(k3, k2, message):
    with pytest.raises(UserError, match=message):
        Divergence(k3, k2)


def test_a_response_has_a_token():
    with pytest.raises(UserError, match="tokens: is 0"):
        predict("vespo", Divergence(1e-3), 0)
