"""Every metric: name, meaning, unit, and how the values of several parts make one. Standard library alone.

A `*` in a name stands for what is known at run time alone (a phase, a layer, a problem set, a reward's own parts); it
may hold slashes, as names that users give may.
"""

from __future__ import annotations

import difflib
import enum
import re
from dataclasses import dataclass
from functools import cache

from vespo_megatron.errors import UserError


class Merge(enum.Enum):
    """How the values of a step's parts (sampling rounds, optimizer updates, repetitions of a phase) make the step's."""

    SUM = "sum"
    MEAN = "mean"
    """Weighted by the parts' sizes, where they have one."""
    MIN = "min"
    MAX = "max"
    LAST = "last"
    WHOLE = "of the whole"
    """Not of the parts' values: computed of everything at once."""


@dataclass(frozen=True)
class Metric:
    """One row, or a family of them."""

    name: str
    meaning: str
    unit: str = ""
    merge: Merge = Merge.MEAN
    over: str = ""
    """What a mean is over."""
    shares: bool = False
    """Micro-batches and ranks hold shares that add up to it; else they hold a sum and a count."""
    title: str = ""
    """In reports, where it has a panel."""


SUM, MEAN, MIN, MAX, LAST, WHOLE = Merge.SUM, Merge.MEAN, Merge.MIN, Merge.MAX, Merge.LAST, Merge.WHOLE

REWARDS = (
    Metric(
        "reward/mean",
        "Mean reward of a rollout batch, before the step's updates.",
        "",
        WHOLE,
        "responses",
        title="Reward",
    ),
    Metric("reward/std", "Standard deviation of the rewards.", "", WHOLE, "responses"),
    Metric(
        "reward/*", "A part of the reward, by its name: the mean of responses that have it.", "", WHOLE, "responses"
    ),
    Metric(
        "response/length_mean",
        "Tokens, mean of a rollout batch.",
        "tokens",
        WHOLE,
        "responses",
        title="Response length",
    ),
    Metric("response/length_std", "Standard deviation of the lengths.", "tokens", WHOLE, "responses"),
    Metric("response/length_max", "The longest response.", "tokens", WHOLE),
    Metric("response/tokens", "Response tokens of the rollout batch.", "tokens", WHOLE),
    Metric("response/truncated_fraction", "Responses cut off at their limit.", "", WHOLE, "responses"),
)

ADVANTAGES = (
    Metric("advantage/mean", "Mean advantage.", "", WHOLE, "kept responses"),
    Metric("advantage/std", "Standard deviation of the advantages.", "", WHOLE, "kept responses"),
    Metric("advantage/min", "The smallest advantage.", "", MIN),
    Metric("advantage/max", "The largest advantage.", "", MAX),
    Metric("advantage/groups", "Groups that were drawn.", "groups", SUM),
    Metric("advantage/groups_without_signal", "Groups whose rewards are all equal.", "groups", SUM),
    Metric("advantage/dropped_samples", "Responses that are not trained on.", "responses", SUM),
    Metric("advantage/filtered_samples", "Truncated responses that overlong filtering takes out.", "responses", SUM),
    Metric("advantage/bad_samples", "Responses whose reward is not finite.", "responses", SUM),
)

