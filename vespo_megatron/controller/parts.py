"""What both ways to get batches are made of: the parts that a controller is given, and what they do with samples."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from vespo_megatron.controller.event_loop import EventLoopThread
from vespo_megatron.controller.sampler import Sampler
from vespo_megatron.data.batch import Batch
from vespo_megatron.data.prompt_set import PromptRecord
from vespo_megatron.data.prompt_source import DataSource
from vespo_megatron.data.sample import Sample
from vespo_megatron.environments import EnvironmentPool
from vespo_megatron.errors import UserError
from vespo_megatron.losses import (
    AdvantageOptions,
    Advantages,
    compute_advantages,
    compute_turn_advantages,
    resolve_estimator,
)
from vespo_megatron.recipe.schema import Recipe
from vespo_megatron.rewards import RewardPool
from vespo_megatron.rollout_sglang.engine import GenerationRequest, GenerationResult, RolloutEngine
from vespo_megatron.rollout_sglang.faults import WeightsNeeded
from vespo_megatron.run.records import RunLogger

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Parts:
    """Of a run's controller, on rank 0."""

    recipe: Recipe
    engine: RolloutEngine
    tokenizer: PreTrainedTokenizerBase
    prompts: DataSource
    validation: Sequence[PromptRecord]
    rewards: RewardPool
    logger: RunLogger
    thread: EventLoopThread
    environments: EnvironmentPool | None = None
    """What answers between turns; None: responses have one."""

    def resume_prompts(self, state: Mapping[str, Any]) -> None:
        """Go on from a position in the prompts. Raises as `Prompts.load_state_dict`."""
        if not self.prompts.load_state_dict(state):
            before = state.get("stream", state).get("source") or "others"
            self.logger.print(f"data.train: not the prompts the run was saved with ({before}): they are begun anew")


Evaluations = dict[int, dict[str, float]]
"""Step → metrics of the evaluation that the schedule has after it."""


@dataclass
class Rollout:
    """One rollout batch, ready to train on, and its metrics."""

    batch: Batch
    metrics: dict[str, float]
    evaluations: Evaluations = field(default_factory=dict)
    """Those that have ended beside training since the last one."""


