"""From prompts to scored samples: what training's rollouts and every evaluation have in common."""

from __future__ import annotations

import zlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from vespo_megatron.data.prompts import PromptRecord
from vespo_megatron.data.sample import Sample
from vespo_megatron.data.stop_tokens import stop_tokens
from vespo_megatron.errors import UserError
from vespo_megatron.recipe.schema import Recipe
from vespo_megatron.rewards import RewardPool, RewardRequest
from vespo_megatron.rewards.shaping import overlong_penalty
from vespo_megatron.rollout_sglang.engine import GenerationRequest, GenerationResult, SamplingParams
from vespo_megatron.routing_replay.table import apply_stale_policy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Generate = Callable[[Sequence[GenerationRequest]], Awaitable[list[GenerationResult]]]
"""Results in the order of the requests."""


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
    ) -> tuple[list[Sample], int]:
        """`repeats` scored samples per prompt, and how many were unusable and dropped.

        Args:
            evaluation: drawn as the recipe evaluates, not as it trains.
            greedy: whatever else, at temperature 0.
        """
        requests, owners = [], []
        sampling = self.evaluation if evaluation else self.training
        sampling = replace(sampling, temperature=0.0) if greedy else sampling
        for record in records:
            for index in range(repeats):
                name = f"{label}/{record.prompt_id}/{index}"
                requests.append(
                    GenerationRequest(
                        request_id=name,
                        prompt_ids=tuple(record.prompt_ids),
                        sampling=sampling,
                        group_id=record.prompt_id,
                        seed=request_seed(self.recipe.grpo.seed, name),
                        evaluation=evaluation,
                    )
                )
                owners.append(record)
        results = await self._generate(requests)
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
            sample.reward, sample.reward_parts = score.reward, dict(score.parts)
        if self.recipe.policy.router_replay.mode == "R3":
            apply_stale_policy(samples, self.recipe.policy.router_replay.on_stale_routes)
        return samples, bad

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
        routes_version=result.routes_version,
        sampling_mask=result.sampling_mask,
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
    }
    for part in sorted({name for sample in samples for name in sample.reward_parts}):
        if part in ("timeout", "error"):  # the share of all responses; the function's own parts are means where given
            values = [sample.reward_parts.get(part, 0.0) for sample in samples]
        else:
            values = [sample.reward_parts[part] for sample in samples if part in sample.reward_parts]
        metrics[f"reward/{part}"] = float(np.mean(values))
    return metrics


def request_seed(seed: int, name: str) -> int:
    """A seed of its own for every response, the same in every run with the same recipe."""
    return zlib.crc32(f"{seed}/{name}".encode())