ROLLOUTS = (
    Metric("rollout/bad_samples", "Responses whose numbers are not finite, left out.", "responses", SUM),
    Metric(
        "rollout/stale_routes",
        "With R3: responses some of whose routes are, or may be, of other weights than drew their tokens.",
        "responses",
        SUM,
    ),
    Metric(
        "rollout/unscored_*",
        "Responses whose score did not come: late (timeout), the reward raised (error), its process ended (died).",
        "responses",
        SUM,
    ),
    Metric(
        "rollout/tail_share",
        "Of the longest response's tokens, the share drawn when four of five responses have ended.",
        "",
        WHOLE,
    ),
    Metric(
        "rollout/passed_over",
        "Times that a resting prompt was passed over since the run began (`data.curriculum`).",
        "prompts",
        LAST,
    ),
    Metric("rollout/carried_groups", "Groups that an earlier step had begun (`grpo.partial_rollouts`).", "groups", SUM),
    Metric("rollout/ended_groups", "Groups begun and not taken (`grpo.oversample`).", "groups", SUM),
    Metric("rollout/discarded_tokens", "Tokens of such groups that are not gone on with.", "tokens", SUM),
    Metric("rollout/sampling_rounds", "Rollouts that dynamic sampling took for the batch.", "rounds", SUM),
    Metric("rollout/queue_mean", "Requests that waited for a server when one was sent.", "requests"),
    Metric("rollout/queue_max", "Most requests that waited for a server.", "requests", MAX),
    Metric("rollout/in_flight_max", "Most requests at servers at a time.", "requests", MAX),
    Metric("rollout/tokens_per_second", "Response tokens over the time in which servers had work.", "tokens/s"),
    Metric("rollout/retries", "Calls repeated to the same server.", "calls", SUM),
    Metric("rollout/redispatched", "Requests given to another server.", "requests", SUM),
    Metric("rollout/faults", "Times that a server failed.", "", SUM),
    Metric("rollout/readmitted", "Servers that serve again.", "servers", SUM),
    Metric("rollout/servers", "Servers in service.", "servers", LAST),
    Metric("rollout/latency_p*", "Percentile of a call's time, by requests.", "s", MAX),
    Metric("rollout/server_*/requests", "Requests that one server answered.", "requests", SUM),
    Metric("rollout/server_*/tokens_per_second", "Of one server.", "tokens/s"),
    Metric("rollout/server_*/latency_p95", "Of one server.", "s", MAX),
    Metric("rollout/server_*/in_flight_max", "Of one server.", "requests", MAX),
    Metric("rollout/server_*/faults", "Of one server.", "", SUM),
)

TURNS = (
    Metric("turns/mean", "Turns of a response, where an environment answers.", "turns", WHOLE, "responses"),
    Metric("turns/max", "Most turns of a response.", "turns", WHOLE),
    Metric("turns/tokens_mean", "Tokens drawn in a turn.", "tokens", WHOLE, "turns"),
    Metric(
        "turns/observed_tokens_mean", "Tokens that the environment said to a response.", "tokens", WHOLE, "responses"
    ),
    Metric("turns/truncated_fraction", "Turns that no stop token ended.", "", WHOLE, "turns"),
    Metric(
        "turns/limit_fraction",
        "Responses that would have gone on, but for the number of turns, the tokens left or the context.",
        "",
        WHOLE,
        "responses",
    ),
    Metric(
        "turns/tool_errors", "Calls that failed or could not be read, as the environment counts them.", "calls", WHOLE
    ),
)

