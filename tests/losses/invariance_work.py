"""What one process does to check that a gradient does not depend on how a mini-batch is cut; run by four at once."""

from __future__ import annotations

import math
import os
import traceback
from dataclasses import replace

import torch
import torch.distributed as dist

from tests.losses.batches import Batch, loss_inputs, make_batch, select_sequences, zigzag
from tests.losses.surrogates import GIVEN
from vespo_megatron.losses import (
    AGGREGATIONS,
    CorrectionConfig,
    MetricSums,
    Normalizer,
    PolicyLossConfig,
    RouterShift,
    compute_policy_loss,
    correction_counts,
    get_objective,
    objective_names,
)
from vespo_megatron.losses.config import KL_WEIGHTS
from vespo_megatron.losses.router_shift import APPLY as ROUTER_SHIFT

CORRECTED = ("vespo", "grpo", "gspo", "topr")
"""Objectives whose corrections and per-token advantages are tried on real processes too."""
CORRECTIONS = (
    {"weight": "tis", "high": 1.05},
    {"weight": "tis", "level": "sequence", "high": 1.05, "low": 0.9},
    {"weight": "mis", "level": "geometric", "low": 0.9, "high": 1.1},
    {"weight": "icepop", "low": 0.9, "high": 1.1, "veto": 0.8},
    {"reject": [{"level": "sum", "low": 0.7, "high": 1.3}]},
    {
        "reject": [
            {"statistic": "k2", "level": "token", "high": 0.02},
            {"statistic": "k3", "level": "max", "high": 0.03},
        ]
    },
    {
        "weight": "tis",
        "high": 1.05,
        "normalize": True,
        "denominator": "kept",
        "reject": [{"level": "mean", "low": 0.95, "high": 1.05}],
    },
)


def gradient(batch: Batch, config: PolicyLossConfig, normalizer: Normalizer, per_token: bool, group=None):
    """(d loss / d log_probs [tokens], metrics) of one micro-batch on one rank."""
    log_probs = batch.leaf()
    output = compute_policy_loss(loss_inputs(batch, log_probs, per_token=per_token, group=group), config, normalizer)
    output.loss.backward()
    return log_probs.grad, output.metrics


def counted(
    normalizer: Normalizer, config: PolicyLossConfig, pieces: list[tuple[Batch, object]], whole=None
) -> Normalizer:
    """With what the configuration's correction counts over pieces (with their group) on every rank of `whole`."""
    if config.correction is None or not config.correction.needs_mini_batch:
        return normalizer
    total = torch.zeros(4, dtype=torch.float64)
    for piece, group in pieces:
        total += correction_counts(loss_inputs(piece, piece.log_probs, group=group), config)
    if whole is not None:
        dist.all_reduce(total, group=whole)
    return normalizer.corrected(total, kept=config.correction.denominator == "kept")


def configs():
    """Every objective × aggregation, with the variants that touch per-sequence sums in another way."""
    for name in objective_names():
        needs_old = get_objective(name).anchor == "old"
        common = GIVEN.get(name, {})
        for aggregation in AGGREGATIONS:
            behavior = "recompute" if needs_old else "rollout"
            yield PolicyLossConfig(name, common, aggregation, 16.0, behavior), False
        yield PolicyLossConfig(name, {**common, "opsm_delta": 0.01}, "token-mean", 16.0, "recompute"), True
        for correction in CORRECTIONS:
            if get_objective(name).corrections and "weight" in correction:
                continue
            orders = ("before_clip", "after_clip")[: 1 if name == "vespo" else 2] if "weight" in correction else (None,)
            for apply in orders:
                made = CorrectionConfig.from_mapping({**correction, "apply": apply})
                yield PolicyLossConfig(name, common, "seq-mean-token-mean", 16.0, "recompute", made), False
    for correction in CORRECTIONS:
        made = CorrectionConfig.from_mapping(correction)
        yield PolicyLossConfig("reinforce", {}, "token-mean", None, "rollout", made), False
    for name in ("vespo", "grpo", "gspo", "minpro"):
        for apply in ROUTER_SHIFT:
            yield PolicyLossConfig(name, behavior="recompute", router_shift=RouterShift(apply)), False
    for weight in KL_WEIGHTS:
        yield PolicyLossConfig("vespo", kl_coefficient=0.1, kl_weight=weight), False
    yield PolicyLossConfig("vespo", behavior="recompute", kl_coefficient=0.1, kl_weight="anchor"), False
    for normalization in ("sqrt", "linear"):
        yield PolicyLossConfig("vespo", {"normalization": normalization}), False
    yield PolicyLossConfig("topr", {"length_normalized": True}), False


