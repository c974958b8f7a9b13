"""The controller of an asynchronous run: batches come out of a stream that generates beside training."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from vespo_megatron.controller.controller import Controller, Rollout
from vespo_megatron.controller.rollout_stream import RolloutStream
from vespo_megatron.controller.sampler import describe, request_seed
from vespo_megatron.controller.staleness import StalenessBuffer, lags
from vespo_megatron.data.batch import Batch
from vespo_megatron.data.prompts import PromptRecord
from vespo_megatron.data.sample import Sample
from vespo_megatron.errors import UserError
from vespo_megatron.losses import compute_advantages
from vespo_megatron.rollout_sglang.conversation import Conversation
from vespo_megatron.rollout_sglang.engine import GenerationRequest, GenerationResult
from vespo_megatron.rollout_sglang.faults import WeightsNeeded

if TYPE_CHECKING:
    import torch

_MAX_TURNS = 1000
"""A response that was ended so often without having come to its end is not interrupted by weights."""


class AsyncController(Controller):
    """See `Controller`. `collect` waits for a batch that may be trained on now; `evaluate` only begins to evaluate."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        schedule = self.recipe.grpo
        self.mode = schedule.async_grpo.on_weight_update
        self.buffer = StalenessBuffer(
            schedule.async_grpo.staleness, schedule.num_prompts_per_step, schedule.async_grpo.sync_every
        )
        self.stream = self.thread.run(self._make_stream())
        self._resend: list[Any] = []
        self._evaluations: list[asyncio.Future[dict[str, float]]] = []
        self._interruptions = 0

    async def _make_stream(self) -> RolloutStream:
        return RolloutStream(self.buffer, lambda: self.prompts.take(1)[0], self._draw)

    # ---- drawing -----------------------------------------------------------------------------------------------

    async def _draw(self, record: PromptRecord, label: str) -> list[Sample]:
        """One group, scored; empty when too few of it are usable, or all rewards are equal under dynamic sampling."""
        schedule = self.recipe.grpo
        samples, _ = await self.sampler.sample([record], schedule.num_generations_per_prompt, label)
        self.sampler.shape_rewards(samples)
        if len(samples) < schedule.num_generations_per_prompt:
            return []
        if schedule.use_dynamic_sampling and len({sample.reward for sample in samples}) == 1:
            return []
        return samples

    async def generate(self, requests: Sequence[GenerationRequest]) -> list[GenerationResult]:
        """As `Controller.generate`; what new weights interrupt goes on under them."""
        context = self.recipe.policy.max_total_sequence_length
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
        arrived: dict[str, GenerationResult] = {}

        def note(result: GenerationResult) -> None:
            arrived[result.request_id] = result

        seed = self.recipe.grpo.seed
        requests = [replace(turn, seed=request_seed(seed, turn.request_id)) for _, turn in turns]
        while missing := [request for request in requests if request.request_id not in arrived]:
            try:
                for result in await self.engine.generate(missing, on_result=note):
                    note(result)
            except WeightsNeeded as need:
                await self.stream.wait_for_weights(need)
        for conversation, turn in turns:
            self._interruptions += arrived[turn.request_id].finish_reason == "abort"
            conversation.add(arrived[turn.request_id])

    # ---- batches -----------------------------------------------------------------------------------------------

    def collect(self, step: int) -> Rollout:
        """The next batch that may be trained on.

        Raises:
            WeightsNeeded: as `Controller.collect`.
        """
        return self.thread.run(self._collect_async())

    async def _collect_async(self) -> Rollout:
        for group, record in self._resend:
            self.stream.resend(group, record)
        self._resend = []
        groups = await self.stream.take()
        samples = [sample for group in groups for sample in group.samples]
        result = compute_advantages(
            [sample.reward for sample in samples],
            [f"{group.number}" for group in groups for _ in group.samples],
            self.estimator,
            on_bad_sample=self.recipe.loss_fn.on_bad_sample,
            sample_ids=[sample.sample_id for sample in samples],
        )
        version = self.buffer.version
        oldest = np.array([version - int(sample.weight_versions.min()) for sample in samples])
        if oldest.max() > self.buffer.bound:
            raise AssertionError(f"a lag of {oldest.max()} where {self.buffer.bound} is the bound")
        keep = result.keep.numpy()
        batch = Batch(samples, result.values.numpy().astype(np.float32), oldest).select(np.flatnonzero(keep))
        metrics = describe(samples) | dict(result.metrics) | self.engine.metrics() | await self._staleness(samples)
        return Rollout(batch, metrics | await self._finished_evaluations())

    async def _staleness(self, samples: Sequence[Sample]) -> dict[str, Any]:
        per_token, counts = lags(samples, self.buffer.version), self.buffer.counts
        waits = await self.stream.pop_waits()
        partial = np.mean([len(set(sample.weight_versions.tolist())) > 1 for sample in samples])
        interruptions, self._interruptions = self._interruptions, 0
        return {
            "staleness/lag_mean": float(per_token.mean()),
            "staleness/lag_max": float(per_token.max()),
            "staleness/partial_share": float(partial),
            "staleness/interruptions": float(interruptions),
            "staleness/under_way": float(self.buffer.under_way),
            "staleness/waiting": float(self.buffer.waiting),
            **{f"staleness/{name}": float(value) for name, value in vars(counts).items()},
            "staleness/trainer_idle_seconds": waits.trainer,
            "staleness/engine_idle_seconds": waits.engine,
            **{f"staleness/tokens_lag_{lag}": float((per_token == lag).sum()) for lag in range(self.buffer.bound + 1)},
        }

    # ---- evaluation --------------------------------------------------------------------------------------------

    def evaluate(self, step: int) -> dict[str, float]:
        """Begin to evaluate beside training; the metrics come with a later batch. Before and after training, wait."""
        if not self.validation:
            return {}
        future = asyncio.run_coroutine_threadsafe(self._evaluate_beside(step), self.thread.loop)
        if step in (0, self.recipe.grpo.max_num_steps):
            return self.thread.run(self._finished_evaluations(wait=True)) | future.result()
        self._evaluations.append(asyncio.wrap_future(future, loop=self.thread.loop))
        return {}

    async def _evaluate_beside(self, step: int) -> dict[str, float]:
        return await self.evaluation(step) | {"eval/begun_after_step": float(step)}

    async def _finished_evaluations(self, *, wait: bool = False) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for future in list(self._evaluations):
            if future.done() or wait:
                metrics |= await future
                self._evaluations.remove(future)
        return metrics

    # ---- weights, records, end ---------------------------------------------------------------------------------

    def update_weights(self, stream: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """As `Controller.update_weights`, with what runs meanwhile treated as the recipe says."""
        self.thread.run(self.stream.stop_sending(drain=self.mode == "drain"))
        if self.mode == "in_place":
            self.engine.update_weights(stream, version, in_place=True)
        else:
            self.thread.run(self.engine.pause())
            try:
                self.engine.update_weights(stream, version)
            finally:
                self.thread.run(self.engine.resume())
        self.weight_version = version
        self.thread.run(self.stream.resume_sending(version))

    def state_dict(self) -> dict[str, Any]:
        """Position in the prompts, and every group that was sent and is not trained on."""

        async def state() -> dict[str, Any]:
            return {"prompts": self.prompts.state_dict(), "buffer": self.buffer.state_dict()}

        return self.thread.run(state())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`; what was under way then is drawn again."""
        super().load_state_dict(state)
        records = {record.prompt_id: record for record in self.prompts.records}
        under_way = self.buffer.load_state_dict(state["buffer"])
        self._resend = [(group, records[group.prompt_id]) for group in under_way]

    def close(self) -> None:
        """Give up what is under way, then as `Controller.close`."""
        self.thread.run(self.stream.close())
        super().close()