STALENESS = (
    Metric(
        "staleness/lag_mean",
        "Weight versions between sampling and training.",
        "versions",
        WHOLE,
        "tokens",
        title="Staleness",
    ),
    Metric("staleness/lag_max", "The largest lag of a token.", "versions", MAX),
    Metric("staleness/partial_share", "Responses with tokens of several weight versions.", "", WHOLE, "responses"),
    Metric("staleness/interruptions", "Responses that a weight update ended, to go on after it.", "", SUM),
    Metric("staleness/under_way", "Groups that were sent and have not arrived.", "groups", LAST),
    Metric("staleness/waiting", "Groups that have arrived and wait to be trained on.", "groups", LAST),
    Metric("staleness/sent", "Groups sent since the run began.", "groups", LAST),
    Metric("staleness/trained", "Groups trained on since the run began.", "groups", LAST),
    Metric("staleness/aborted", "Groups given up, or without signal, since the run began.", "groups", LAST),
    Metric("staleness/expired", "Groups too old to be trained on, since the run began.", "groups", LAST),
    Metric(
        "staleness/drawn_again",
        "Groups that a resume found under way, and that were sent once more, since the run began; not in the sum.",
        "groups",
        LAST,
    ),
    Metric("staleness/trainer_idle_seconds", "The trainer waited for a batch.", "s", SUM),
    Metric("staleness/engine_idle_seconds", "Nothing was under way.", "s", SUM),
    Metric("staleness/versions", "Weight versions that π_old was computed under (`behavior: version`).", "", WHOLE),
    Metric("staleness/version_forwards", "Forwards for π_old that a micro-batch took.", "", WHOLE, "micro-batches"),
    Metric("staleness/swap_seconds", "Copying weights of other versions in, and the trainer's back; rank 0.", "s", SUM),
    Metric("staleness/held_versions", "Weight versions in host memory.", "versions", LAST),
    Metric("staleness/held_bytes", "Host memory they take, of rank 0.", "bytes", LAST),
    Metric("staleness/tokens_lag_*", "Tokens of that lag.", "tokens", SUM),
    Metric(
        "staleness/k3",
        "Estimate of KL(π_old‖π_θ) per token: what the updates have moved; with behaviour recompute or version.",
        "nats",
        over="tokens",
    ),
    Metric("staleness/w_mean_lag_*", "W of responses of that lag.", "", MEAN, "responses of that lag"),
    Metric("staleness/ess_lag_*", "(ΣW)²/(n·ΣW²) of responses of that lag.", "", WHOLE),
)

LOSS = (
    Metric(
        "correction/weight_mean", "Mean weight of a correction, before it is normalised.", over="tokens, or responses"
    ),
    Metric("correction/dropped_token_fraction", "Tokens that a correction drops, by themselves.", over="tokens"),
    Metric("correction/dropped_response_fraction", "Responses that a correction drops whole.", over="responses"),
    Metric(
        "router_shift/mean",
        "Mean of γ̃, the weight of tokens by how far the routers have moved since π_old; 1: not at all (RSPO).",
        over="tokens",
    ),
    Metric("router_shift/floored", "Tokens whose γ is at the floor or below.", over="tokens"),
    Metric("loss/policy", "The policy term of the loss.", "", MEAN, "updates", shares=True),
    Metric(
        "loss/kl",
        "Of the penalty, where there is one.",
        "nats",
        MEAN,
        "updates",
        shares=True,
        title="KL to the reference",
    ),
    Metric("loss/entropy", "The entropy term, before its weight.", "nats", MEAN, "updates", shares=True),
    Metric("loss/bad_samples", "Responses with a number that is not finite.", "responses", SUM, shares=True),
    Metric(
        "loss/zero_coefficient_fraction",
        "φ·correction is 0 (token objectives, or per-token advantages).",
        "",
        over="tokens",
    ),
    Metric("loss/grad_norm", "Before clipping.", "", MEAN, "updates", title="Gradient norm"),
    Metric("loss/grad_norm_max", "The largest of the updates, before clipping.", "", MAX),
    Metric("loss/learning_rate", "Of the last update.", "", LAST),
    Metric("loss/updates", "Optimizer updates that were taken.", "updates", SUM),
    Metric("loss/skipped_updates", "Updates refused for numbers that are not finite.", "updates", SUM),
    Metric("loss/overflows", "Updates skipped for gradients that overflow float16 at their scale.", "updates", SUM),
    Metric("loss/scale", "What the loss of the last update was multiplied with (float16).", "", LAST),
    Metric(
        "policy/entropy", "Nats per token, of the policy's own distribution.", "nats", over="tokens", title="Entropy"
    ),
)

