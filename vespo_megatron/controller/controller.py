"""The controller: rank 0's other half, which turns prompts into scored samples with advantages.

Its asyncio loop runs in a thread of its own for the whole run: connections to the servers live there.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from vespo_megatron.controller.evaluation import draw_problems
from vespo_megatron.controller.interruptible import Interruptible
from vespo_megatron.controller.sampler import Sampler, describe
from vespo_megatron.data.batch import Batch
from vespo_megatron.data.prompts import PromptRecord, PromptStream
from vespo_megatron.data.sample import Sample
from vespo_megatron.errors import UserError
from vespo_megatron.evaluation.record import metrics
from vespo_megatron.losses import compute_advantages, resolve_estimator
from vespo_megatron.recipe.schema import Recipe
from vespo_megatron.rewards import RewardPool
from vespo_megatron.rollout_sglang.engine import GenerationRequest, GenerationResult, RolloutEngine
from vespo_megatron.rollout_sglang.faults import WeightsNeeded
from vespo_megatron.run.records import LoggedSample, RunLogger

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

MAX_SAMPLING_ROUNDS = 10
"""Dynamic sampling gives up after so many rollouts without a full batch of groups that carry signal."""


@dataclass
class Rollout:
    """One rollout batch, ready to train on, and what is to be said of it."""

    batch: Batch
    metrics: dict[str, float]


class AsyncThread:
    """An asyncio loop in a daemon thread; `run` waits for a coroutine from any other thread."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="controller", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result()

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(5)


