"""From prompts to scored samples: what training's rollouts and every evaluation have in common."""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from vespo_megatron.data.prompt_set import PromptRecord
from vespo_megatron.data.sample import Sample
from vespo_megatron.data.stop_tokens import stop_tokens
from vespo_megatron.errors import UserError
from vespo_megatron.recipe.schema import Recipe
from vespo_megatron.rewards import UNSCORED, RewardPool, RewardRequest, RewardResult
from vespo_megatron.rewards.shaping import overlong_penalty
from vespo_megatron.rollout_sglang.engine import GenerationRequest, GenerationResult, SamplingParams
from vespo_megatron.routing_replay.table import apply_stale_policy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MOST = 0.8
"""Share of a rollout's responses after which the rest is its tail."""

Generate = Callable[[Sequence[GenerationRequest]], Awaitable[list[GenerationResult]]]
"""Results in the order of the requests."""


@dataclass(frozen=True)
class Drawn:
    """Scored samples, and what became of those that are not among them."""

    samples: list[Sample]
    bad: int
    """Responses whose numbers are not finite, left out."""
    unscored: Counter[str]
    """Of `rewards.UNSCORED`, why no score came → responses, whether they are left out or not."""
    stale: int = 0
    """Under R3, responses some of whose routes are, or may be, of other weights than drew their tokens."""


class Sampler:
    """Draws, checks and scores.

    Args:
        generate: how requests are answered.
    """

    def __init__(
        self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, rewards: RewardPool, generate: Generate
    ) -> None:
        self.recipe, self.tokenizer, self.rewards, self._generate = recipe, tokenizer, rewards, generate
        generation = recipe.policy.generation
        self.training = SamplingParams(
            max_new_tokens=generation.max_new_tokens,
            temperature=generation.temperature,
            top_p=generation.top_p,
            top_k=-1 if generation.top_k is None else generation.top_k,
            min_p=generation.min_p,
            stop_token_ids=tuple(stop_tokens(recipe, tokenizer)),
        )
        temperature, top_p = generation.val_temperature, generation.val_top_p
        self.evaluation = replace(
            self.training,
            temperature=self.training.temperature if temperature is None else temperature,
            top_p=self.training.top_p if top_p is None else top_p,
        )

    async def sample(
        self,
        records: Sequence[PromptRecord],
        repeats: int,
        label: str,
        *,
        evaluation: bool = False,
        greedy: bool = False,
        temperature: float | None = None,
        top_p: float | None = None,
    ) -> Drawn:
        """`repeats` scored samples per prompt, without those that are unusable.

        Args:
            evaluation: drawn as the recipe evaluates, not as it trains.
            greedy: whatever else, at temperature 0.
            temperature, top_p: in place of the recipe's.

        Raises:
            UserError: a response's numbers are not finite, or its score did not come, where the recipe says error.
        """
        sampling = self.evaluation if evaluation else self.training
        temperature = 0.0 if greedy else temperature
        sampling = replace(
            sampling,
            temperature=sampling.temperature if temperature is None else temperature,
            top_p=sampling.top_p if top_p is None else top_p,
        )
        asked = [
            (record, request)
            for record in records
            for request in self.requests(record, repeats, label, sampling, evaluation=evaluation)
        ]
        results = await self._generate([request for _, request in asked])
        return await self.score([record for record, _ in asked], results, evaluation=evaluation)

    def requests(
        self,
        record: PromptRecord,
        repeats: int,
        label: str,
        sampling: SamplingParams | None = None,
        *,
        evaluation: bool = False,
    ) -> list[GenerationRequest]:
        """For `repeats` responses to one prompt; drawn as the recipe trains, unless `sampling` says otherwise."""
        names = [f"{label}/{record.prompt_id}/{index}" for index in range(repeats)]
        return [
            GenerationRequest(
                request_id=name,
                prompt_ids=tuple(record.prompt_ids),
                sampling=sampling or self.training,
                group_id=record.prompt_id,
                seed=request_seed(self.recipe.grpo.seed, name),
                evaluation=evaluation,
            )
            for name in names
        ]

    async def score(
        self, owners: Sequence[PromptRecord], results: Sequence[GenerationResult], *, evaluation: bool = False
    ) -> Drawn:
        """Scored samples of results, each to the prompt in `owners`. Raises as `sample`."""
        samples, kept, bad = [], [], 0
        for result, record in zip(results, owners, strict=True):
            try:
                samples.append(to_sample(result, record))
                kept.append(record)
            except UserError:
                if self.recipe.loss_fn.on_bad_sample == "error":
                    raise
                bad += 1
        scores = await self.rewards.score(
            [self._reward_request(record, sample) for record, sample in zip(kept, samples, strict=True)]
        )
        for sample, score in zip(samples, scores, strict=True):
            sample.reward, sample.reward_parts, sample.unscored = score.reward, dict(score.parts), score.unscored
            if score.unscored and self.recipe.env.on_unscored == "error":
                raise _no_score(sample.sample_id, score, self.recipe.env.timeout)
        unscored = Counter(sample.unscored for sample in samples if sample.unscored)
        if self.recipe.env.on_unscored == "drop" and not evaluation:
            samples = [sample for sample in samples if not sample.unscored]
        stale = 0
        if self.recipe.policy.router_replay.mode == "R3" and not evaluation:
            stale = apply_stale_policy(samples, self.recipe.policy.router_replay.on_stale_routes)
        return Drawn(samples, bad, unscored, stale)

    def shape_rewards(self, samples: Sequence[Sample]) -> None:
        """Add what `grpo.reward_shaping` says; evaluation has the plain reward."""
        shaping = self.recipe.grpo.reward_shaping
        if shaping.enabled:
            for sample in samples:
                penalty = overlong_penalty(len(sample.response_ids), shaping, self.training.max_new_tokens)
                sample.reward += penalty
                sample.reward_parts["overlong"] = penalty

    def _reward_request(self, record: PromptRecord, sample: Sample) -> RewardRequest:
        return RewardRequest(
            data_source=record.data_source,
            solution_str=self.text(sample),
            ground_truth=record.ground_truth,
            extra_info=record.extra_info,
            row=record.prompt_id,
            reward=record.reward,
        )

    def text(self, sample: Sample) -> str:
        """The response as rewards see it."""
        return self.decode(sample.response_ids, skip_special_tokens=True)

    def decode(self, token_ids: np.ndarray, *, skip_special_tokens: bool = False) -> str:
        """Token ids as text."""
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens))