OBJECTIVE = (
    Metric(
        "vespo/approx_kl",
        "Estimate of the KL from W's denominator to π_θ per token: −log W over the length, mean of responses.",
        "nats",
        over="responses",
        title="KL",
    ),
    Metric(
        "vespo/w_mean",
        "Mean of W of whole responses; 1 is on-policy.",
        over="responses",
        title="Importance weight W",
    ),
    Metric("vespo/w_max", "The largest W.", "", MAX),
    Metric("vespo/w_min", "The smallest W.", "", MIN),
    Metric("vespo/w_std", "Standard deviation of W.", "", WHOLE, "responses"),
    Metric("vespo/log_w_mean", "log W, unclamped (the reference logs it clamped to ±20).", over="responses"),
    Metric("vespo/log_w_max", "The largest log W, unclamped (the reference logs it clamped to ±20).", "", MAX),
    Metric("vespo/log_w_min", "The smallest log W, unclamped (the reference logs it clamped to ±20).", "", MIN),
    Metric("vespo/w_mean_positive", "W where A ≥ 0.", over="responses of that sign"),
    Metric("vespo/w_mean_negative", "W where A < 0.", over="responses of that sign"),
    Metric("vespo/count_positive", "Responses with A ≥ 0.", "responses", SUM, shares=True),
    Metric("vespo/count_negative", "Responses with A < 0.", "responses", SUM, shares=True),
    Metric("vespo/negative_large_w_count", "Responses with A < 0 and W > 100.", "responses", SUM, shares=True),
    Metric("vespo/negative_large_w_max", "The largest W of those.", "", MAX),
    Metric("vespo/negative_large_w_phi_mean", "φ of those.", over="those"),
    Metric(
        "vespo/ess",
        "(Σw)² / (n·Σw²) of unclipped W; 1 is on-policy.",
        "",
        WHOLE,
        "responses",
        title="Effective sample size",
    ),
    Metric("vespo/ess_clamped", "The same of W clamped to e^±20.", "", WHOLE, "responses"),
    Metric(
        "vespo/phi_mean",
        "Mean of what multiplies A·∇log π; 1 at W = 1.",
        over="responses (sequence objectives) or tokens",
        title="Coefficient φ",
    ),
    Metric("vespo/phi_max", "The largest φ.", "", MAX),
    Metric("vespo/phi_min", "The smallest φ.", "", MIN),
    Metric("vespo/phi_mean_positive", "φ where A ≥ 0, of sequence objectives.", over="responses of that sign"),
    Metric("vespo/phi_mean_negative", "φ where A < 0, of sequence objectives.", over="responses of that sign"),
    Metric("vespo/phi_ess", "(E φ)²/E φ².", "", WHOLE, "as phi_mean"),
    Metric("vespo/implied_c", "E[φW]/E[φ] = E_Q[W], of sequence objectives.", "", WHOLE, "responses"),
    Metric("vespo/log_w", "Histogram of log W (TensorBoard).", "", SUM),
    Metric("vespo/phi", "Histogram of φ (TensorBoard).", "", SUM),
    *(
        Metric(f"vespo/{name}_{which}_update", f"{name} of the {which} update of the rollout batch.", "", WHOLE)
        for name in ("w_mean", "phi_mean", "ess")
        for which in ("first", "last")
    ),
)