class Controller:
    """Generates, scores, groups and logs. Lives on rank 0."""

    def __init__(
        self,
        recipe: Recipe,
        engine: RolloutEngine,
        tokenizer: PreTrainedTokenizerBase,
        prompts: PromptStream,
        validation: Sequence[PromptRecord],
        rewards: RewardPool,
        logger: RunLogger,
    ) -> None:
        self.recipe, self.engine, self.tokenizer = recipe, engine, tokenizer
        self.prompts, self.validation, self.rewards, self.logger = prompts, validation, rewards, logger
        self.thread = AsyncThread()
        self.interruptible = Interruptible()
        self.sampler = Sampler(recipe, tokenizer, rewards, self.generate)
        self.estimator = resolve_estimator(
            recipe.grpo.advantage_estimator,
            normalize_rewards=recipe.grpo.normalize_rewards,
            use_leave_one_out_baseline=recipe.grpo.use_leave_one_out_baseline,
        )
        self.weight_version = 0

    def probe_routes(self, num_layers: int, topk: int) -> None:
        """One short request: does the engine return routes, and of this model's shape?

        Raises:
            UserError: no routes, or another number of layers or experts per token.
        """
        record = self.prompts.records[0]
        request = GenerationRequest("probe", tuple(record.prompt_ids), replace(self.sampler.training, max_new_tokens=2))
        routes = self.thread.run(self.engine.generate([request]))[0].routes
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

    # ---- rollouts ----------------------------------------------------------------------------------------------

    def collect(self, step: int) -> Rollout:
        """Generate and score one rollout batch; whole groups only.

        Raises:
            WeightsNeeded: servers wait for weights; push them under the same version and call this again.
            UserError: no group carries signal after `MAX_SAMPLING_ROUNDS`, or the engine or a reward failed.
        """
        rollout = self.interruptible.run(lambda: self._collect(step))
        rollout.metrics |= self.engine.metrics()
        return rollout

    def _collect(self, step: int) -> Rollout:
        schedule = self.recipe.grpo
        samples: list[Sample] = []
        advantages: list[np.ndarray] = []
        sums: dict[str, float] = {}
        generated: list[Sample] = []
        for attempt in range(MAX_SAMPLING_ROUNDS):
            wanted = schedule.num_prompts_per_step - len({sample.prompt_id for sample in samples})
            records = self.prompts.take(wanted)
            label = f"{step}" if attempt == 0 else f"{step}.{attempt}"
            fresh, bad = self.thread.run(self.sampler.sample(records, schedule.num_generations_per_prompt, label))
            if not fresh:
                raise UserError("no sample of the rollout batch was usable", where=f"step {step}")
            self.sampler.shape_rewards(fresh)
            result = compute_advantages(
                [sample.reward for sample in fresh],
                [sample.prompt_id for sample in fresh],
                self.estimator,
                drop_groups_without_signal=schedule.use_dynamic_sampling,
                on_bad_sample=self.recipe.loss_fn.on_bad_sample,
                sample_ids=[sample.sample_id for sample in fresh],
            )
            keep = result.keep.numpy()
            samples += [sample for sample, kept in zip(fresh, keep, strict=True) if kept]
            advantages.append(result.values.numpy()[keep])
            generated += fresh
            sums["rollout/bad_samples"] = sums.get("rollout/bad_samples", 0.0) + bad
            for name, value in result.metrics.items():
                sums[name] = value if name in ("advantage/mean", "advantage/std") else sums.get(name, 0.0) + value
            if not schedule.use_dynamic_sampling or len(samples) >= self.recipe.rollout_batch_size:
                break
        else:
            raise UserError(
                f"{MAX_SAMPLING_ROUNDS} rollouts gave {len(samples)} samples in groups whose rewards differ",
                where="grpo.use_dynamic_sampling",
                expected=f"{self.recipe.rollout_batch_size}",
                fix="the prompts are all solved or all hopeless: change them, or switch dynamic sampling off",
            )
        metrics = {**describe(generated), **sums, "rollout/sampling_rounds": float(attempt + 1)}
        return Rollout(Batch(samples, np.concatenate(advantages).astype(np.float32)), metrics)

    async def generate(self, requests: Sequence[GenerationRequest]) -> list[GenerationResult]:
        """Results in the order of `requests`, every one drawn once, whatever happens to servers meanwhile."""
        arrived: dict[str, GenerationResult] = {}

        def note(result: GenerationResult) -> None:
            arrived[result.request_id] = result

        while missing := [request for request in requests if request.request_id not in arrived]:
            try:
                for result in await self.engine.generate(missing, on_result=note):
                    note(result)
            except WeightsNeeded as need:
                await asyncio.to_thread(self.interruptible.await_weights, need)
        return [arrived[request.request_id] for request in requests]

    # ---- evaluation --------------------------------------------------------------------------------------------

    def evaluate(self, step: int) -> dict[str, float]:
        """Scores of each validation set, `eval/<set>/avg@<k>` among them; problems and some samples are written.

        Raises:
            WeightsNeeded: as `collect`.
        """
        if not self.validation:
            return {}
        return self.interruptible.run(lambda: self.thread.run(self.evaluation(step)))

    async def evaluation(self, step: int) -> dict[str, float]:
        """See `evaluate`."""
        records = list(self.validation)[: self.recipe.grpo.max_val_samples]
        problems, samples = await draw_problems(self.sampler, records, self.recipe.grpo.val_num_generations)
        by_id = {record.prompt_id: record for record in records}
        shown = samples[:: max(1, self.recipe.grpo.val_num_generations)][: self.recipe.logger.num_val_samples_to_print]
        self.logger.log_samples(step, [self._readable(by_id[s.prompt_id], s) for s in shown], name="validation")
        self.logger.log_problems(step, problems)
        return metrics(problems)

    def _readable(self, record: PromptRecord, sample: Sample) -> LoggedSample:
        return LoggedSample(
            prompt=self.tokenizer.decode(sample.prompt_ids),
            response=self.tokenizer.decode(sample.response_ids),
            reward=sample.reward,
            ground_truth=str(record.ground_truth),
            finish_reason=sample.finish_reason,
            prompt_id=sample.prompt_id,
        )

    # ---- weights, records, end ---------------------------------------------------------------------------------

    def update_weights(self, stream: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Give the engine the streamed weights; it answers with a checksum both sides agree on."""
        self.engine.update_weights(stream, version)
        self.weight_version = version

    def release_memory(self) -> None:
        """The engine's device memory is the trainer's until `update_weights`."""
        self.engine.release_memory()

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """One step to every record of the run."""
        metrics = dict(metrics)
        histograms = metrics.pop("histograms", {})
        self.logger.log_step(step, metrics, histograms=histograms)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of it: the position in the prompts."""
        return {"prompts": self.prompts.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`. Raises UserError when the prompts are not those it was taken with."""
        self.prompts.load_state_dict(state["prompts"])

    def close(self) -> None:
        """Release the engine's connections, the reward workers and the thread."""
        self.engine.close()
        self.rewards.close()
        self.interruptible.close()
        self.thread.close()
