"""Batches that are drawn beside training, out of a stream that is as stale as the recipe allows."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from vespo_megatron.controller.evaluation import evaluate
from vespo_megatron.controller.parts import Evaluations, Parts, Rollout, advantages_of, answer_all
from vespo_megatron.controller.rollout_stream import RolloutStream
from vespo_megatron.controller.sampler import Sampler, describe, left_out, partial_share, solved_rates
from vespo_megatron.controller.staleness import Group, StalenessBuffer
from vespo_megatron.controller.synchronous import MAX_SAMPLING_ROUNDS, no_signal
from vespo_megatron.controller.turns import request_seed
from vespo_megatron.data.batch import Batch
from vespo_megatron.data.prompt_set import PromptRecord
from vespo_megatron.data.sample import Sample
from vespo_megatron.errors import UserError
from vespo_megatron.rollout_sglang.conversation import Conversation
from vespo_megatron.rollout_sglang.engine import GenerationRequest, GenerationResult
from vespo_megatron.run.metrics_file import evaluated_steps

if TYPE_CHECKING:
    import torch

_MAX_TURNS = 1000
"""A response that was ended so often without having come to its end is not interrupted by weights."""


class AsynchronousSource:
    """See `BatchSource`. `collect` waits for a batch that may be trained on now; `evaluate` only begins to evaluate."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        schedule = parts.recipe.grpo
        self.mode = schedule.async_grpo.on_weight_update
        self.buffer = StalenessBuffer(
            schedule.async_grpo.staleness, schedule.num_prompts_per_step, schedule.async_grpo.sync_every
        )
        self.sampler = Sampler(parts.recipe, parts.tokenizer, parts.rewards, self.generate, parts.environments)
        self.stream = parts.thread.run(self._make_stream())
        self._resend: list[tuple[Group, PromptRecord]] = []
        self._evaluations: dict[int, Future[dict[str, float]]] = {}
        """By step, those whose metrics nobody has yet."""
        self._owed: list[int] = []
        """Steps whose evaluation the end of an earlier attempt cut short."""
        self._interruptions = 0
        self._bad_samples = 0
        self._unscored: Counter[str] = Counter()
        self._stale_routes = 0
        self._unusable_in_a_row = 0

    async def _make_stream(self) -> RolloutStream:
        return RolloutStream(self.buffer, lambda: self.parts.prompts.take(1)[0], self._draw)

    # ---- drawing -----------------------------------------------------------------------------------------------

    async def _draw(self, record: PromptRecord, label: str) -> list[Sample]:
        """One group, scored, without its bad samples; empty when nothing of it is to be trained on.

        The rule is that of synchronous rounds (`advantages_of`): a group with a bad sample goes on without it, and
        under dynamic sampling a group goes when the rewards that are left are all equal. Raises as they do when no
        group was usable for as many prompts as `MAX_SAMPLING_ROUNDS` batches have.
        """
        recipe, schedule = self.parts.recipe, self.parts.recipe.grpo
        drawn = await self.sampler.sample([record], schedule.num_generations_per_prompt, label)
        samples = drawn.samples
        self.parts.prompts.report(solved_rates(samples, recipe.data.curriculum.solved_above))
        self.sampler.shape_rewards(samples)
        self._bad_samples += drawn.bad
        self._unscored += drawn.unscored
        self._stale_routes += drawn.stale
        keep = advantages_of(recipe, samples, [label] * len(samples)).keep.tolist() if samples else []
        kept = [sample for sample, good in zip(samples, keep, strict=True) if good]
        self._unusable_in_a_row = 0 if kept else self._unusable_in_a_row + 1
        if self._unusable_in_a_row >= MAX_SAMPLING_ROUNDS * schedule.num_prompts_per_step:
            if schedule.use_dynamic_sampling:
                raise no_signal(recipe.rollout_batch_size, 0)
            raise UserError(f"no sample of {self._unusable_in_a_row} prompts in a row was usable", where="rollouts")
        return kept

    async def generate(self, requests: Sequence[GenerationRequest]) -> list[GenerationResult]:
        """See `answer_all`; what new weights interrupt goes on under them."""
        context = self.parts.recipe.policy.max_total_sequence_length
        conversations = [Conversation(request, context_length=context) for request in requests]
        for _ in range(_MAX_TURNS):
            turns = [(conversation, conversation.next_request()) for conversation in conversations]
            open_turns = [(conversation, turn) for conversation, turn in turns if turn is not None]
            if not open_turns:
                return [conversation.result() for conversation in conversations]
            await self._turn(open_turns)
        raise UserError(
            f"was ended {_MAX_TURNS} times before its end",
            where=f"request {open_turns[0][1].request_id}",
            fix="see the servers' logs",
        )

    async def _turn(self, turns: Sequence[tuple[Conversation, GenerationRequest]]) -> None:
        """One turn of each; those that were answered before servers were lost keep their answers."""
        seed = self.parts.recipe.grpo.seed
        requests = [replace(turn, seed=request_seed(seed, turn.request_id)) for _, turn in turns]
        results = await answer_all(self.parts.engine, requests, self.stream.wait_for_weights)
        for (conversation, _), result in zip(turns, results, strict=True):
            self._interruptions += result.finish_reason == "abort"
            conversation.add(result)

    # ---- batches -----------------------------------------------------------------------------------------------

    def collect(self, step: int) -> Rollout:
        """The next batch that may be trained on."""
        while self._owed:  # by the weights that there are, whatever became of those it began with
            self._begin_evaluation(self._owed.pop(), weights_of=step - 1)
        return self.parts.thread.run(self._collect())

    async def _collect(self) -> Rollout:
        for group, record in self._resend:
            self.stream.resend(group, record)
        self._resend = []
        groups = await self.stream.take()
        samples = [sample for group in groups for sample in group.samples or ()]
        result = advantages_of(
            self.parts.recipe, samples, [group.number for group in groups for _ in group.samples or ()]
        )
        versions = [sample.weight_versions for sample in samples]
        oldest = np.array([self.buffer.lag(int(each.min())) if len(each) else 0 for each in versions])
        if oldest.max() > self.buffer.bound:
            raise AssertionError(f"a lag of {oldest.max()} where {self.buffer.bound} is the bound")
        keep = np.flatnonzero(result.keep.numpy()).tolist()
        batch = Batch(samples, result.values.numpy().astype(np.float32), oldest).select(keep)
        metrics = describe(samples) | result.metrics | self.parts.prompts.metrics() | self.parts.engine.metrics()
        metrics |= await self._staleness(samples)
        return Rollout(batch, metrics, self._ended_evaluations())

    async def _staleness(self, samples: Sequence[Sample]) -> dict[str, float]:
        per_token, counts = self.buffer.lags(samples), self.buffer.counts
        waits = await self.stream.pop_waits()
        interruptions, self._interruptions = self._interruptions, 0
        bad, self._bad_samples = self._bad_samples, 0
        unscored, self._unscored = self._unscored, Counter()
        stale, self._stale_routes = self._stale_routes, 0
        return {
            **left_out(bad, unscored, stale),
            "staleness/lag_mean": float(per_token.mean()) if len(per_token) else 0.0,
            "staleness/lag_max": float(per_token.max(initial=0)),
            "staleness/partial_share": partial_share(samples),
            "staleness/interruptions": float(interruptions),
            "staleness/under_way": float(self.buffer.under_way),
            "staleness/waiting": float(self.buffer.waiting),
            **{f"staleness/{name}": float(value) for name, value in vars(counts).items()},
            "staleness/trainer_idle_seconds": waits.trainer,
            "staleness/engine_idle_seconds": waits.engine,
            **{f"staleness/tokens_lag_{lag}": float((per_token == lag).sum()) for lag in range(self.buffer.bound + 1)},
        }

    # ---- evaluation --------------------------------------------------------------------------------------------

    def evaluate(self, step: int) -> Evaluations:
        """Begin to evaluate beside training; the metrics come with a later batch, or are waited for."""
        if self.parts.validation and step not in self._evaluations:
            self._begin_evaluation(step, weights_of=step)
        return {}

    def await_evaluations(self) -> Evaluations:
        """See `BatchSource.await_evaluations`."""
        self.parts.thread.run(self._evaluations_end())
        return self._ended_evaluations()

    def _begin_evaluation(self, step: int, *, weights_of: int) -> None:
        """`weights_of`: the step whose weights the engine has, or will have."""

        async def scores() -> dict[str, float]:
            begun = {"eval/begun_after_step": float(weights_of)}
            return await evaluate(self.parts, self.sampler, step) | begun

        self._evaluations[step] = asyncio.run_coroutine_threadsafe(scores(), self.parts.thread.loop)

    async def _evaluations_end(self) -> None:
        """Wait for those that have begun. Raises WeightsNeeded when what they wait for is new weights."""
        while not all(future.done() for future in self._evaluations.values()):
            if self.stream.weights_needed is not None:
                raise self.stream.weights_needed
            await asyncio.sleep(0.01)

    def _ended_evaluations(self) -> Evaluations:
        ended = sorted(step for step, future in self._evaluations.items() if future.done())
        return {step: self._evaluations.pop(step).result() for step in ended}

    # ---- weights, state, end -----------------------------------------------------------------------------------

    def update_weights(
        self, stream: Iterable[tuple[str, torch.Tensor]], version: int, *, between: bool = False
    ) -> None:
        """See `BatchSource.update_weights`; what runs meanwhile is treated as the recipe says."""
        thread, engine = self.parts.thread, self.parts.engine
        thread.run(self.stream.stop_sending(drain=self.mode == "drain"))
        if self.mode == "in_place":
            engine.update_weights(stream, version, in_place=True)
        else:
            thread.run(engine.pause())
            try:
                engine.update_weights(stream, version)
            finally:
                thread.run(engine.resume())
        thread.run(self.stream.resume_sending(version, between=between))

    def state_dict(self) -> dict[str, Any]:
        """Position in the prompts, every group that was sent and is not trained on, evaluations under way."""
        evaluations = sorted({*self._evaluations, *self._owed})

        async def state() -> dict[str, Any]:
            return {
                "prompts": self.parts.prompts.state_dict(),
                "buffer": self.buffer.state_dict(),
                "evaluations": evaluations,
            }

        return self.parts.thread.run(state())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`: what waited is trained on, what was under way then is drawn again; both are said."""
        self.parts.resume_prompts(state["prompts"])
        under_way = self.buffer.load_state_dict(state["buffer"])
        records = self.parts.prompts.find(group.prompt_id for group in under_way)
        for group in under_way:
            if group.prompt_id not in records:  # of other data, which `data.on_change` has let go
                self.buffer.abort(group)
                self.buffer.counts.drawn_again -= 1
            else:
                self._resend.append((group, records[group.prompt_id]))
        gone = len(under_way) - len(self._resend)
        self.parts.logger.print(
            f"rollouts of before: {self.buffer.waiting} groups wait to be trained on, {len(self._resend)} that were "
            "under way are drawn again" + (f", {gone} of other prompts are given up" if gone else "")
        )
        recorded = evaluated_steps(self.parts.logger.history)
        self._owed = [step for step in state.get("evaluations", ()) if step not in recorded]

    def expire_other_versions(self, known: Collection[int]) -> None:
        """See `BatchSource.expire_other_versions`."""
        self.buffer.expire_other_versions(known)

    def close(self) -> None:
        """Give up what is under way."""
        self.parts.thread.run(self.stream.close())