MISMATCH = (
    Metric("mismatch/k1", "−d: an estimate of KL(μ‖π).", "nats", over="tokens"),
    Metric("mismatch/k2", "d²/2.", "nats", over="tokens"),
    Metric("mismatch/k3", "k3 estimate of KL(μ‖π) per token.", "nats", over="tokens", title="Train-inference mismatch"),
    Metric(
        "mismatch/k3_first_update",
        "The same over the first update of a rollout batch, which is not stale.",
        "nats",
        WHOLE,
        title="Mismatch of the engines",
    ),
    Metric("mismatch/k3_last_update", "The same over the last update.", "nats", WHOLE),
    Metric("mismatch/chi2_token", "e^(2d) − 1.", over="tokens"),
    Metric("mismatch/chi2_seq", "e^(2·clamp(Σd, ±20)) − 1.", over="responses"),
    Metric("mismatch/extreme_token_fraction", "max(e^d, e^−d) > 2.", over="tokens"),
    Metric("mismatch/token_mult_prob_error", "e^|d|.", over="tokens"),
    Metric("mismatch/prob_diff_mean", "|π − μ|.", over="tokens"),
    Metric("mismatch/prob_diff_max", "The largest |π − μ|.", "", MAX),
    Metric("mismatch/prob_diff_std", "Standard deviation of |π − μ|.", "", WHOLE, "tokens"),
    Metric("mismatch/prob_correlation", "Pearson correlation of π and μ.", "", WHOLE, "tokens"),
    Metric("mismatch/log_ppl_diff", "Mean of −d over a response.", "nats", over="responses"),
    Metric("mismatch/log_ppl_abs_diff", "Its size.", "nats", over="responses"),
    Metric("mismatch/log_ppl_diff_max", "The largest.", "nats", MAX),
    Metric("mismatch/log_ppl_diff_min", "The smallest.", "nats", MIN),
    Metric("mismatch/log_ratio_mean", "Σd over a response: log π/μ of all of it.", "nats", over="responses"),
    Metric(
        "mismatch/log_ratio_std",
        "Its standard deviation.",
        "nats",
        WHOLE,
        "responses",
        title="Width of a response's log-ratio",
    ),
    Metric(
        "mismatch/log_ratio_std_expected",
        "√(2·k3·T), what k3 and the mean length T make of it where tokens are independent.",
        "nats",
        WHOLE,
    ),
)

ROUTES = (
    Metric(
        "routes/agreement", "Experts that trainer and engine agree on.", "", WHOLE, "tokens", title="Route agreement"
    ),
    Metric(
        "routes/agreement_layer_*",
        "The same, layer by layer.",
        "",
        WHOLE,
        "tokens",
        title="Route agreement by layer",
    ),
    Metric("routes/differing_tokens", "Tokens that differ in any layer.", "", WHOLE, "tokens"),
    Metric("routes/drift_agreement", "Experts of θ_old that θ would choose too (R2).", "", WHOLE, "tokens"),
    Metric("routes/drift_agreement_layer_*", "The same, layer by layer.", "", WHOLE, "tokens"),
    Metric("routes/drift_differing_tokens", "Tokens that differ in any layer from θ_old's.", "", WHOLE, "tokens"),
    Metric(
        "routes/max_violation",
        "Load of a layer's busiest expert over the layer's mean, less 1 (MaxVio); mean of the layers.",
        "",
        over="updates",
        title="Expert load: MaxVio",
    ),
    Metric("routes/max_violation_worst_layer", "Of the layer where it is largest.", "", over="updates"),
    Metric(
        "routes/max_violation_layer_*",
        "The same, layer by layer.",
        "",
        over="updates",
        title="MaxVio by layer",
    ),
    Metric(
        "routes/busiest_expert_share",
        "Share of a layer's load on its busiest expert; mean of the layers.",
        "",
        over="updates",
    ),
    Metric("routes/busiest_expert_share_worst_layer", "Of the layer where it is largest.", "", over="updates"),
    Metric("routes/busiest_expert_share_layer_*", "The same, layer by layer.", "", over="updates"),
    Metric(
        "routes/dead_experts",
        "Experts of a layer that no token of an update was sent to; mean of the layers.",
        "experts",
        over="updates",
        title="Dead experts",
    ),
    Metric("routes/dead_experts_worst_layer", "Of the layer where there are most.", "experts", over="updates"),
    Metric("routes/dead_experts_layer_*", "The same, layer by layer.", "experts", over="updates"),
    Metric(
        "routes/load_balancing_loss",
        "Routers' load balancing loss before its coefficient, 1 at even load; mean of the layers.",
        "",
        over="updates",
        title="Load balancing loss",
    ),
    Metric("routes/load_balancing_loss_layer_*", "The same, layer by layer.", "", over="updates"),
    Metric("routes/z_loss", "Routers' z-loss before its coefficient; mean of the layers.", "", over="updates"),
    Metric("routes/z_loss_layer_*", "The same, layer by layer.", "", over="updates"),
    Metric("routes/bytes_per_token", "Host memory of the routes that are held.", "bytes", WHOLE),
)