def to_sample(result: GenerationResult, record: PromptRecord) -> Sample:
    """The engine's answer as a sample. Raises UserError naming the request when its numbers are no log-probs."""
    return Sample(
        sample_id=result.request_id,
        prompt_id=record.prompt_id,
        prompt_ids=np.asarray(record.prompt_ids),
        response_ids=result.output_ids,
        behavior_log_probs=result.behavior_log_probs,
        weight_versions=result.weight_versions,
        finish_reason=result.finish_reason,
        routes=result.routes,
        route_versions=result.route_versions,
        sampling_mask=result.sampling_mask,
    )


def solved_rates(samples: Sequence[Sample], above: float) -> dict[str, float]:
    """Prompt id → share of its responses whose reward is above the bound."""
    solved: dict[str, list[bool]] = {}
    for sample in samples:
        solved.setdefault(sample.prompt_id, []).append(sample.reward > above)
    return {prompt_id: sum(found) / len(found) for prompt_id, found in solved.items()}


def left_out(bad: int, unscored: Counter[str], stale: int) -> dict[str, float]:
    """Metrics of what `Drawn` counts beside its samples."""
    return {"rollout/bad_samples": float(bad), "rollout/stale_routes": float(stale)} | {
        f"rollout/unscored_{kind}": float(unscored[kind]) for kind in UNSCORED
    }


def _no_score(sample_id: str, score: RewardResult, timeout: float) -> UserError:
    why = {"timeout": f"it took longer than {timeout:g} s", "died": "the reward's process ended with it"}
    return UserError(
        f"has no score: {why.get(score.unscored, score.failure)}",
        where=f"sample {sample_id}",
        expected="a score, env.on_unscored is error",
        fix="mend the reward, raise env.timeout, or go on: env.on_unscored=zero, or drop",
    )


def describe(samples: Sequence[Sample]) -> dict[str, float]:
    """Metrics of rewards, their parts, and response lengths."""
    rewards = np.array([sample.reward for sample in samples])
    lengths = np.array([len(sample.response_ids) for sample in samples])
    metrics = {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        "response/length_mean": float(lengths.mean()),
        "response/length_std": float(lengths.std()),
        "response/length_max": float(lengths.max()),
        "response/tokens": float(lengths.sum()),
        "response/truncated_fraction": float(np.mean([sample.truncated for sample in samples])),
        "rollout/tail_share": tail_share(lengths),
    }
    for part in sorted({name for sample in samples for name in sample.reward_parts}):
        values = [sample.reward_parts[part] for sample in samples if part in sample.reward_parts]
        metrics[f"reward/{part}"] = float(np.mean(values))
    return metrics


def partial_share(samples: Sequence[Sample]) -> float:
    """The share of samples with tokens of several weight versions."""
    return float(np.mean([len(set(sample.weight_versions.tolist())) > 1 for sample in samples]))


def tail_share(lengths: np.ndarray) -> float:
    """Of the longest response's tokens, the share that is drawn when four of five responses have ended."""
    ended = np.sort(lengths)[math.ceil(_MOST * len(lengths)) - 1]
    return float(1 - ended / lengths.max()) if lengths.max() else 0.0


def request_seed(seed: int, name: str) -> int:
    """A seed of its own for every response, the same in every run with the same recipe."""
    return zlib.crc32(f"{seed}/{name}".encode())
