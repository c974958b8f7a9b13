"""From prompts to scored samples: what training's rollouts and every evaluation have in common."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from vespo_megatron.controller.turns import Dialogue, TurnLoop, describe_turns, request_seed
from vespo_megatron.data.prompt_set import PromptRecord
from vespo_megatron.data.sample import Sample
from vespo_megatron.data.stop_tokens import stop_tokens
from vespo_megatron.environments import EnvironmentPool
from vespo_megatron.errors import UserError
from vespo_megatron.recipe.schema import EnvConfig, Recipe
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
        environments: what answers between turns; None: responses have one.
    """

    def __init__(
        self,
        recipe: Recipe,
        tokenizer: PreTrainedTokenizerBase,
        rewards: RewardPool,
        generate: Generate,
        environments: EnvironmentPool | None = None,
    ) -> None:
        self.recipe, self.tokenizer, self.rewards, self._generate = recipe, tokenizer, rewards, generate
        self._turns = TurnLoop(recipe, tokenizer, environments, generate) if environments is not None else None
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
        owners = [record for record, _ in asked]
        dialogues = await self._draw([request for _, request in asked], owners)
        return await self.score(owners, dialogues, evaluation=evaluation)

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
        self, owners: Sequence[PromptRecord], dialogues: Sequence[Dialogue], *, evaluation: bool = False
    ) -> Drawn:
        """Scored samples of what was drawn, each to the prompt in `owners`. Raises as `sample`."""
        samples, kept, bad = [], [], 0
        for dialogue, record in zip(dialogues, owners, strict=True):
            try:
                samples.append(to_sample(dialogue, record))
                kept.append((record, dialogue))
            except UserError:
                if self.recipe.loss_fn.on_bad_sample == "error":
                    raise
                bad += 1
        await self._score(samples, kept)
        unscored = Counter(sample.unscored for sample in samples if sample.unscored)
        if self.recipe.env.on_unscored == "drop" and not evaluation:
            samples = [sample for sample in samples if not sample.unscored]
        stale = 0
        if self.recipe.policy.router_replay.mode == "R3" and not evaluation:
            stale = apply_stale_policy(samples, self.recipe.policy.router_replay.on_stale_routes)
        return Drawn(samples, bad, unscored, stale)

    async def _draw(self, requests: list[GenerationRequest], owners: Sequence[PromptRecord]) -> list[Dialogue]:
        if self._turns is not None:
            return await self._turns.draw(requests, owners)
        return [Dialogue(result) for result in await self._generate(requests)]

    async def _score(self, samples: Sequence[Sample], kept: Sequence[tuple[PromptRecord, Dialogue]]) -> None:
        """The reward's score, and what the environment gave. Raises as `sample` does."""
        whole = [index for index, (_, dialogue) in enumerate(kept) if not dialogue.unscored]
        requests = [self._reward_request(kept[index][0], samples[index]) for index in whole]
        results = dict(zip(whole, await self.rewards.score(requests) if requests else [], strict=True))
        for index, (sample, (_, dialogue)) in enumerate(zip(samples, kept, strict=True)):
            score = results.get(index) or RewardResult(0.0, unscored=dialogue.unscored, failure=dialogue.failure)
            sample.reward, sample.reward_parts, sample.unscored = score.reward, dict(score.parts), score.unscored
            if score.unscored and self.recipe.env.on_unscored == "error":
                raise _no_score(sample.sample_id, score, self.recipe.env, in_environment=bool(dialogue.unscored))
            if sample.turn_rewards is not None and score.unscored:
                sample.turn_rewards = np.zeros_like(sample.turn_rewards)
            elif sample.turn_rewards is not None:
                sample.reward_parts["environment"] = float(sample.turn_rewards.sum())
                sample.reward += sample.reward_parts["environment"]

    def shape_rewards(self, samples: Sequence[Sample]) -> None:
        """Add what `grpo.reward_shaping` says; evaluation has the plain reward."""
        shaping = self.recipe.grpo.reward_shaping
        if shaping.enabled:
            for sample in samples:
                penalty = overlong_penalty(int(sample.drawn.sum()), shaping, self.training.max_new_tokens)
                sample.reward += penalty
                sample.reward_parts["overlong"] = penalty

    def _reward_request(self, record: PromptRecord, sample: Sample) -> RewardRequest:
        said = {} if sample.turns is None else {"conversation": self._conversation(sample)}
        return RewardRequest(
            data_source=record.data_source,
            solution_str=self.text(sample),
            ground_truth=record.ground_truth,
            extra_info=record.extra_info | said,
            row=record.prompt_id,
            reward=record.reward,
        )

    def text(self, sample: Sample) -> str:
        """The response as rewards see it: what the policy wrote, each turn from a new line, and no observation."""
        if sample.turns is None:
            return self.decode(sample.response_ids, skip_special_tokens=True)
        return "\n".join(text for drawn, text in self._conversation(sample) if drawn)

    def _conversation(self, sample: Sample) -> list[tuple[bool, str]]:
        """Turns and what was observed between them: whether it was drawn, and its text without special tokens."""
        if sample.turns is None or not len(sample.turns):
            return []
        pieces = np.split(np.arange(len(sample.turns)), np.flatnonzero(np.diff(sample.turns)) + 1)
        return [
            (bool(sample.turns[piece[0]] >= 0), self.decode(sample.response_ids[piece], skip_special_tokens=True))
            for piece in pieces
        ]

    def decode(self, token_ids: np.ndarray, *, skip_special_tokens: bool = False) -> str:
        """Token ids as text."""
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens))


def to_sample(drawn: GenerationResult | Dialogue, record: PromptRecord) -> Sample:
    """What was drawn as a sample. Raises UserError naming the request when its numbers are no log-probs."""
    dialogue = drawn if isinstance(drawn, Dialogue) else Dialogue(drawn)
    result = dialogue.result
    return Sample(
        sample_id=result.request_id,
        prompt_id=record.prompt_id,
        prompt_ids=np.asarray(dialogue.prompt_ids or record.prompt_ids),
        response_ids=result.output_ids,
        behavior_log_probs=result.behavior_log_probs,
        weight_versions=result.weight_versions,
        finish_reason=result.finish_reason,
        routes=result.routes,
        route_versions=result.route_versions,
        sampling_mask=result.sampling_mask,
        turns=dialogue.turns,
        turn_rewards=dialogue.rewards,
        turn_facts=dict(dialogue.facts),
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


def _no_score(sample_id: str, score: RewardResult, env: EnvConfig, *, in_environment: bool) -> UserError:
    who, key, seconds = ("reward", "env.timeout", env.timeout)
    if in_environment:
        who, key, seconds = ("environment", "env.turn_timeout", env.turn_timeout)
    why = {"timeout": f"it took longer than {seconds:g} s", "died": f"the {who}'s process ended with it"}
    return UserError(
        f"has no score: {why.get(score.unscored, score.failure)}",
        where=f"sample {sample_id}",
        expected="a score, env.on_unscored is error",
        fix=f"mend the {who}, raise {key}, or go on: env.on_unscored=zero, or drop",
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
    metrics |= describe_turns([sample for sample in samples if sample.turns is not None])
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
