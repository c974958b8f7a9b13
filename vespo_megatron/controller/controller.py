"""The controller: rank 0's other half, which turns prompts into scored samples with advantages, and keeps records."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vespo_megatron.controller.asynchronous import AsynchronousSource
from vespo_megatron.controller.event_loop import EventLoopThread
from vespo_megatron.controller.parts import BatchSource, Evaluations, Parts, Rollout
from vespo_megatron.controller.synchronous import SynchronousSource
from vespo_megatron.data.prompt_set import PromptRecord
from vespo_megatron.data.prompt_source import PromptSource
from vespo_megatron.data.prompt_stream import Prompts
from vespo_megatron.data.sample import Sample
from vespo_megatron.environments import EnvironmentPool
from vespo_megatron.errors import UserError
from vespo_megatron.recipe.schema import Recipe
from vespo_megatron.rewards import RewardPool
from vespo_megatron.rollout_sglang.engine import GenerationRequest, RolloutEngine, ScoredResponse
from vespo_megatron.run.records import RunLogger

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


class Controller:
    """One of a run; `grpo.async_grpo.enabled` says whether its batches are drawn beside training."""

    def __init__(
        self,
        recipe: Recipe,
        engine: RolloutEngine,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Prompts,
        validation: Sequence[PromptRecord],
        rewards: RewardPool,
        logger: RunLogger,
        environments: EnvironmentPool | None = None,
    ) -> None:
        source = PromptSource(prompts, recipe.data.curriculum)
        thread = EventLoopThread()
        self.parts = Parts(recipe, engine, tokenizer, source, validation, rewards, logger, thread, environments)
        batches = AsynchronousSource if recipe.grpo.async_grpo.enabled else SynchronousSource
        self.source: BatchSource = batches(self.parts)

    @property
    def engine(self) -> RolloutEngine:
        """What generates."""
        return self.parts.engine

    @property
    def logger(self) -> RunLogger:
        """The run's records."""
        return self.parts.logger

    def probe_routes(self, num_layers: int, topk: int) -> None:
        """One short request: does the engine return routes, and of this model's shape?

        Raises:
            UserError: no routes, or another number of layers or experts per token.
        """
        record = self.parts.prompts.first()
        sampling = replace(self.source.sampler.training, max_new_tokens=2)
        request = GenerationRequest("probe", tuple(record.prompt_ids), sampling)
        routes = self.parts.thread.run(self.engine.generate([request]))[0].routes
        where = self.engine.description
        if routes is None:
            raise UserError(
                "returns no routes",
                where=where,
                expected="the experts of every token: policy.router_replay.mode is R3",
                fix="set policy.generation.sglang_cfg.enable_return_routed_experts=true "
                "(the server's flag is --enable-return-routed-experts)",
            )
        if routes.shape[1:] != (num_layers, topk):
            raise UserError(
                f"returns routes of {routes.shape[1]} layers and {routes.shape[2]} experts per token",
                where=where,
                expected=f"{num_layers} MoE layers and {topk}, as the trainer's model has",
            )

    def collect(self, step: int) -> Rollout:
        """See `BatchSource.collect`."""
        return self.source.collect(step)

    def evaluate(self, step: int) -> Evaluations:
        """See `BatchSource.evaluate`."""
        return self.source.evaluate(step)

    def await_evaluations(self) -> Evaluations:
        """See `BatchSource.await_evaluations`."""
        return self.source.await_evaluations()

    def update_weights(
        self, stream: Iterable[tuple[str, torch.Tensor]], version: int, *, between: bool = False
    ) -> None:
        """See `BatchSource.update_weights`."""
        self.source.update_weights(stream, version, between=between)

    def release_memory(self) -> int:
        """See `RolloutEngine.release_memory`."""
        return self.engine.release_memory()

    def resume_memory(self) -> None:
        """See `RolloutEngine.resume_memory`."""
        self.engine.resume_memory()

    def await_server(self) -> None:
        """See `RolloutEngine.await_server`."""
        self.engine.await_server()

    def score(self, samples: Sequence[Sample]) -> list[ScoredResponse]:
        """See `RolloutEngine.score`, at the temperature of training."""
        responses = [(sample.prompt_ids, sample.response_ids) for sample in samples]
        return self.parts.thread.run(self.engine.score(responses, self.source.sampler.training.temperature))

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """One step to every record of the run."""
        metrics = dict(metrics)
        histograms = metrics.pop("histograms", {})
        self.logger.log_step(step, metrics, histograms=histograms)

    def log_evaluations(self, evaluations: Evaluations) -> None:
        """What ended beside training, to the steps that it belongs to."""
        for step, metrics in evaluations.items():
            self.logger.log_late(step, metrics)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return self.source.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`. Raises UserError when the prompts are not those it was taken with."""
        self.source.load_state_dict(state)

    def expire_other_versions(self, known: Collection[int]) -> None:
        """See `BatchSource.expire_other_versions`."""
        self.source.expire_other_versions(known)

    def close(self) -> None:
        """Release what is under way, the engine's connections, the reward workers, environments and the thread."""
        self.source.close()
        self.engine.close()
        self.parts.rewards.close()
        if self.parts.environments is not None:
            self.parts.environments.close()
        self.parts.thread.close()