def label(config: PolicyLossConfig, per_token: bool) -> str:
    correction = config.correction
    parts = [config.name, str(config.hyperparameters), config.aggregation, config.behavior]
    parts += [f"KL weighted by {config.kl_weight}"] if config.kl_coefficient else []
    parts += [f"router shift {config.router_shift.apply}"] if config.router_shift else []
    if correction:
        rules = "+".join(f"{rule.statistic}-{rule.level}" for rule in correction.rules)
        parts += [f"{correction.weight}/{correction.level}/{correction.apply}/{rules}/{correction.denominator}"]
    return " ".join([*parts, "per-token advantages" if per_token else ""])


def difference(found: dict[str, float], expected: dict[str, float]) -> float:
    """Largest difference of two sets of metrics; inf where a name is in one alone."""
    if set(found) != set(expected):
        return math.inf
    return max((abs(found[n] - expected[n]) / max(1.0, abs(expected[n])) for n in expected), default=0.0)


def cut(batch: Batch, numbers: list[int], rank: int, size: int) -> tuple[Batch, torch.Tensor]:
    """This context parallel rank's piece of some sequences, and where its tokens are in the batch."""
    if not numbers:
        return select_sequences(batch, [1])[0], torch.zeros(0, dtype=torch.long)
    micro, at = select_sequences(batch, numbers)
    if size == 1:
        return micro, at
    piece, inside = zigzag(micro, rank, size)
    return piece, at[inside]


def check_rank(rank: int, groups: dict[tuple[int, ...], dist.ProcessGroup]) -> dict[str, float]:
    """Case → largest difference from the whole batch on one process, in gradients and in metrics."""
    batch = make_batch(11)
    normalizer = Normalizer.from_lengths(batch.unmasked_lengths, 16.0)
    everyone = list(range(batch.num_sequences))
    worst: dict[str, float] = {}
    for config, per_token in configs():
        with_metrics = config.aggregation in ("token-mean", "token-sum-norm")
        if not with_metrics:
            config = replace(config, metrics="none")
        counts = counted(normalizer, config, [(batch, None)])
        expected, metrics = gradient(batch, config, counts, per_token)
        expected_metrics = metrics.finalize()
        for dp, cp in ((1, 2), (1, 4), (2, 2), (4, 1)):
            if dp * cp < 4 and rank >= 2:
                continue
            if (config.correction or per_token) and ((dp, cp) != (2, 2) or config.name not in CORRECTED):
                continue  # what corrections add to the sums is the same for the others, and takes most of the time
            data_rank, context_rank = divmod(rank, cp)
            group = groups[tuple(range(data_rank * cp, (data_rank + 1) * cp))] if cp > 1 else None
            # A data parallel rank's sequences, in another order, in micro-batches of two.
            mine = everyone[data_rank::dp][::-1]
            total = torch.zeros_like(batch.log_probs)
            sums = MetricSums()
            micro_batches = [mine[i : i + 2] for i in range(0, len(mine), 2)]
            micro_batches += [[]] * (5 - len(micro_batches))
            pieces = [cut(batch, numbers, context_rank, cp) for numbers in micro_batches]
            whole = groups[tuple(range(dp * cp))]
            counts = counted(normalizer, config, [(piece, group) for piece, _ in pieces], whole)
            for piece, at in pieces:
                part, part_metrics = gradient(piece, config, counts, per_token, group)
                total[at] += part
                sums = sums + part_metrics
            dist.all_reduce(total, group=whole)
            case = f"dp{dp} cp{cp} {label(config, per_token)}"
            worst[f"gradient {case}"] = float((total - expected).abs().max())
            if with_metrics:
                worst[f"metrics {case}"] = difference(sums.all_reduce(whole).finalize(), expected_metrics)
    return worst


def worker(rank: int, size: int, path: str, results) -> None:
    """Process entry: join, check, report; `results` gets (rank, differences or traceback)."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=size)
    try:
        members = [(0, 1), (2, 3), (0, 1, 2, 3)]
        groups = {ranks: dist.new_group(list(ranks)) for ranks in members}
        results.put((rank, check_rank(rank, groups)))
    except Exception:
        results.put((rank, traceback.format_exc()))
    finally:
        dist.destroy_process_group()
