"""The trained policy on one rank, in any parallel layout: log-probs, optimizer updates, weights out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vespo_megatron.families.shape import ModelShape
from vespo_megatron.megatron import hf_weights
from vespo_megatron.megatron.correction_bias import move_correction_biases
from vespo_megatron.megatron.host_memory import return_free_memory
from vespo_megatron.megatron.host_weights import HostWeights, weights_of
from vespo_megatron.megatron.loss_scale import LossScale
from vespo_megatron.megatron.micro_batch import MicroBatch
from vespo_megatron.megatron.model import build_model
from vespo_megatron.megatron.optimizer import build_optimizer
from vespo_megatron.megatron.own_gradients import OwnGradients, gradients_finite
from vespo_megatron.megatron.parallel import RankInfo
from vespo_megatron.megatron.parameter_gather import finish_parameter_gather
from vespo_megatron.megatron.parked_memory import ParkedMemory
from vespo_megatron.megatron.rounded_weights import RoundedWeights
from vespo_megatron.megatron.router_losses import RouterLosses
from vespo_megatron.megatron.router_pass import RouterPass
from vespo_megatron.quantization import WeightQuantizer
from vespo_megatron.recipe.model_shape import read_shape
from vespo_megatron.recipe.schema import PolicyConfig
from vespo_megatron.routing_replay.replay import RouteReplay
from vespo_megatron.routing_replay.router_scores import RouterScores
from vespo_megatron.routing_replay.table import RouteTable

# isort: split
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import get_model_config

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


@dataclass(frozen=True)
class RouteUse:
    """What a pass does with routes: 'off', 'record' or 'replay', and which tables of a micro-batch it works with.

    `tables(micro_batch)` gives (the table to record into or replay, the table that takes the routers' own choices).
    """

    mode: str = "off"
    tables: Callable[[MicroBatch], tuple[RouteTable | None, RouteTable | None]] = lambda _: (None, None)
    scores: Callable[[MicroBatch], RouterScores | None] = lambda _: None
    """The table that takes the log-probs of the experts the tokens are sent to; None: nobody wants to know."""
    measures_shift: bool = False
    """Whether the routers are compared with `MicroBatch.router_scores`, into `MicroBatch.router_shift`."""


LIVE = RouteUse()

LossOfOutput = Callable[..., Any]
"""What megatron-core's schedule calls with a model chunk's output."""
LossFunction = Callable[[torch.Tensor, torch.Tensor, MicroBatch], tuple[torch.Tensor, Any]]
"""(log-probs [R], entropies [R], micro-batch) → (this rank's share of the global loss, anything to report)."""


@dataclass(frozen=True)
class UpdateResult:
    """One optimizer update."""

    grad_norm: float
    """Before clipping, over the whole model; NaN when the update was not taken."""
    learning_rate: float
    succeeded: bool
    reports: list[Any]
    """What the loss function reported, per micro-batch; empty but on the last pipeline stage."""
    expert_load: torch.Tensor | None = None
    """int64 [layers, experts], tokens of this rank's rows and layers; None where it is not counted."""
    router_losses: torch.Tensor | None = None
    """float32 [2, layers], `RouterLosses.values`; None where there are none."""
    loss_scale: float | None = None
    """What the loss was multiplied with; None but in float16."""
    overflowed: bool = False
    """Whether gradients overflowed at that scale: then it was not taken."""


class MegatronPolicy:
    """The policy on this rank. Every method is a collective: call it on every rank, in the same order."""

    def __init__(
        self,
        config: PolicyConfig,
        rank_info: RankInfo,
        *,
        total_updates: int = 1,
        model_folder: str | Path | None = None,
    ) -> None:
        self.rank_info = rank_info
        self.config = config
        self.model_folder = Path(model_folder or config.model_name)
        self.shape: ModelShape = read_shape(self.model_folder)
        self.dtype = DTYPES[config.precision]
        self.chunks = build_model(self.shape, config.megatron_cfg, rank_info, dtype=self.dtype)
        hf_weights.load(self.chunks, self.model_folder, self.shape, rank_info)
        self.optimizer, self.scheduler = build_optimizer(
            config.megatron_cfg, self.chunks, dtype=self.dtype, total_updates=total_updates
        )
        self.memory = ParkedMemory(self.chunks, self.optimizer, rank_info.device)
        self.loss_scale = LossScale(config.megatron_cfg.optimizer) if self.dtype is torch.float16 else None
        if self.loss_scale is not None:
            self.loss_scale.share(self.optimizer)
        model_config = get_model_config(self.chunks[0])
        model_config.grad_scale_func = self.optimizer.scale_loss
        self._own_gradients = OwnGradients(self.chunks)
        self.on_progress: Callable[[], None] = lambda: None
        """Called before every forward of a micro-batch."""
        self.updates_taken = 0
        """Optimizer updates since the policy was made: while it stays, so do the weights."""
        self._own: HostWeights | None = None
        """Where its own weights wait while others are in use."""
        self._bias_rate = config.megatron_cfg.moe_router_bias_update_rate
        self.replay = RouteReplay(
            [hf_weights.unwrap(chunk) for chunk in self.chunks],
            recomputes=model_config.recompute_granularity == "full",
            num_experts=self.shape.num_experts,
            counts_load=config.megatron_cfg.track_moe_metrics or self._bias_rate > 0,
        )
        self.router_losses = RouterLosses.from_recipe(config.megatron_cfg, self.replay.routers, rank_info.device)
        quantizer = WeightQuantizer.of(config) if config.quantization.in_training else None
        self._rounded = RoundedWeights(self.chunks, self.shape, rank_info, quantizer) if quantizer else None
        """What every pass computes with, where it is not the weights themselves."""
        self.exporter = hf_weights.WeightExporter(
            self.chunks, self.shape, rank_info, bucket_bytes=config.generation.sglang_cfg.weight_piece_bytes
        )

    def log_probs(self, micro_batches: Sequence[MicroBatch], *, routes: RouteUse = LIVE) -> list[torch.Tensor]:
        """Float32 [2, R] (log-probs, entropies) of each micro-batch; empty but on the last pipeline stage."""
        for chunk in self.chunks:
            chunk.eval()
        try:
            with torch.no_grad():
                return self._run(micro_batches, lambda output, *_, **__: output, routes, forward_only=True)
        finally:
            for chunk in self.chunks:
                chunk.train()

    def weights(self) -> list[torch.Tensor]:
        """`weights_of` this rank's chunks, as the last update left them."""
        self.memory.check_here("parameters")
        finish_parameter_gather(self.chunks)
        return weights_of(self.chunks)

    @contextmanager
    def under(self, weights: HostWeights, *, own: HostWeights | None = None) -> Iterator[None]:
        """Within the block the policy has other weights; its own come back exactly, whatever happens.

        Args:
            own: a copy of its own, where there is one already; else one is made.
        """
        live = self.weights()
        if own is None:
            own = self._own = self._own or HostWeights(live)
            own.copy_from(live)
        try:
            weights.copy_to(live)
            yield
        finally:
            own.copy_to(live)

    def keep_reference(self) -> None:
        """Remember the weights as they are now, in host memory, for `ref_log_probs`."""
        weights = self.weights()
        self._reference = HostWeights(weights)
        self._reference.copy_from(weights)

    def ref_log_probs(self, micro_batches: Sequence[MicroBatch]) -> list[torch.Tensor]:
        """`log_probs` under the weights `keep_reference` remembered."""
        with self.under(self._reference):
            return self.log_probs(micro_batches)

    @property
    def own_gradients_finite(self) -> bool:
        """Whether this rank's last gradients were, before they were added to other ranks'."""
        return self._own_gradients.finite()

    def gradients_finite(self) -> bool:
        """Whether every gradient on this rank is, as the buffers hold them now."""
        return gradients_finite(self.chunks)

    def scale_learning_rate(self, factor: float) -> None:
        """Multiply the learning rate of the next update only; the schedule sets it anew after that."""
        for group in self.optimizer.param_groups:
            group["lr"] *= factor

    def compute_gradients(
        self,
        micro_batches: Sequence[MicroBatch],
        loss: LossFunction,
        *,
        routes: RouteUse = LIVE,
        everywhere: bool = False,
    ) -> list[Any]:
        """The gradient of Σ over all ranks and micro-batches of `loss`, in `main_grad`; returns the loss's reports.

        In float16 it is multiplied with `loss_scale`, which the optimizer divides it by.
        With the distributed optimizer each data parallel rank ends with its shard of it, unless `everywhere`.
        """
        self.memory.check_here("parameters", "gradients", "optimizer")
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
            chunk.force_all_reduce = everywhere  # of what the backward reduces; the schedule has it for the rest
        self.optimizer.zero_grad()
        self._own_gradients.forget()
        # megatron-core multiplies a two-tuple loss by CP and divides it by the number of micro-batches
        # (schedules.py:279); DDP averages gradients over DP·CP. What is left of that is undone here.
        scale = len(micro_batches) * self.rank_info.data_size

        def loss_function(output: torch.Tensor, micro_batch: MicroBatch) -> tuple[torch.Tensor, Any]:
            value, report = loss(output[0], output[1], micro_batch)
            return value * scale, report

        return self._run(micro_batches, loss_function, routes, forward_only=False, force_all_reduce=everywhere)

    def gradient_norm(self) -> float:
        """Norm, over the whole model, of what `compute_gradients` left; a collective. Not finite after an overflow."""
        self.optimizer.prepare_grads()
        if self.loss_scale is not None:
            self.loss_scale.forget()
        return float(self.optimizer.get_grad_norm() or 0.0)

    def update(
        self,
        micro_batches: Sequence[MicroBatch],
        loss: LossFunction,
        *,
        routes: RouteUse = LIVE,
        before_step: Callable[[list[Any]], bool] = lambda _: True,
    ) -> UpdateResult:
        """One optimizer update from the gradients of `micro_batches` (this data parallel rank's share).

        `before_step` sees the reports before any weight has changed; it may raise, or refuse the update by False,
        which then leaves weights, optimizer and schedule as they were. So does, in float16, an overflow of gradients.
        """
        with self._penalised(micro_batches):
            reports = self.compute_gradients(micro_batches, loss, routes=routes)
        counts = None if self.replay.load is None else self.replay.load.counts
        load = counts if self.config.megatron_cfg.track_moe_metrics else None
        penalties = None if self.router_losses is None else self.router_losses.values()
        learning_rate = self.optimizer.param_groups[0]["lr"]
        if not before_step(reports):
            return UpdateResult(math.nan, learning_rate, False, reports, load, penalties)
        scale = None if self.loss_scale is None else self.loss_scale.value
        succeeded, grad_norm, _ = self.optimizer.step()
        if succeeded and counts is not None and self._bias_rate:
            move_correction_biases(self.replay.routers, counts.clone(), self._bias_rate)
        overflowed = self.loss_scale is not None and self.loss_scale.settle()
        self.updates_taken += int(succeeded)
        self.scheduler.step(increment=int(succeeded))  # by 0: takes back what `scale_learning_rate` did
        if self.rank_info.device.type == "cpu":
            return_free_memory()
        norm = float(grad_norm or 0.0) if succeeded else math.nan
        return UpdateResult(norm, learning_rate, bool(succeeded), reports, load, penalties, scale, overflowed)

    @property
    def needs_choices(self) -> bool:
        """Whether `count_choices` has to come before an update."""
        return self.router_losses is not None and self.router_losses.needs_counts

    def count_choices(self, micro_batches: Sequence[MicroBatch], *, routes: RouteUse = LIVE) -> None:
        """The experts' shares of an update before it begins, for its `router_losses`."""
        if self.router_losses is not None:
            with self.router_losses.counting():
                self.log_probs(micro_batches, routes=routes)

    def _penalised(self, micro_batches: Sequence[MicroBatch]) -> AbstractContextManager[None]:
        """Within the block gradients are the routers' own losses' as well."""
        if self.router_losses is None:
            return nullcontext()
        is_real = [micro_batch.is_real for micro_batch in micro_batches]
        return self.router_losses.update(is_real, data_size=self.rank_info.data_size)

    @property
    def moe_layers(self) -> list[int]:
        """This rank's MoE layers, counted among the model's MoE layers: its columns of the engine's routes."""
        ordinal = {
            layer + 1: index for index, layer in enumerate(i for i, moe in enumerate(self.shape.is_moe_layer) if moe)
        }
        return [ordinal[number] for number in self.replay.layer_numbers]

    def empty_routes(self, micro_batch: MicroBatch) -> RouteTable:
        """A table for this rank's rows and layers, to record into."""
        rows = micro_batch.layout.num_local_tokens // self.rank_info.tensor_size
        return RouteTable.empty(rows, len(self.replay.hooks), self.shape.num_experts_per_tok, self.shape.num_experts)

    def empty_router_scores(self, micro_batch: MicroBatch) -> RouterScores:
        """The same, for the log-probs of the experts that are chosen."""
        rows = micro_batch.layout.num_local_tokens // self.rank_info.tensor_size
        return RouterScores.empty(rows, len(self.replay.hooks), self.shape.num_experts_per_tok, self.shape.num_experts)

    def _run(
        self, micro_batches: Sequence[MicroBatch], loss_function: Callable, routes: RouteUse, **schedule: bool
    ) -> list[Any]:
        self.memory.check_here("parameters")
        routers = RouterPass(routes.scores, routes.measures_shift, self.rank_info, self.shape.num_moe_layers)

        def forward_step(
            data_iterator: Iterator[MicroBatch], model: MegatronModule
        ) -> tuple[torch.Tensor, LossOfOutput]:
            micro_batch = next(data_iterator)
            self.on_progress()
            if self.rank_info.device.type == "cpu":
                return_free_memory()
            chunk = next(index for index, candidate in enumerate(self.chunks) if candidate is model)
            table, observed = routes.tables(micro_batch)
            watcher = routers.watcher(micro_batch)
            with self.replay.forward(chunk, table, observed, self.rank_info.device, micro_batch.is_real, watcher):
                output = model(
                    input_ids=micro_batch.input_ids,
                    position_ids=micro_batch.position_ids,
                    attention_mask=None,
                    labels=micro_batch.request,
                    packed_seq_params=micro_batch.packed_seq_params,
                    padding_mask=None if self.router_losses is None else ~micro_batch.is_real[None],
                )
            routers.after_forward(micro_batch, watcher)
            return output, lambda tensor, **kwargs: loss_function(tensor, micro_batch, **kwargs)

        iterators = [iter(micro_batches) for _ in self.chunks]
        backward = not schedule["forward_only"]
        with (
            self.replay.running(
                routes.mode, micro_batches=len(micro_batches), backward=backward, device=self.rank_info.device
            ),
            self._rounded.in_use() if self._rounded is not None else nullcontext(),
        ):
            results = get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=iterators if len(iterators) > 1 else iterators[0],
                model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
                num_microbatches=len(micro_batches),
                seq_length=micro_batches[0].layout.num_global_tokens,
                micro_batch_size=1,
                collect_non_loss_data=schedule["forward_only"],
                **schedule,
            )
        routers.after_pass(micro_batches)
        return results
