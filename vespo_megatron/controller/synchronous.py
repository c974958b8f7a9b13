"""Batches that are drawn when a step asks for them, in rounds until there are enough groups that carry signal."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vespo_megatron.controller.evaluation import evaluate
from vespo_megatron.controller.interruptible import Interruptible
from vespo_megatron.controller.oversampling import BegunGroup, draw_first_whole
from vespo_megatron.controller.parts import Evaluations, Parts, Rollout, advantages_of, answer_all
from vespo_megatron.controller.sampler import Drawn, Sampler, describe, left_out, partial_share, solved_rates
from vespo_megatron.controller.turns import Dialogue
from vespo_megatron.data.batch import Batch
from vespo_megatron.data.sample import Sample
from vespo_megatron.errors import UserError
from vespo_megatron.losses.advantages import spread
from vespo_megatron.metrics.merging import merge_rows
from vespo_megatron.rollout_sglang.conversation import Conversation
from vespo_megatron.rollout_sglang.engine import GenerationRequest, GenerationResult
from vespo_megatron.rollout_sglang.faults import WeightsNeeded

MAX_SAMPLING_ROUNDS = 10
"""Dynamic sampling gives up after so many rollouts without a full batch of groups that carry signal."""


class SynchronousSource:
    """See `BatchSource`. Its work runs in a thread that waits where it is when servers need weights."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.sampler = Sampler(parts.recipe, parts.tokenizer, parts.rewards, self.generate, parts.environments)
        self._interruptible = Interruptible()
        self._begun: list[BegunGroup] = []
        """With `grpo.partial_rollouts`: what the last step has ended, for the next one to go on with."""
        self._waiting: asyncio.Task[None] | None = None

    async def generate(self, requests: Sequence[GenerationRequest]) -> list[GenerationResult]:
        """See `answer_all`; a rank that trains pushes the weights meanwhile."""
        return await answer_all(self.parts.engine, requests, self._wait_for_weights)

    async def _wait_for_weights(self, need: WeightsNeeded) -> None:
        """All that draw, conversations one by one among them, wait for the same push."""
        if self._waiting is None or self._waiting.done():
            self._waiting = asyncio.create_task(asyncio.to_thread(self._interruptible.await_weights, need))
        await asyncio.shield(self._waiting)

    def collect(self, step: int) -> Rollout:
        """See `BatchSource.collect`."""
        rollout = self._interruptible.run(lambda: self._collect(step))
        rollout.metrics |= self.parts.engine.metrics()
        return rollout

    def _collect(self, step: int) -> Rollout:
        recipe, schedule = self.parts.recipe, self.parts.recipe.grpo
        samples: list[Sample] = []
        prompts: set[str] = set()
        advantages: list[Tensor] = []
        trained: list[Tensor] = []
        rounds: list[dict[str, float]] = []
        generated: list[Sample] = []
        for attempt in range(MAX_SAMPLING_ROUNDS):
            label = f"{step}" if attempt == 0 else f"{step}.{attempt}"
            drawn, counts = self._draw(label, schedule.num_prompts_per_step - len(prompts), prompts)
            fresh = drawn.samples
            if not fresh:
                raise UserError("no sample of the rollout batch was usable", where=f"step {step}")
            self.parts.prompts.report(solved_rates(fresh, recipe.data.curriculum.solved_above))
            self.sampler.shape_rewards(fresh)
            result = advantages_of(recipe, fresh, [sample.prompt_id for sample in fresh])
            keep = result.keep.numpy()
            samples += [sample for sample, kept in zip(fresh, keep, strict=True) if kept]
            prompts = {sample.prompt_id for sample in samples}
            advantages.append(result.values[result.keep])
            trained.append(result.values[result.trained])
            generated += fresh
            counts |= left_out(drawn.bad, drawn.unscored, drawn.stale) | {"rollout/sampling_rounds": 1.0}
            rounds.append(result.metrics | counts)
            if not schedule.use_dynamic_sampling or len(prompts) == schedule.num_prompts_per_step:
                break
        else:
            raise no_signal(recipe.rollout_batch_size, len(samples))
        kept_advantages = torch.cat(advantages)
        metrics = describe(generated) | merge_rows(rounds) | spread(torch.cat(trained)) | self.parts.prompts.metrics()
        if schedule.partial_rollouts:
            metrics |= self._staleness(samples)
        return Rollout(Batch(samples, kept_advantages.numpy().astype(np.float32)), metrics)

    def _draw(self, label: str, count: int, have: Collection[str]) -> tuple[Drawn, dict[str, float]]:
        """`count` groups, scored; with `grpo.oversample` the first that are whole of more, to no prompt in `have`."""
        schedule = self.parts.recipe.grpo
        repeats, run = schedule.num_generations_per_prompt, self.parts.thread.run
        if schedule.oversample == 1:
            return run(self.sampler.sample(self.parts.prompts.take(count), repeats, label)), {}
        begun, self._begun = self._begun, []
        more = max(0, schedule.groups_begun(count) - len(begun))
        records = self.parts.prompts.take(more, avoid={*have, *(group.record.prompt_id for group in begun)})
        context = self.parts.recipe.policy.max_total_sequence_length
        groups = begun + [
            BegunGroup(
                record,
                [Conversation(each, context_length=context) for each in self.sampler.requests(record, repeats, label)],
            )
            for record in records
        ]
        whole = run(
            draw_first_whole(
                self.parts.engine, groups, count, seed=schedule.seed, wait_for_weights=self._wait_for_weights
            )
        )
        ended = [group for group in groups if group not in whole]
        counts = {"rollout/carried_groups": float(len(begun)), "rollout/ended_groups": float(len(ended))}
        if schedule.partial_rollouts:
            self._begun = ended
        else:
            counts["rollout/discarded_tokens"] = float(sum(group.tokens for group in ended))
        owners = [group.record for group in whole for _ in group.conversations]
        dialogues = [Dialogue(each.result()) for group in whole for each in group.conversations]
        return run(self.sampler.score(owners, dialogues)), counts

    def _staleness(self, samples: Sequence[Sample]) -> dict[str, float]:
        """Of a batch some of whose tokens earlier steps have drawn; versions are steps."""
        versions = np.concatenate([sample.weight_versions for sample in samples])
        lags = self.parts.engine.weight_version - versions
        return {
            "staleness/lag_mean": float(lags.mean()) if len(lags) else 0.0,
            "staleness/lag_max": float(lags.max(initial=0)),
            "staleness/partial_share": partial_share(samples),
        }

    def evaluate(self, step: int) -> Evaluations:
        """Scores of each validation set, `eval/<set>/avg@<k>` among them; problems and some samples are written."""
        if not self.parts.validation:
            return {}
        return {step: self._interruptible.run(lambda: self.parts.thread.run(evaluate(self.parts, self.sampler, step)))}

    def await_evaluations(self) -> Evaluations:
        """None goes on beside training."""
        return {}

    def update_weights(
        self,
        stream: Iterable[tuple[str, torch.Tensor]],
        version: int,
        *,
        between: bool = False,  # noqa: ARG002  (there is no lag)
    ) -> None:
        """See `BatchSource.update_weights`."""
        self.parts.engine.update_weights(stream, version)

    def state_dict(self) -> dict[str, Any]:
        """The position in the prompts, and groups that the next step goes on with."""
        return {
            "prompts": self.parts.prompts.state_dict(),
            "begun": [group.state_dict() for group in self._begun],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `BatchSource.load_state_dict`."""
        self.parts.resume_prompts(state["prompts"])
        begun = state.get("begun", ())
        records = self.parts.prompts.find(group["prompt_id"] for group in begun)
        context = self.parts.recipe.policy.max_total_sequence_length
        kept = [group for group in begun if group["prompt_id"] in records]
        goes_on = self.parts.recipe.grpo.partial_rollouts
        if goes_on:
            self._begun = [
                BegunGroup.of_state(group, records[group["prompt_id"]], self.sampler.training, context)
                for group in kept
            ]
        else:  # any more
            self.parts.prompts.give_back([records[group["prompt_id"]] for group in kept])
        if begun:
            becomes = "go on with the tokens they have" if goes_on else "are drawn anew"
            self.parts.logger.print(
                f"rollouts of before: {len(kept)} groups {becomes}"
                + (f", {len(begun) - len(kept)} of other prompts are given up" if len(kept) < len(begun) else "")
            )

    def expire_other_versions(self, known: Collection[int]) -> None:
        """Nothing waits between two rollouts."""

    def close(self) -> None:
        """Let work that waits for weights go on to its end."""
        self._interruptible.close()


def no_signal(wanted: int, found: int) -> UserError:
    """Dynamic sampling drew and drew, and no group of the last many carries signal."""
    return UserError(
        f"{MAX_SAMPLING_ROUNDS} rollouts gave {found} samples in groups whose rewards differ",
        where="grpo.use_dynamic_sampling",
        expected=f"{wanted}",
        fix="the prompts are all solved or all hopeless: change them, or switch dynamic sampling off",
    )