EVALUATION = (
    Metric("eval/*/avg@*", "Mean over the validation prompts.", "", LAST, "problems", title="Held-out accuracy"),
    Metric(
        "eval/average",
        "Mean of the validation sets' averages, each set as much as another.",
        "",
        LAST,
        "problems",
    ),
    Metric("eval/*/pass@*", "Problems of which one of k answers is right.", "", LAST, "problems"),
    Metric("eval/*/maj@*", "Problems whose most frequent of k answers is right.", "", LAST, "problems"),
    Metric("eval/*/greedy", "Mean of one greedy answer each.", "", LAST, "problems", title="Held-out accuracy, greedy"),
    Metric(
        "eval/*/by/*", "Mean over the prompts of one group.", "", LAST, "problems", title="Held-out accuracy by group"
    ),
    Metric(
        "eval/*/greedy_by/*",
        "Mean of one greedy answer each, of one group.",
        "",
        LAST,
        "problems",
        title="Held-out accuracy by group, greedy",
    ),
    Metric("eval/*/ci95", "Half the width of the 95% interval of the average.", "", LAST),
    Metric(
        "eval/response_length_mean", "Tokens of an answer.", "tokens", LAST, "answers", title="Held-out response length"
    ),
    Metric("eval/unscored", "Responses whose score did not come, which counts as 0.", "responses", LAST),
    Metric("eval/begun_after_step", "The step whose weights it began with: its own, or a resume's.", "", LAST),
)

MACHINE = (
    Metric("time/*", "Seconds of each step.", "s", SUM, title="Time per phase"),
    Metric("memory/*", "Of this process: on a GPU the most during the phase, on the host at its end.", "GiB", MAX),
    Metric("throughput/tokens_per_second", "Tokens per second.", "tokens/s", WHOLE, title="Throughput"),
    Metric("throughput/model_tflop", "Floating-point operations of the model in training.", "TFLOP", WHOLE),
    Metric("throughput/tflops_per_device", "The same over time and devices.", "TFLOP/s", WHOLE),
    Metric("throughput/mfu", "The same over the devices' peak.", "", WHOLE),
    Metric("checkpoint/stall_seconds", "Training stood still to copy the state.", "s", SUM),
    Metric("checkpoint/seconds", "From the copy to the published checkpoint.", "s", LAST),
    Metric("checkpoint/bytes", "Size of the checkpoint.", "bytes", LAST),
    Metric("checkpoint/failures", "Checkpoints that could not be written since the run began.", "", LAST),
)

AREAS: dict[str, tuple[Metric, ...]] = {
    "Rewards and responses": REWARDS,
    "Advantages": ADVANTAGES,
    "Rollouts": ROLLOUTS,
    "Turns": TURNS,
    "Staleness": STALENESS,
    "Loss and updates": LOSS,
    "Objective": OBJECTIVE,
    "Mismatch": MISMATCH,
    "Routes": ROUTES,
    "Evaluation": EVALUATION,
    "Machine": MACHINE,
}
METRICS: dict[str, Metric] = {metric.name: metric for area in AREAS.values() for metric in area}
"""By name, in the order of the documentation."""
_FAMILIES = [
    (re.compile(re.escape(name).replace(r"\*", ".+") + r"\Z"), metric)
    for name, metric in METRICS.items()
    if "*" in name
]


@cache
def metric(name: str) -> Metric:
    """The row of a metric, or of its family.

    Raises:
        UserError: the table has none; the nearest name is given.
    """
    if name in METRICS:
        return METRICS[name]
    for pattern, family in _FAMILIES:
        if pattern.match(name):
            return family
    near = difflib.get_close_matches(name, METRICS, n=1, cutoff=0.4)
    raise UserError(
        f"{name!r} is no metric" + (f"; the nearest is {near[0]!r}" if near else ""),
        where="vespo_megatron/metrics/table.py",
        expected="a row for everything that is logged",
        fix="add one: what it means, its unit, and how its values merge",
    )