class BatchSource(Protocol):
    """A way to get rollout batches: `SynchronousSource` draws when asked, `AsynchronousSource` beside training."""

    sampler: Sampler

    def collect(self, step: int) -> Rollout:
        """The rollout batch of a step; whole groups only.

        Raises:
            WeightsNeeded: servers wait for weights; push them and call this again.
            UserError: no usable group was drawn in a long time, or the engine or a reward failed.
        """

    def evaluate(self, step: int) -> Evaluations:
        """Scores of the validation sets, or nothing yet. Raises WeightsNeeded as `collect` does."""

    def await_evaluations(self) -> Evaluations:
        """Those that have begun and that nobody has yet, at their end. Raises WeightsNeeded as `collect` does."""

    def update_weights(
        self, stream: Iterable[tuple[str, torch.Tensor]], version: int, *, between: bool = False
    ) -> None:
        """Give the engine the streamed weights; it answers with a checksum both sides agree on.

        `between`: it had lost those it had, and gets newer ones before the schedule gives it any.
        """

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`. Raises UserError when the prompts are not those it was taken with."""

    def expire_other_versions(self, known: Collection[int]) -> None:
        """Give up samples that wait and have a token that none of the `known` weight versions drew."""

    def close(self) -> None:
        """Give up what is under way."""


async def answer_all(
    engine: RolloutEngine,
    requests: Sequence[GenerationRequest],
    wait_for_weights: Callable[[WeightsNeeded], Awaitable[None]],
) -> list[GenerationResult]:
    """Results in the order of `requests`, every one drawn once, whatever happens to servers meanwhile.

    Args:
        wait_for_weights: returns when the servers that wait for weights have been given them.
    """
    arrived: dict[str, GenerationResult] = {}

    def note(result: GenerationResult) -> None:
        arrived[result.request_id] = result

    while missing := [request for request in requests if request.request_id not in arrived]:
        try:
            for result in await engine.generate(missing, on_result=note):
                note(result)
        except WeightsNeeded as need:
            await wait_for_weights(need)
    return [arrived[request.request_id] for request in requests]


def advantage_options(recipe: Recipe) -> AdvantageOptions:
    """How this recipe makes advantages of rewards. Raises UserError when its keys do not fit together."""
    schedule = recipe.grpo
    switches = {
        "normalize_rewards": schedule.normalize_rewards,
        "use_leave_one_out_baseline": schedule.use_leave_one_out_baseline,
    }
    weights = dict(schedule.reward_part_weights)
    if not weights:  # those of the weighted sum, under the names that its parts have
        weights = {name.rpartition(":")[2]: weight for name, weight in recipe.env.rewards.items()}
        if schedule.reward_shaping.enabled:
            weights["overlong"] = 1.0
    return AdvantageOptions(
        resolve_estimator(schedule.advantage_estimator, **switches),
        drop_groups_without_signal=schedule.use_dynamic_sampling,
        on_bad_sample=recipe.loss_fn.on_bad_sample,
        overlong=schedule.overlong,
        overlong_in_baseline=schedule.overlong_in_baseline,
        pass_at_k=schedule.pass_at_k,
        part_weights=weights,
        part_estimator=resolve_estimator("auto", **switches),
        clip_low=schedule.advantage_clip_low,
        clip_high=schedule.advantage_clip_high,
    )


def advantages_of(recipe: Recipe, samples: Sequence[Sample], groups: Sequence[Hashable]) -> Advantages:
    """Advantages within groups; which samples to keep follows `on_bad_sample` and `use_dynamic_sampling`.

    Truncated samples that `grpo.overlong_filtering` drops are kept, so that the batch divides as it did, but lose their
    loss mask: no token of theirs is in the loss or in what it is divided by.

    With `grpo.advantage_level: turn` the values are those of rewards without the environment's, and samples are given
    those of their turns beside them; groups without signal are told by the whole reward.

    Args:
        groups: the group of each sample.
    """
    options, raw = advantage_options(recipe), recipe.grpo.dynamic_sampling_reward == "raw"
    by_turn = recipe.grpo.advantage_level == "turn"
    result = compute_advantages(
        [sample.reward - (_of_turns(sample).sum() if by_turn else 0.0) for sample in samples],
        groups,
        options=options,
        lengths=[int(sample.drawn.sum()) for sample in samples],
        truncated=[sample.truncated for sample in samples],
        parts=_parts(samples, options.part_weights or {}) if options.estimator == "gdpo" else None,
        signal_rewards=[_raw_reward(sample) if raw else sample.reward for sample in samples]
        if raw or by_turn
        else None,
        sample_ids=[sample.sample_id for sample in samples],
    )
    if by_turn:
        found = compute_turn_advantages([_of_turns(sample) for sample in samples], groups, options.estimator)
        for sample, values, trained in zip(samples, found, result.trained.tolist(), strict=True):
            sample.turn_advantages = (values if trained else np.zeros_like(values)).astype(np.float32)
    for sample, masked in zip(samples, result.masked.tolist(), strict=True):
        if masked:
            sample.loss_mask = np.zeros_like(sample.loss_mask)
    return result


def _of_turns(sample: Sample) -> np.ndarray:
    return np.zeros(0) if sample.turn_rewards is None else sample.turn_rewards


def _raw_reward(sample: Sample) -> float:
    """Before `grpo.reward_shaping`."""
    return sample.reward - sample.reward_parts.get("overlong", 0.0)


def _parts(samples: Sequence[Sample], names: Iterable[str]) -> dict[str, list[float]]:
    """Part → its value in every sample; 0, as the reward, where no score came."""
    for sample in samples:
        missing = [name for name in names if name not in sample.reward_parts]
        if missing and not sample.unscored:
            raise UserError(
                f"has no part {missing[0]!r} of the reward",
                where=f"sample {sample.sample_id}",
                expected="every part of grpo.reward_part_weights, or of env.rewards",
                fix=f"its parts are {', '.join(sorted(sample.reward_parts)) or 'none'}",
            )
    return {name: [sample.reward_parts.get(name, 0.0) for sample in samples] for name in names}
